"""Signals and terminals: what a user of a shell expects of a command in the foreground."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import own_install
from tests.own_install import Household, Installation, eventually, read_until

OPTIONS = {"plain": (), "pid": ("-p",), "userns": ("-u",), "userns pid": ("-u", "-p")}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
# Tells of each signal by name, and ends with a status of its own.
TRAPS = (
    'for s in INT TERM HUP QUIT USR1 WINCH CONT; do trap "echo got $s; exit 7" $s; done; '
    "echo ready; while :; do read x || sleep 0.05; done"
)


@pytest.fixture
def own(own) -> Installation:
    own.configure()
    return own


@pytest.fixture
def home(home) -> Iterator[Household]:
    yield home
    eventually(lambda: not home.alive(), "nothing is left", own_install.within_a_second())


@pytest.fixture(params=list(OPTIONS))
def options(request) -> tuple[str, ...]:
    return OPTIONS[request.param]


class Terminal:
    """A pseudo-terminal with a command in its foreground."""

    def __init__(self, own: Installation, home: Household, argv: list[Any], **how: Any) -> None:
        self.master, slave = pty.openpty()
        os.fchown(slave, own.user.pw_uid, -1)
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)

        def make_controlling() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = home.adopt(
            # Only the child itself can take a terminal, after setsid; no thread runs here.
            subprocess.Popen(
                argv, stdin=slave, stdout=slave, stderr=slave, env=own.environment(),
                cwd=own.user.pw_dir, **own.identity(), **how,
                preexec_fn=make_controlling,  # noqa: PLW1509
            )
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def expect(self, wanted: bytes) -> None:
        """Read until some bytes have come."""
        if wanted not in self.seen:
            self.seen += read_until(self.master, wanted)
        self.seen = self.seen[self.seen.index(wanted) + len(wanted) :]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> None:
        os.close(self.master)


def status_of(process: subprocess.Popen[bytes]) -> int:
    """Return the status as a shell shows it."""
    status = process.wait(timeout=10)
    return 128 - status if status < 0 else status


@pytest.mark.parametrize("number", SIGNALS)
def test_kill_reaches_the_payload(own, sif, options, number, home):
    process = home.adopt(own.start("exec", *options, sif, "sh", "-c", TRAPS))
    read_until(process.stdout.fileno(), b"ready")
    process.send_signal(number)
    said = read_until(process.stdout.fileno(), b"\n")
    assert said == f"got {number.name[3:]}\n".encode()
    assert status_of(process) == 7


@pytest.mark.parametrize("number", [*SIGNALS[:4], signal.SIGKILL])
def test_payload_without_a_handler(own, sif, options, number, home):
    process = home.adopt(own.start("exec", *options, sif, "sleep", "100"))
    payload_of(home)
    process.send_signal(number)
    assert status_of(process) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_the_start(own, sif, options, number, home):
    """It ends the launch, whenever it comes."""
    for _ in range(5):
        process = home.adopt(own.start("exec", *options, sif, "sleep", "100"))
        eventually(home.alive, "it runs")
        process.send_signal(number)
        assert status_of(process) in (128 + number, 255)
        eventually(lambda: not home.alive(), "nothing is left", 1)


@pytest.mark.parametrize(("key", "name"), [(b"\x03", "INT"), (b"\x1c", "QUIT")])
def test_keys_of_the_terminal(own, sif, options, key, name, home):
    terminal = Terminal(own, home, [own.program, "exec", *options, sif, "sh", "-c", TRAPS])
    terminal.expect(b"ready")
    terminal.type(key)
    terminal.type(b"\n")  # busybox's read may have gone to sleep just before the signal came
    terminal.expect(b"got " + name.encode())
    assert status_of(terminal.process) == 7
    # Once, not twice: by the terminal, and not again by us.
    assert b"got" not in terminal.seen
    terminal.close()


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_keys_that_nobody_catches(own, sif, options, key, number, home):
    terminal = Terminal(own, home, [own.program, "exec", *options, sif, "sleep", "100"])
    payload_of(home)
    terminal.type(key)
    assert status_of(terminal.process) == 128 + number
    terminal.close()


def test_size_of_the_window(own, sif, options, home):
    terminal = Terminal(own, home, [own.program, "exec", *options, sif, "sh", "-c", TRAPS])
    terminal.expect(b"ready")
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))
    terminal.type(b"\n")  # busybox's read may have gone to sleep just before the signal came
    terminal.expect(b"got WINCH")
    assert status_of(terminal.process) == 7
    terminal.close()


def test_closed_terminal(own, sif, options, home):
    terminal = Terminal(own, home, [own.program, "exec", *options, sif, "sleep", "100"])
    payload_of(home)
    terminal.close()
    assert status_of(terminal.process) == 128 + signal.SIGHUP


def stopped(pid: int) -> bool:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2] == "T"


def payload_of(home: Household, name: str = "sleep") -> int:
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid, facts in home.alive().items() if facts[2] == name]
        return bool(found)

    eventually(there, f"{name} runs")
    return found[0]


def in_foreground(terminal: Terminal, home: Household) -> None:
    """Wait until the terminal's keys go to the payload: the shell may still be on its way."""

    def there() -> bool:
        try:
            return os.tcgetpgrp(terminal.master) == os.getpgid(payload_of(home))
        except ProcessLookupError:
            return False

    eventually(there, "the payload has the terminal")


