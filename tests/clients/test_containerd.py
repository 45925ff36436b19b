"""containerd and ctr: the shim of containerd calls our program for everything."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.clients import images
from tests.oci.bed import eventually

# A namespace of containerd's is not a name space of Linux: it is a word before each container.


@pytest.fixture
def ctr(containerd, runtime):
    """Runs `ctr run` with the runtime under test."""

    def run(*words: str, **how):
        flags = ["--runtime", "io.containerd.runc.v2", "--runc-binary", runtime.program]
        flags += ["--snapshotter", "overlayfs"]
        return containerd.call("run", *flags, *words, **how)

    return run


@pytest.fixture
def running(ctr, containerd, names):
    """A container in the background, which is removed at the end."""
    name = names[0]
    done = ctr("--detach", images.NAME, name, "sleep", "600")
    assert done.returncode == 0, done.stderr
    yield name
    containerd.call("tasks", "kill", "--all", "--signal", "9", name)
    containerd.call("tasks", "delete", "--force", name)
    containerd.call("containers", "delete", name)


def status(containerd, name: str) -> str:
    lines = containerd.good("tasks", "list").splitlines()
    return next((line.split()[2] for line in lines if line.split()[0] == name), "")


def test_run(ctr, names):
    done = ctr("--rm", images.NAME, names[0], "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


def test_the_status_of_run(ctr, names):
    assert ctr("--rm", images.NAME, names[0], "sh", "-c", "exit 7").returncode == 7


def test_a_program_that_is_not_there(ctr, names):
    done = ctr("--rm", images.NAME, names[0], "/no/such")
    assert done.returncode != 0
    assert "no such file or directory" in done.stderr


def test_the_environment_and_the_directory(ctr, names):
    done = ctr(
        "--rm", "--env", "A=b", "--cwd", "/tmp", images.NAME, names[0], "sh", "-c", "echo $A; pwd"
    )
    assert done.stdout.split() == ["b", "/tmp"], done.stderr


def test_a_mount(ctr, names, tmp_path):
    (tmp_path / "file").write_text("content\n")
    option = f"type=bind,src={tmp_path},dst=/data,options=rbind:ro"
    done = ctr("--rm", "--mount", option, images.NAME, names[0], "cat", "/data/file")
    assert done.stdout == "content\n", done.stderr


def test_privileged(ctr, names):
    script = "mkdir /m && mount -t tmpfs x /m && grep -c ' /m ' /proc/mounts"
    done = ctr("--rm", "--privileged", images.NAME, names[0], "sh", "-c", script)
    assert done.stdout == "1\n", done.stderr


def test_a_memory_limit(ctr, containerd, names):
    if not os.path.exists("/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        pytest.skip("did not run: written for cgroup v1")
    done = ctr("--detach", "--memory-limit", str(64 << 20), images.NAME, names[0], "sleep", "600")
    assert done.returncode == 0, done.stderr
    path = f"/sys/fs/cgroup/memory/default/{names[0]}/memory.limit_in_bytes"
    limit = containerd.read(path)
    containerd.good("tasks", "kill", "--signal", "9", names[0])
    eventually(lambda: status(containerd, names[0]) == "STOPPED", "it has stopped")
    containerd.good("tasks", "delete", names[0])
    containerd.good("containers", "delete", names[0])
    assert limit == f"{64 << 20}\n"


def test_seccomp(ctr, names):
    done = ctr("--rm", "--seccomp", images.NAME, names[0], "grep", "Seccomp:", "/proc/self/status")
    assert done.stdout.split() == ["Seccomp:", "2"], done.stderr


def test_exec(containerd, running):
    done = containerd.call("tasks", "exec", "--exec-id", "e1", running, "echo", "inside")
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr
    done = containerd.call("tasks", "exec", "--exec-id", "e2", running, "sh", "-c", "exit 9")
    assert done.returncode == 9


def test_the_processes_of_a_task(containerd, running):
    lines = containerd.good("tasks", "ps", running).splitlines()
    assert len(lines) == 2
    pid = int(lines[1].split()[0])
    assert containerd.read(f"/proc/{pid}/cmdline") == "sleep\x00600\x00"


def test_pause_and_resume(containerd, running):
    containerd.good("tasks", "pause", running)
    assert status(containerd, running) == "PAUSED"
    containerd.good("tasks", "resume", running)
    assert status(containerd, running) == "RUNNING"


def test_kill(containerd, running):
    assert status(containerd, running) == "RUNNING"
    containerd.good("tasks", "kill", "--signal", "9", running)
    eventually(lambda: status(containerd, running) == "STOPPED", "it has stopped")
    containerd.call("tasks", "delete", running)
    assert status(containerd, running) == ""


def test_metrics(containerd, running):
    said = containerd.good("tasks", "metrics", running)
    assert "memory.usage_in_bytes" in said or "memory" in said


def test_a_terminal(containerd, runtime, names):
    words = [*containerd.argv, "run", "--rm", "--tty", "--runtime", "io.containerd.runc.v2",
             "--runc-binary", runtime.program, images.NAME, names[0], "tty"]  # fmt: skip
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", " ".join(words), "/dev/null"],
        env=containerd.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=60,
    )  # fmt: skip
    assert "/dev/pts/0" in done.stdout, (done.stdout, done.stderr)
