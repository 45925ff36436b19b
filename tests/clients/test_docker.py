"""docker and dockerd: containerd's shim calls our program, as its daemon says."""

from __future__ import annotations

import json

import pytest

from tests.clients import images
from tests.oci.bed import eventually


@pytest.fixture
def run(docker):
    """Runs `docker run --rm`."""

    def run(*words: str, **how):
        return docker.call("run", "--rm", "--network", "none", *words, **how)

    return run


@pytest.fixture
def running(docker, names):
    """A container in the background, which is removed at the end."""
    docker.good("run", "--detach", "--network", "none", "--name", names[0], images.NAME, *WAITS)
    yield names[0]
    docker.call("rm", "--force", names[0])


# Ends at once by SIGTERM, and says so.
WAITS = ("sh", "-c", "trap 'echo bye; exit 3' TERM; echo begun; while :; do sleep 1; done")


def inspected(docker, name: str, what: str):
    return json.loads(docker.good("inspect", "--format", f"{{{{json {what}}}}}", name))


def test_the_runtime_is_the_one_under_test(docker, runtime):
    found = json.loads(docker.good("info", "--format", "{{json .Runtimes}}"))
    assert found["rut"]["path"] == runtime.program
    assert docker.good("info", "--format", "{{.DefaultRuntime}}") == "rut\n"


def test_run(run):
    done = run(images.NAME, "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [(("sh", "-c", "exit 7"), 7), (("/no/such",), 127), (("/etc/passwd",), 126)],
)
def test_the_status_of_run(run, words, status):
    done = run(images.NAME, *words)
    assert done.returncode == status, done.stderr


def test_standard_input(run):
    assert run("--interactive", images.NAME, "cat", input="a line\n").stdout == "a line\n"


def test_what_a_process_is_given(run):
    words = ("--user", "12:34", "--env", "A=b", "--workdir", "/tmp", "--hostname", "there")
    done = run(*words, images.NAME, "sh", "-c", "id -u; id -g; echo $A; pwd; hostname")
    assert done.stdout.split() == ["12", "34", "b", "/tmp", "there"], done.stderr


def test_limits(run):
    words = ("--memory", "64m", "--pids-limit", "99")
    done = run(*words, images.NAME, "sh", "-c", "cat /proc/self/cgroup")
    assert done.returncode == 0, done.stderr
    assert "/docker/" in done.stdout


def test_a_read_only_root_with_a_volume(run, tmp_path):
    script = "touch /x 2>/dev/null && exit 9; cat /data/file; touch /data/new"
    (tmp_path / "file").write_text("content\n")
    done = run("--read-only", "--volume", f"{tmp_path}:/data", images.NAME, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "content\n"), done.stderr
    assert (tmp_path / "new").exists()


def test_a_capability_more(run):
    script = "mkdir /m && mount -t tmpfs x /m && grep -c ' /m ' /proc/mounts"
    free = ("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined")
    assert run(*free, images.NAME, "sh", "-c", script).stdout == "1\n"
    assert run(images.NAME, "sh", "-c", script).returncode != 0


def test_exec(docker, running):
    done = docker.call("exec", "--env", "A=b", running, "sh", "-c", "echo $A; exit 5")
    assert (done.returncode, done.stdout) == (5, "b\n"), done.stderr
    done = docker.call("exec", running, "/no/such")
    assert done.returncode in (126, 127)
    assert "no such file or directory" in done.stdout + done.stderr


def test_logs_and_stop(docker, running):
    eventually(lambda: docker.good("logs", running) == "begun\n", "it has begun")
    docker.good("stop", "--time", "60", running)
    assert inspected(docker, running, ".State.ExitCode") == 3
    assert docker.good("logs", running) == "begun\nbye\n"


def test_kill(docker, running):
    docker.good("kill", running)
    eventually(lambda: not inspected(docker, running, ".State.Running"), "it has ended")
    assert inspected(docker, running, ".State.ExitCode") == 137


def test_pause(docker, running):
    docker.good("pause", running)
    assert inspected(docker, running, ".State.Status") == "paused"
    docker.good("unpause", running)
    assert docker.good("exec", running, "echo", "again") == "again\n"


def test_restart(docker, running):
    before = inspected(docker, running, ".State.Pid")
    docker.good("restart", "--time", "60", running)
    assert inspected(docker, running, ".State.Running")
    assert inspected(docker, running, ".State.Pid") not in (0, before)


def test_top(docker, running):
    assert "sh -c trap" in docker.good("top", running)


def test_update(docker, running):
    docker.good("update", "--cpu-shares", "200", running)
    assert inspected(docker, running, ".HostConfig.CpuShares") == 200
    identifier = inspected(docker, running, ".Id")
    path = f"/sys/fs/cgroup/cpu/docker/{identifier}/cpu.shares"
    assert docker.read(path) == "200\n"
