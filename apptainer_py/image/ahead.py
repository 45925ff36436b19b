"""Reading a large object while what was read before is hashed: two processors in place of one."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pieces = Callable[[int, int, int], Iterator[bytes | memoryview]]

# No larger than what the allocator keeps: pages that are new each time cost more than the hash.
_CHUNK_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_BUFFERS = 2
# Below that a thread costs more than it saves.
_LARGE_BYTES = 16 << 20


def in_turn(fd: int, at: int, size: int) -> Iterator[bytes | memoryview]:
    """Return a part of an open file, piece by piece; less where the file ends.

    Raises:
        OSError: as read(2) fails.
    """
    while size > 0 and (part := os.pread(fd, min(size, _CHUNK_BYTES), at)):
        yield part
        at, size = at + len(part), size - len(part)


def ahead(fd: int, at: int, size: int) -> Iterator[bytes | memoryview]:
    """Return the same as `in_turn`; a thread reads on meanwhile. A piece is gone with the next.

    Raises:
        OSError: as read(2) fails.
    """
    if size < _LARGE_BYTES:
        yield from in_turn(fd, at, size)
        return
    reader = _Reader(fd, at, size)
    try:
        yield from reader.pieces()
    finally:
        reader.end()


class _Reader:
    """A thread that fills buffers in a ring."""

    def __init__(self, fd: int, at: int, size: int) -> None:
        import threading

        self._buffers = [memoryview(bytearray(_BUFFER_BYTES)) for _ in range(_BUFFERS)]
        self._filled = [0] * _BUFFERS
        self._free = threading.Semaphore(_BUFFERS)
        self._full = threading.Semaphore(0)
        self._error: OSError | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(fd, at, size), daemon=True)
        self._thread.start()

    def pieces(self) -> Iterator[memoryview]:
        turn = 0
        while True:
            self._full.acquire()
            if self._error:
                raise self._error
            if not self._filled[turn]:
                return
            yield self._buffers[turn][: self._filled[turn]]
            self._free.release()
            turn = (turn + 1) % _BUFFERS

    def end(self) -> None:
        self._ended = True
        self._free.release()
        self._thread.join()

    def _read(self, fd: int, at: int, size: int) -> None:
        turn, got = 0, 1
        while got:
            self._free.acquire()
            if self._ended:
                return
            got = 0
            try:
                if size > 0:
                    got = os.preadv(fd, [self._buffers[turn][: min(size, _BUFFER_BYTES)]], at)
            except OSError as error:
                self._error = error
            self._filled[turn] = got
            self._full.release()
            at, size, turn = at + got, size - got, (turn + 1) % _BUFFERS
