"""`exec`: one more process in a container, by runc's command line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.oci.bed import PROBE, eventually

CHOWN, KILL, RAW = 0, 5, 13


@pytest.fixture
def container(bed, bundle):
    return bed.sleeping(bundle)


def facts(container, *flags: str) -> dict:
    done = container.exec(PROBE, flags=flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_exec_runs_in_all_namespaces(container):
    done = container.exec(
        "sh", "-c", "hostname; ps | grep -c 'sleep 600'; readlink /proc/self/ns/net"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[0] == "runc"
    assert lines[2] == os.readlink(f"/proc/{container.pid}/ns/net")


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_status_of_exec(container, status):
    assert container.exec(PROBE, "status", str(status)).returncode == status


def test_the_status_of_exec_after_a_signal(container):
    assert container.exec("sh", "-c", "kill -TERM $$").returncode == 128 + 15


def test_exec_takes_the_configured_process(container, bed):
    found = facts(container)
    assert found["cwd"] == "/"
    assert "TERM=xterm" in found["env"]
    assert found["no_new_privs"] == 1
    assert found["capabilities"]["bounding"] == 1 << 29 | 1 << KILL | 1 << 10
    assert sorted(found["fds"], key=int) == ["0", "1", "2"]
    assert found["pdeathsig"] == 0


def test_cwd(container):
    assert facts(container, "--cwd", "/usr/bin")["cwd"] == "/usr/bin"


def test_cwd_that_is_not_there(container):
    done = container.exec("true", flags=("--cwd", "/no/such"))
    assert done.returncode == 255
    assert "no such file or directory" in done.stderr


def test_env(container):
    found = facts(container, "-e", "A=1", "-e", "TERM=other", "-e", "A=2")["env"]
    assert "A=2" in found
    assert "A=1" not in found
    assert "TERM=other" in found
    assert "TERM=xterm" not in found


@pytest.mark.parametrize(
    ("word", "uid", "gid"),
    [("1000", 1000, 0), ("1000:1001", 1000, 1001), ("0:0", 0, 0), ("1", 1, 0), ("4321:7", 4321, 7)],
)
def test_user(container, word, uid, gid):
    found = facts(container, "--user", word)
    assert (found["uid"], found["gid"]) == ([uid] * 3, [gid] * 3)


@pytest.mark.parametrize("word", ["worker", "1x", "-1", "1:2:3", "1:x", "99999999999", "0x0", " 1"])
def test_a_user_that_is_no_number(container, word):
    done = container.exec("true", flags=("--user", word))
    assert done.returncode != 0
    assert done.stdout == ""


def test_additional_gids(container):
    assert sorted(facts(container, "-g", "5", "-g", "9")["groups"]) == [5, 9]


def test_no_new_privs(bed, bundle):
    bundle.process["noNewPrivileges"] = False
    container = bed.sleeping(bundle)
    assert facts(container)["no_new_privs"] == 0
    assert facts(container, "--no-new-privs")["no_new_privs"] == 1


def test_a_capability(container):
    found = facts(container, "--cap", "CAP_NET_RAW", "--cap", "CAP_CHOWN")["capabilities"]
    wanted = 1 << 29 | 1 << KILL | 1 << 10 | 1 << RAW | 1 << CHOWN
    assert (found["bounding"], found["effective"], found["permitted"]) == (wanted,) * 3
    assert found["inheritable"] == found["ambient"] == 0


def test_a_process_file(container, bed):
    path = bed.place / "process.json"
    process = {
        "user": {"uid": 12, "gid": 34, "additionalGids": [56]},
        "args": [PROBE, "word"],
        "env": ["PATH=/bin", "ONLY=this", "HOME=/"],
        "cwd": "/tmp",
        "noNewPrivileges": False,
        "capabilities": {name: ["CAP_CHOWN"] for name in ("bounding", "permitted")},
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}],
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
        "scheduler": {"policy": "SCHED_BATCH", "nice": 3},
    }
    path.write_text(json.dumps(process))
    done = bed.call("exec", "--process", path, container.id)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["argv"] == [PROBE, "word"]
    assert sorted(found["env"]) == ["HOME=/", "ONLY=this", "PATH=/bin"]
    assert (found["uid"][0], found["gid"][0], found["groups"]) == (12, 34, [56])
    assert (found["cwd"], found["no_new_privs"]) == ("/tmp", 0)
    assert found["capabilities"]["bounding"] == 1 << CHOWN
    assert found["rlimits"][4] == [1, 2]
    assert found["io_priority"] == 2 << 13 | 6
    assert (found["scheduler"]["policy"], found["scheduler"]["nice"]) == (3, 3)


def test_umask_of_a_process_file(container, bed):
    path = bed.place / "process.json"
    user = {"uid": 0, "gid": 0, "umask": 0o77}
    path.write_text(json.dumps({"user": user, "args": [PROBE], "cwd": "/", "env": ["PATH=/bin"]}))
    done = bed.call("exec", "--process", path, container.id)
    assert json.loads(done.stdout)["umask"] == 0o77


def test_exec_affinity(container, bed):
    if os.cpu_count() == 1:
        pytest.skip("did not run: one processor")
    process = {"user": {"uid": 0, "gid": 0}, "args": [PROBE], "cwd": "/", "env": ["PATH=/bin"]}
    path = bed.place / "process.json"
    path.write_text(json.dumps(process | {"execCPUAffinity": {"initial": "0", "final": "1"}}))
    done = bed.call("exec", "--process", path, container.id)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpus"] == [1]


def test_detached(container, bed):
    pid_file = bed.place / "exec.pid"
    words = ("exec", "--detach", "--pid-file", pid_file, container.id, "sleep", "600")
    done = subprocess.run(bed.argv(*words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, timeout=60)  # fmt: skip
    assert done.returncode == 0
    pid = int(pid_file.read_text())
    assert os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{container.pid}/ns/pid")
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00600\x00"
    assert sorted(json.loads(bed.good("ps", "-f", "json", container.id).stdout)) == sorted(
        [container.pid, pid]
    )
    container.finish()


def test_standard_streams(container):
    done = container.exec("sh", "-c", "cat; echo wrong >&2", input="given")
    assert (done.stdout, done.stderr) == ("given", "wrong\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["no-such"], "executable file not found in $PATH"),
        (["/no/such"], "no such file or directory"),
        (["/etc/passwd"], "permission denied"),
    ],
    ids=["name", "path", "mode"],
)
def test_a_program_that_does_not_run(container, words, text):
    done = container.exec(*words)
    assert done.returncode == 255
    assert text in done.stderr
    assert "exec failed: " in done.stderr


def test_exec_without_a_program(container, bed):
    done = bed.call("exec", container.id)
    assert done.returncode != 0
    assert done.stderr or done.stdout


def test_exec_in_a_stopped_container(bed, bundle):
    container = bed.started(bundle.args("true"))
    container.wait()
    done = container.exec("true")
    assert done.returncode == 255
    assert "cannot exec in a stopped container" in done.stderr


def test_exec_in_a_created_container(bed, bundle):
    container = bed.create(bundle.args("true"))
    assert container.exec("echo", "inside").stdout == "inside\n"


def test_options_after_the_program_are_its_own(container):
    done = container.exec("echo", "--env", "A=1", "-t", "--help")
    assert done.stdout == "--env A=1 -t --help\n"


def test_a_terminal(container, bed):
    """`--tty` in the foreground: the pty of ours is copied to the caller's terminal."""
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.execv(bed.runtime.program, bed.argv("exec", "--tty", container.id, "tty"))
    said = b""
    try:
        while True:
            piece = os.read(master, 4096)
            if not piece:
                break
            said += piece
    except OSError:
        pass
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said
    assert b"/dev/pts/" in said