def test_stop_and_go_on_by_kill(own, sif, options, home):
    """SIGTSTP to the command stops the payload, and the job with it; SIGCONT continues both."""
    # A shell is the parent: an orphaned process group is not stopped by SIGTSTP.
    script = (
        'set -m; "$@" & echo "job $!"; fg >/dev/null; echo "stopped $?"; read x; fg; echo "end $?"'
    )
    command = ["sh", "-c", "echo ready; sleep 100; exit 6"]
    words = ["bash", "-c", script, "bash", own.program, "exec", *options, sif, *command]
    terminal = Terminal(own, home, words)
    terminal.expect(b"job ")
    terminal.expect(b"ready")
    payload = payload_of(home, "sh")
    keeper = next(pid for pid, facts in home.alive().items() if facts[0] == terminal.process.pid)
    os.kill(keeper, signal.SIGTSTP)
    terminal.expect(b"stopped 148")
    eventually(lambda: stopped(payload), "the payload is stopped")
    terminal.type(b"go\n")
    eventually(lambda: not stopped(payload), "the payload goes on")
    os.kill(payload_of(home), signal.SIGTERM)
    terminal.expect(b"end 6")
    assert status_of(terminal.process) == 0
    terminal.close()


def test_stop_and_go_on_by_keys(own, sif, options, home):
    """Control-Z, fg, and the status at the end, in a shell with job control."""
    terminal = Terminal(own, home, ["bash", "--norc", "--noprofile", "-i"])
    terminal.type(b"PS1='$ '; echo be''gin\n")
    terminal.expect(b"begin")
    words = " ".join(map(str, [own.program, "exec", *options, sif]))
    terminal.type(f"{words} sh -c 'echo re\"\"ady; sleep 100; exit 6'\n".encode())
    terminal.expect(b"ready")
    payload = payload_of(home)
    terminal.type(b"\x1a")
    terminal.expect(b"Stopped")
    eventually(lambda: stopped(payload), "the payload is stopped")
    terminal.type(b"bg; echo in''background\n")
    terminal.expect(b"inbackground")
    eventually(lambda: not stopped(payload), "the payload goes on")
    terminal.type(b"fg\n")
    terminal.expect(b"exec")
    os.kill(payload, signal.SIGTERM)
    terminal.type(b"echo status=$?\n")
    terminal.expect(b"status=6")
    terminal.type(b"exit\n")
    terminal.process.wait(timeout=10)
    terminal.close()


def test_reading_in_the_background_stops_the_job(own, sif, options, home):
    """As SIGTTIN does to any other command, and the shell is told so."""
    script = 'set -m; "$@" & wait %1; echo "stopped $?"; fg >/dev/null; echo "end $?"'
    command = ["sh", "-c", 'echo "got $(head -n 1)"; exit 4']
    words = ["bash", "-c", script, "bash", own.program, "exec", *options, sif, *command]
    terminal = Terminal(own, home, words)
    terminal.expect(b"stopped 149")
    terminal.type(b"word\n")
    terminal.expect(b"got word")
    terminal.expect(b"end 4")
    assert status_of(terminal.process) == 0
    terminal.close()


