"""podman with our program as its runtime: the commands that people type."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.clients import images
from tests.oci.bed import eventually

PLAIN = ["--network", "none"]


@pytest.fixture
def detached(podman) -> Iterator:
    """Starts a container in the background; it is removed at the end."""
    made: list[str] = []

    def start(*words: str) -> str:
        made.append(podman.good("run", "--detach", *PLAIN, *words).strip())
        return made[-1]

    yield start
    for name in made:
        podman.call("rm", "--force", "--time", "0", name)


def run(podman, *words: str, **how):
    return podman.call("run", "--rm", *PLAIN, *words, **how)


def inspected(podman, name: str, form: str) -> str:
    return podman.good("inspect", "--format", form, name).strip()


def test_run(podman):
    done = run(podman, images.NAME, "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


@pytest.mark.parametrize("status", [0, 3, 255])
def test_the_status_of_run(podman, status):
    assert run(podman, images.NAME, "sh", "-c", f"exit {status}").returncode == status


def test_a_program_that_is_not_there(podman):
    assert run(podman, images.NAME, "/no/such").returncode == 127
    assert run(podman, images.NAME, "nosuch").returncode == 127


def test_a_program_that_is_not_executable(podman):
    assert run(podman, images.NAME, "/etc/passwd").returncode == 126


def test_standard_input(podman):
    done = run(podman, "--interactive", images.NAME, "cat", input="given")
    assert (done.returncode, done.stdout) == (0, "given"), done.stderr


def test_the_user_the_directory_and_the_environment(podman):
    options = ["--user", "1000:2000", "--workdir", "/tmp", "--env", "A=b"]
    done = run(podman, *options, images.NAME, "sh", "-c", "id -u; id -g; pwd; echo $A; umask")
    assert done.stdout.split() == ["1000", "2000", "/tmp", "b", "0022"], done.stderr


def test_a_volume(podman, tmp_path):
    (tmp_path / "file").write_text("content\n")
    done = run(podman, "--volume", f"{tmp_path}:/data:ro", images.NAME, "cat", "/data/file")
    assert done.stdout == "content\n", done.stderr
    done = run(podman, "--volume", f"{tmp_path}:/data:ro", images.NAME, "touch", "/data/new")
    assert done.returncode != 0
    done = run(podman, "--volume", f"{tmp_path}:/data", images.NAME, "touch", "/data/new")
    assert (tmp_path / "new").exists()


def test_a_tmpfs_and_a_read_only_root(podman):
    options = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/scratch"]
    done = run(podman, *options, images.NAME, "sh", "-c", "touch /scratch/x && ! touch /file")
    assert done.returncode == 0, done.stderr


def test_capabilities(podman):
    script = "grep CapEff /proc/self/status"
    plain = run(podman, images.NAME, "sh", "-c", script).stdout
    none = run(podman, "--cap-drop", "all", images.NAME, "sh", "-c", script).stdout
    some = run(podman, "--cap-add", "NET_ADMIN", images.NAME, "sh", "-c", script).stdout
    assert int(none.split()[1], 16) == 0
    assert int(some.split()[1], 16) == int(plain.split()[1], 16) | 1 << 12


def test_the_seccomp_profile_of_podman(podman):
    done = run(podman, images.NAME, "grep", "Seccomp:", "/proc/self/status")
    assert done.stdout.split() == ["Seccomp:", "2"], done.stderr
    options = ["--security-opt", "seccomp=unconfined"]
    done = run(podman, *options, images.NAME, "grep", "Seccomp:", "/proc/self/status")
    assert done.stdout.split() == ["Seccomp:", "0"], done.stderr


def test_no_new_privileges(podman):
    options = ["--security-opt", "no-new-privileges"]
    done = run(podman, *options, images.NAME, "grep", "NoNewPrivs", "/proc/self/status")
    assert done.stdout.split() == ["NoNewPrivs:", "1"], done.stderr


def test_limits(podman):
    options = ["--memory", "64m", "--pids-limit", "50", "--cpu-shares", "300"]
    script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
    done = run(podman, *options, images.NAME, "sh", "-c", script)
    if os.path.isdir("/sys/fs/cgroup/memory"):
        assert done.stdout.split() == ["67108864", "50"], done.stderr


def test_ulimits(podman):
    options = ["--ulimit", "nofile=100:200", "--ulimit", "nproc=4096:4096"]
    done = run(podman, *options, images.NAME, "sh", "-c", "ulimit -n; ulimit -Hn")
    assert done.stdout.split() == ["100", "200"], done.stderr


def test_a_device(podman):
    done = run(
        podman, "--device", "/dev/fuse", images.NAME, "sh", "-c", ": <>/dev/fuse && echo open"
    )
    assert done.stdout == "open\n", done.stderr


def test_a_sysctl(podman):
    done = run(
        podman, "--sysctl", "kernel.shmmax=65536", images.NAME, "cat", "/proc/sys/kernel/shmmax"
    )
    assert done.stdout == "65536\n", done.stderr


def test_privileged(podman):
    done = run(podman, "--privileged", images.NAME, "sh", "-c",
               "mount -t tmpfs x /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs x /mnt; "
               "grep ' /mnt ' /proc/mounts; ls /dev | wc -l; "
               "echo 1 >/proc/sys/kernel/shm_rmid_forced")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tmpfs" in done.stdout
    assert int(done.stdout.split()[-1]) > 20


def test_an_init_process(podman):
    assert run(podman, "--init", images.NAME, "true").returncode == 0


def test_the_network_of_the_host(podman):
    done = podman.call(
        "run", "--rm", "--network", "host", images.NAME, "readlink", "/proc/self/ns/net"
    )
    assert done.stdout.strip() == os.readlink("/proc/self/ns/net"), done.stderr


def test_the_pid_namespace_of_the_host(podman):
    done = run(podman, "--pid", "host", images.NAME, "readlink", "/proc/self/ns/pid")
    expected = os.readlink(f"/proc/{podman.household.first}/ns/pid")
    assert done.stdout.strip() == expected, done.stderr


def test_a_user_namespace(podman):
    options = ["--uidmap", "0:100000:5000", "--gidmap", "0:100000:5000"]
    done = run(podman, *options, images.NAME, "cat", "/proc/self/uid_map")
    assert done.stdout.split() == ["0", "100000", "5000"], done.stderr


def test_without_cgroups(podman):
    done = run(podman, "--cgroups", "disabled", images.NAME, "echo", "hello")
    assert done.stdout == "hello\n", done.stderr


def test_a_terminal(podman):
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command",
         " ".join([*podman.argv, "run", "--rm", "--tty", *PLAIN, images.NAME, "tty"]), "/dev/null"],
        env=podman.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=60,
    )  # fmt: skip
    assert "/dev/pts/0" in done.stdout, (done.stdout, done.stderr)


def test_detached_logs_and_wait(podman, detached):
    name = detached(images.NAME, "sh", "-c", "echo out; echo err >&2; exit 4")
    assert podman.good("wait", name).strip() == "4"
    done = podman.call("logs", name)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert inspected(podman, name, "{{.State.Status}}") == "exited"


def test_exec(podman, detached):
    name = detached(images.NAME, "sleep", "600")
    assert podman.good("exec", name, "hostname").strip() == name[:12]
    assert podman.call("exec", name, "sh", "-c", "exit 9").returncode == 9
    assert podman.call("exec", name, "/no/such").returncode == 127
    done = podman.call("exec", "--interactive", name, "cat", input="given")
    assert (done.returncode, done.stdout) == (0, "given"), done.stderr
    done = podman.call(
        "exec", "--user", "1000", "--workdir", "/tmp", name, "sh", "-c", "id -u; pwd"
    )
    assert done.stdout.split() == ["1000", "/tmp"], done.stderr


def test_exec_in_the_background(podman, detached):
    name = detached(images.NAME, "sleep", "600")
    podman.good("exec", "--detach", name, "sh", "-c", "echo here >/tmp/told; sleep 600")
    eventually(lambda: podman.call("exec", name, "cat", "/tmp/told").stdout == "here\n", "it runs")


def test_stop(podman, detached):
    name = detached(images.NAME, "sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done")
    podman.good("stop", "--time", "20", name)
    assert inspected(podman, name, "{{.State.ExitCode}}") == "5"


def test_stop_by_force(podman, detached):
    name = detached(images.NAME, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    podman.good("stop", "--time", "0", name)
    assert inspected(podman, name, "{{.State.ExitCode}}") == "137"


def test_kill(podman, detached):
    name = detached(
        images.NAME, "sh", "-c", "trap 'exit 6' USR1; echo up; while :; do sleep 0.1; done"
    )
    eventually(lambda: "up" in podman.good("logs", name), "it is up")
    podman.good("kill", "--signal", "USR1", name)
    assert podman.good("wait", name).strip() == "6"


def test_pause(podman, detached):
    name = detached(images.NAME, "sleep", "600")
    podman.good("pause", name)
    assert inspected(podman, name, "{{.State.Status}}") == "paused"
    assert podman.call("exec", name, "true").returncode != 0
    podman.good("unpause", name)
    assert inspected(podman, name, "{{.State.Status}}") == "running"


def test_stats(podman, detached):
    name = detached("--memory", "64m", images.NAME, "sleep", "600")
    found = json.loads(podman.good("stats", "--no-stream", "--format", "json", name))
    assert found[0]["id"] == name[:12]
    assert "67.11MB" in found[0]["mem_usage"]
    assert found[0]["pids"] == "1"


def test_top(podman, detached):
    name = detached(images.NAME, "sleep", "600")
    assert "sleep 600" in podman.good("top", name)


def test_update(podman, detached):
    name = detached("--memory", "64m", images.NAME, "sleep", "600")
    if "update" not in podman.good("--help"):
        pytest.skip("did not run: this podman has no update")
    podman.good("update", "--memory", "32m", name)
    pid = inspected(podman, name, "{{.State.Pid}}")
    lines = podman.read(f"/proc/{pid}/cgroup").splitlines()
    group = [line.split(":")[2] for line in lines if ":memory:" in line]
    if group:
        path = f"/sys/fs/cgroup/memory{group[0]}/memory.limit_in_bytes"
        assert podman.read(path) == f"{32 << 20}\n"


def test_restart(podman, detached):
    name = detached(images.NAME, "sleep", "600")
    first = inspected(podman, name, "{{.State.Pid}}")
    podman.good("restart", "--time", "0", name)
    assert inspected(podman, name, "{{.State.Status}}") == "running"
    assert inspected(podman, name, "{{.State.Pid}}") != first


def test_create_and_start(podman):
    name = podman.good("create", *PLAIN, images.NAME, "echo", "started").strip()
    assert podman.good("start", "--attach", name) == "started\n"
    podman.good("rm", name)


def test_copy_into_a_container(podman, detached, tmp_path):
    name = detached(images.NAME, "sleep", "600")
    (tmp_path / "file").write_text("copied")
    podman.good("cp", tmp_path / "file", f"{name}:/tmp/file")
    assert podman.good("exec", name, "cat", "/tmp/file") == "copied"


def test_a_pod_shares_namespaces(podman, detached):
    first = detached(images.NAME, "sleep", "600")
    second = detached("--ipc", f"container:{first}", "--pid", f"container:{first}", images.NAME,
                      "sleep", "601")  # fmt: skip
    assert "sleep 600" in podman.good("exec", second, "ps")
    podman.good("rm", "--force", "--time", "0", second)


def test_commit(podman, detached):
    name = detached(images.NAME, "sh", "-c", "echo kept >/kept; sleep 600")
    eventually(lambda: podman.call("exec", name, "cat", "/kept").stdout == "kept\n", "it is there")
    podman.good("commit", "--quiet", name, "localhost/committed")
    assert run(podman, "localhost/committed", "cat", "/kept").stdout == "kept\n"


def test_many_at_once(podman):
    argv = [*podman.argv, "run", "--rm", *PLAIN, images.NAME, "echo", "hello"]
    many = [
        subprocess.Popen(argv, env=podman.environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [process.communicate(timeout=100)[0] for process in many]
    assert said == ["hello\n"] * 6


def test_build(podman, tmp_path):
    lines = [
        f"FROM {images.NAME}", "RUN echo built >/built && id -u >/user", "WORKDIR /work",
        "COPY file /built-in/", 'ENTRYPOINT ["cat"]', 'CMD ["/built", "/built-in/file"]',
    ]  # fmt: skip
    (tmp_path / "Dockerfile").write_text("\n".join(lines) + "\n")
    (tmp_path / "file").write_text("copied\n")
    podman.good("build", "--quiet", "--network", "none", "--isolation", "oci",
                "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096",
                "--tag", "localhost/built", tmp_path)  # fmt: skip
    assert run(podman, "localhost/built").stdout == "built\ncopied\n"