def test_the_tenant_ends_with_the_container(container, bed):
    process = subprocess.Popen(bed.argv("exec", container.id, "tail", "-f", "/dev/null"))
    # Two processes are not enough: ours is in the cgroup before it has joined the namespaces.
    eventually(lambda: "tail -f" in bed.good("ps", container.id).stdout, "it runs")
    container.kill()
    assert process.wait(timeout=20) == 128 + 9


def test_exec_in_a_user_namespace(bed, bundle):
    container = bed.sleeping(bundle.user_space())
    found = facts(container)
    assert found["uid"] == [0] * 3
    done = container.exec("cat", "/proc/self/uid_map")
    assert done.stdout.split() == ["0", "100000", "65536"]


def test_signals_to_exec_reach_the_process(container, bed):
    script = "trap 'echo got; exit 6' TERM; echo ready; while :; do sleep 0.1; done"
    argv = bed.argv("exec", container.id, "sh", "-c", script)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (6, "got\n")


def test_a_group_that_is_no_number(container):
    done = container.exec("id", flags=("-g", "wheel"))
    assert done.returncode == 1
    assert 'invalid value "wheel" for flag -g' in done.stdout + done.stderr


def test_exec_wait_fifo(container, bed):
    """The program begins when the fifo is opened for reading; exec --detach does not wait."""
    fifo, pid_file = bed.place / "fifo", bed.place / "pid"
    os.mkfifo(fifo)
    argv = bed.argv("exec", "-d", "--pid-file", pid_file, "--exec-wait-fifo", fifo, container.id)
    script = "echo begun > /dev/shm/mark; exec sleep 600"
    done = subprocess.run([*argv, "sh", "-c", script], stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0
    assert pid_file.read_text().isdigit()
    assert container.exec("test", "-e", "/dev/shm/mark").returncode == 1
    assert fifo.read_text() == "0"
    eventually(
        lambda: container.exec("test", "-e", "/dev/shm/mark").returncode == 0, "it has begun"
    )
    container.finish()


@pytest.mark.parametrize("name", ["a file", "nothing"])
def test_exec_wait_fifo_that_is_none(container, bed, name):
    path = "/etc/passwd" if name == "a file" else bed.place / "nothing"
    done = container.exec("true", flags=("--exec-wait-fifo", str(path)))
    assert done.returncode == 255
    said = "is not a fifo" if name == "a file" else "failed to open exec wait fifo"
    assert said in done.stderr
