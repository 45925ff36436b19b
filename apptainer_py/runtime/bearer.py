"""The process that waits in a container to become its payload, as calls (starter/bearer.c).

That is a lean stage 2, or who joins a container that runs. It is C alone, with the payload's
identity, and does what it is told: enter a directory, and become a program once the starter has
dropped. What it cannot do it says by number.
"""

from __future__ import annotations

import os

from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_REPLY_BYTES = protocol.LIMIT_PATH_BYTES + 4


class Bearer:
    """The channel to it; both ends close when it becomes the payload, or has ended."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def has_ended(self) -> bool:
        """Return whether it is there no more."""
        import select

        events = select.poll()
        events.register(self._fd, 0)
        return bool(events.poll(0))

    def ask_place(self, directory: bytes) -> None:
        """Have it make a directory of the container its own; `place` has the answer."""
        self._send(protocol.BEARERPART_PLACE, 0, directory + b"\0")

    def place(self) -> tuple[int, bytes]:
        """Return the number of an error, or 0 and where the directory is."""
        answer = self._answer()
        return _number(answer), answer[4:]

    def stream(self, number: int, fd: int) -> None:
        """Make an open file the payload's standard stream of that number."""
        self._pass(protocol.BEARERPART_STREAM, number, fd)

    def label(self, kind: int, text: bytes) -> int:
        """Have it become the payload with this label; returns 0 or the number of the error."""
        self._send(protocol.BEARERPART_LABEL, kind, text)
        return _number(self._answer())

    def filter_calls(self, program: bytes, flags: int) -> None:
        """Have it become the payload under this seccomp filter, or not at all."""
        self._send(protocol.BEARERPART_FILTER, flags, program)

    def execute(
        self, path: bytes, arguments: Sequence[bytes], environment: Sequence[bytes], umask: int
    ) -> int:
        """Make it the payload; returns 0, or the number of the error and it waits on."""
        data = b"\0".join((path, *arguments, *environment, b""))
        self._send(protocol.BEARERPART_PROGRAM, umask, data, len(arguments), len(environment))
        return _number(self._answer())

    def dismiss(self) -> None:
        """Let it end: there is no payload."""
        self._pass(protocol.BEARERPART_NOTHING, 0, -1)
        while self._answer():
            pass  # to what was asked before

    def _send(self, part: int, number: int, data: bytes, argc: int = 0, envc: int = 0) -> None:
        fd = _starter.sealed_file(data)
        self._pass(part, number, fd, argc, envc)
        os.close(fd)

    def _pass(self, part: int, number: int, fd: int, argc: int = 0, envc: int = 0) -> None:
        frame = b"".join(n.to_bytes(4, "little") for n in (part, number, argc, envc))
        try:
            _starter.send_bytes(self._fd, frame, fd)
        except OSError:
            return  # it has ended, which shows in what it does not answer

    def _answer(self) -> bytes:
        try:
            return _starter.receive_bytes(self._fd, _REPLY_BYTES)[0]
        except OSError:
            return b""


def _number(answer: bytes) -> int:
    return int.from_bytes(answer[:4], "little", signed=True)
