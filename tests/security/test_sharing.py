"""Mounts of images that are handed on: nobody gets one who should not, and none can be forged."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import images, own_install
from tests.e2e.sharing import (
    hold,
    is_offered,
    master_of,
    need_copies,
    offers,
    servers,
    take,
    tell,
)
from tests.own_install import HostState, Household, assert_nothing_left, eventually

_SEALS = 0x2F  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE and _EXEC
_OPEN_TREE, _CLONE, _EMPTY_PATH, _NEWPID = 428, 1, 0x1000, 0x20000000


SILENT: list[socket.socket] = []


@pytest.fixture(scope="module")
def own(require_root) -> Iterator[own_install.Installation]:
    need_copies()
    made = own_install.installation()
    made.restore()
    yield made
    made.restore()


@pytest.fixture
def image(own, user_tmp) -> Path:
    target = user_tmp / "image.sif"
    shutil.copyfile(images.own_sif(images.shared_folder()), target)
    target.chmod(0o644)
    return target


def become_user(own: own_install.Installation) -> None:
    os.setgroups([])
    os.setgid(own.user.pw_gid)
    os.setuid(own.user.pw_uid)


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Have a process do something, until it is not needed any more."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def send(peer: socket.socket, parts: list[int], message: bytes = b"M") -> None:
    """Hand descriptors to somebody who may not want them; without any, say nothing."""
    with contextlib.suppress(OSError):
        if parts:
            socket.send_fds(peer, [message], parts)
    SILENT.append(peer)


@contextmanager
def squatter(
    own: own_install.Installation,
    name: str,
    parts: list[int],
    *,
    below: bool = False,
    message: bytes = b"M",
    passed_on: bool = False,
) -> Iterator[None]:
    """Have a process of the user's listen there, which sends these descriptors to everybody."""
    reader, writer = os.pipe()

    def serve() -> None:
        if below:
            assert ctypes.CDLL(None).unshare(_NEWPID) == 0
            inner = os.fork()
            if inner:
                os.waitpid(inner, 0)
                return
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        become_user(own)
        listener.bind("\0" + name[1:])
        listener.listen(8)
        if passed_on and os.fork():
            os._exit(0)  # who has listened ends, and its number is free
        os.write(writer, b"x")
        while True:
            send(listener.accept()[0], parts, message)

    with child(serve):
        assert os.read(reader, 1) == b"x"
        yield
    os.close(reader)
    os.close(writer)


def genuine(own: own_install.Installation, home: Household, image: Path, *flow: str):
    """Return a name, and what is handed out there: a mount, what says of which file, a process."""
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    name = offers(first.pid)[0]
    parts = take_as_user(own, name) if flow else take(name)
    assert len(parts) == 3
    tell(first)
    first.wait(20)
    eventually(lambda: not is_listening(name), "nobody listens any more")
    return name, parts


def is_listening(name: str) -> bool:
    return name in Path("/proc/net/unix").read_text(errors="replace")


def take_as_user(own: own_install.Installation, name: str) -> list[int]:
    ours, theirs = socket.socketpair()

    def ask() -> None:
        become_user(own)
        socket.send_fds(theirs, [b"x"], take(name))
        signal.pause()

    with ours, theirs, child(ask):
        ours.settimeout(20)
        return list(socket.recv_fds(ours, 1, 8)[1])


