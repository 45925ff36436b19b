"""The process that stays with a container: log, streams, sockets, state and status."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import termios
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.oci.apptainer.conftest import Desk, command

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)"


@pytest.fixture
def bundle(desk: Desk) -> beds.Bundle:
    return desk.bundle()


# ---- the state ----


def test_the_state_of_a_container_from_its_making_to_its_end(desk, bundle):
    bundle.config["annotations"] = {"a": "b"}
    name = desk.make(bundle.shell("exit 7"), stdin=subprocess.DEVNULL)
    made = desk.state(name)
    assert list(made) == [
        "ociVersion", "id", "status", "pid", "bundle", "annotations", "createdAt",
        "attachSocket", "controlSocket",
    ]  # fmt: skip
    assert (made["status"], made["annotations"]) == ("created", {"a": "b"})
    assert made["bundle"] == str(bundle.path)
    desk.good("start", name)
    ended = desk.until(name, "stopped")
    assert made["createdAt"] < ended["startedAt"] <= ended["finishedAt"]
    assert (ended["exitCode"], ended["exitDesc"]) == (7, "exited with code 7")
    assert "pid" not in ended
    text = desk.good("state", name).stdout
    assert text.startswith('{\n\t"ociVersion": ')
    assert text.endswith("\n}\n")


def test_the_start_is_noted_when_start_returns(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("start", name)
    running = desk.state(name)
    assert running["status"] == "running"
    assert running["startedAt"] > running["createdAt"]
    assert running["pid"] > 0


def test_the_status_after_a_signal(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("start", name)
    desk.good("kill", "-t", "10", name, "KILL")
    ended = desk.state(name)
    assert ended["status"] == "stopped"
    assert (ended["exitCode"], ended["exitDesc"]) == (137, "interrupted by signal killed")


def test_a_container_that_others_start_is_seen(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    root = ("--root", str(desk.root))
    subprocess.run([desk.runtime.program, *root, "start", name], check=True, timeout=60)
    beds.eventually(lambda: "startedAt" in desk.state(name), "the start is noted")


def test_state_to_a_socket(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    listener = desk.listener("s")
    done = desk.good("state", "-s", listener.path, name)
    assert done.stdout == ""
    assert listener.next() == desk.state(name)
    assert "connect: no such file" in desk.fails("state", "-s", desk.place / "none", name)


# ---- the sync socket ----


def test_each_change_is_told(desk, bundle):
    listener = desk.listener("sync")
    name = desk.make(bundle.args("sleep", "600"), "--sync-socket", listener.path)
    creating, created = listener.next(), listener.next()
    assert (creating["status"], creating["id"]) == ("creating", name)
    assert "pid" not in creating
    assert created["status"] == "created"
    assert created == desk.state(name)
    desk.good("start", name)
    running = listener.next()
    assert running["status"] == "running"
    assert running["startedAt"]
    desk.good("pause", name)
    assert listener.next()["status"] == "paused"
    desk.good("resume", name)
    assert listener.next()["status"] == "running"
    desk.good("kill", "-f", name)
    ended = listener.next()
    assert (ended["status"], ended["exitCode"]) == ("stopped", 137)
    assert listener.quiet()


def test_nobody_listens(desk, bundle):
    name = desk.make(bundle.shell("exit 3"), "--sync-socket", desk.place / "nobody")
    assert "connect: no such file" in desk.err(name).read_text()
    desk.good("start", name)
    assert desk.until(name, "stopped")["exitCode"] == 3


def test_a_listener_that_takes_nothing_holds_nobody_up(desk, bundle):
    path = desk.place / "full"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        name = desk.make(bundle.shell("exit 3"), "--sync-socket", path)
        desk.good("start", name)
        assert desk.until(name, "stopped")["exitCode"] == 3
        desk.good("delete", name)


# ---- the log ----


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("kubernetes", f"{TIME} STREAM F TEXT"),
        ("basic", f"{TIME} STREAM TEXT"),
        ("json", f'{{"time":"{TIME}","stream":"STREAM","log":"TEXT"}}'),
    ],
    ids=["kubernetes", "basic", "json"],
)
def test_the_formats_of_the_log(desk, bundle, form, pattern):
    log = desk.place / "log"
    script = "echo one; echo two >&2; printf 'three\\r\\n'; printf last"
    name = desk.make(bundle.shell(script), "--log-path", log, "--log-format", form)
    assert stat.S_IMODE(log.stat().st_mode) == 0o640
    desk.good("start", name)
    desk.until(name, "stopped")
    lines = log.read_text().splitlines()
    found = sorted(lines, key=lambda line: "stderr" in line)
    texts = [("stdout", "one"), ("stdout", "three"), ("stdout", "last"), ("stderr", "two")]
    for line, (stream, text) in zip(found, texts, strict=True):
        wanted = pattern.replace("STREAM", stream).replace("TEXT", text)
        assert re.fullmatch(wanted, line), line


def test_the_log_is_kubernetes_and_beside_the_state_by_default(desk, bundle):
    name = desk.make(bundle.args("echo", "hello"))
    desk.good("start", name)
    desk.until(name, "stopped")
    text = (desk.folder(name) / f"{name}.log").read_text()
    assert re.fullmatch(rf"{TIME} stdout F hello\n", text)


def test_a_long_line_is_logged_in_parts(desk, bundle):
    log = desk.place / "log"
    name = desk.make(bundle.shell("head -c 40000 /dev/zero | tr '\\0' x; echo"), "-l", log)
    desk.good("start", name)
    desk.until(name, "stopped")
    rows = [line.split(" ", 3) for line in log.read_text().splitlines()]
    assert [(row[2], len(row[3])) for row in rows] == [("P", 16384), ("P", 16384), ("F", 7232)]


def test_the_log_of_anything_is_json(desk, bundle):
    log = desk.place / "log"
    script = r"""printf '"\\\t\033\001\r\177é\n'"""
    name = desk.make(bundle.shell(script), "-l", log, "--log-format", "json")
    desk.good("start", name)
    desk.until(name, "stopped")
    assert json.loads(log.read_text())["log"] == '"\\\t\x1b\x01\r\x7fé'


def test_the_log_is_opened_anew(desk, bundle):
    log = desk.place / "log"
    listener = desk.listener("sync")
    script = "echo before; read x; echo after"
    reading, writing = os.pipe()
    name = desk.make(bundle.shell(script), "-l", log, "-s", listener.path, stdin=reading)
    os.close(reading)
    desk.good("start", name)
    beds.eventually(lambda: "before" in log.read_text(), "the first line")
    log.rename(desk.place / "old")
    command(desk.folder(name) / "control.sock", b'{"reopenLog":true}')
    assert log.read_text() == ""
    os.write(writing, b"go\n")
    os.close(writing)
    desk.until(name, "stopped")
    assert "after" in log.read_text()
    assert "after" not in (desk.place / "old").read_text()


def test_a_log_that_cannot_be(desk, bundle):
    bundle.write()
    path = desk.place / "none/log"
    text = desk.fails("create", "-b", bundle.path, "-l", path, desk.name())
    assert text == f"open {path}: no such file or directory"
    text = desk.fails("create", "-b", bundle.path, "--log-format", "xml", desk.name())
    assert text == "log format xml is not supported"


# ---- streams and attach ----


def test_the_streams_of_create_are_the_containers(desk, bundle):
    reading, writing = os.pipe()
    name = desk.make(bundle.shell("cat; echo error >&2"), stdin=reading)
    os.close(reading)
    desk.good("start", name)
    os.write(writing, b"through\n")
    os.close(writing)
    desk.until(name, "stopped")
    assert desk.out(name).read_text() == "through\n"
    assert desk.err(name).read_text() == "error\n"


def waiting(desk: Desk, bundle: beds.Bundle, script: str) -> tuple[str, int]:
    """Start a container whose stdin stays open; return its name and who holds it open."""
    reading, writing = os.pipe()
    name = desk.make(bundle.shell(script), stdin=reading)
    os.close(reading)
    desk.good("start", name)
    return name, writing


def test_attached_clients_see_and_are_heard(desk, bundle):
    name, held = waiting(desk, bundle, "while read x; do echo got $x; [ $x = end ] && exit 5; done")
    one, two = desk.attach(name), desk.attach(name)
    one.socket.sendall(b"first\n")
    one.until(b"got first\n")
    two.until(b"got first\n")
    two.socket.sendall(b"end\n")
    assert one.rest() == two.rest() == b"got first\ngot end\n"
    assert desk.until(name, "stopped")["exitCode"] == 5
    os.close(held)


def test_what_a_client_says_before_it_goes_is_heard(desk, bundle):
    name, held = waiting(desk, bundle, "read x; echo $x")
    client = desk.attach(name)
    client.socket.sendall(b"word\n")
    client.close()
    desk.until(name, "stopped")
    assert desk.out(name).read_text() == "word\n"
    os.close(held)


def test_a_client_that_reads_nothing_holds_nobody_up(desk, bundle):
    name, held = waiting(desk, bundle, "read x; yes 0123456789abcdef | head -n 1500000; echo done")
    deaf, other = desk.attach(name), desk.attach(name)
    os.write(held, b"go\n")
    assert other.rest().endswith(b"done\n")
    assert desk.until(name, "stopped")["exitCode"] == 0
    assert desk.out(name).stat().st_size == len(other.got) == 1500000 * 17 + 5
    deaf.close()
    os.close(held)


def test_a_client_that_reads_nothing_is_let_go(desk, bundle):
    name, held = waiting(desk, bundle, "read x; yes 0123456789abcdef | head -n 2500000; echo done")
    deaf = desk.attach(name)
    os.write(held, b"go\n")
    assert desk.until(name, "stopped")["exitCode"] == 0
    assert desk.out(name).stat().st_size == 2500000 * 17 + 5
    assert len(deaf.rest()) < 1 << 20, "what was kept for it is gone"
    os.close(held)


def test_more_clients_than_there_is_room_for(desk, bundle):
    name, held = waiting(desk, bundle, "read x; echo $x")
    many = [desk.attach(name) for _ in range(24)]
    refused = [client for client in many[16:] if client.socket.recv(1) == b""]
    assert len(refused) == 8
    for client in many[:10]:
        client.close()
    os.write(held, b"word\n")
    assert many[15].rest() == b"word\n"
    os.close(held)


@pytest.mark.parametrize(
    "data", [b"garbage", b"[1]", b'{"a":', b"\0\xff" * 4000, b"{" * 5000, b'{"pause":3}']
)
def test_garbage_on_the_control_socket(desk, bundle, data):
    name, held = waiting(desk, bundle, "read x; echo $x")
    path = desk.folder(name) / "control.sock"
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(path))
        try:
            made.sendall(data)
            made.shutdown(socket.SHUT_WR)
            assert made.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass
    command(path, b'{"other":[1,{"x":"\\u0041"}],"reopenLog":false}')
    assert desk.state(name)["status"] == "running"
    os.write(held, b"word\n")
    assert desk.until(name, "stopped")["exitCode"] == 0
    os.close(held)


def test_silent_ones_on_the_control_socket_make_room(desk, bundle):
    name, held = waiting(desk, bundle, "read x; echo $x")
    path = desk.folder(name) / "control.sock"
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for one in silent:
        one.connect(str(path))
    command(path, b'{"reopenLog":true}')
    os.write(held, b"word\n")
    desk.until(name, "stopped")
    for one in silent:
        one.settimeout(beds.DEADLINE_S)
        assert one.recv(1) == b"", "the end of the container is the end of a connection"
        one.close()
    os.close(held)


def test_commands_of_the_control_socket(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    path = desk.folder(name) / "control.sock"
    command(path, b'{"startContainer":true}')
    assert desk.state(name)["status"] == "running"
    command(path, b'{"pause":true}')
    assert desk.state(name)["status"] == "paused"
    command(path, b'{"resume":true}\n')
    assert desk.state(name)["status"] == "running"


def test_sockets_are_their_owners_alone(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    for file in ("attach.sock", "control.sock"):
        assert stat.S_IMODE((desk.folder(name) / file).stat().st_mode) == 0o600
    assert stat.S_IMODE(desk.root.stat().st_mode) == 0o700
    desk.good("start", name)
    desk.good("kill", "-t", "10", "-f", name)
    assert not [path for path in desk.folder(name).iterdir() if path.name.endswith(".sock")]


def test_the_monitor_is_small_and_closed(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("start", name)
    pid = desk.monitor(name)
    assert Path(f"/proc/{pid}/exe").readlink().name == "starter-monitor"
    status = Path(f"/proc/{pid}/smaps_rollup").read_text()
    assert int(re.findall(r"Private_Dirty: +(\d+) kB", status)[0]) < 512
    assert int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[3]) == pid
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_the_payload_has_three_streams_and_nothing_of_ours(desk, bundle):
    name = desk.make(bundle.args(beds.PROBE))
    desk.good("start", name)
    desk.until(name, "stopped")
    found = json.loads(desk.out(name).read_text())["fds"]
    assert sorted(found) == ["0", "1", "2"]
    assert all(target.startswith("pipe:") for target in found.values())


# ---- the terminal ----


def test_attach_to_a_terminal(desk, bundle):
    bundle.process["terminal"] = True
    bundle.shell("printf 'name? '; read x; stty size; echo got $x; exit 9")
    name = desk.make(bundle)
    desk.good("start", name)
    log = desk.folder(name) / f"{name}.log"
    probe = desk.attach(name)
    probe.until(b"name? ")
    probe.close()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(desk.argv()[0], desk.argv("attach", name))
    termios.tcsetwinsize(terminal, (33, 77))
    shown = b""
    typed = False
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:
            break
        shown += more
        if not typed and b"name? " in shown:
            os.write(terminal, b"me\r")
            typed = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert b"got me\r\n" in shown
    assert re.search(r"stdout F got me$", log.read_text(), re.MULTILINE)
    assert desk.until(name, "stopped")["exitCode"] == 9


def test_the_size_of_the_terminal(desk, bundle):
    bundle.process["terminal"] = True
    bundle.shell("read x; stty size; read x")
    name = desk.make(bundle)
    desk.good("start", name)
    command(desk.folder(name) / "control.sock", b'{"consoleSize":{"height":12,"width":34}}')
    client = desk.attach(name)
    client.socket.sendall(b"\n")
    client.until(b"12 34\r\n")
    client.socket.sendall(b"\n")
    client.rest()


def test_attach_wants_a_terminal_and_a_running_container(desk, bundle):
    bundle.process["terminal"] = True
    name = desk.make(bundle.args("sleep", "600"))
    assert desk.fails("attach", name) == f"could not attach to {name}: not in running state"
    desk.good("start", name)
    text = "attach requires a terminal when terminal config is set to true"
    assert desk.fails("attach", name) == text
    assert desk.fails("attach", "nosuch") == "no container found with name nosuch"


def test_attach_without_a_terminal(desk, bundle):
    name, held = waiting(desk, bundle, "while read x; do echo got $x; [ $x = end ] && exit 4; done")
    done = desk.call("attach", name, input="one\nend\n")
    assert (done.returncode, done.stdout) == (4, "got one\ngot end\n")
    os.close(held)


def test_a_signal_to_attach_is_the_containers(desk, bundle):
    script = "trap 'echo hup; exit 6' HUP; echo ready; while :; do sleep 1; done"
    name, held = waiting(desk, bundle, script)
    beds.eventually(lambda: "ready" in desk.out(name).read_text(), "the trap is set")
    child = subprocess.Popen(
        desk.argv("attach", name), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    # Whoever holds all signals back passes them on.
    status = Path(f"/proc/{child.pid}/status")
    beds.eventually(lambda: "SigBlk:\tfffffff" in status.read_text(), "signals are passed on")
    child.send_signal(signal.SIGHUP)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (6, b"hup\n")
    os.close(held)


# ---- run ----


@pytest.mark.parametrize("status", [0, 7])
def test_run(desk, bundle, status):
    bundle.shell(f"cat; echo error >&2; exit {status}").write()
    done = desk.call("run", "-b", bundle.path, desk.name(), input="through\n")
    assert (done.returncode, done.stdout, done.stderr) == (status, "through\n", "error\n")
    assert os.listdir(desk.root) == []


def test_run_of_what_is_killed(desk, bundle):
    bundle.shell("kill -KILL $$").write()
    bundle.without_space("pid").write()
    assert desk.call("run", "-b", bundle.path, desk.name()).returncode == 137


def test_a_signal_to_run_is_the_containers(desk, bundle):
    bundle.shell("trap 'exit 6' TERM; echo ready; while :; do sleep 1; done").write()
    out = desk.place / "run.out"
    with out.open("w") as stream:
        child = subprocess.Popen(
            desk.argv("run", "-b", bundle.path, desk.name()),
            stdin=subprocess.DEVNULL,
            stdout=stream,
        )
    beds.eventually(lambda: "ready" in out.read_text(), "the trap is set")
    status = Path(f"/proc/{child.pid}/status")
    beds.eventually(lambda: "SigBlk:\tfffffff" in status.read_text(), "signals are passed on")
    child.terminate()
    assert child.wait(timeout=60) == 6
    assert os.listdir(desk.root) == []


def test_run_of_much_output_loses_nothing(desk, bundle):
    bundle.shell("yes 0123456789abcde | head -n 200000").write()
    done = desk.call("run", "-b", bundle.path, desk.name())
    assert done.stdout == "0123456789abcde\n" * 200000


def test_run_with_a_terminal(desk, bundle):
    bundle.process["terminal"] = True
    bundle.shell("tty; stty size; exit 3").write()
    name = desk.name()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(desk.argv()[0], desk.argv("run", "-b", str(bundle.path), name))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert b"/dev/pts/0\r\n" in shown
    assert os.listdir(desk.root) == []


def test_run_of_a_terminal_without_one(desk, bundle):
    bundle.process["terminal"] = True
    bundle.args("sleep", "600").write()
    text = desk.fails("run", "-b", bundle.path, desk.name())
    assert text == "attach requires a terminal when terminal config is set to true"
    assert os.listdir(desk.root) == []


def test_run_that_fails_leaves_nothing(desk, bundle):
    bundle.args("/nosuch").write()
    text = desk.fails("run", "-b", bundle.path, desk.name())
    assert "no such file or directory" in text
    assert os.listdir(desk.root) == []


def test_run_detached(desk, bundle):
    bundle.args("sleep", "600").write()
    name = desk.name()
    with desk.out(name).open("w") as stream:
        done = subprocess.run(
            desk.argv("run", "-d", "-b", bundle.path, name),
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert desk.state(name)["status"] == "running"


# ---- the rest ----


def test_an_empty_process(desk, bundle):
    name = desk.make(bundle, "--empty-process")
    desk.good("start", name)
    inside = desk.good("exec", name, "sh", "-c", "cat /proc/1/cmdline; (sleep 0 &) ; echo ok")
    assert inside.stdout.startswith("apptainer-py-init\0")
    zombies = "for p in /proc/[0-9]*; do grep -l 'State:.Z' $p/status; done; true"
    beds.eventually(lambda: desk.good("exec", name, "sh", "-c", zombies).stdout == "", "reaped")
    assert desk.good("exec", name, "ls", "/proc/1/fd").returncode == 0
    desk.good("kill", "-t", "10", name)
    assert desk.state(name)["exitCode"] == 0


def test_the_pid_file_lives_as_long_as_the_process(desk, bundle):
    path = desk.place / "pid"
    name = desk.make(bundle.args("sleep", "600"), "--pid-file", path)
    assert path.read_text() == str(desk.state(name)["pid"])
    desk.good("start", name)
    desk.good("kill", "-t", "10", "-f", name)
    assert not path.exists()


def test_variables_of_the_environment(desk, bundle):
    log, pid_file = desk.place / "log", desk.place / "pid"
    bundle.args("echo", "hello").write()
    name = desk.name()
    more = {
        "APPTAINER_BUNDLE": str(bundle.path),
        "APPTAINER_LOG_PATH": str(log),
        "APPTAINER_LOG_FORMAT": "basic",
        "APPTAINER_PID_FILE": str(pid_file),
    }
    with desk.out(name).open("w") as stream:
        subprocess.run(
            desk.argv("create", name), env={**os.environ, **more}, check=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip
    assert pid_file.exists()
    desk.good("start", name)
    desk.until(name, "stopped")
    assert re.fullmatch(rf"{TIME} stdout hello\n", log.read_text())


def test_words_of_refusals(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    bundle_flags = ("-b", bundle.path)
    state = "the state of the container must be"
    assert desk.fails("create", *bundle_flags, name) == f"{name} already exists"
    text = f"cannot execute command \"ls -l\", container '{name}' is not running"
    assert desk.fails("resume", name) == f"container {name} is not paused"
    assert desk.fails("update", name) == "you must specify --from-file"
    desk.good("start", name)
    assert desk.fails("start", name) == f"cannot start '{name}', {state} created"
    assert desk.fails("delete", name) == f"cannot delete '{name}', {state} created or stopped"
    desk.good("pause", name)
    assert desk.fails("pause", name) == f"container {name} is not running"
    assert desk.fails("kill", name) == f"cannot kill '{name}', {state} created or running"
    desk.good("resume", name)
    desk.good("kill", "-t", "10", "-s", "KILL", name)
    assert desk.fails("exec", name, "ls", "-l") == text
    assert desk.fails("exec", "nosuch", "ls") == "nosuch doesn't exist"
    for verb in ("start", "kill", "delete", "state", "pause", "update", "attach"):
        assert desk.fails(verb, "nosuch") == "no container found with name nosuch"
    text = f'oci specification file "{desk.place}/config.json" is missing or cannot be read'
    assert desk.fails("create", "-b", desk.place, "other") == text


def test_update_from_a_file(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("start", name)
    limits = desk.place / "limits"
    limits.write_text(json.dumps({"pids": {"limit": 123}}))
    desk.good("update", "-f", limits, name)
    place = Path(beds.cgroup_folder("pids", beds.own_cgroup("pids"))) / name
    assert (place / "pids.max").read_text() == "123\n"
    desk.good("update", "--from-file", "-", name, input='{"pids":{"limit":124}}')
    assert (place / "pids.max").read_text() == "124\n"


def test_a_created_container_is_deleted(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("delete", name)
    assert not desk.folder(name).exists()
    assert desk.monitor(name) == 0


def test_a_monitor_that_is_killed_leaves_a_container_that_can_be_deleted(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    desk.good("start", name)
    pid = desk.monitor(name)
    beds.end(pid)
    os.waitpid(pid, 0)
    assert desk.fails("attach", name) == "attach socket not available"
    desk.good("kill", "-f", name)
    beds.reap()
    beds.eventually(lambda: (beds.reap(), desk.state(name)["status"])[1] == "stopped", "its end")
    desk.good("delete", name)


def test_a_create_that_is_killed_ends_its_monitor_to_be(desk, bundle):
    bundle.hook("createRuntime", f"echo $$ > {desk.place}/hook; exec sleep 600").write()
    name = desk.name()
    with desk.out(name).open("w") as stream:
        child = subprocess.Popen(
            desk.argv("create", "-b", bundle.path, name),
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip
    hook = desk.place / "hook"
    beds.eventually(lambda: hook.exists() and hook.read_text().strip(), "the hook runs")
    others = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(others) == 1
    end = os.pidfd_open(int(others[0]))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert select.select([end], [], [], beds.DEADLINE_S)[0], "it goes with its launcher"
    os.close(end)
    beds.end(int(hook.read_text()))
    beds.reap()
    desk.good("delete", "--force", name)
    assert os.listdir(desk.root) == []


def test_runcs_commands_on_a_monitored_container(desk, bundle):
    name = desk.make(bundle.args("sleep", "600"))
    runc = [desk.runtime.program, "--root", str(desk.root)]
    subprocess.run([*runc, "start", name], check=True, timeout=60)
    text = subprocess.run([*runc, "state", name], check=True, capture_output=True).stdout
    assert json.loads(text)["status"] == "running"
    subprocess.run([*runc, "delete", "--force", name], check=True, timeout=60)
    assert desk.monitor(name) == 0


def test_runcs_command_line_has_no_monitor(desk, bundle):
    bundle.args("sleep", "600").write()
    name = desk.name()
    runc = [desk.runtime.program, "--root", str(desk.root)]
    with desk.out(name).open("w") as stream:
        subprocess.run(
            [*runc, "run", "-d", "-b", str(bundle.path), name], check=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip
    assert desk.monitor(name) == 0
    assert "attach socket not available" in desk.fails("attach", name)
