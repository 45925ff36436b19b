"""A squashfs whose start is quick: blocks that a launch reads are put in as they are.

mksquashfs leaves whole files uncompressed, or none, and none at all of a stream. Here single blocks
of an image that it has made are exchanged, and what lies behind them moves: addresses of blocks in
inodes, of fragments, and of tables. That takes an image of zstd whose inodes are not compressed
(`-noI`); another one stays as it is.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import blobs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What the start of almost any program reads, the most wanted first: to unpack it would take longer
# than all else that the image server does.
NAMES = (
    "ld-linux*.so*", "ld64.so*", "ld-musl-*.so*", "libc.so.*", "libc-*.so", "libdl*.so*",
    "libpthread*.so*", "sh", "dash", "busybox", "bash", "libtinfo.so*",
)  # fmt: skip
_BEGINNINGS = ("ld", "lib", "sh", "dash", "busybox", "bash")
# The image becomes larger by this part of it at most: less than what its compression has saved over
# that of other programs.
_SHARE = 100

_SUPERBLOCK = struct.Struct("<5I6H8Q")
_FIELDS = (
    "magic", "inodes", "time", "block", "fragments", "kind", "log", "flags", "ids", "major",
    "minor", "root", "used_at", "ids_at", "xattrs_at", "inodes_at", "names_at", "fragments_at",
    "export_at",
)  # fmt: skip
_META_BYTES = 8192
_META_PLAIN = 0x8000
_BLOCK_PLAIN = 1 << 24
_NONE = (1 << 64) - 1
_NO_FRAGMENT = 0xFFFFFFFF
_ZSTD = 6
_CHUNK = 1 << 20
# The tables are in memory: an image that has larger ones stays as it is.
_TABLE_BYTES = 16 << 20
_FRAGMENT = struct.Struct("<QQ")
_LISTING = struct.Struct("<III")
_NAME = struct.Struct("<HhHH")
_FILE_IN_LISTING = 2
_BASE_BYTES = 16
_FILE = struct.Struct("<IIII")
_LONG_FILE = struct.Struct("<QQQIIII")
_PLAIN_FILE, _PLAIN_LINK, _LONG_DIRECTORY, _LONG_FILE_KIND, _LONG_LINK = 2, 3, 8, 9, 10
# Kind of inode: how long it is, where that does not vary.
_INODE_BYTES = {1: 32, 4: 24, 5: 24, 6: 20, 7: 20, 11: 28, 12: 28, 13: 24, 14: 24}


class _Unfit(Exception):
    """The image is not one that this can be done to."""


class Piece(Record):
    """A part of an image: bytes, or where they stand in the file that there was."""

    offset: int
    size_bytes: int
    data: bytes = b""


class _File(Record):
    """A file's inode: where its start and the sizes of its blocks stand, and what they say."""

    start: int
    start_at: int
    sizes: tuple[int, ...]
    sizes_at: int
    is_long: bool


def rearranged(fd: int) -> list[Piece]:
    """Return what the image of an open file becomes; one piece, the whole, if it cannot be done."""
    try:
        return _Image(fd).pieces()
    except (_Unfit, struct.error, IndexError, ImageError):
        return [_part(0, os.fstat(fd).st_size)]


def chunks(fd: int, pieces: Sequence[Piece]) -> Iterator[bytes]:
    """Yield the bytes of pieces."""
    for piece in pieces:
        if piece.data:
            yield piece.data
        place, end = piece.offset, piece.offset + piece.size_bytes
        while not piece.data and place < end:
            data = os.pread(fd, min(_CHUNK, end - place), place)
            if not data:
                return
            place += len(data)
            yield data


def _part(start: int, end: int) -> Piece:
    return Piece(offset=start, size_bytes=end - start)


def _bytes(data: bytes) -> Piece:
    return Piece(offset=0, size_bytes=len(data), data=data)