def memory(content: bytes, uid: int, seals: int = _SEALS) -> int:
    """Return a memory file with an owner."""
    fd = os.memfd_create("apptainer-py image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    os.fchown(fd, uid, uid)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def copy_of(mount: int) -> int:
    fd = ctypes.CDLL(None).syscall(_OPEN_TREE, mount, b"", _CLONE | _EMPTY_PATH)
    assert fd >= 0
    return int(fd)


def test_the_user_gets_no_mount(own, home, image):
    """In a namespace of the user's own it would show devices of the user's making."""
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    name = offers(first.pid)[0]
    reader, writer = os.pipe()

    def ask() -> None:
        become_user(own)
        for _ in range(20):
            os.write(writer, b"%d" % len(take(name)))
        signal.pause()

    with child(ask):
        assert own_install.read_until(reader, b"0" * 20) == b"0" * 20
    os.close(reader)
    os.close(writer)
    assert tell(first) == b"still\n"


def test_who_is_root_gets_what_it_takes(own, home, image):
    """As keeper is before it drops: so the tests here would find it if anybody else did."""
    name, parts = genuine(own, home, image)
    facts = os.fstat(parts[1])
    assert facts.st_uid == 0
    assert fcntl.fcntl(parts[1], fcntl.F_GET_SEALS) == _SEALS
    with squatter(own, name, parts):
        second = hold(own, home, image)
        assert len(servers(home)) == 1
        tell(second)
        second.wait(20)
    for fd in parts:
        os.close(fd)


FORGERIES = {
    "the user's own word": lambda m, t, p, uid: [m, memory(os.pread(t, 999, 0), uid), p],
    "a word that can be changed": lambda m, t, p, uid: [
        m, memory(os.pread(t, 999, 0), 0, fcntl.F_SEAL_GROW), p],
    "another mount": lambda m, t, p, uid: [copy_of(m), t, p],
    "a directory": lambda m, t, p, uid: [os.open("/", os.O_RDONLY), t, p],
    "too few": lambda m, t, p, uid: [m, t],
    "too many": lambda m, t, p, uid: [m, t, p, p],
    "another order": lambda m, t, p, uid: [t, m, p],
    "a server that has ended": lambda m, t, p, uid: [m, t, os.open("/dev/null", os.O_RDONLY)],
    "nothing": lambda m, t, p, uid: [],
    "another word": lambda m, t, p, uid: [m, memory(bytes(os.fstat(t).st_size), 0), p],
}  # fmt: skip


@pytest.mark.parametrize("forgery", list(FORGERIES))
def test_forged(own, home, image, forgery):
    """The launch has a server of its own, as if nobody were there."""
    host = HostState(own.session)
    name, parts = genuine(own, home, image)
    forged = FORGERIES[forgery](*parts, own.user.pw_uid)
    with squatter(own, name, forged):
        second = hold(own, home, image)
        assert len(servers(home)) == 2  # that of the mount which is still held here
        assert tell(second) == b"still\n"
        assert second.wait(20) == 0
    for fd in {*parts, *forged}:
        os.close(fd)
    assert_nothing_left(home, host)


def test_an_empty_message_leaves_no_descriptor(own, home, image):
    name, parts = genuine(own, home, image)
    marker = os.open("/etc/hostname", os.O_RDONLY)
    with squatter(own, name, [marker] * 3, message=b""):
        second = hold(own, home, image)
        assert len(servers(home)) == 2
        held = Path(f"/proc/{second.pid}/fd")
        assert not [fd for fd in held.iterdir() if os.readlink(fd) == "/etc/hostname"]
    for fd in {*parts, marker}:
        os.close(fd)


def test_another_user_listens(own, home, image):
    name, parts = genuine(own, home, image)
    stranger = own_install.account("nobody")

    def serve() -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.setgroups([])
        os.setgid(stranger.pw_gid)
        os.setuid(stranger.pw_uid)
        listener.bind("\0" + name[1:])
        listener.listen(8)
        while True:
            send(listener.accept()[0], parts)

    with child(serve):
        eventually(lambda: is_listening(name), "it listens")
        hold(own, home, image)
        assert len(servers(home)) == 2
    for fd in parts:
        os.close(fd)


@pytest.mark.parametrize(("how", "refused"), [
    ({}, False), ({"below": True}, True), ({"passed_on": True}, True),
])  # fmt: skip
def test_a_payload_cannot_offer_one(own, home, image, open_fuse, how, refused):
    """In the user's own flow the owner says nothing; whoever is in a pid namespace is no peer.

    Nor is a process that has ended, by whose number another one can be known.
    """
    name, parts = genuine(own, home, image, "-u")
    with squatter(own, name, parts, **how):
        hold(own, home, "-u", image)
        assert len(servers(home)) == (2 if refused else 1)
    for fd in parts:
        os.close(fd)


def sockets_of(pid: int) -> int:
    folder = Path(f"/proc/{pid}/fd")
    return sum(os.readlink(name).startswith("socket:") for name in folder.iterdir())


def test_master_has_no_part_in_it(own, home, image):
    """It is forked while the answer of who offers the mount is on its way."""
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, image)
    assert len(servers(home)) == 1, "the second has the first one's"
    assert sockets_of(master_of(second)) == sockets_of(master_of(first)) > 0


def test_a_payload_gets_none(own, home, image, open_fuse):
    """Nor reaches who holds it."""
    first = hold(own, home, "-u", image)
    eventually(lambda: is_offered(first), "the mount is offered")
    name = offers(first.pid)[0]
    assert subprocess.run(["ls", f"/proc/{first.pid}/fd"], check=False, capture_output=True,
                          **own.identity()).returncode != 0  # fmt: skip
    reader, writer = os.pipe()

    def ask() -> None:
        assert ctypes.CDLL(None).unshare(_NEWPID) == 0
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            become_user(own)
            os.write(writer, b"%d" % len(take(name)))
        signal.pause()

    with child(ask):
        assert os.read(reader, 1) == b"0"
    os.close(reader)
    os.close(writer)
