"""Layers as they are stored: which compression, and whether they are what their digest says."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Step = Callable[[bytes], tuple[bytes, bytes, bool]]

_CHUNK = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_LIBRARY = "libzstd.so.1"
# What may follow the end of an archive.
_REST_BYTES = 64 << 20
# What a window may cost in memory: beyond it a layer is refused, as `zstd -d` does.
_ZSTD_WINDOW_LOG, _ZSTD_WINDOW_MOST = 100, 27


class Digest:
    """`algorithm:hex` (OCI image specification, descriptor.md)."""

    def __init__(self, text: str) -> None:
        algorithm, _, digits = text.partition(":")
        wanted = {"sha256": 64, "sha512": 128}.get(algorithm)
        if len(digits) != wanted or digits.strip("0123456789abcdef"):
            raise ImageError(image="", reason=f"the digest {text[:200]!r} is none")
        self.text = text
        self.algorithm = algorithm
        self.digits = digits


class Blob:
    """One object of a layout: a part of an open file, and what it must be."""

    def __init__(self, fd: int, offset: int, size: int, digest: Digest) -> None:
        import hashlib

        self._fd = fd
        self._place = offset
        self._left = size
        self._digest = digest
        self._hash = hashlib.new(digest.algorithm)

    def _ready(self, place: int) -> int:
        """Wait for what stands at a place; return how much is there."""
        return self._left

    def read(self, size: int) -> bytes:
        """Return the next bytes; nothing at the end."""
        size = min(size, self._left, _CHUNK)
        data = os.pread(self._fd, min(size, self._ready(self._place)) if size else 0, self._place)
        self._place += len(data)
        self._left -= len(data)
        self._hash.update(data)
        return data

    def close(self) -> None:
        """Give the file up."""
        os.close(self._fd)

    def check(self) -> None:
        """Read the rest, and compare the whole with its digest.

        Raises:
            ImageError: it is something else.
        """
        while self.read(_CHUNK):
            pass
        if self._left or self._hash.hexdigest() != self._digest.digits:
            raise ImageError(image="", reason=f"{self._digest.text} is damaged or incomplete")


class Unpacked:
    """The content of a blob that may be compressed, as a stream that is read forwards."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._ready = b""
        self._input = blob.read(_CHUNK)
        self._make = _maker(self._input)
        self._step: Step | None = None

    def read(self, size: int) -> bytes:
        """Return up to so many bytes; nothing at the end.

        Raises:
            ImageError: what is compressed is damaged.
        """
        while not self._ready and (self._input or self._fill()):
            self._advance()
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def _fill(self) -> bool:
        self._input = self._blob.read(_CHUNK)
        if not self._input and self._step is not None:
            raise ImageError(image="", reason="a compressed layer ends in the middle")
        return bool(self._input)

    def _advance(self) -> None:
        if self._make is None:
            self._ready, self._input = self._input, b""
            return
        if self._step is None:
            self._step = self._make()
        self._ready, self._input, over = self._step(self._input)
        if over:
            # More may follow: pigz and pzstd write a file in parts.
            self._step = None
            self._input = self._input or self._blob.read(_CHUNK)
            if not self._input.strip(b"\0"):
                self._input = b""


class Layer:
    """The content of a layer, compared in the end with what the image's configuration says of it.

    `plain` is the digest of the content, "" where nothing is said, or the blob's own is the same.
    """

    def __init__(self, blob: Blob, plain: str) -> None:
        import hashlib

        self._stream = Unpacked(blob)
        self._plain = Digest(plain) if plain else None
        self._hash = hashlib.new(self._plain.algorithm) if self._plain else None

    def read(self, size: int) -> bytes:
        """Return up to so many bytes; nothing at the end.

        Raises:
            ImageError: what is compressed is damaged.
        """
        data = self._stream.read(size)
        if self._hash is not None:
            self._hash.update(data)
        return data

    def check(self) -> None:
        """Read the rest, which is what writers of archives leave behind them.

        Raises:
            ImageError: it is something else, or the rest is too long.
        """
        if self._plain is None or self._hash is None:
            return
        left = _REST_BYTES
        while data := self.read(_CHUNK):
            left -= len(data)
            if left < 0:
                raise ImageError(image="", reason="a layer goes on far behind its archive")
        if self._hash.hexdigest() != self._plain.digits:
            reason = f"the layer is damaged or incomplete: its content is not {self._plain.text}"
            raise ImageError(image="", reason=reason)


def _maker(start: bytes) -> Callable[[], Step] | None:
    if start.startswith(_GZIP):
        return _gzip
    if start.startswith(_ZSTD):
        return _zstd
    return None


def _gzip() -> Step:
    import zlib

    worker = zlib.decompressobj(wbits=31)

    def step(data: bytes) -> tuple[bytes, bytes, bool]:
        try:
            # Bounded: a kilobyte may become a megabyte.
            done = worker.decompress(data, _CHUNK)
        except zlib.error as error:
            raise ImageError(image="", reason=f"a gzip layer is damaged: {error}") from None
        rest = worker.unused_data if worker.eof else worker.unconsumed_tail
        return done, rest, worker.eof

    return step


def _zstd() -> Step:
    """Return a step of libzstd's streaming interface; Python has no module for it before 3.14."""
    import ctypes

    class Buffer(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("size", ctypes.c_size_t),
            ("place", ctypes.c_size_t),
        )

    library = _load_zstd(ctypes)
    stream = ctypes.c_void_p(library.ZSTD_createDStream())
    library.ZSTD_DCtx_setParameter(stream, _ZSTD_WINDOW_LOG, _ZSTD_WINDOW_MOST)
    space = ctypes.create_string_buffer(_CHUNK)

    def step(data: bytes) -> tuple[bytes, bytes, bool]:
        source = Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)
        target = Buffer(ctypes.cast(space, ctypes.c_void_p), _CHUNK, 0)
        left = library.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
        if library.ZSTD_isError(left):
            library.ZSTD_freeDStream(stream)
            reason = library.ZSTD_getErrorName(left).decode("ascii", "replace")
            raise ImageError(image="", reason=f"a zstd layer is damaged: {reason}")
        if left == 0:
            library.ZSTD_freeDStream(stream)
        return space.raw[: target.place], data[source.place :], left == 0

    return step


def unpack_zstd(data: bytes, limit_bytes: int) -> bytes:
    """Return the content of one frame.

    Raises:
        ImageError: it is damaged, or longer.
    """
    import ctypes

    library = _load_zstd(ctypes)
    space = ctypes.create_string_buffer(limit_bytes)
    size = library.ZSTD_decompress(space, limit_bytes, data, len(data))
    if library.ZSTD_isError(size):
        raise ImageError(image="", reason="a block of zstd is damaged")
    return space.raw[:size]


def _load_zstd(ctypes: Any) -> Any:
    try:
        library = ctypes.CDLL(_ZSTD_LIBRARY)
    except OSError:
        reason = f"a layer is compressed with zstd, and {_ZSTD_LIBRARY} is not installed"
        raise ImageError(image="", reason=reason) from None
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t,
    )  # fmt: skip
    library.ZSTD_DCtx_setParameter.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
    library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    return library
