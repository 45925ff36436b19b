"""The container's first process, before it is the payload: its rows as calls (server INIT).

Rows are sent without waiting, many in one message, and the replies fetched in order: each message
costs system calls, and each round trip two process switches. After the first row that fails the
other side does nothing more, so the failure that is raised is the first one, however many rows were
in flight behind it.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_plan import Row

# Messages under way, and the rows of one: the next is put together while the other side works.
_IN_FLIGHT = 8
_TOGETHER = 24
_WORD = 0xFFFFFFFFFFFFFFFF


class RowFailed(LaunchError):
    """A row was not carried out: `code` is an ERR_* of the protocol, `errno` the call's, or 0."""

    message = "{says}"

    def __init__(self, *, row: Row, code: int, errno: int, value: int = 0, fd: int = -1) -> None:
        self.row = row
        self.code = code
        self.errno = errno
        self.value = value
        self.fd = fd
        reason = os.strerror(errno).lower() if errno else protocol.ERR_TEXTS.get(code, "failed")
        super().__init__(says=row.says.replace("{error}", reason))


class NestGone(LaunchError):
    """The other side ended in the middle: by a signal, or a row out of place."""

    message = "the container's first process ended before it was told to start"


class Nest:
    """The socket to the process that becomes the container; usable by one thread."""

    __slots__ = ("_fd", "_flight", "_packed", "_rows", "_size", "root_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # The container's root directory, from the reply of the row that makes it one.
        self.root_fd = -1
        # Messages under way, and the rows that the next one will have.
        self._flight: list[list[Row]] = []
        self._rows: list[Row] = []
        self._packed: list[bytes] = []
        self._size = 0

    def row(self, row: Row, fd: int = -1) -> None:
        """Put a row on its way; one with a descriptor goes alone, others together.

        Raises:
            RowFailed: an earlier row was not carried out.
            NestGone: the other side has ended.
        """
        numbers = tuple([number & _WORD for number in row.numbers])
        try:
            packed = _starter.pack_operation(row.op, row.flags, numbers, row.first, row.second)
        except ValueError as error:
            raise LaunchError(text=f"{error}") from None
        if fd >= 0 or self._size + len(packed) > protocol.LIMIT_ROWS_BYTES:
            self.flush()
        self._rows.append(row)
        self._packed.append(packed)
        self._size += len(packed)
        if fd >= 0 or len(self._rows) >= _TOGETHER or row.op == protocol.OP_ROOT_BUNDLE:
            self._send(fd)

    def rows(self, rows: tuple[Row, ...]) -> None:
        """Put rows on their way that carry no descriptor."""
        for row in rows:
            self.row(row)

    def flush(self) -> None:
        """Send what has been put together so far."""
        if self._rows:
            self._send(-1)

    def _send(self, fd: int) -> None:
        rows, data = self._rows, b"".join(self._packed)
        self._rows, self._packed, self._size = [], [], 0
        if len(self._flight) >= _IN_FLIGHT:
            self._fetch()
        try:
            _starter.send_bytes(self._fd, data, fd)
        except OSError:
            # What was refused before it ended lies in the socket, and says more.
            self.settle()
            raise NestGone from None
        self._flight.append(rows)

    def _fetch(self) -> tuple[int, int]:
        rows = self._flight.pop(0)
        try:
            code, error, value, fd, number = _starter.receive_rows_answer(self._fd)
        except (EOFError, OSError):
            self._forget()
            raise NestGone from None
        if code != protocol.ERR_OK:
            self._forget()
            raise RowFailed(row=rows[number], code=code, errno=error, value=value, fd=fd)
        if rows[-1].op == protocol.OP_ROOT_BUNDLE:
            self.root_fd = fd
        return value, fd

    def _forget(self) -> None:
        self._flight.clear()
        self._rows, self._packed, self._size = [], [], 0

    def settle(self) -> None:
        """Send what is left, and fetch every reply that is still out.

        Raises:
            RowFailed: a row was not carried out.
        """
        self.flush()
        while self._flight:
            self._fetch()

    def ask(self, row: Row, fd: int = -1) -> tuple[int, int]:
        """Send a row and wait for its reply: (value, descriptor or -1).

        Raises:
            RowFailed: it, or an earlier row, was not carried out.
        """
        self.row(row, fd)
        self.flush()
        while len(self._flight) > 1:
            self._fetch()
        return self._fetch()

    def go(self, row: Row, fd: int = -1) -> tuple[int, int] | None:
        """Send the last row; None when the payload has taken over, else what was answered.

        An answer that is no failure is a listener of seccomp_unotify(2), by its number in there.

        Raises:
            RowFailed: the payload could not be started.
        """
        self.settle()
        self.row(row, fd)
        self.flush()
        try:
            code, error, value, passed = _starter.receive_answer(self._fd)
        except EOFError:
            self._flight.clear()
            return None
        except OSError:
            raise NestGone from None
        if code != protocol.ERR_OK:
            raise RowFailed(row=row, code=code, errno=error, value=value, fd=passed)
        return value, passed

    def acknowledge(self) -> None:
        """Say that the listener has been handed over; then the payload takes over.

        Raises:
            RowFailed: it could not be started.
        """
        _starter.send_bytes(self._fd, b"k")
        (row,) = self._flight.pop()
        try:
            code, error, value, passed = _starter.receive_answer(self._fd)
        except EOFError:
            return
        raise RowFailed(row=row, code=code, errno=error, value=value, fd=passed)

    def close(self) -> None:
        """Give the socket up, which ends the other side unless it is the payload by now."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
