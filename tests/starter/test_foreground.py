"""Hooks run by the Cython module, and what stands between a payload in the foreground and us."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from apptainer_py.kernel import _starter
from apptainer_py.model.hook_frame import hook_frames
from apptainer_py.model.oci_plan import Hook

TREE = Path(__file__).resolve().parents[2]
# Prints the payload's wait status; a pty as runtime/nest.py would have it from init.
RELAY = """
import os, sys
sys.path.insert(0, {tree!r})
from apptainer_py.kernel import _starter
_starter.relay_begin()
terminal = sys.argv[1] == "tty"
master, slave = os.openpty() if terminal else (-1, -1)
ready, told = os.pipe()
pid = os.fork()
if pid == 0:
    import signal
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if terminal:
        os.setsid()
        for fd in range(3):
            os.dup2(slave, fd)
        import fcntl, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.close(told)
    os.execv("/bin/sh", ["sh", "-c", sys.argv[2]])
if terminal:
    os.close(slave)
os.close(told)
status = _starter.relay(pid, master)
os.write(2, b"status %d" % status)
"""


def relay(kind: str, script: str, **options: object) -> subprocess.Popen[bytes]:
    code = RELAY.format(tree=str(TREE))
    argv = ["/usr/bin/python3", "-I", "-S", "-B", "-c", code, kind, script]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, **options)


def status_of(process: subprocess.Popen[bytes]) -> int:
    _, said = process.communicate(timeout=20)
    assert said.startswith(b"status "), said
    return int(said.split()[1])


def read_until(fd: int, wanted: bytes) -> bytes:
    found = b""
    deadline = time.monotonic() + 20
    while wanted not in found:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], found
        found += os.read(fd, 4096)
    return found


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7 << 8), ("kill -9 $$", 9), ("sleep 0.1 & exit 0", 0)]
)
def test_the_status_is_the_payloads(script, status):
    assert status_of(relay("plain", script)) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_payload(number):
    script = f"trap 'exit 9' {number.name[3:]}; echo up; while :; do sleep 0.05; done"
    process = relay("plain", script, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    assert status_of(process) == 9 << 8


def test_a_signal_before_the_relay_is_not_lost():
    code = RELAY.format(tree=str(TREE)).replace(
        "status = ", "import signal; os.kill(os.getpid(), signal.SIGTERM); status = "
    )
    argv = ["/usr/bin/python3", "-I", "-S", "-B", "-c", code, "plain", "exec sleep 1000"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    assert status_of(process) == signal.SIGTERM


def test_a_terminal_is_raw_meanwhile_and_sane_afterwards():
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    script = "read -r line; echo got:$line; read -r line; stty size"
    process = relay("tty", script, stdin=theirs, stdout=theirs)
    try:
        termios.tcsetwinsize(ours, (33, 77))
        os.write(ours, b"hello\r")
        shown = read_until(ours, b"got:hello")
        assert not termios.tcgetattr(theirs)[3] & termios.ICANON
        process.send_signal(signal.SIGWINCH)
        os.write(ours, b"x\r")
        if b"33 77" not in shown:
            read_until(ours, b"33 77")
        assert status_of(process) == 0, shown
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_much_output_arrives_whole_although_it_comes_at_the_end():
    process = relay("tty", "seq 1 20000; exit 3", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    shown, said = process.communicate(timeout=30)
    assert said == b"status %d" % (3 << 8)
    assert shown.replace(b"\r", b"") == b"".join(b"%d\n" % i for i in range(1, 20001))


def hook(*words: str, **options: object) -> Hook:
    return Hook(kind="poststart", path="/bin/sh", arguments=("sh", "-c", *words), **options)


def run(*hooks: Hook, state: tuple[bytes, bytes] = (b"{", b"}")) -> tuple[int, str]:
    return _starter.hook_run(hook_frames(hooks, state), 42, [b"MINE=1"])


def test_a_hook_gets_the_state_and_the_environment_that_it_names(tmp_path):
    out = tmp_path / "out"
    assert run(hook(f"cat > {out}; env >> {out}"), state=(b'{"pid":', b"}\n")) == (0, "")
    assert out.read_text().splitlines()[0] == '{"pid":42}'
    assert "MINE=1" in out.read_text()
    assert (
        run(hook(f"cat > {out}; env >> {out}", environment=("A=b",)), state=(b"x\n", b""))[0] == 0
    )
    assert "MINE" not in out.read_text()
    assert {"x", "A=b"} <= set(out.read_text().splitlines())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo o; echo e >&2; exit 3", "exit status 3, stdout: o\n, stderr: e\n"),
        ("kill -9 $$", "signal: killed, stdout: , stderr: "),
        ("kill -TERM $$", "signal: terminated, stdout: , stderr: "),
    ],
)
def test_how_a_hook_failed_is_told_in_runcs_words(script, said):
    assert run(hook("exit 0"), hook(script), hook("exit 9")) == (2, said)


def test_a_hook_that_is_not_there():
    missing = Hook(kind="poststart", path="/nonexistent")
    assert run(missing) == (1, "fork/exec /nonexistent: no such file or directory")


def test_a_hook_has_its_time_and_no_more():
    assert run(hook("exec sleep 100", timeout_seconds=1)) == (
        1,
        "hook ran past specified timeout of 1.0s",
    )


def test_output_is_bounded_and_never_stops_a_hook():
    number, said = run(hook("yes | head -c 3000000; yes | head -c 3000000 >&2; exit 1"))
    assert number == 1
    assert len(said) < 9000


def test_a_hook_has_no_descriptor_of_ours(tmp_path):
    out = tmp_path / "out"
    kept = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        assert run(hook(f"exec ls /proc/self/fd > {out}"))[0] == 0
    finally:
        os.close(kept)
    # 0, 1, 2, and the directory that ls reads.
    assert out.read_text().split() == ["0", "1", "2", "3"]


def test_a_child_that_keeps_the_pipe_is_not_waited_for():
    started = time.monotonic()
    assert run(hook("sleep 30 & exit 0")) == (0, "")
    assert time.monotonic() - started < 25


@pytest.mark.parametrize("size", [0, 8, 23, 30, 60])
def test_a_frame_that_is_cut_runs_nothing(size, tmp_path):
    frame = hook_frames((hook(f"touch {tmp_path}/made"),), (b"{", b"}"))
    number, said = _starter.hook_run(frame[:size], 42, [])
    assert number
    assert said == "the hooks are malformed"
    assert not (tmp_path / "made").exists()
