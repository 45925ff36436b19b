"""Names to masks, and what a payload gets."""

from __future__ import annotations

import pytest

from apptainer_py.base.errors import NotSupported
from apptainer_py.engines.apptainer import capabilities
from apptainer_py.engines.apptainer.capabilities import ALL, NAMES, for_root, for_user, parse_names

CHOWN, KILL, NET_RAW = 1 << 0, 1 << 5, 1 << 13
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


def test_a_user_gets_nothing_outside_a_namespace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "_allowed", lambda uid, gids: CHOWN | KILL)
    assert for_user("", "", 7, userns=False) == (0, 0, 0, 0, 0)
    assert for_user("net_raw", "", 7, userns=False) == (0, 0, 0, 0, 0)
    assert "not authorized to add capability: CAP_NET_RAW" in capsys.readouterr().err
    with pytest.raises(NotSupported):
        for_user("chown,net_raw", "", 7, userns=False)
    assert for_user("net_raw,kill", "kill", 7, userns=True) == (NET_RAW,) * 5


@pytest.mark.parametrize(
    ("default", "changes", "held"),
    [
        ("full", {}, CHOWN | KILL),
        ("full", {"drop_caps": "kill"}, CHOWN),
        ("full", {"drop_caps": "all"}, 0),
        ("no", {}, 0),
        ("no", {"keep_privs": True}, CHOWN | KILL),
        ("no", {"add_caps": "kill,net_raw"}, KILL),
        ("full", {"no_privs": True}, 0),
        ("full", {"no_privs": True, "add_caps": "chown"}, CHOWN),
    ],
)
def test_root_never_gets_more_than_it_has(
    default: str, changes: dict[str, object], held: int
) -> None:
    options = {**NOTHING, **changes}
    sets = for_root(options, default, CHOWN | KILL, target_is_root=True)
    assert sets == (held, held, 0, held, 0)
