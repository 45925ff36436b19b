"""Plug-ins: the lines of docs/plugins.md, typed by those whom they are for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import REPOSITORY
from tests.own_install import Installation

Type = Callable[[str], "CompletedProcess[str]"]


@pytest.fixture
def lines(installed: Installation, user_tmp: Path) -> Iterator[Type]:
    """Types a line as the ordinary user, or with sudo as root, in a directory of the user's."""

    def lines(line: str) -> CompletedProcess[str]:
        words = shlex.split(line, comments=True)
        is_root = words[0] == "sudo"
        program, *rest = words[1:] if is_root else words
        assert program == "apptainer-py"
        return installed.run(*rest, root=is_root, cwd=user_tmp)

    yield lines
    for entry in (installed.libexec / "plugins").iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def good(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def documented() -> list[str]:
    text = (REPOSITORY / "docs/plugins.md").read_text()
    found = [line.strip() for line in text.splitlines() if "apptainer-py " in line]
    return [line for line in found if line.startswith(("apptainer-py ", "sudo "))]


def test_the_documented_lines_work(lines, installed):
    outs = {line: good(lines(line)) for line in documented()}
    assert len(outs) == 7
    said = {line.partition(" #")[0].strip(): out for line, out in outs.items()}
    assert said["apptainer-py greet world"] == "hello world\n"
    (listed,) = json.loads(said["apptainer-py plugin list --json"])["plugins"]
    assert (listed["name"], listed["commands"], listed["enabled"]) == ("greet", ["greet"], True)
    gone = lines("apptainer-py greet world")
    assert (gone.returncode, gone.stderr.splitlines()[0]) == (
        1, 'Error: unknown command "greet" for "apptainer-py"',
    )  # fmt: skip
    good(lines("sudo apptainer-py plugin enable greet"))
    assert "  greet " in good(lines("apptainer-py --help"))
    assert "Says hello" in good(lines("apptainer-py help greet"))
    assert " greet " in good(lines("apptainer-py completion bash"))
    assert good(lines("apptainer-py -q greet --help")) == "hello --help\n"
    good(lines("sudo apptainer-py plugin uninstall greet"))
    assert os.listdir(installed.libexec / "plugins") == [".lock"]
    assert lines("apptainer-py greet").returncode == 1


CODE = """\
import os, sys

def main(arguments):
    print(os.getresuid(), os.getresgid(), sys.argv)
    if arguments == ["raise"]:
        raise ValueError("one\\nline")
    if arguments == ["exit"]:
        raise SystemExit(7)
    return 3
"""


def test_a_command_has_its_callers_rights_and_its_own_status(lines, user_tmp, user):
    good(lines("apptainer-py plugin create source own"))
    (user_tmp / "source/own/__init__.py").write_text(CODE)
    good(lines("apptainer-py plugin compile -o own.whl source"))
    good(lines("sudo apptainer-py plugin install own.whl"))
    done = lines("apptainer-py own a")
    ids = f"({user.pw_uid}, {user.pw_uid}, {user.pw_uid})"
    assert (done.returncode, done.stdout) == (3, f"{ids} {ids} ['apptainer-py own', 'a']\n")
    assert lines("apptainer-py own exit").returncode == 7
    failed = lines("apptainer-py own raise")
    first = "FATAL:   the plug-in own 0.1.0 failed: ValueError: one\\nline"
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (255, first)
    assert "Traceback" not in failed.stderr
    assert "Traceback" in lines("apptainer-py -d own raise").stderr


def test_users_change_nothing(lines, installed, user_tmp):
    good(lines("apptainer-py plugin create source own"))
    good(lines("apptainer-py plugin compile -o own.whl source"))
    for verb, name in (("install", "own.whl"), ("enable", "own"), ("uninstall", "own")):
        done = lines(f"apptainer-py plugin {verb} {name}")
        said = f'FATAL:   "apptainer-py plugin {verb}" command requires root privileges\n'
        assert (done.returncode, done.stdout, done.stderr) == (255, "", said)
    assert os.listdir(installed.libexec / "plugins") == [".lock"]
    assert good(lines("apptainer-py plugin list")) == "There are no plugins installed.\n"
    absent = lines("apptainer-py plugin inspect absent")
    text = 'FATAL:   Failed to inspect plugin "absent": plugin not found.\n'
    assert (absent.returncode, absent.stderr) == (255, text)
    wrong = lines("sudo apptainer-py plugin install /etc/passwd")
    assert wrong.returncode == 255
    assert wrong.stderr.startswith(
        'FATAL:   Failed to install plugin "/etc/passwd": it is no wheel'
    )


def test_a_file_that_a_user_could_have_written_is_not_run(lines, installed, user, sif):
    good(lines("apptainer-py plugin create source own"))
    good(lines("apptainer-py plugin compile -o own.whl source"))
    good(lines("sudo apptainer-py plugin install own.whl"))
    (code,) = (installed.libexec / "plugins").glob("own-*/own/__init__.py")
    os.chown(code, user.pw_uid, 0)
    done = lines("apptainer-py own")
    assert (done.returncode, "hello" in done.stdout) == (1, False)
    assert f"WARNING: the plug-in own is left out: {code} belongs to uid" in done.stderr
    assert done.stderr.count("WARNING") == 1
    # A launch looks at no plug-in.
    launched = installed.run("exec", sif, "true")
    assert (launched.returncode, launched.stderr) == (0, "")
