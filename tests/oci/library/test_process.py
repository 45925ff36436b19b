"""Each field of a process, asserted from inside; wait, pid and signal before and after."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apptainer_py.runtime.process import Process, ProcessError, ProcessSettings, pid_of
from tests.oci import bed as beds
from tests.oci.bed import PROBE

KILL, CHOWN = 5, 0
SETS = ("bounding", "permitted", "effective", "inheritable", "ambient")
_F_GET_SEALS = 1034


def test_args(facts):
    assert facts(args=(PROBE, "one", "", "two words"))["argv"] == [PROBE, "one", "", "two words"]


def test_env(facts):
    found = facts(env=("PATH=/bin", "ONE=1", "TWO=a=b", "HOME=/here"))
    assert sorted(found["env"]) == ["HOME=/here", "ONE=1", "PATH=/bin", "TWO=a=b"]


def test_what_is_not_given_is_as_configured(facts, bundle):
    bundle.process["env"] = ["PATH=/bin", "CONFIGURED=yes"]
    bundle.process["user"] = {"uid": 7, "gid": 8, "additionalGids": [9]}
    bundle.process["cwd"] = "/tmp"
    bundle.process["noNewPrivileges"] = True
    bundle.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]
    found = facts()
    assert "CONFIGURED=yes" in found["env"]
    assert (found["uid"][0], found["gid"][0], found["groups"]) == (7, 8, [9])
    assert (found["cwd"], found["no_new_privs"]) == ("/tmp", 1)
    assert found["rlimits"][7] == [77, 99]


def test_user_and_groups(facts):
    found = facts(uid=12, gid=34, additional_groups=(56, 78))
    assert (found["uid"], found["gid"]) == ([12, 12, 12], [34, 34, 34])
    assert found["groups"] == [56, 78]


def test_umask(facts):
    assert facts(umask=0o27)["umask"] == 0o27


def test_cwd(facts):
    assert facts(cwd="/var/tmp")["cwd"] == "/var/tmp"


def test_streams_that_are_files_and_pipes(home):
    container = home.sleeping()
    reading, writing = os.pipe()
    out, err = home.desk.place / "out", home.desk.place / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        settings = ProcessSettings(
            args=("sh", "-c", "cat; echo error >&2"),
            stdin=reading,
            stdout=stdout.fileno(),
            stderr=stderr.fileno(),
        )
        process = Process(settings)
        container.start(process)
    os.close(reading)
    os.write(writing, b"through\n")
    os.close(writing)
    assert process.wait() == 0
    assert (out.read_text(), err.read_text()) == ("through\n", "error\n")


SCRIPT = """
import sys
from apptainer_py.runtime.library import Container
from apptainer_py.runtime.process import Process, ProcessSettings
root, name, program = sys.argv[1:]
process = Process(ProcessSettings(args=("sh", "-c", "cat; echo error >&2; exit 3")))
Container(root, name, launcher=program).start(process)
sys.exit(process.wait())
"""


def test_streams_that_are_inherited(home, repository):
    container = home.sleeping()
    words = [container.root, container.name, home.desk.runtime.program]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        input="through\n", capture_output=True, text=True, cwd=repository, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "through\n", "error\n")


def test_extra_files_and_no_descriptor_of_ours(facts, home):
    for name in ("a", "b"):
        (home.desk.place / name).write_text(name)
    kept = [os.open(home.desk.place / name, os.O_RDONLY) for name in ("a", "b")]
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    found = facts(extra_files=tuple(kept))["fds"]
    for fd in (*kept, other):
        os.close(fd)
    assert sorted(found) == ["0", "1", "2", "3", "4"]
    assert [Path(found[number]).name for number in ("3", "4")] == ["a", "b"]


def test_without_extra_files_there_are_three(facts):
    assert sorted(facts()["fds"]) == ["0", "1", "2"]


@pytest.mark.parametrize("name", SETS)
def test_capabilities(facts, name):
    sets = {"bounding": ["CAP_KILL"], "effective": [], "permitted": []}
    sets |= {one: ["CAP_KILL"] for one in SETS[: SETS.index(name) + 1]}
    found = facts(uid=1000, gid=1000, capabilities=sets)["capabilities"]
    assert found["bounding"] == 1 << KILL
    # Without ambient ones, an execve by an ordinary user keeps nothing but what is inheritable.
    expected = 1 << KILL if name == "ambient" else 0
    assert found["effective"] == found["permitted"] == found["ambient"] == expected
    assert found["inheritable"] == (1 << KILL if name in ("inheritable", "ambient") else 0)


def test_capabilities_of_root(facts):
    sets = {one: ["CAP_CHOWN", "CAP_KILL"] for one in ("bounding", "effective", "permitted")}
    found = facts(capabilities=sets)["capabilities"]
    assert found["effective"] == found["permitted"] == 1 << KILL | 1 << CHOWN


def test_an_unknown_capability_is_a_message(home):
    container = home.sleeping()
    process = Process(
        ProcessSettings(args=("true",), capabilities={"bounding": ["CAP_NONE"], "ambient": []})
    )
    container.start(process)
    assert process.wait() == 0
    text = "ignoring unknown or unavailable capabilities: [CAP_NONE]"
    assert process.messages == (("warning", text),)


@pytest.mark.parametrize("value", [True, False])
def test_no_new_privileges(facts, bundle, value):
    bundle.process["noNewPrivileges"] = not value
    assert facts(no_new_privileges=value)["no_new_privs"] == int(value)


def test_rlimits(facts):
    found = facts(rlimits=({"type": "RLIMIT_CORE", "soft": 3, "hard": 5},))
    assert found["rlimits"][4] == [3, 5]


def test_scheduler(facts):
    found = facts(scheduler={"policy": "SCHED_BATCH", "nice": 7})["scheduler"]
    assert (found["policy"], found["nice"]) == (3, 7)


def test_io_priority(facts):
    wanted = {"class": "IOPRIO_CLASS_BE", "priority": 6}
    assert facts(io_priority=wanted)["io_priority"] == 2 << 13 | 6


def test_exec_cpu_affinity(home):
    container = home.sleeping()
    output = home.desk.place / "cpus"
    last = max(os.sched_getaffinity(0))
    with output.open("w") as stream:
        affinity = {"initial": "0", "final": f"{last}"}
        settings = ProcessSettings(
            args=(PROBE,), stdout=stream.fileno(), exec_cpu_affinity=affinity
        )
        process = Process(settings)
        container.start(process)
        assert process.wait() == 0
    assert json.loads(output.read_text())["cpus"] == [last]


def test_sub_cgroup_paths(home):
    container = home.sleeping()
    groups = Path(beds.cgroup_folder("pids", beds.own_cgroup("pids"))) / container.name
    (groups / "below").mkdir()
    process = Process(ProcessSettings(args=("sleep", "600"), sub_cgroup_paths=("pids:below",)))
    container.start(process)
    assert (groups / "below/cgroup.procs").read_text() == f"{process.pid()}\n"
    process.signal(signal.SIGKILL)
    assert process.wait() == 137
    with pytest.raises(ProcessError, match="is not a sub cgroup path"):
        container.start(Process(ProcessSettings(args=("true",), sub_cgroup_paths=("../x",))))
    (groups / "below").rmdir()


def test_sub_cgroup_paths_of_a_first_process(home):
    settings = ProcessSettings(args=("true",), init=True, sub_cgroup_paths=("x",))
    with pytest.raises(ProcessError, match="sub-cgroup paths are for"):
        home.container().run(Process(settings))


@pytest.mark.parametrize("init", [True, False])
def test_console_socket_and_size(home, init):
    container = home.container() if init else home.sleeping()
    path = home.desk.place / "console"
    listener, receive = beds.pseudo_terminal_from(path)
    settings = ProcessSettings(
        args=("sh", "-c", "tty; stty size; read x; echo got $x"),
        console_socket=str(path),
        console_width=71,
        console_height=17,
        init=init,
    )
    process = Process(settings)
    container.run(process)
    terminal = receive()
    listener.close()
    os.write(terminal, b"word\n")
    shown = b""
    while b"got word" not in shown:
        shown += os.read(terminal, 4096)
    assert b"17 71" in shown
    assert re.search(rb"/dev/(pts/\d+|console)", shown)
    assert process.wait() == 0
    os.close(terminal)


@pytest.mark.parametrize(("init", "word"), [(True, b"standard"), (False, b"setns")])
def test_pidfd_socket(home, init, word):
    container = home.container() if init else home.sleeping()
    path = home.desk.place / "pidfd"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(beds.DEADLINE_S)
        settings = ProcessSettings(args=("sleep", "600"), pidfd_socket=str(path), init=init)
        process = Process(settings)
        container.run(process)
        connection, _ = listener.accept()
        with connection:
            said, fds, _, _ = socket.recv_fds(connection, 64, 1)
    assert said == word
    assert pid_of(fds[0]) == process.pid()
    signal.pidfd_send_signal(fds[0], signal.SIGTERM if not init else signal.SIGKILL)
    os.close(fds[0])
    assert process.wait() == (137 if init else 143)


def test_label_and_profile_of_what_this_machine_lacks(home):
    container = home.sleeping()
    if not os.path.exists("/sys/fs/selinux/enforce"):
        with pytest.raises(ProcessError, match="selinux is disabled or not supported"):
            container.start(Process(ProcessSettings(args=("true",), label="a:b:c:d")))
    if not os.path.exists("/sys/kernel/security/apparmor"):
        with pytest.raises(ProcessError, match="apparmor failed to apply profile"):
            container.start(Process(ProcessSettings(args=("true",), apparmor_profile="none")))


def test_log_level(home):
    container = home.sleeping()
    quiet = Process(ProcessSettings(args=("true",)))
    container.start(quiet)
    assert quiet.wait() == 0
    assert quiet.messages == ()
    told = Process(ProcessSettings(args=("true",), log_level=5))
    container.start(told)
    assert told.wait() == 0
    assert all(level == "debug" for level, _ in told.messages)
    assert told.messages


# ---- wait, pid, signal ----


def test_before_the_start_and_after_the_end(home):
    container = home.sleeping()
    process = Process(ProcessSettings(args=("sh", "-c", "exit 5")))
    for ask in (process.pid, process.wait, lambda: process.signal(9)):
        with pytest.raises(ProcessError, match=r"^invalid process$"):
            ask()
    container.start(process)
    pid = process.pid()
    assert process.wait() == process.wait() == 5
    assert process.pid() == pid > 0
    with pytest.raises(ProcessError, match=r"^os: process already finished$"):
        process.signal(9)


def test_a_signal(home):
    container = home.sleeping()
    process = Process(ProcessSettings(args=("sleep", "600")))
    container.start(process)
    assert sorted(container.processes()) == sorted([container.state()["pid"], process.pid()])
    process.signal(signal.SIGTERM)
    assert process.wait() == 143


def test_after_the_end_but_before_the_wait(home):
    container = home.sleeping()
    process = Process(ProcessSettings(args=("true",)))
    container.start(process)

    def refused() -> bool:
        try:
            process.signal(0)
        except ProcessError as error:
            assert str(error) == "os: process already finished"
            return True
        return False

    beds.eventually(refused, "it has ended and was reaped by its stand-in")
    assert process.wait() == 0


def test_a_process_starts_once(home):
    container = home.sleeping()
    process = Process(ProcessSettings(args=("true",)))
    container.start(process)
    with pytest.raises(ProcessError, match="was started before"):
        container.start(process)
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("word", "text"),
    [("nosuch", "executable file not found in $PATH"), ("/nosuch", "no such file or directory")],
)
@pytest.mark.parametrize("init", [True, False])
def test_what_cannot_be_started_says_why(home, init, word, text):
    container = home.container() if init else home.sleeping()
    process = Process(ProcessSettings(args=(word,), init=init))
    with pytest.raises(ProcessError, match=re.escape(text)):
        container.run(process)
    with pytest.raises(ProcessError, match="invalid process"):
        process.pid()
    assert (container.name in os.listdir(container.root)) is not init


# ---- the container ----


def test_the_life_of_a_container(home):
    container = home.container()
    first = Process(ProcessSettings(args=("sleep", "600"), init=True))
    container.start(first)
    state = container.state()
    assert (container.status(), state["pid"]) == ("created", first.pid())
    assert state["bundle"] == str(home.bundle.path)
    with pytest.raises(ProcessError, match="container already has init process"):
        container.start(Process(ProcessSettings(args=("true",), init=True)))
    container.exec()
    assert container.status() == "running"
    with pytest.raises(ProcessError, match="cannot start an already running container"):
        container.exec()
    container.pause()
    assert container.status() == "paused"
    container.resume()
    with pytest.raises(ProcessError, match="that is not stopped: running"):
        container.destroy()
    container.signal(signal.SIGKILL)
    assert first.wait() == 137
    assert container.status() == "stopped"
    with pytest.raises(ProcessError, match="container not running"):
        container.signal(signal.SIGKILL)
    container.destroy()
    with pytest.raises(ProcessError, match="container does not exist"):
        container.state()


def test_a_name_that_is_taken(home):
    taken = home.sleeping()
    again = home.container(taken.name)
    with pytest.raises(ProcessError, match="container with given ID already exists"):
        again.run(Process(ProcessSettings(args=("true",), init=True)))
    assert taken.status() == "running"


def test_a_bundle_that_is_none(home):
    home.bundle.write()
    container = home.container()
    container.bundle = "/nosuch"
    with pytest.raises(ProcessError, match="no such file or directory"):
        container.run(Process(ProcessSettings(args=("true",), init=True)))


# ---- what enters a container ----


def test_the_program_that_enters_is_a_sealed_copy(home):
    container = home.container()
    first = Process(ProcessSettings(args=("sleep", "600"), init=True))
    container.start(first)
    exe = f"/proc/{first.pid()}/exe"
    assert os.readlink(exe).startswith("/memfd:apptainer-py-init")
    with pytest.raises(OSError, match=r"Text file busy|Operation not permitted"):
        os.open(exe, os.O_WRONLY)
    fd = os.open(exe, os.O_RDONLY)
    seals = fcntl.fcntl(fd, _F_GET_SEALS)
    os.close(fd)
    assert seals & 0xF == 0xF, "sealed against writes, growth, shrinking and other seals"
    container.exec()
    first.signal(signal.SIGKILL)
    assert first.wait() == 137


def test_an_interpreter_line_of_the_container_reaches_nothing_of_the_host(home):
    """CVE-2019-5736: a payload that is a script run by /proc/self/exe finds the sealed copy."""
    evil = home.bundle.rootfs / "evil"
    evil.write_text("#!/proc/self/exe\n")
    evil.chmod(0o755)
    container = home.container()
    output = home.desk.place / "output"
    with output.open("w") as stream:
        settings = ProcessSettings(
            args=("/evil",), init=True, stdout=stream.fileno(), stderr=stream.fileno()
        )
        process = Process(settings)
        container.run(process)
        assert process.wait() == 255
    assert "not for direct use" in output.read_text()
