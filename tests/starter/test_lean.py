"""The commands that apptainer-py-oci does itself, against containers that are only records."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from apptainer_py.model.hook_frame import hook_frames
from apptainer_py.model.oci_plan import Hook
from apptainer_py.model.record_frame import (
    FLAG_CGROUP2,
    FLAG_PIDNS,
    FLAG_PYTHON,
    PHASE_CREATED,
    PHASE_CREATING,
    RecordData,
    record_frame,
)

PROGRAM = Path(__file__).resolve().parents[2] / "build/apptainer-py-oci"
TEXT_LINE = re.compile(
    r'time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)" level=(\w+) msg=(.*)\n'
)


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class Container:
    """A state directory whose first process is a `sleep`, or one that waits at the fifo."""

    def __init__(self, root: Path, name: str = "c1", *, waiting: bool = False) -> None:
        self.root, self.name = root, name
        self.directory = root / name
        self.directory.mkdir(parents=True)
        argv = ["sleep", "1000"]
        if waiting:
            os.mkfifo(self.directory / "exec.fifo")
            # Shows as a copy of starter-init would, and writes one byte where that does.
            fd = os.memfd_create("apptainer-py-init", 0)
            with open("/bin/busybox", "rb") as source:
                os.write(fd, source.read())
            script = f"echo -n 0 > {self.directory}/exec.fifo; exec /bin/sleep 1000"
            argv = ["sh", "-c", script]
            self.process = subprocess.Popen(
                argv, executable=f"/proc/self/fd/{fd}", pass_fds=[fd], stdin=subprocess.DEVNULL
            )
            os.close(fd)
        else:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self.facts = {
            "container_id": name,
            "phase": PHASE_CREATED,
            "flags": FLAG_PIDNS,
            "creator_pid": 0,
            "creator_start": 0,
            "init_pid": self.process.pid,
            "init_start": start_ticks(self.process.pid),
            "state": (b'{\n  "pid": ', b',\n  "status": "', b'",\n  "bundle": "/b"\n}'),
        }
        self.write()

    def write(self, **changes: object) -> None:
        self.facts |= changes
        fresh = self.directory / ".record"
        fresh.write_bytes(record_frame(RecordData(**self.facts)))
        fresh.rename(self.directory / "record")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def make(tmp_path):
    made = []

    def one(name: str = "c1", **options: bool) -> Container:
        made.append(Container(tmp_path / "root", name, **options))
        return made[-1]

    yield one
    for container in made:
        container.end()


@pytest.fixture
def call(tmp_path):
    def run(*words: str, before: tuple[str, ...] = (), **options: object):
        argv = [str(PROGRAM), "--root", str(tmp_path / "root"), *before, *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, **options)

    return run


def message(done: subprocess.CompletedProcess[str]) -> str:
    found = TEXT_LINE.fullmatch(done.stderr)
    assert found, done.stderr
    assert found[2] == "error"
    assert done.returncode == 1
    return json.loads(found[3]) if found[3].startswith('"') else found[3]


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


def test_state_is_what_the_record_says_around_pid_and_status(make, call):
    container = make()
    done = call("state", "c1")
    pid = container.process.pid
    assert done.stdout == f'{{\n  "pid": {pid},\n  "status": "running",\n  "bundle": "/b"\n}}'
    container.end()
    assert json.loads(call("state", "c1").stdout) == {"pid": 0, "status": "stopped", "bundle": "/b"}


def test_a_later_process_of_the_same_number_is_not_the_container(make, call):
    container = make()
    container.write(init_start=container.facts["init_start"] + 1)
    assert json.loads(call("state", "c1").stdout)["status"] == "stopped"
    assert message(call("kill", "c1")) == "container not running"
    assert call("delete", "-f", "c1").returncode == 0
    assert container.process.poll() is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("state", "nope"), "container does not exist"),
        (("start", "nope"), "container does not exist"),
        (("kill", "nope", "FOO"), "container does not exist"),
        (("delete", "nope"), "container does not exist"),
        (("state", ""), "container id cannot be empty"),
        (("state", "a/b"), "invalid container ID format"),
        (("delete", "-f", ".."), "invalid container ID format"),
        (("kill", "c1", "FOO"), 'unknown signal "FOO"'),
        (("kill", "c1", "SIGRTMIN"), 'unknown signal "SIGRTMIN"'),
        (("kill", "c1", "999"), "unable to signal init: invalid argument"),
        (("start", "c1"), "cannot start an already running container"),
        (("delete", "c1"), "cannot delete container c1 that is not stopped: running"),
    ],
)
def test_refusals_are_runcs(make, call, words, said):
    make()
    assert message(call(*words)) == said


def test_messages_go_to_the_log_and_bare_to_stderr(make, call, tmp_path):
    make()
    log = tmp_path / "log"
    done = call("kill", "c1", 'a"<\n', before=("--log", str(log), "--log-format=json"))
    assert done.stderr == 'unknown signal "a"<\n"\n'
    line = log.read_text()
    assert "\\u003c" in line
    assert json.loads(line) | {"time": ""} == {
        "level": "error",
        "msg": 'unknown signal "a"<\n"',
        "time": "",
    }
    assert call("state", "x", before=("--log-format", "json")).stderr.startswith(
        '{"level":"error",'
    )
    done = call("state", "c1", before=("--log", "/nonexistent/log"))
    assert message(done) == "open /nonexistent/log: no such file or directory"


@pytest.mark.parametrize("word", ["TERM", "sigterm", "15", "", None])
def test_kill_takes_names_and_numbers(make, call, word):
    container = make()
    assert call("kill", "c1", *([] if word is None else [word])).returncode == 0
    assert container.process.wait() == -signal.SIGTERM
    assert message(call("kill", "c1")) == "container not running"
    assert call("kill", "--all", "c1", "9").returncode == 0


def test_start_reads_the_fifo_once_and_runs_hooks(make, call, tmp_path):
    container = make(waiting=True)
    seen = tmp_path / "seen"
    hook = Hook(
        kind="poststart", path="/bin/sh", arguments=("sh", "-c", f"cat > {seen}; env >> {seen}")
    )
    container.write(poststart=hook_frames((hook,), (b'{"pid":', b"}\n")))
    assert json.loads(call("state", "c1").stdout)["status"] == "created"
    done = call("start", "c1", env={"FROM": "start"})
    assert (done.returncode, done.stderr) == (0, "")
    assert not (container.directory / "exec.fifo").exists()
    assert seen.read_text().splitlines()[0] == f'{{"pid":{container.process.pid}}}'
    assert "FROM=start" in seen.read_text()
    assert message(call("start", "c1")) == "cannot start an already running container"


def test_a_poststart_hook_that_fails_ends_the_container(make, call):
    container = make(waiting=True)
    hook = Hook(kind="poststart", path="/bin/sh", arguments=("sh", "-c", "echo a; exit 4"))
    container.write(poststart=hook_frames((hook,), (b"{", b"}")))
    said = message(call("start", "c1"))
    assert said == "error running poststart hook #0: exit status 4, stdout: a\n, stderr: "
    assert container.process.wait() == -signal.SIGKILL


def test_a_container_whose_process_ended_cannot_be_started(make, call):
    container = make(waiting=True)
    container.end()
    assert message(call("start", "c1")) == "cannot start a container that has stopped"


def test_delete_removes_everything_and_runs_each_poststop_hook(make, call, tmp_path):
    container = make()
    (container.directory / "checkpoint/deep").mkdir(parents=True)
    (container.directory / "checkpoint/deep/file").write_text("x")
    seen = tmp_path / "seen"
    hooks = (
        Hook(kind="poststop", path="/bin/false"),
        Hook(
            kind="poststop",
            path="/bin/sh",
            arguments=("sh", "-c", f"cat > {seen}; ls {tmp_path}/root >> {seen}"),
        ),
    )
    container.write(poststop=hook_frames(hooks, (b'{"status":"stopped"}\n', b"")))
    container.end()
    done = call("delete", "c1")
    assert done.returncode == 0
    found = TEXT_LINE.fullmatch(done.stderr)
    assert found[2] == "warning"
    assert "error running poststop hook #0: exit status 1" in found[3]
    assert seen.read_text() == '{"status":"stopped"}\n'
    assert list(container.root.iterdir()) == []


def test_delete_ends_a_container_that_was_never_started(make, call):
    container = make(waiting=True)
    assert call("delete", "c1").returncode == 0
    assert container.process.wait() == -signal.SIGKILL
    assert not container.directory.exists()
    assert call("delete", "-f", "c1").returncode == 0


def test_delete_of_one_that_is_being_created(make, call):
    container = make()
    creator = subprocess.Popen(["sleep", "1000"])
    container.write(
        phase=PHASE_CREATING, creator_pid=creator.pid, creator_start=start_ticks(creator.pid)
    )
    assert json.loads(call("state", "c1").stdout)["status"] == "creating"
    said = message(call("delete", "c1"))
    assert said == "cannot delete container c1 that is not stopped: creating"
    assert message(call("start", "c1")) == "cannot start a container in the creating state"
    assert call("delete", "--force", "c1").returncode == 0
    assert creator.wait() == -signal.SIGKILL
    assert not container.directory.exists()


def test_remains_without_a_record_are_removed(call, tmp_path):
    for words, status in ((("delete", "-f", "c1"), 0), (("delete", "c1"), 1)):
        (tmp_path / "root/c1/sub").mkdir(parents=True)
        assert message(call("state", "c1")) == "container does not exist"
        assert call(*words).returncode == status
        assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"APYREC1\0", b"\0" * 4096, b"x" * 200])
def test_a_record_that_is_none_is_left_to_the_interpreter(make, call, content):
    container = make()
    (container.directory / "record").write_bytes(content)
    done = call("state", "c1", env={})
    assert done.returncode != 0
    assert "running" not in done.stdout


def test_damaged_records_are_never_believed(make, call):
    container = make()
    whole = (container.directory / "record").read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x81
        cut = whole[:at]
        for data in (bytes(damaged), cut):
            (container.directory / "record").write_bytes(data)
            done = subprocess.run(
                [str(PROGRAM), "--root", str(container.root), "kill", "c1", "0"],
                capture_output=True,
                check=False,
                env={},
            )
            assert done.returncode >= 0  # no signal
        if at > 120:
            break


def test_frozen_is_paused_in_both_versions(make, call, tmp_path):
    container = make()
    freezer = tmp_path / "freezer"
    for flags, frozen, thawed in (
        (FLAG_PIDNS, "FROZEN\n", "THAWED"),
        (FLAG_PIDNS | FLAG_CGROUP2, "1\n", "0"),
    ):
        container.write(flags=flags, freezer=str(freezer))
        freezer.write_text(thawed)
        assert json.loads(call("state", "c1").stdout)["status"] == "running"
        freezer.write_text(frozen)
        assert json.loads(call("state", "c1").stdout)["status"] == "paused"
        assert message(call("start", "c1")) == "cannot start a container in the paused state"
        said = message(call("delete", "c1"))
        assert said == "cannot delete container c1 that is not stopped: paused"
    assert call("delete", "-f", "c1").returncode == 0
    assert freezer.read_text().startswith("0")
    assert container.process.wait() == -signal.SIGKILL


def test_cgroup_directories_go_with_those_below(make, call, tmp_path):
    container = make()
    group = tmp_path / "group"
    (group / "inner/innermost").mkdir(parents=True)
    container.write(cgroups=(str(group), str(tmp_path / "not there")))
    assert call("delete", "-f", "c1").returncode == 0
    assert not group.exists()


def test_without_a_pid_namespace_kill_reaches_everybody(make, call, tmp_path):
    container = make()
    other = subprocess.Popen(["sleep", "1000"])
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").write_text(f"{container.process.pid}\n{other.pid}\n")
    container.write(flags=0, cgroups=(str(group),))
    assert call("kill", "c1", "KILL").returncode == 0
    assert container.process.wait() == other.wait() == -signal.SIGKILL


def test_what_needs_judgement_goes_to_the_interpreter(make, call):
    container = make()
    container.write(flags=FLAG_PIDNS | FLAG_PYTHON)
    assert json.loads(call("state", "c1").stdout)["status"] == "running"
    call("delete", "-f", "c1", env={})
    assert container.process.poll() is None or not container.directory.exists()


def test_one_delete_wins(make, call):
    container = make()
    argv = [str(PROGRAM), "--root", str(container.root), "delete", "-f", "c1"]
    running = [subprocess.Popen(argv, stderr=subprocess.PIPE) for _ in range(8)]
    assert [process.communicate()[1] for process in running] == [b""] * 8
    assert [process.returncode for process in running] == [0] * 8
    assert not container.directory.exists()
    until(lambda: container.process.poll() is not None)


def test_version_names_program_and_specification():
    done = subprocess.run([str(PROGRAM), "--version"], capture_output=True, text=True, check=True)
    first, commit, spec = done.stdout.splitlines()
    assert re.fullmatch(r"apptainer-py-oci version \S+", first)
    assert commit.startswith("commit: ")
    assert spec.startswith("spec: 1.")


def nested(top: Path, levels: int) -> int:
    """Make directories below each other, deeper than a path or a table of descriptors reaches."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("below", dir_fd=fd)
        inner = os.open("below", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


@pytest.mark.parametrize("levels", [1, 40, 1500])
def test_groups_are_removed_however_deep(make, call, tmp_path, levels):
    os.close(nested(tmp_path / "group", levels))
    try:
        make().write(cgroups=(str(tmp_path / "group"),))
        done = call("delete", "--force", "c1", preexec_fn=lambda: few_files(64))
        assert (done.returncode, done.stderr) == (0, "")
        assert not (tmp_path / "group").exists()
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "group"], check=True)


@pytest.mark.parametrize("levels", [1, 40, 1500])
def test_whoever_is_in_a_group_is_killed_however_deep(make, call, tmp_path, levels):
    container = make()
    fd = nested(tmp_path / "group", levels)
    try:
        (tmp_path / "group/cgroup.procs").touch()
        file = os.open("cgroup.procs", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
        os.write(file, b"%d\n" % container.process.pid)
        os.close(file)
        # The record's own process has ended: only the group tells of this one.
        container.write(flags=0, init_start=1, cgroups=(str(tmp_path / "group"),))
        done = call("kill", "c1", "KILL", preexec_fn=lambda: few_files(64))
        assert (done.returncode, done.stderr) == (0, "")
        assert container.process.wait(10) == -signal.SIGKILL
    finally:
        os.close(fd)
        subprocess.run(["rm", "-rf", tmp_path / "group"], check=True)


def few_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
