from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base import build
from apptainer_py.base.errors import ConfigError
from apptainer_py.host.config_file import FileWrong
from apptainer_py.verbs import config as verb
from apptainer_py.verbs.config import config_global, render

TREE = Path(__file__).resolve().parents[3]
SHIPPED = TREE / "etc/apptainer-py.conf"
REAL_FILE = Path("/etc/apptainer/apptainer.conf")


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    file = tmp_path / "some.conf"
    shutil.copy(SHIPPED, file)
    return file


def act(
    file: Path, operation: str, directive: str, value: str = "", *, dry_run: bool = False
) -> str:
    return config_global(
        operation=operation,
        directive=directive,
        value=value,
        dry_run=dry_run,
        file=str(file),
        template=str(SHIPPED),
    )


def test_get(conf: Path) -> None:
    assert act(conf, "get", "allow setuid") == "yes\n"
    assert act(conf, "get", "bind path") == "/etc/localtime,/etc/hosts\n"
    assert act(conf, "get", "limit container owners") == ""
    assert act(conf, "get", "image driver") == ""


def test_set_and_unset_a_scalar(conf: Path) -> None:
    before = conf.read_text()
    assert act(conf, "set", "allow setuid", "no") == ""
    assert act(conf, "get", "allow setuid") == "no\n"
    assert conf.read_text() == before.replace("\nallow setuid = yes\n", "\nallow setuid = no\n")
    act(conf, "unset", "allow setuid", "no")
    assert conf.read_text() == before


def test_set_puts_new_items_first_and_knows_old_ones(conf: Path) -> None:
    act(conf, "set", "bind path", "/c, /etc/hosts,/d,/c,")
    assert act(conf, "get", "bind path") == "/c,/d,/etc/localtime,/etc/hosts\n"


def test_unset_items(conf: Path) -> None:
    act(conf, "unset", "bind path", "/etc/hosts,/nowhere")
    assert act(conf, "get", "bind path") == "/etc/localtime\n"
    act(conf, "unset", "bind path", "/etc/localtime")
    assert act(conf, "get", "bind path") == ""
    act(conf, "set", "bind path", "/a")
    assert act(conf, "get", "bind path") == "/a\n"


def test_reset(conf: Path) -> None:
    act(conf, "set", "max loop devices", "0x10")
    assert act(conf, "get", "max loop devices") == "16\n"
    act(conf, "reset", "max loop devices")
    assert act(conf, "get", "max loop devices") == "256\n"
    act(conf, "reset", "bind path")
    assert act(conf, "get", "bind path") == ""


def test_dry_run_writes_nothing(conf: Path) -> None:
    before = conf.read_bytes()
    text = act(conf, "set", "mount dev", "minimal", dry_run=True)
    assert "\nmount dev = minimal\n" in text
    assert conf.read_bytes() == before


def test_written_file_is_new_whole_and_readable(conf: Path) -> None:
    conf.chmod(0o600)
    inode = conf.stat().st_ino
    act(conf, "set", "mount tmp", "no")
    assert conf.stat().st_mode & 0o7777 == 0o644
    assert conf.stat().st_ino != inode
    assert [path.name for path in conf.parent.iterdir()] == [conf.name]


def test_values_of_another_file_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "old.conf"
    file.write_text(
        "limit container owners = a, b\n\nmount dev=minimal\nallow setuid-mount extfs = yes\n"
    )
    act(file, "set", "audit log", "/var/log/launches")
    assert act(file, "get", "limit container owners") == "a,b\n"
    assert act(file, "get", "mount dev") == "minimal\n"
    assert act(file, "get", "allow setuid-mount extfs") == "yes\n"
    assert act(file, "get", "audit log") == "/var/log/launches\n"
    assert act(file, "get", "bind path") == ""


def test_a_directive_without_a_place_in_the_template_is_not_lost() -> None:
    assert render("# nothing\n", {"mount tmp": ("no",)}) == "# nothing\nmount tmp = no\n"


@pytest.mark.parametrize(
    ("operation", "directive", "value", "message"),
    [
        ("get", "nope", "", '"nope" is not a valid configuration directive'),
        ("set", "ALLOW SETUID", "no", '"ALLOW SETUID" is not a valid configuration directive'),
        ("set", "allow setuid", " ", 'you must specify a value for directive "allow setuid"'),
        (
            "set",
            "allow setuid",
            "maybe",
            "configuration directive invalid: "
            'value authorized for directive "allow setuid" are [yes no]',
        ),
        (
            "set",
            "enable overlay",
            "x",
            "configuration directive invalid: "
            "value authorized for directive 'enable overlay' are [yes no try driver]",
        ),
        (
            "set",
            "max loop devices",
            "abc",
            'configuration directive invalid: strconv.ParseUint: parsing "abc": invalid syntax',
        ),
        (
            "set",
            "max loop devices",
            "99999999999999999999",
            "configuration directive invalid: "
            'strconv.ParseUint: parsing "99999999999999999999": value out of range',
        ),
        ("unset", "bind path", "/a", "value '/a' not found for directive \"bind path\""),
        ("unset", "allow setuid", "no", "value 'no' not found for directive \"allow setuid\""),
    ],
)
def test_messages_are_those_of_apptainer(conf, operation, directive, value, message) -> None:
    before = conf.read_bytes()
    with pytest.raises(ConfigError) as caught:
        act(conf, operation, directive, value)
    assert (str(caught.value), caught.value.exit_code) == (message, 255)
    assert conf.read_bytes() == before


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("image driver", "x\nallow setuid = yes"),
        ("allow setuid users", "a\nb"),
        ("image driver", "\0"),
        ("bind path", "relative"),
        ("audit log", "somewhere"),
        ("mount home", "yes,no"),
        ("limit container paths", "/" + "x" * 70000),
    ],
)
def test_nothing_is_written_that_would_not_read_back(conf, directive, value) -> None:
    before = conf.read_bytes()
    with pytest.raises(ConfigError):
        act(conf, "set", directive, value)
    assert conf.read_bytes() == before


