from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest

from apptainer_py.base import build
from apptainer_py.host import policy
from apptainer_py.host.config_file import FileWrong
from apptainer_py.model.directives import directives
from apptainer_py.verbs import config_report
from apptainer_py.verbs.config_report import config_check, config_show

TREE = Path(__file__).resolve().parents[3]
SHIPPED = TREE / "etc/apptainer-py.conf"
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        file = tmp_path / "some.conf"
        file.write_text(text)
        return str(file)

    return write


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_report, "user_namespaces_allowed", lambda: True)


def test_shipped_file_is_good() -> None:
    outcome = config_check(file=str(SHIPPED))
    assert outcome.exit_code == 0
    assert outcome.text == f"{SHIPPED}: good; the setuid flow is allowed\n"


def test_everything_wrong_is_listed(written) -> None:
    file = written("allow setid = no\nmount tmp = x\nhello\n")
    outcome = config_check(file=file)
    assert outcome.exit_code == 255
    assert outcome.text.splitlines() == [
        f"wrong: {file}:1: allow setid: is not a directive (nearest: allow setuid)",
        f'wrong: {file}:2: mount tmp: "x" is not one of [yes no]',
        f'wrong: {file}:3: hello: is neither a comment nor "directive = value"',
        f"setuid flow refused: the file is wrong: {file}:1: allow setid: is not a directive "
        "(nearest: allow setuid)",
    ]


def test_switched_off_is_said_with_its_line(written) -> None:
    file = written("\nallow setuid = no\n")
    outcome = config_check(file=file)
    assert outcome.exit_code == 255
    assert outcome.text == f"setuid flow refused: {file}:2: allow setuid = no\n"


def test_what_is_not_enforced_is_said(written) -> None:
    outcome = config_check(file=written("image driver = fast\nallow user ns = no\n"))
    assert outcome.exit_code == 0
    lines = outcome.text.splitlines()
    assert lines[0].startswith("not enforced: allow user ns = no: ")
    assert lines[1].startswith("not enforced: image driver = fast: ")
    assert lines[1].endswith("(not supported yet)")


def test_escapes_and_unknown_names_are_warned_about(written, namespaces, monkeypatch) -> None:
    file = written("limit container owners = root, no-such-user-here, 17\n")
    text = config_check(file=file).text
    assert "warning: limit container owners: users escape this" in text
    assert f"{file}:1: limit container owners: nobody here is called no-such-user-here" in text
    assert "called root" not in text
    monkeypatch.setattr(config_report, "user_namespaces_allowed", lambda: False)
    assert "users escape this" not in config_check(file=file).text


def test_missing_file(tmp_path: Path) -> None:
    file = str(tmp_path / "none")
    outcome = config_check(file=file)
    assert outcome.exit_code == 255
    assert f"wrong: {file}: does not exist" in outcome.text
    with pytest.raises(FileWrong):
        config_show(file=file)


def test_check_as_json(written) -> None:
    file = written("allow setid = no\nimage driver = x\n")
    data = json.loads(config_check(file=file, as_json=True).text)
    assert data["problems"] == [
        {
            "file": file,
            "line": 1,
            "key": "allow setid",
            "text": "is not a directive",
            "nearest": "allow setuid",
        }
    ]
    assert data["setuid"]["allowed"] is False
    assert len(data["setuid"]["reasons"]) == 1
    assert [row["key"] for row in data["notEnforced"]] == ["image driver"]


def test_installed_file_is_judged_by_owner_and_mode(written, monkeypatch) -> None:
    file = written("mount tmp = x\n")
    os.chmod(file, 0o666)
    monkeypatch.setattr(build, "CONFIG_FILE", file)
    monkeypatch.setattr(config_report, "starter_obstacles", lambda: ())
    outcome = config_check()
    assert outcome.exit_code == 255
    assert f"wrong: {file}: must be writable by root only (mode 0666)" in outcome.text
    assert f'wrong: {file}:1: mount tmp: "x" is not one of [yes no]' in outcome.text


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a file of root's")
def test_installed_starter_is_judged(monkeypatch, tmp_path) -> None:
    starter = tmp_path / "starter-suid"
    monkeypatch.setattr(build, "STARTER_SUID", str(starter))
    monkeypatch.setattr(build, "SETUID", True)
    assert policy.starter_obstacles() == (f"{starter}: No such file or directory",)
    starter.write_text("")
    starter.chmod(0o755)
    assert policy.starter_obstacles() == (
        f"{starter}: must belong to root and have the setuid bit",
    )
    starter.chmod(0o4711)
    assert not any("setuid bit" in text for text in policy.starter_obstacles())
    monkeypatch.setattr(build, "SETUID", False)
    assert policy.starter_obstacles() == ("this installation has no setuid starter",)


def test_show_has_every_directive_and_its_origin(written) -> None:
    file = written("max loop devices = 0x10\nlimit container paths = /a, /b\n")
    lines = config_show(file=file).text.splitlines()
    assert len(lines) == len(directives())
    shown = {line.split("#")[0].strip(): line.split("# ")[1] for line in lines}
    assert shown["max loop devices = 16"] == f"{file}:1"
    assert shown["limit container paths = /a, /b"] == f"{file}:2"
    assert shown["allow setuid = yes"] == "default"
    data = json.loads(config_show(file=file, as_json=True).text)
    assert data["directives"]["max loop devices"] == {"value": "16", "from": f"{file}:1"}


def effective(file: str, user: str | None) -> dict[str, dict[str, str]]:
    text = config_show(file=file, effective=True, user=user, as_json=True).text
    return {row["subject"]: row for row in json.loads(text)["decisions"]}


def test_effective_for_a_user(written, namespaces) -> None:
    file = written("allow setuid users = nobody\nallow container dir = no\n")
    found = effective(file, "nobody")
    assert found["setuid flow"] == {
        "subject": "setuid flow",
        "answer": "allowed",
        "rule": "allow setuid users",
        "from": f"{file}:1",
    }
    assert found["sandbox directory"]["answer"] == "refused"
    assert found["SIF image"]["from"] == "default"
    assert effective(file, str(NOBODY.pw_uid)) == found
    assert effective(file, "daemon")["setuid flow"]["answer"] == "refused"
    assert effective(file, "root")["setuid flow"]["answer"] == "not needed"
    text = config_show(file=file, effective=True, user="nobody").text
    assert text.startswith(f"nobody (uid {NOBODY.pw_uid})\n")
    assert f"# allow setuid users, {file}:1\n" in text
    assert "warning: allow container dir: users escape this" in text


def test_effective_for_a_wrong_file(written) -> None:
    found = effective(written("hello\n"), "nobody")
    assert found["setuid flow"]["answer"] == "refused"
    assert "the file is wrong" in found["setuid flow"]["rule"]


@pytest.mark.parametrize("user", ["no-such-user-here", "4294967290", "9" * 5000, "a\0b", ""])
def test_unknown_user(user: str) -> None:
    with pytest.raises(policy.NoSuchUser) as caught:
        config_show(file=str(SHIPPED), effective=True, user=user)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, True),
        ({"user/max_user_namespaces": "0\n"}, False),
        ({"user/max_user_namespaces": "100\n", "kernel/unprivileged_userns_clone": "0\n"}, False),
        ({"user/max_user_namespaces": "100\n", "kernel/unprivileged_userns_clone": "1\n"}, True),
    ],
)
def test_user_namespaces(tmp_path: Path, files: dict[str, str], allowed: bool) -> None:
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert policy.user_namespaces_allowed(str(tmp_path)) is allowed
