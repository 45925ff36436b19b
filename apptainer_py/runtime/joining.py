"""The process that waits in an instance to become a payload, as calls (starter/join.c).

It is C alone, with the payload's identity, and does what it is told once the starter has dropped:
enter a directory, become a program. What it cannot do it says by number.
"""

from __future__ import annotations

import os

from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_REPLY_BYTES = 16


class Joining:
    """The channel to it; both ends close when it becomes the payload, or has ended."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def enter(self, directory: bytes) -> int:
        """Make a directory of the container its own; returns 0 or the number of the error."""
        return self._ask(protocol.BEARERPART_PLACE, 0, (directory,), 0, 0)

    def label(self, kind: int, text: bytes) -> int:
        """Have it become the payload with this label; returns 0 or the number of the error."""
        return self._send(protocol.BEARERPART_LABEL, kind, text)

    def filter_calls(self, program: bytes, flags: int) -> None:
        """Have it become the payload under this seccomp filter, or not at all."""
        self._send(protocol.BEARERPART_FILTER, flags, program, answers=False)

    def execute(
        self, path: bytes, arguments: Sequence[bytes], environment: Sequence[bytes], umask: int
    ) -> int:
        """Make it the payload; returns 0, or the number of the error and it waits on."""
        strings = (path, *arguments, *environment)
        count = (len(arguments), len(environment))
        return self._ask(protocol.BEARERPART_PROGRAM, umask, strings, *count)

    def dismiss(self) -> None:
        """Let it end: there is no payload."""
        try:
            _starter.send_bytes(self._fd, _frame(protocol.BEARERPART_NOTHING, 0, 0, 0), -1)
            _starter.receive_bytes(self._fd, _REPLY_BYTES)
        except OSError:
            return

    def _ask(self, part: int, number: int, strings: Sequence[bytes], argc: int, envc: int) -> int:
        data = b"".join(text + b"\0" for text in strings)
        return self._send(part, number, data, (argc, envc))

    def _send(
        self,
        part: int,
        number: int,
        data: bytes,
        count: tuple[int, int] = (0, 0),
        *,
        answers: bool = True,
    ) -> int:
        fd = _starter.sealed_file(data)
        answer = b""
        try:
            _starter.send_bytes(self._fd, _frame(part, number, *count), fd)
            if answers:
                answer = _starter.receive_bytes(self._fd, _REPLY_BYTES)[0]
        except OSError:
            answer = b""
        os.close(fd)
        return int.from_bytes(answer, "little", signed=True)


def _frame(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)
