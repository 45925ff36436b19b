"""State that a hostile user has prepared for root's commands, or for another user's."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.model.hook_frame import hook_frames
from apptainer_py.model.oci_plan import Hook
from apptainer_py.model.record_frame import (
    PHASE_CREATED,
    PHASE_CREATING,
    RecordData,
    read_record,
    record_frame,
)
from apptainer_py.runtime import containers
from tests.oci import bed as beds
from tests.security.oci.killing import Ground
from tests.security.oci.weakened import weakened

FOREIGN = "belongs to another user"
COMMANDS = {
    "delete -f": ("delete", "--force", "bait"),
    "delete": ("delete", "bait"),
    "kill": ("kill", "bait", "KILL"),
    "kill -a": ("kill", "--all", "bait", "KILL"),
    "start": ("start", "bait"),
    "state": ("state", "bait"),
    "exec": ("exec", "bait", "true"),
    "exec -d": ("exec", "--detach", "bait", "true"),
    "pause": ("pause", "bait"),
    "resume": ("resume", "bait"),
    "ps": ("ps", "bait"),
    "events": ("events", "--stats", "bait"),
    "update": ("update", "--pids-limit", "5", "bait"),
}


class Trap:
    """A state directory of a user's, and what it would have root do."""

    def __init__(self, place: Path, user: pwd.struct_passwd) -> None:
        self.place = place
        self.user = user
        self.root = place / "theirs"
        self.victim = subprocess.Popen(["sleep", "600"])
        self.other = subprocess.Popen(["sleep", "600"])
        (place / "roots/groups/inner").mkdir(parents=True)
        self.file = place / "roots/file"
        self.file.write_text("keep")
        self.marker = place / "marker"

    def set(self, phase: int = PHASE_CREATED) -> None:
        """Write the bait, as its owner would."""
        shutil.rmtree(self.root, ignore_errors=True)
        directory = self.root / "bait"
        directory.mkdir(parents=True)
        hook = Hook(kind="poststop", path="/bin/touch", arguments=("touch", str(self.marker)))
        frames = hook_frames([hook], (b"{", b"}"))
        # Control groups are directories too: the user's own file names whom to kill.
        groups = self.place / "groups"
        groups.mkdir(exist_ok=True)
        (groups / "cgroup.procs").write_text(f"{self.other.pid}\n")
        record = RecordData(
            container_id="bait", phase=phase, flags=0,
            creator_pid=self.other.pid, creator_start=containers.start_time(self.other.pid),
            init_pid=self.victim.pid, init_start=containers.start_time(self.victim.pid),
            created_ns=1, state=(b'{"pid": ', b', "status": "', b'"}'),
            freezer=str(self.file), cgroups=(str(groups), f"{self.place}/roots/groups"),
            poststart=frames, poststop=frames,
        )  # fmt: skip
        (directory / "record").write_bytes(record_frame(record))
        (directory / "config.json").write_text(json.dumps(beds.config()))
        (directory / "state.json").write_text(json.dumps({"cgroup_paths": {}}))
        os.mkfifo(directory / "exec.fifo")
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def assert_not_sprung(self) -> None:
        assert self.victim.poll() is None, "the foreign process was killed"
        assert self.other.poll() is None, "whom the user's file names was killed"
        assert self.file.read_text() == "keep"
        assert (self.place / "roots/groups/inner").is_dir()
        assert not self.marker.exists(), "the user's hook was run"

    def end(self) -> None:
        for process in (self.victim, self.other):
            process.kill()
            process.wait()


@pytest.fixture
def trap(bed: beds.Bed, user: pwd.struct_passwd) -> Iterator[Trap]:
    made = Trap(bed.place, user)
    made.set()
    bed.root = made.root
    yield made
    made.end()
    bed.root = bed.place / "state"


def refused(bed: beds.Bed, *words: str) -> str:
    """Run a command that must fail; `exec` has a status of its own for that."""
    done = bed.call(*words)
    assert done.returncode == (255 if words[0] == "exec" else 1), (words, done)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_root_does_not_follow_a_users_record(bed: beds.Bed, trap: Trap, words) -> None:
    assert FOREIGN in refused(bed, *words)
    trap.assert_not_sprung()
    assert (trap.root / "bait/record").exists()


def test_root_does_not_end_a_users_creator(bed: beds.Bed, trap: Trap) -> None:
    trap.set(PHASE_CREATING)
    assert FOREIGN in bed.bad("delete", "--force", "bait")
    trap.assert_not_sprung()


