"""Master's end of the janitor (starter/janitor.c): what is registered here is undone in the end.

The end is that of the container and of this socket, whoever was killed meanwhile. What is about to
be made is registered before it is made.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ImageGone
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.runtime.mounting import StarterGone, refused

_WHAT = "cannot arrange for the end of the launch"
_REASON_BYTES_MAX = 65536


class Janitor:
    """One process of the starter's, which outlives all others; `container_pid` is who it watches.

    While `fd` is open, nothing is undone yet.
    """

    __slots__ = ("container_pid", "fd")

    def __init__(self, keeper_fd: int, container_pid: int) -> None:
        import socket

        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        ours, its = socket.socketpair(socket.AF_UNIX, kind)
        self.fd = ours.detach()
        try:
            _starter.send_operation(keeper_fd, protocol.OP_JANITOR, 0, (), None, None, its.fileno())
            op, code, error, _ = _starter.receive_reply(keeper_fd)
        except (EOFError, OSError):
            raise StarterGone(what=_WHAT) from None
        finally:
            its.close()
        if op == protocol.EVENT_SERVER_ENDED:
            raise ImageGone
        if op != protocol.OP_JANITOR:
            raise StarterGone(what=_WHAT)
        if code != protocol.ERR_OK:
            raise refused(_WHAT, code, error)
        self.container_pid = container_pid

    def group(self, directory: str) -> None:
        """Have a directory of a control group removed."""
        self._register(protocol.OP_CLEAN_GROUP, (), os.fsencode(directory), None, -1)

    def connect(self) -> tuple[int, int, int, bytes]:
        """Have the networks made that keeper has judged.

        Returns an ERR_*, an errno, which plugin has failed, and what that one says; of success
        what was said of the first network.
        """
        try:
            _starter.send_operation(self.fd, protocol.OP_ADD_NETWORKS, 0, (), None, None, -1)
            code, error, value, fd = _starter.receive_answer(self.fd)
        except (EOFError, OSError):
            raise StarterGone(what=_WHAT) from None
        said = b""
        if fd >= 0:
            said = os.pread(fd, _REASON_BYTES_MAX, 0)
            os.close(fd)
        return code, error, value, said

    def _register(
        self, op: int, numbers: tuple[int, ...], first: bytes, second: bytes | None, fd: int
    ) -> None:
        try:
            _starter.send_operation(self.fd, op, 0, numbers, first, second, fd)
            code, error, _, _ = _starter.receive_answer(self.fd)
        except (EOFError, OSError):
            raise StarterGone(what=_WHAT) from None
        if code != protocol.ERR_OK:
            raise refused(_WHAT, code, error)

    def end(self, *, wait: bool) -> None:
        """Say that there is no more to come; `wait` until all is undone that nobody uses."""
        import socket

        channel = socket.socket(fileno=self.fd)
        try:
            channel.shutdown(socket.SHUT_WR)
            while wait and channel.recv(16):
                pass
        except OSError:
            return  # it has ended
        finally:
            channel.close()
