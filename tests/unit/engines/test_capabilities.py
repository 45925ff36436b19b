"""Names to masks, and what a payload gets."""

from __future__ import annotations

import json

import pytest

from apptainer_py.base.errors import ConfigError
from apptainer_py.engines.apptainer import capabilities
from apptainer_py.engines.apptainer.capabilities import ALL, NAMES, for_root, for_user, parse_names

CHOWN, KILL, NET_RAW = 1 << 0, 1 << 5, 1 << 13
NONE = (0, 0, 0, 0, 0)
NOTHING = {"keep_privs": False, "no_privs": False, "add_caps": "", "drop_caps": ""}


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("", 0),
        ("CAP_CHOWN", CHOWN),
        ("chown,cap_net_raw", CHOWN | NET_RAW),
        (" kill , ,", KILL),
        ("all", ALL),
        ("CAP_ALL", ALL),
    ],
)
def test_names(text: str, mask: int) -> None:
    assert parse_names(text, "add") == mask


def test_an_unknown_name_is_said_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_names("CAP_FOO,CHOWN", "add") == CHOWN
    assert capsys.readouterr().err == "WARNING: won't add unknown capability: CAP_FOO\n"


def test_the_numbers_are_the_kernels() -> None:
    assert (NAMES.index("SYS_ADMIN"), NAMES.index("CHECKPOINT_RESTORE")) == (21, 40)


def test_a_user_gets_what_the_file_grants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "_allowed", lambda uid, gids: CHOWN | KILL)
    assert for_user("", "", 7, ALL, userns=False) == NONE
    assert for_user("net_raw", "", 7, ALL, userns=False) == NONE
    assert "not authorized to add capability: CAP_NET_RAW" in capsys.readouterr().err
    assert for_user("chown,kill", "kill", 7, ALL, userns=False) == (CHOWN,) * 5
    assert capsys.readouterr().err == ""
    assert for_user("chown,kill", "", 7, CHOWN, userns=False) == (CHOWN,) * 5
    assert "this system cannot give the capability: CAP_KILL" in capsys.readouterr().err


def test_a_namespace_gives_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "of_a_namespace", lambda: NET_RAW | KILL)
    assert for_user("net_raw,kill", "kill", 7, 0, userns=True) == (NET_RAW,) * 5
    assert for_user("all", "", 7, 0, userns=True) == (NET_RAW | KILL,) * 5


GRANTS = {
    "users": {"root": ["CAP_CHOWN", "CAP_FOO", "kill", "cap_kill"], "other": ["CAP_NET_RAW"]},
    "groups": {"root": ["CAP_KILL"], "there is no such group": ["CAP_NET_RAW"], "x": None},
}


@pytest.mark.parametrize(
    ("text", "gids", "mask"),
    [
        (json.dumps(GRANTS), [], CHOWN),
        (json.dumps(GRANTS), [0], CHOWN | KILL),
        ("", [0], 0),
        ("{}", [0], 0),
        ('{"users": null}', [0], 0),
        ('{"users": {"root": ["CAP_KILL"], "root": ["CAP_CHOWN"]}}', [], CHOWN | KILL),
    ],
)
def test_the_file(monkeypatch: pytest.MonkeyPatch, text: str, gids: list[int], mask: int) -> None:
    monkeypatch.setattr(capabilities, "read_file", text.encode)
    assert capabilities._allowed(0, gids) == mask


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "7", '{"users": []}', '{"users": {"root": "CAP_CHOWN"}}', '{"more": {"a": []}}',
     "[" * 100_000, '{"users": {}, "users": {"root": ["CAP_CHOWN"]}}', "\ufeff{}",
     '{"users": {}} x',
     '{"users": {"r\\u006fot": ["CAP_CHOWN"]}}', '{"users": {"root": [5]}}',
     '{"users": {"root": ["CAP_CHOWN", null]}}', '{"users": {"ro\x7fot": []}}'],
)  # fmt: skip
def test_a_file_of_another_form(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(capabilities, "read_file", text.encode)
    with pytest.raises(ConfigError):
        capabilities._allowed(0, [0])


@pytest.mark.parametrize(
    ("default", "changes", "held"),
    [
        ("full", {}, CHOWN | KILL),
        ("full", {"drop_caps": "kill"}, CHOWN),
        ("full", {"drop_caps": "all"}, 0),
        ("full", {"drop_caps": "all", "add_caps": "chown"}, 0),
        ("no", {}, 0),
        ("no", {"keep_privs": True}, CHOWN | KILL),
        ("no", {"add_caps": "kill,net_raw"}, KILL),
        ("full", {"no_privs": True}, 0),
        ("full", {"no_privs": True, "keep_privs": True}, 0),
        ("full", {"no_privs": True, "add_caps": "chown"}, CHOWN),
        ("file", {}, KILL),
        ("file", {"keep_privs": True}, CHOWN | KILL),
    ],
)
def test_root_never_gets_more_than_it_has(
    monkeypatch: pytest.MonkeyPatch, default: str, changes: dict[str, object], held: int
) -> None:
    monkeypatch.setattr(capabilities, "_allowed", lambda uid, gids: KILL | NET_RAW)
    options = {**NOTHING, **changes}
    assert for_root(options, default, CHOWN | KILL) == (held, held, 0, held, 0)
