"""`capability add|drop` on a real installation: what is granted works, and nobody else writes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from tests import images, own_install
from tests.own_install import Installation

SHOW = "grep CapEff /proc/self/status"
NAMES = list(protocol.CAPABILITY_NAMES.values())


@pytest.fixture
def own(require_root) -> Iterator[Installation]:
    made = own_install.installation()
    made.configure()
    yield made
    made.restore()


@pytest.fixture
def file(own: Installation) -> Path:
    return own.sysconfdir / "capability.json"


def held(own: Installation) -> int:
    sif = images.own_sif(images.shared_folder())
    done = own.run("exec", "--add-caps", "all", sif, "sh", "-c", SHOW)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[1], 16)


def test_a_grant_lasts_until_it_is_taken_back(own, file):
    name = own.user.pw_name
    assert own.run("capability", "add", "--user", name, "net_raw", root=True).returncode == 0
    assert held(own) == 1 << 13
    assert own.run("capability", "add", "--group", name, "chown", root=True).returncode == 0
    assert held(own) == 1 << 13 | 1 << 0
    for option in ("--user", "--group"):
        assert own.run("capability", "drop", option, name, "all", root=True).returncode == 0
    assert held(own) == 0
    assert json.loads(file.read_text()) == {}


def test_changes_at_once_are_all_made(own, file):
    def add(word: str) -> int:
        return own.run("capability", "add", "-u", own.user.pw_name, word, root=True).returncode

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(add, NAMES[:16])) == {0}
    granted = json.loads(file.read_text())["users"][own.user.pw_name]
    assert sorted(granted) == sorted(f"CAP_{name}" for name in NAMES[:16])
    left = {path.name for path in own.sysconfdir.iterdir() if "capability" in path.name}
    assert left == {"capability.json", ".capability.lock"}


def test_a_user_cannot_keep_root_waiting(own, file):
    own.run("capability", "add", "-u", "root", "kill", root=True)
    lock = own.sysconfdir / ".capability.lock"
    tried = subprocess.run(["cat", lock], **own.identity(), capture_output=True, check=False)
    assert b"Permission denied" in tried.stderr
    assert lock.stat().st_uid == 0


@pytest.mark.parametrize("kind", ["link", "user's", "writable", "fifo", "directory"])
def test_a_file_that_others_could_have_made_is_not_taken_over(own, file, tmp_path, kind):
    aim = tmp_path / "aim"
    aim.write_text("{}")
    if kind == "link":
        file.symlink_to(aim)
    elif kind == "fifo":
        os.mkfifo(file, 0o644)
    elif kind == "directory":
        file.mkdir()
    else:
        file.write_text("{}")
        file.chmod(0o666 if kind == "writable" else 0o644)
        os.chown(file, own.user.pw_uid if kind == "user's" else 0, 0)
    before = file.lstat()
    done = own.run("capability", "add", "-u", "root", "chown", root=True, timeout_s=20)
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:   Unable to add capabilities: while ")
    assert done.stderr.count("\n") == 1
    after = file.lstat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (
        before.st_ino,
        before.st_mode,
        before.st_uid,
    )
    assert aim.read_text() == "{}"
    if kind == "directory":
        file.rmdir()
