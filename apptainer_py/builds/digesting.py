"""The digest of a file that is sent: it is found while others prepare to send it."""

from __future__ import annotations

import hashlib
import os
import threading

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_CHUNK = 1 << 20


class FileChanged(ApptainerError):
    message = "{path} has changed while it was pushed"
    hint = "push it again when nobody writes to it"


class Digesting:
    """A file's digest and size, found in a thread; whoever goes away ends it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._facts = self._now()
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._error: OSError | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Digesting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def wait(self) -> tuple[str, int]:
        """Return what it has found.

        Raises:
            OSError: the file cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return f"sha256:{self._hash.hexdigest()}", self._size_bytes

    def check(self) -> None:
        """Find out whether the file is what it was.

        Raises:
            FileChanged: somebody has written to it.
        """
        if self._now() != self._facts:
            raise FileChanged(path=self.file.name)

    def _now(self) -> tuple[int, int]:
        facts = os.fstat(self.file.fileno())
        return facts.st_size, facts.st_mtime_ns

    def _work(self) -> None:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        try:
            while not self._stopped and (size := self._read(buffer)):
                self._hash.update(view[:size])
                self._size_bytes += size
        except OSError as error:
            self._error = error

    def _read(self, buffer: bytearray) -> int:
        return os.preadv(self.file.fileno(), [buffer], self._size_bytes)
