"""The container's first process, before it is the payload: its rows as calls (server INIT).

Rows are sent without waiting, and the replies fetched in order: each round trip costs two process
switches. After the first row that fails the other side does nothing more, so the failure that is
raised is the first one, however many rows were in flight behind it.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_plan import Row

_IN_FLIGHT = 24
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

    __slots__ = ("_fd", "_flight", "root_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # The container's root directory, from the reply of the row that makes it one.
        self.root_fd = -1
        self._flight: list[Row] = []

    def row(self, row: Row, fd: int = -1) -> None:
        """Send a row, with a descriptor or without; a failure of an earlier one is raised here.

        Raises:
            RowFailed: an earlier row was not carried out.
            NestGone: the other side has ended.
        """
        if len(self._flight) >= _IN_FLIGHT:
            self._fetch()
        numbers = tuple([number & _WORD for number in row.numbers])
        try:
            _starter.send_operation(self._fd, row.op, row.flags, numbers, row.first, row.second, fd)
        except ValueError as error:
            raise LaunchError(text=f"{error}") from None
        except OSError:
            # What was refused before it ended lies in the socket, and says more.
            self.settle()
            raise NestGone from None
        self._flight.append(row)

    def rows(self, rows: tuple[Row, ...]) -> None:
        """Send rows that carry no descriptor."""
        for row in rows:
            self.row(row)

    def _fetch(self) -> tuple[int, int]:
        row = self._flight.pop(0)
        try:
            code, error, value, fd = _starter.receive_answer(self._fd)
        except (EOFError, OSError):
            self._flight.clear()
            raise NestGone from None
        if code != protocol.ERR_OK:
            self._flight.clear()
            raise RowFailed(row=row, code=code, errno=error, value=value, fd=fd)
        if row.op == protocol.OP_ROOT_BUNDLE:
            self.root_fd = fd
        return value, fd

    def settle(self) -> None:
        """Fetch every reply that is still out.

        Raises:
            RowFailed: a row was not carried out.
        """
        while self._flight:
            self._fetch()

    def ask(self, row: Row, fd: int = -1) -> tuple[int, int]:
        """Send a row and wait for its reply: (value, descriptor or -1).

        Raises:
            RowFailed: it, or an earlier row, was not carried out.
        """
        self.row(row, fd)
        while len(self._flight) > 1:
            self._fetch()
        return self._fetch()

    def go(self, row: Row, fd: int = -1) -> tuple[int, int] | None:
        """Send the last row; None when the payload has taken over, else what was answered.

        An answer that is no failure is a listener of seccomp_unotify(2), by its number in there.

        Raises:
            RowFailed: the payload could not be started.
        """
        self.row(row, fd)
        while len(self._flight) > 1:
            self._fetch()
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
        row = self._flight.pop()
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
