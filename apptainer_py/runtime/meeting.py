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
# Somebody who has the name already, and has not come to listen.
_PAUSE_S = 0.002
_NAMES = 4
_BACKLOG = 4096
_WORD = b"share"
_CREDENTIALS_BYTES = 12
_FD_BYTES = 4


class Alone(Exception):
    """Nobody can be met: `why`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Foreign(Exception):
    """The name is another user's."""


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
            if _user(one) == os.getuid():
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
    while True:
        found = _claim(name) or _ask(name, until)
        if found is not None:
            return found
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
        one.settimeout(max(until - time.monotonic(), _PAUSE_S))
        one.connect(name)
        if _user(one) != os.getuid():
            raise _Foreign
        word, extra, _, _ = one.recvmsg(
            len(_WORD), _socket.CMSG_SPACE(2 * _FD_BYTES), _socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise Alone("the others do not answer") from None
    except OSError:
        return None
    finally:
        one.close()
    fds = [
        int.from_bytes(data[at : at + _FD_BYTES], "little")
        for level, kind, data in extra
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS
        for at in range(0, len(data) - _FD_BYTES + 1, _FD_BYTES)
    ]
    if word != _WORD or len(fds) != 2:
        for fd in fds:
            os.close(fd)
        return None
    return Meeting(_socket.socket(fileno=fds[1]), fds[0])


def _user(one: _socket.socket) -> int:
    import _socket

    facts = one.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    return int.from_bytes(facts[4:8], "little")