def test_the_list_leaves_a_users_containers_out(bed: beds.Bed, trap: Trap) -> None:
    assert "bait" not in bed.good("list", "--quiet").stdout
    trap.assert_not_sprung()


@pytest.mark.parametrize("mode", [0o777, 0o730])
def test_a_directory_that_others_can_write_is_not_trusted(
    bed: beds.Bed, trap: Trap, mode: int
) -> None:
    directory = trap.root / "bait"
    for path in [trap.root, *trap.root.rglob("*")]:
        os.chown(path, 0, 0)
    directory.chmod(mode)
    for words in COMMANDS.values():
        assert FOREIGN in refused(bed, *words), words
    trap.assert_not_sprung()


@pytest.mark.long
def test_weak_owner(ground: Ground, bed: beds.Bed, trap: Trap) -> None:
    """Without the check, root's delete runs the user's hook and kills whom it names."""
    edit = ("lean_container.c", "if (!is_own(c->dir_fd))", "if (0)")
    with weakened(ground, "apptainer-py-oci-steps", edit):
        argv = [ground.program, "--root", trap.root, "delete", "--force", "bait"]
        subprocess.run(argv, check=False, capture_output=True)
    with pytest.raises(AssertionError):
        trap.assert_not_sprung()


def test_a_stale_number_is_nobody(bed: beds.Bed, trap: Trap) -> None:
    """T-R18: the number is another process's by now; the record is root's own."""
    record = trap.root / "bait/record"
    for path in [trap.root, *trap.root.rglob("*")]:
        os.chown(path, 0, 0)
    (trap.root / "bait").chmod(0o711)
    facts = read_record(record.read_bytes())
    stale = facts.replace(init_start=facts.init_start - 1, freezer="", cgroups=(), poststop=b"")
    record.write_bytes(record_frame(stale))
    assert "not running" in bed.bad("kill", "bait", "KILL")
    assert "stopped" in refused(bed, "exec", "bait", "true")
    assert json.loads(bed.good("state", "bait").stdout)["status"] == "stopped"
    bed.good("delete", "--force", "bait")
    trap.assert_not_sprung()


# ---- where others can rename what root makes


def test_the_directory_is_swapped_as_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: pwd.struct_passwd
) -> None:
    """A user who owns the root directory puts a link there, or a directory, in that moment."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "config.json").write_text("keep")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, user.pw_uid, user.pw_gid)
    made = os.mkdir

    for instead in ("link", "directory"):

        def swap(path: str, mode: int = 0o777, *, instead: str = instead) -> None:
            made(path, mode)
            os.rmdir(path)
            if instead == "link":
                os.symlink(victim, path)
            else:
                made(path, 0o777)
                os.chown(path, user.pw_uid, user.pw_gid)

        monkeypatch.setattr(os, "mkdir", swap)
        with pytest.raises(containers.ContainerError):
            containers.StateDir.make(str(theirs), f"c-{instead}", sticky=False)
        monkeypatch.undo()
    assert victim.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in victim.iterdir()] == ["config.json"]


def test_what_is_removed_is_what_was_made(tmp_path: Path) -> None:
    state = containers.StateDir.make(str(tmp_path / "root"), "c", sticky=False)
    state.write("config.json", b"{}")
    (tmp_path / "root/c").rename(tmp_path / "root/d")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("keep")
    (tmp_path / "root/c").symlink_to(victim)
    with pytest.raises(OSError, match="Not a directory"):
        state.remove()
    assert (victim / "config.json").read_text() == "keep"
    assert list((tmp_path / "root/d").iterdir()) == []


@pytest.mark.parametrize("umask", [0, 0o077])
def test_directories_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    was = os.umask(umask)
    try:
        state = containers.StateDir.make(str(tmp_path / "a/b/c"), "box", sticky=True)
        state.write("config.json", b"{}")
        os.close(state.make_fifo(5, 6))
    finally:
        os.umask(was)
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o7777
        for path in (tmp_path / "a").rglob("*")
    }
    assert modes == {
        "a/b": 0o700, "a/b/c": 0o1700, "a/b/c/box": 0o711, "a/b/c/box/config.json": 0o600,
        "a/b/c/box/exec.fifo": 0o622,
    }  # fmt: skip
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    fifo = (tmp_path / "a/b/c/box/exec.fifo").stat()
    assert (fifo.st_uid, fifo.st_gid) == (5, 6)


def test_kill_of_whom_the_container_lists(bed: beds.Bed, bundle: beds.Bundle) -> None:
    """A payload that is root in its cgroup mount cannot have other processes ended with it."""
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        container = bed.sleeping(bundle)
        bed.good("delete", "--force", container.id)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()