class _Image:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        values = _SUPERBLOCK.unpack(self._read(0, _SUPERBLOCK.size))
        self._facts = dict(zip(_FIELDS, values, strict=True))
        facts = self._facts
        if facts["kind"] != _ZSTD or not facts["fragments"]:
            raise _Unfit
        self._inodes = bytearray(self._plain(facts["inodes_at"], facts["names_at"]))
        self._fragments_from = self._addresses(facts["fragments_at"], facts["fragments"] * 16)[0]
        # Of each block that is exchanged: where it stood, and what comes there.
        self._new: dict[int, tuple[int, bytes]] = {}
        self._places: list[int] = []
        self._grown: list[int] = [0]

    def _read(self, offset: int, size: int) -> bytes:
        if not 0 <= size <= _TABLE_BYTES:
            raise _Unfit
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise _Unfit
        return data

    def _plain(self, start: int, end: int) -> bytes:
        """Return a table of metadata blocks, all of which are full and uncompressed."""
        raw, place, parts = self._read(start, end - start), 0, []
        while place < len(raw):
            (head,) = struct.unpack_from("<H", raw, place)
            size = head & ~_META_PLAIN
            place += 2 + size
            # So that an address in a block is one in the table.
            if not head & _META_PLAIN or (size != _META_BYTES and place != len(raw)):
                raise _Unfit
            parts.append(raw[place - size : place])
        return b"".join(parts)

    def _addresses(self, place: int, table_bytes: int) -> tuple[int, ...]:
        """Return where the metadata blocks of a table stand: a list behind it says so."""
        count = -(-table_bytes // _META_BYTES)
        return struct.unpack(f"<{count}Q", self._read(place, 8 * count))

    # -- what is there

    def _wanted(self) -> list[int]:
        """Return where in their table the inodes of the wanted files stand, the first first."""
        table = self._plain(self._facts["names_at"], self._fragments_from)
        place = 0
        found: list[tuple[int, int]] = []
        while place < len(table):
            count, block, _ = _LISTING.unpack_from(table, place)
            place += _LISTING.size
            for _ in range(count + 1):
                offset, _, kind, size = _NAME.unpack_from(table, place)
                place += _NAME.size + size + 1
                name = table[place - size - 1 : place].decode("utf-8", "replace")
                rank = _rank(name)
                if kind == _FILE_IN_LISTING and rank < len(NAMES):
                    found.append((rank, block // (_META_BYTES + 2) * _META_BYTES + offset))
        return [inode for _, inode in sorted(found)]

    def _file(self, place: int) -> _File:
        at = place + _BASE_BYTES
        is_long = self._kind(place) == _LONG_FILE_KIND
        if is_long:
            start, size, _, _, fragment, _, _ = _LONG_FILE.unpack_from(self._inodes, at)
        else:
            start, fragment, _, size = _FILE.unpack_from(self._inodes, at)
        sizes_at = at + (_LONG_FILE.size if is_long else _FILE.size)
        blocks, rest = divmod(size, self._facts["block"])
        blocks += bool(rest) and fragment == _NO_FRAGMENT
        if not 0 <= blocks <= len(self._inodes) // 4:
            raise _Unfit
        sizes = struct.unpack_from(f"<{blocks}I", self._inodes, sizes_at)
        return _File(start=start, start_at=at, sizes=sizes, sizes_at=sizes_at, is_long=is_long)

    def _kind(self, place: int) -> int:
        return int.from_bytes(self._inodes[place : place + 2], "little")

    def _files(self) -> Iterator[_File]:
        """Yield every file, in the order of inodes."""
        place = 0
        while place < len(self._inodes):
            kind = self._kind(place)
            if kind in (_PLAIN_FILE, _LONG_FILE_KIND):
                file = self._file(place)
                yield file
                place = file.sizes_at + 4 * len(file.sizes)
            else:
                place += self._inode_bytes(place, kind)

    def _inode_bytes(self, place: int, kind: int) -> int:
        at = place + _BASE_BYTES
        if kind in (_PLAIN_LINK, _LONG_LINK):
            (size,) = struct.unpack_from("<I", self._inodes, at + 4)
            return int(_BASE_BYTES + 8 + size + 4 * (kind == _LONG_LINK))
        if kind != _LONG_DIRECTORY:
            if kind not in _INODE_BYTES:
                raise _Unfit
            return _INODE_BYTES[kind]
        (count,) = struct.unpack_from("<H", self._inodes, at + 16)
        end = at + 24
        for _ in range(count):
            (size,) = struct.unpack_from("<I", self._inodes, end + 8)
            end += 12 + size + 1
        return int(end - place)

    # -- what becomes of it

    def pieces(self) -> list[Piece]:
        """Return the image with blocks exchanged and every address mended."""
        left = self._facts["used_at"] // _SHARE
        for place in self._wanted():
            left = self._unpack(self._file(place), left)
        if not self._new:
            raise _Unfit
        self._places = sorted(self._new)
        for place in self._places:
            size, data = self._new[place]
            self._grown.append(self._grown[-1] + len(data) - size)
        for file in self._files():
            self._mend(file)
        found = [*self._data(), *self._tables()]
        return [self._superblock(), *(piece for piece in found if piece.size_bytes)]

    def _unpack(self, file: _File, left: int) -> int:
        """Exchange blocks of a file; return by how many bytes the image may still grow."""
        place, block = file.start, self._facts["block"]
        for size in file.sizes:
            if size and not size & _BLOCK_PLAIN and place not in self._new:
                data = blobs.unpack_zstd(self._read(place, size), block)
                if len(data) - size <= left:
                    self._new[place] = (size, data)
                    left -= len(data) - size
            place += size & ~_BLOCK_PLAIN
        return left

    def _moved(self, place: int) -> int:
        """Return where what stood at a place comes."""
        return place + self._grown[bisect_left(self._places, place)]

    def _mend(self, file: _File) -> None:
        if not file.sizes:
            return
        form = "<Q" if file.is_long else "<I"
        struct.pack_into(form, self._inodes, file.start_at, self._moved(file.start))
        end = file.start + sum(size & ~_BLOCK_PLAIN for size in file.sizes)
        if self._moved(end) - self._moved(file.start) == end - file.start:
            return
        place = file.start
        for number, size in enumerate(file.sizes):
            if size and place in self._new:
                plain = len(self._new[place][1]) | _BLOCK_PLAIN
                struct.pack_into("<I", self._inodes, file.sizes_at + 4 * number, plain)
            place += size & ~_BLOCK_PLAIN

    def _data(self) -> Iterator[Piece]:
        place = _SUPERBLOCK.size
        for start in self._places:
            size, data = self._new[start]
            yield _part(place, start)
            yield _bytes(data)
            place = start + size
        yield _part(place, self._facts["inodes_at"])

    def _tables(self) -> Iterator[Piece]:
        """Yield all behind the data, and note where it comes."""
        facts = self._facts
        yield _bytes(_in_blocks(bytes(self._inodes)))
        yield _part(facts["names_at"], self._fragments_from)
        table = _in_blocks(self._fragment_table())
        begin = self._moved(self._fragments_from)
        addresses = range(begin, begin + len(table), _META_BYTES + 2)
        yield _bytes(table + struct.pack(f"<{len(addresses)}Q", *addresses))
        rest_at = facts["fragments_at"] + 8 * len(addresses)
        by = begin + len(table) + 8 * len(addresses) - rest_at
        yield _bytes(self._rest(rest_at, by))
        facts["inodes_at"] = self._moved(facts["inodes_at"])
        facts["names_at"] = self._moved(facts["names_at"])
        facts["fragments_at"] = begin + len(table)
        for name in ("ids_at", "export_at", "xattrs_at", "used_at"):
            if facts[name] != _NONE:
                facts[name] += by
        yield _bytes(bytes(-facts["used_at"] % 4096))

    def _fragment_table(self) -> bytes:
        table = bytearray()
        for place in self._addresses(self._facts["fragments_at"], self._facts["fragments"] * 16):
            (head,) = struct.unpack("<H", self._read(place, 2))
            data = self._read(place + 2, head & ~_META_PLAIN)
            table += data if head & _META_PLAIN else blobs.unpack_zstd(data, _META_BYTES)
        if len(table) != self._facts["fragments"] * _FRAGMENT.size:
            raise _Unfit
        for at in range(0, len(table), _FRAGMENT.size):
            (start,) = struct.unpack_from("<Q", table, at)
            struct.pack_into("<Q", table, at, self._moved(start))
        return bytes(table)

    def _rest(self, start: int, by: int) -> bytes:
        """Return the tables behind that of fragments, which move by so many bytes."""
        facts = self._facts
        data = bytearray(self._read(start, facts["used_at"] - start))
        lists = [(facts["export_at"], facts["inodes"] * 8), (facts["ids_at"], facts["ids"] * 4)]
        if facts["xattrs_at"] != _NONE:
            first, count = struct.unpack_from("<QI", data, facts["xattrs_at"] - start)
            struct.pack_into("<Q", data, facts["xattrs_at"] - start, first + by)
            lists.append((facts["xattrs_at"] + 16, count * 16))
        for place, table_bytes in lists:
            if place == _NONE:
                continue
            moved = [address + by for address in self._addresses(place, table_bytes)]
            struct.pack_into(f"<{len(moved)}Q", data, place - start, *moved)
        return bytes(data)

    def _superblock(self) -> Piece:
        return _bytes(_SUPERBLOCK.pack(*self._facts.values()))


def _rank(name: str) -> int:
    if not name.startswith(_BEGINNINGS):
        return len(NAMES)
    from fnmatch import fnmatchcase

    return next((n for n, one in enumerate(NAMES) if fnmatchcase(name, one)), len(NAMES))


def _in_blocks(table: bytes) -> bytes:
    parts = []
    for at in range(0, len(table), _META_BYTES):
        data = table[at : at + _META_BYTES]
        parts += [struct.pack("<H", len(data) | _META_PLAIN), data]
    return b"".join(parts)
