"""Where launches that are to live in one container find each other.

It is a listening socket with a name that is no file. Who binds the name first makes the container;
each other one gets, from whoever answers, the namespace of the mounts and the socket itself, and
answers too from then on. So the container and its name stay for as long as one of them does, and
all of it goes with the last, whatever they die of.
"""

from __future__ import annotations

import errno
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

_PATIENCE_S = 30
_PATIENCE_WITH_STRANGERS_S = 2
# Somebody who has the name already, and has not come to listen.
_PAUSE_S = 0.002
_NAMES = 4
_BACKLOG = 4096
_WORD = b"share"
_CREDENTIALS_BYTES = 12
_STATUS_BYTES = 8192
# linux/socket.h, asm-generic/socket.h; the descriptors of processes are of Linux 6.5.
_SO_PASSPIDFD, _SO_PEERPIDFD, _SCM_PIDFD = 76, 77, 4
_SCM_CREDENTIALS = 2
_FD_BYTES = 4


class Alone(Exception):
    """Nobody can be met: `why`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Foreign(Exception):
    """The name is another user's, or a container's."""


class _Gone(Exception):
    """One of us was to answer, and has ended."""


class Meeting:
    """What one that takes part holds: the socket, and the mounts (-1 until there are some)."""

    __slots__ = ("_listener", "mounts")

    def __init__(self, listener: _socket.socket, mounts: int) -> None:
        self._listener = listener
        self.mounts = mounts

    def until(self, fd: int, seconds: float = -1.0) -> bool:
        """Answer who asks, until there is something to read at `fd`; False if time is up before."""
        end = time.monotonic() + seconds
        events = select.poll()
        events.register(fd, select.POLLIN)
        events.register(self._listener.fileno(), select.POLLIN)
        while True:
            left = None if seconds < 0 else max(0.0, 1000 * (end - time.monotonic()))
            ready = [number for number, _ in events.poll(left)]
            if fd in ready or not ready:
                return fd in ready
            self._answer()

    def _answer(self) -> None:
        import _socket

        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return  # another one of us was quicker
        one = _socket.socket(fileno=fd)
        try:
            if _user(one) == os.getuid() and _is_beside_us(_asker(one)):
                passed = b"".join(
                    number.to_bytes(_FD_BYTES, "little")
                    for number in (self.mounts, self._listener.fileno())
                )
                what = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, passed)]
                one.sendmsg([_WORD], what, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # who has asked is gone
        finally:
            one.close()


def meet(key: str) -> Meeting:
    """Return a meeting that is ours to fill, or the mounts of one that others have filled.

    Raises:
        Alone: neither.
    """
    until = time.monotonic() + _PATIENCE_S
    for number in range(_NAMES):
        try:
            return _meet(f"\0apptainer-py/{os.getuid()}/{key}/{number}".encode(), until)
        except _Foreign:
            continue
    raise Alone("its name is taken by another user")


def _meet(name: bytes, until: float) -> Meeting:
    begun = time.monotonic()
    while True:
        try:
            found = _claim(name) or _ask(name, until)
        except _Gone:
            found, begun = None, time.monotonic()
        if found is not None:
            return found
        # One of us listens at once, and has room for many.
        if time.monotonic() >= begun + _PATIENCE_WITH_STRANGERS_S:
            raise _Foreign
        if time.monotonic() >= until:
            raise Alone("the others do not answer")
        time.sleep(_PAUSE_S)


def _claim(name: bytes) -> Meeting | None:
    import _socket

    one = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        one.bind(name)
        one.listen(_BACKLOG)
        one.settimeout(0)
    except OSError as error:
        one.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise Alone((error.strerror or "no socket").lower()) from None
    return Meeting(one, -1)


def _ask(name: bytes, until: float) -> Meeting | None:
    """Return what somebody there hands out; None where there is nobody any more, or not yet."""
    import _socket

    one = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        one.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        _try_option(one, _SO_PASSPIDFD)
        one.settimeout(0)
        one.connect(name)
        if _user(one) != os.getuid():
            raise _Foreign
        one.settimeout(max(until - time.monotonic(), _PAUSE_S))
        room = sum(map(_socket.CMSG_SPACE, (2 * _FD_BYTES, _CREDENTIALS_BYTES, _FD_BYTES)))
        word, extra, _, _ = one.recvmsg(len(_WORD), room, _socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise Alone("the others do not answer") from None
    except OSError:
        return None
    finally:
        one.close()
    parts = {kind: data for level, kind, data in extra if level == _socket.SOL_SOCKET}
    fds = _numbers(parts.get(_socket.SCM_RIGHTS, b""))
    if not word:
        raise _Gone
    if not _is_beside_us(_answerer(parts)):
        _close(fds)
        raise _Foreign
    if word != _WORD or len(fds) != 2:
        _close(fds)
        return None
    return Meeting(_socket.socket(fileno=fds[1]), fds[0])


def _numbers(data: bytes) -> list[int]:
    return [
        int.from_bytes(data[at : at + _FD_BYTES], "little")
        for at in range(0, len(data) - _FD_BYTES + 1, _FD_BYTES)
    ]


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


# -- who the others are: a payload of the same user, in a pid namespace of its own, is none of us


def _try_option(one: _socket.socket, option: int) -> None:
    import _socket

    try:
        one.setsockopt(_socket.SOL_SOCKET, option, 1)
    except OSError:
        pass  # an older kernel: its number tells who it is


def _asker(one: _socket.socket) -> bytes:
    """Return what /proc says of the process that has connected."""
    import _socket

    try:
        process = one.getsockopt(_socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        facts = one.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
        return _status_of(int.from_bytes(facts[:4], "little"))
    return _status_by(process)


def _answerer(parts: dict[int, bytes]) -> bytes:
    """Return what /proc says of the process that has sent a message; nothing of another user's."""
    credentials = parts.get(_SCM_CREDENTIALS, bytes(_CREDENTIALS_BYTES))
    processes = _numbers(parts.get(_SCM_PIDFD, b""))
    if int.from_bytes(credentials[4:8], "little") != os.getuid():
        _close(processes)
        return b""
    if processes:
        return _status_by(processes[0])
    return _status_of(int.from_bytes(credentials[:4], "little"))


def _status_by(process: int) -> bytes:
    """Return what /proc says of a process by its descriptor, which is closed."""
    try:
        with open(f"/proc/self/fdinfo/{process}", "rb") as file:
            return file.read(_STATUS_BYTES)
    except OSError:
        return b""
    finally:
        os.close(process)


def _status_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return file.read(_STATUS_BYTES)
    except OSError:
        return b""


def _is_beside_us(status: bytes) -> bool:
    for line in status.split(b"\n"):
        if line.startswith(b"NSpid:"):
            numbers = line.split()[1:]
            return len(numbers) == 1 and numbers[0].isdigit() and numbers[0] != b"0"
    return False


def _user(one: _socket.socket) -> int:
    import _socket

    facts = one.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    return int.from_bytes(facts[4:8], "little")