def test_an_image_server_that_is_stopped_goes_on(own, sif, options, home):
    """Whoever reads the image would hang, and could be ended by nothing but the server's end."""
    command = "echo ready; read x; cat /bin/* >/dev/null; exit 3"
    process = home.adopt(
        own.start("exec", *options, sif, "sh", "-c", command, stdin=subprocess.PIPE)
    )
    read_until(process.stdout.fileno(), b"ready")
    server = next(pid for pid, facts in home.alive().items() if facts[2] == "squashfuse_ll")
    for _ in range(20):
        os.kill(server, signal.SIGSTOP)
    eventually(lambda: not stopped(server), "the server goes on")
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert status_of(process) == 3


def test_payload_that_stops_itself_stops_the_job(own, sif, home):
    script = 'set -m; "$@"; echo "stopped $?"; kill -CONT %1; fg >/dev/null; echo "end $?"'
    terminal = Terminal(own, home, ["bash", "-c", script, "bash", own.program, "exec", sif, "sh",
                                    "-c", "kill -STOP $$; exit 9"])  # fmt: skip
    terminal.expect(b"stopped 147")
    terminal.expect(b"end 9")
    terminal.process.wait(timeout=10)
    terminal.close()


def test_interactive_shell_has_job_control(own, sif, options, home):
    terminal = Terminal(own, home, [own.program, "shell", *options, sif])
    terminal.type(b"echo be''gin\n")
    terminal.expect(b"begin")
    terminal.type(b"sleep 100\n")
    in_foreground(terminal, home)
    terminal.type(b"\x1a")
    terminal.expect(b"Stopped")
    terminal.type(b"jobs; kill -KILL %1; wait %1; echo st''ill\n")
    terminal.expect(b"still")
    terminal.type(b"sleep 100\n")
    in_foreground(terminal, home)
    terminal.type(b"\x03")
    terminal.type(b"echo status=$?\n")
    terminal.expect(b"status=130")
    terminal.type(b"exit 5\n")
    assert status_of(terminal.process) == 5
    terminal.close()


def test_timeout(own, sif, options, home):
    argv = ["timeout", "0.5", own.program, "exec", *options, sif, "sleep", "100"]
    done = subprocess.run(argv, env=own.environment(), cwd="/", timeout=20, check=False,
                          **own.identity())  # fmt: skip
    assert done.returncode == 124


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_payload_ends_in_its_own_time(own, sif, options, home, number):
    """The whole group gets the signal; nobody takes the payload away before it is done."""
    name = signal.Signals(number).name.removeprefix("SIG")
    clean_up = "echo got; until [ $x. = cleaned. ]; do read x; done; echo $x; exit 7"
    script = f"trap '{clean_up}' {name}; echo ready; while :; do read x; done"
    process = home.adopt(
        own.start("exec", *options, sif, "sh", "-c", script, stdin=subprocess.PIPE)
    )
    read_until(process.stdout.fileno(), b"ready")
    os.killpg(process.pid, number)
    process.stdin.write(b"\n")
    process.stdin.flush()
    read_until(process.stdout.fileno(), b"got")
    process.stdin.write(b"cleaned\n")
    process.stdin.flush()
    read_until(process.stdout.fileno(), b"cleaned")
    assert status_of(process) == 7


def test_nohup(own, sif, options, home):
    argv = ["nohup", own.program, "exec", *options, sif, "sh", "-c", "echo ready; read x; exit 3"]
    process = home.adopt(
        subprocess.Popen(argv, env=own.environment(), cwd="/", stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                         **own.identity())
    )  # fmt: skip
    read_until(process.stdout.fileno(), b"ready")
    process.send_signal(signal.SIGHUP)
    process.stdin.write(b"x\n")
    process.stdin.close()
    assert status_of(process) == 3


def test_broken_pipe(own, sif, options, home):
    script = '"$@" | head -n 1; echo "status ${PIPESTATUS[0]}"'
    argv = ["bash", "-c", script, "bash", own.program, "exec", *options, sif,
            "sh", "-c", "while :; do echo y; done"]  # fmt: skip
    done = subprocess.run(argv, env=own.environment(), cwd="/", timeout=20, check=False, text=True,
                          stdout=subprocess.PIPE, restore_signals=True,
                          **own.identity())  # fmt: skip
    assert done.stdout == f"y\nstatus {128 + signal.SIGPIPE}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE])
def test_status_of_a_payload_that_kills_itself(own, sif, options, number, home):
    done = own.run("exec", *options, sif, "sh", "-c", f"kill -{number.value} $$")
    status = 128 - done.returncode if done.returncode < 0 else done.returncode
    assert status == 128 + number
