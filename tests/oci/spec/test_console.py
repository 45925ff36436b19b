"""Terminals and sockets by which descriptors are handed out."""

from __future__ import annotations

import array
import os
import select
import socket

import pytest

from tests.oci.bed import DEADLINE_S, PROBE, pseudo_terminal_from


def said_on(master: int, until: bytes) -> bytes:
    """Read from a terminal until something has come, or its other end is closed."""
    found = b""
    poll = select.poll()
    poll.register(master, select.POLLIN)
    while until not in found and poll.poll(DEADLINE_S * 1000):
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        found += piece
    return found


@pytest.fixture
def terminal(bed, bundle):
    """Creates a container with a terminal; returns it and the terminal's master."""
    bundle.process["terminal"] = True
    opened = []

    def make(*flags: str):
        listener, receive = pseudo_terminal_from(bed.place / "console")
        with listener:
            container = bed.create(bundle, "--console-socket", str(bed.place / "console"), *flags)
            opened.append(receive())
        return container, opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def test_a_terminal(bundle, terminal):
    bundle.shell("tty; test -t 0 && test -t 1 && test -t 2 && echo all")
    container, master = terminal()
    container.start()
    said = said_on(master, b"all")
    assert b"/dev/pts/0" in said or b"/dev/console" in said
    assert b"all" in said
    assert container.wait() == 0


def test_the_size_of_the_terminal(bundle, terminal):
    bundle.process["consoleSize"] = {"height": 33, "width": 77}
    bundle.args("stty", "size")
    container, master = terminal()
    container.start()
    assert b"33 77" in said_on(master, b"77")
    container.wait()


def test_the_console_device(bundle, terminal):
    bundle.shell("stat -c '%t' /dev/console; echo through >/dev/console; echo done")
    container, master = terminal()
    container.start()
    said = said_on(master, b"done").split()
    assert said[0] == b"88"  # the major number of pseudo terminals, 136
    assert b"through" in said
    container.wait()


def test_the_terminal_controls_the_session(bundle, terminal):
    bundle.shell("trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.1; done")
    container, master = terminal()
    container.start()
    said_on(master, b"ready")
    os.write(master, b"\x03")
    assert b"interrupted" in said_on(master, b"interrupted")
    assert container.wait() == 3


def test_the_terminal_belongs_to_the_user(bundle, terminal):
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    bundle.shell("stat -c '%u' /dev/pts/0; echo end")
    container, master = terminal()
    container.start()
    assert b"1000" in said_on(master, b"end")
    container.wait()


def test_a_console_socket_that_is_not_there(bed, bundle):
    bundle.process["terminal"] = True
    bed.refused(bundle, "--console-socket", str(bed.place / "no"))


def test_exec_with_a_terminal(bed, bundle):
    container = bed.sleeping(bundle)
    listener, receive = pseudo_terminal_from(bed.place / "console")
    with listener:
        done = container.exec(
            "sh", "-c", "tty; echo end; sleep 600",
            flags=("--tty", "--detach", "--console-socket", str(bed.place / "console")),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        master = receive()
    assert b"/dev/pts/" in said_on(master, b"end")
    os.close(master)
    container.finish()


def test_the_pidfd_socket(bed, bundle):
    path = bed.place / "pidfd"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(DEADLINE_S)
    with listener:
        container = bed.create(bundle.args(PROBE), "--pidfd-socket", str(path))
        connection, _ = listener.accept()
    with connection:
        data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
    numbers = array.array("i")
    numbers.frombytes(ancillary[0][2][:4])
    with open(f"/proc/self/fdinfo/{numbers[0]}") as stream:
        fields = dict(line.split(":\t") for line in stream.read().splitlines())
    os.close(numbers[0])
    assert data == b"standard"
    assert int(fields["Pid"]) == container.pid


def test_run_on_a_terminal_of_the_caller(bed, bundle):
    import pty

    bundle.process["terminal"] = True
    bundle.shell("tty; read line; echo got $line; exit 7").write()
    argv = bed.argv("run", "--bundle", bundle.path, bed.name())
    pid, master = pty.fork()
    if pid == 0:
        os.execv(argv[0], argv)
    said = said_on(master, b"/dev/pts/0")
    os.write(master, b"hello\n")
    said += said_on(master, b"got hello")
    said += said_on(master, b"never")
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert b"got hello" in said
    assert os.waitstatus_to_exitcode(status) == 7