def test_a_wrong_directive_gets_advice(conf: Path) -> None:
    with pytest.raises(verb.NotADirective) as caught:
        act(conf, "get", "alow setuid")
    assert caught.value.advice() == "did you mean `allow setuid`?"
    with pytest.raises(verb.NotADirective) as caught:
        act(conf, "get", "qqqqq")
    assert caught.value.advice() is None


def test_a_wrong_file_is_not_rewritten(conf: Path) -> None:
    conf.write_text("allow setid = no\n")
    with pytest.raises(FileWrong) as caught:
        act(conf, "set", "allow setuid", "no")
    assert f"{conf}:1: allow setid: is not a directive (nearest: allow setuid)" in str(caught.value)
    assert conf.read_text() == "allow setid = no\n"


def test_files_that_are_not_there(conf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileWrong):
        act(tmp_path / "none", "get", "allow setuid")
    with pytest.raises(ConfigError):
        config_global(
            operation="set",
            directive="mount tmp",
            value="no",
            file=str(conf),
            template=str(tmp_path / "none"),
        )


def test_only_root_changes_the_file(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1001)
    monkeypatch.setattr(build, "SETUID", True)
    with pytest.raises(verb.NeedsRoot):
        act(conf, "get", "allow setuid")
    monkeypatch.setattr(build, "SETUID", False)
    assert act(conf, "get", "allow setuid") == "yes\n"


SAME = [
    ("--set", "bind path", "/a,/b"),
    ("--set", "bind path", "/etc/hosts"),
    ("--unset", "bind path", "/a,/zz"),
    ("--set", "limit container owners", "root,daemon"),
    ("--set", "allow setuid", "no"),
    ("--set", "max loop devices", "0x10"),
    ("--set", "max loop devices", "1_000"),
    ("--reset", "max loop devices"),
    ("--unset", "allow setuid", "no"),
    ("--set", "mksquashfs mem", "1G"),
    ("--set", "image driver", "a b"),
    ("--unset", "image driver", "zz"),
    ("--set", "mount dev", "x"),
    ("--set", "download concurrency", "-1"),
    ("--set", "nope", "1"),
    ("--reset", "bind path"),
    ("--reset", "nope"),
]
COMPARED = ("bind path", "limit container owners", "allow setuid", "max loop devices")


def real(file: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["apptainer", "-c", file, "config", "global", *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr.removeprefix("FATAL:   ")


def ours(file: Path, operation: str, *words: str) -> tuple[int, str, str]:
    try:
        return 0, act(file, operation.lstrip("-"), *words), ""
    except ConfigError as error:
        return error.exit_code, "", f"{error}\n"


@pytest.mark.parity
def test_same_answers_as_apptainer(tmp_path: Path) -> None:
    if not (shutil.which("apptainer") and REAL_FILE.exists()) or os.getuid() != 0:
        pytest.skip("Apptainer is not installed, or this is not root")
    theirs, mine = tmp_path / "theirs.conf", tmp_path / "mine.conf"
    for file in (theirs, mine):
        shutil.copy(REAL_FILE, file)
    for words in SAME:
        assert ours(mine, *words) == real(theirs, *words), words
        for key in COMPARED:
            got = ours(mine, "get", key)
            expected = real(theirs, "--get", key)
            assert (got[0], got[1].replace(",", ", ")) == (
                expected[0],
                expected[1].replace(", ", ",").replace(",", ", "),
            ), (words, key)


# ---- confgen ----


def test_confgen_writes_the_template(tmp_path: Path) -> None:
    verb.confgen(str(tmp_path / "new"), template=str(SHIPPED))
    assert (tmp_path / "new").read_text() == SHIPPED.read_text()


def test_confgen_keeps_the_values_of_an_old_file(tmp_path: Path, conf: Path) -> None:
    act(conf, "set", "max loop devices", "7")
    act(conf, "set", "limit container paths", "/data")
    conf.write_text(conf.read_text().replace("# ", "# old comment "))
    verb.confgen(str(tmp_path / "new"), str(conf), template=str(SHIPPED))
    written = (tmp_path / "new").read_text()
    assert "\nmax loop devices = 7\n" in written
    assert "\nlimit container paths = /data\n" in written
    assert "old comment" not in written


@pytest.mark.parametrize(("old", "new"), [("none", "new"), ("", "none/new")])
def test_confgen_refuses_in_one_line(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError) as raised:
        verb.confgen(str(tmp_path / new), old and str(tmp_path / old), template=str(SHIPPED))
    assert "no such file or directory" in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_confgen_refuses_what_is_wrong(tmp_path: Path, conf: Path) -> None:
    conf.write_text("allow setuid = perhaps\n")
    with pytest.raises(FileWrong):
        verb.confgen(str(tmp_path / "new"), str(conf), template=str(SHIPPED))
    assert not (tmp_path / "new").exists()
