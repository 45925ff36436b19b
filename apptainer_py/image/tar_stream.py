"""Reader of tar archives from a stream that may be hostile (POSIX ustar and pax, GNU long names).

Sparse files of GNU tar (its own format, and 0.0, 0.1 and 1.0 in pax headers) are read as what they
stand for: "GNU tar, Storing Sparse Files".

The standard library's reader takes headers of any size into memory and follows what they say; this
one knows few kinds of entry, bounds each, and opens nothing.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Read = Callable[[int], bytes]

BLOCK = 512
PATH_BYTES = 4095
_EXTENDED_BYTES = 1 << 20
_CHUNK = 1 << 16
# Extended headers of one member, and records that are for all: neither counts as a member.
_MOST_EXTENDED, _MOST_RECORDS = 16, 1024
_LARGEST = 1 << 62

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0", b"1", b"2", b"3", b"4", b"5", b"6",
)  # fmt: skip
_FILES = (b"0", b"\0", b"7")
_SPARSE = b"S"
_KNOWN = (FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO)
_XATTR = b"SCHILY.xattr."
_OF_SPARSE = b"GNU.sparse."
# Pieces of data in one file, as many as fit into the largest extended header.
_MOST_PIECES = 1 << 16
_NO_MAP = "the map of a sparse file in the archive is damaged"


class TarWrong(ApptainerError):
    """Bytes that are no archive, or one beyond the limits."""

    message = "{reason}"


class Entry(Record):
    """One member; `name` and `link` as they stand there, times in nanoseconds.

    `holes_bytes` of its size are not in the archive.
    """

    kind: bytes
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size_bytes: int
    modified_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    holes_bytes: int = 0


class TarStream:
    """The members of an archive, in order; the content of one is read before the next is asked for.

    `read` returns at most as many bytes as it is asked for, nothing at the end.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._left = 0
        self._padding = 0
        # What of a sparse file is there: offset and size of each piece, and the whole size.
        self._map: list[tuple[int, int]] = []
        self._size = 0
        self._global: dict[bytes, bytes] = {}

    def entries(self) -> Iterator[Entry]:
        """Yield each member.

        Raises:
            TarWrong: a header is damaged, too large, or of an unknown kind.
        """
        while True:
            extended, long_name, long_link = dict(self._global), b"", b""
            headers = 0
            while True:
                block = self._header()
                if block is None:
                    return
                kind = block[156:157]
                if kind not in (b"x", b"g", b"L", b"K"):
                    break
                headers += 1
                if headers > _MOST_EXTENDED or len(self._global) > _MOST_RECORDS:
                    raise TarWrong(reason="the archive has too many extended headers")
                data = self._small(_number(block[124:136]))
                if kind == b"L":
                    long_name = data.rstrip(b"\0")
                elif kind == b"K":
                    long_link = data.rstrip(b"\0")
                else:
                    found = _records(data)
                    (self._global if kind == b"g" else extended).update(found)
                    if kind == b"g":
                        extended.update(found)
            yield self._entry(block, extended, long_name, long_link)
            self._skip()

    def content(self) -> Iterator[bytes]:
        """Yield the content of the member at hand."""
        for piece in self.pieces():
            if isinstance(piece, bytes):
                yield piece
                continue
            for start in range(0, piece, _CHUNK):
                yield bytes(min(_CHUNK, piece - start))

    def pieces(self) -> Iterator[bytes | int]:
        """Yield the content of the member at hand, a number for as many bytes of a hole."""
        if not self._map:
            yield from self._stored(self._left)
            if self._size:
                yield self._size
            return
        place = 0
        for offset, size in self._map:
            if offset > place:
                yield offset - place
            yield from self._stored(size)
            place = offset + size
        if self._size > place:
            yield self._size - place

    def _stored(self, size: int) -> Iterator[bytes]:
        """Yield so many bytes of what the archive has of a member."""
        end = self._left - size
        while self._left > end:
            data = self._read(min(self._left - end, _CHUNK))
            if not data:
                raise TarWrong(reason="the archive ends in the middle of a file")
            self._left -= len(data)
            yield data

    def pass_over(self, place: int) -> int:
        """Return where the header after this member lies, for a caller that can go there."""
        place += self._left + self._padding
        self._left = self._padding = 0
        return place

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            data = self._read(min(size, _CHUNK))
            if not data:
                break
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _header(self) -> bytes | None:
        block = self._exactly(BLOCK)
        # Two empty blocks end an archive; some writers leave one out, or both.
        if not block or block == bytes(BLOCK):
            return None
        if len(block) < BLOCK:
            raise TarWrong(reason="the archive ends in the middle of a header")
        if _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):
            raise TarWrong(reason="a header of the archive is damaged")
        return block

    def _small(self, size: int) -> bytes:
        if size > _EXTENDED_BYTES:
            raise TarWrong(reason=f"a header of the archive is larger than {_EXTENDED_BYTES} bytes")
        data = self._exactly(size)
        rest = self._exactly(-size % BLOCK)
        if len(data) < size or len(rest) < -size % BLOCK:
            raise TarWrong(reason="the archive ends in the middle of a header")
        return data

    def _entry(
        self, block: bytes, extended: dict[bytes, bytes], long_name: bytes, long_link: bytes
    ) -> Entry:
        kind = _kind(block)
        name, link = _names(block, extended, long_name, long_link)
        if kind == FILE and name.endswith(b"/"):
            kind = DIRECTORY  # as before POSIX
        size = _decimal(extended, b"size", _number(block[124:136]))
        self._expect(kind, size)
        holes = self._sparse(block, extended) if kind == FILE else 0
        return Entry(
            kind=kind,
            name=name,
            link=link,
            mode=_number(block[100:108]) & 0o7777,
            uid=_decimal(extended, b"uid", _number(block[108:116])),
            gid=_decimal(extended, b"gid", _number(block[116:124])),
            size_bytes=size if kind != FILE else self._left + holes,
            modified_ns=_time(extended.get(b"mtime"), _number(block[136:148], signed=True)),
            xattrs=tuple(
                (key[len(_XATTR) :], value)
                for key, value in extended.items()
                if key.startswith(_XATTR)
            ),
            holes_bytes=holes,
        )

    def _expect(self, kind: bytes, size: int) -> None:
        """Get ready for the content that follows; pax allows a hard link to repeat the file's."""
        if size and kind not in (FILE, HARD_LINK):
            raise TarWrong(reason="the archive has content where none belongs")
        self._map, self._size = [], 0
        self._left, self._padding = size, -size % BLOCK

    def _sparse(self, block: bytes, extended: dict[bytes, bytes]) -> int:
        """Take the map of a sparse file, if it is one; return how much of it is not there."""
        keys = {key for key in extended if key.startswith(_OF_SPARSE)}
        if block[156:157] == _SPARSE:
            self._map, self._size = self._old_map(block), _number(block[483:495])
        elif keys:
            whole = extended.get(_OF_SPARSE + b"realsize", extended.get(_OF_SPARSE + b"size"))
            self._size = _whole(whole)
            numbers = extended.get(_OF_SPARSE + b"map", b"")
            if extended.get(_OF_SPARSE + b"major") == b"1":
                self._map = self._map_before_data()
            elif numbers:
                self._map = _pairs([_whole(word) for word in numbers.split(b",")])
        place = 0
        for offset, size in self._map:
            if offset < place:
                raise TarWrong(reason=_NO_MAP)
            place = offset + size
        stored = sum(size for _, size in self._map)
        if (self._map or self._size) and (place > self._size or stored != self._left):
            raise TarWrong(reason=_NO_MAP)
        return self._size - stored if self._map or self._size else 0

    def _old_map(self, block: bytes) -> list[tuple[int, int]]:
        """Return the map of GNU tar's own format: four pieces in the header, more in others."""
        fields, more = block[386:482], block[482]
        numbers: list[int] = []
        while True:
            for at in range(0, len(fields), 12):
                if not fields[at]:
                    break
                numbers.append(_number(fields[at : at + 12]))
            if not more:
                return _pairs(numbers)
            if len(numbers) > 2 * _MOST_PIECES:
                raise TarWrong(reason=_NO_MAP)
            block = self._exactly(BLOCK)
            if len(block) < BLOCK:
                raise TarWrong(reason="the archive ends in the middle of a header")
            fields, more = block[:504], block[504]

    def _map_before_data(self) -> list[tuple[int, int]]:
        """Return the map that stands in front of a file's data: decimal numbers, a line each."""
        data, wanted = b"", 1
        while data.count(b"\n") < wanted:
            if self._left < BLOCK or len(data) > _EXTENDED_BYTES:
                raise TarWrong(reason=_NO_MAP)
            data += b"".join(self._stored(BLOCK))
            if b"\n" in data:
                count = _whole(data.partition(b"\n")[0])
                if count > _MOST_PIECES:
                    raise TarWrong(reason=_NO_MAP)
                wanted = 1 + 2 * count
        return _pairs([_whole(word) for word in data.split(b"\n")[1:wanted]])

    def _skip(self) -> None:
        for _ in self._stored(self._left):
            pass
        # Some writers leave out what fills the last block; then there is no header behind it.
        self._exactly(self._padding)
        self._padding = 0


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _kind(block: bytes) -> bytes:
    flag = block[156:157]
    kind = FILE if flag in (*_FILES, _SPARSE) else flag
    if kind not in _KNOWN:
        raise TarWrong(reason=f"the archive has an entry of the unknown kind {kind!r}")
    return kind


def _names(
    block: bytes, extended: dict[bytes, bytes], long_name: bytes, long_link: bytes
) -> tuple[bytes, bytes]:
    """Return the name and where a link leads: pax's words, else GNU's, else the header's own."""
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
    name = (
        extended.get(_OF_SPARSE + b"name")
        or extended.get(b"path")
        or long_name
        or (prefix + b"/" + name if prefix else name)
    )
    link = extended.get(b"linkpath") or long_link or _text(block[157:257])
    if max(len(name), len(link)) > PATH_BYTES or b"\0" in name + link:
        raise TarWrong(reason="the archive has a name that is too long, or no name at all")
    return name, link


def _number(field: bytes, *, signed: bool = False) -> int:
    """Return an octal number, or one in base 256 (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
        if signed and field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
    else:
        digits = field.strip(b" \0")
        if digits.translate(None, b"01234567"):
            raise TarWrong(reason="a header of the archive has a number that is none")
        value = int(digits or b"0", 8)
    if abs(value) > _LARGEST:
        raise TarWrong(reason="a header of the archive has a number that is too large")
    return value


def _decimal(extended: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    text = extended.get(key)
    if text is None:
        return otherwise
    if not text.isdigit() or len(text) > 19 or int(text) > _LARGEST:
        raise TarWrong(reason="a header of the archive has a number that is none")
    return int(text)


def _whole(text: bytes | None) -> int:
    """Return a number of a sparse file's map."""
    if text is None or not text.isdigit() or len(text) > 19 or int(text) > _LARGEST:
        raise TarWrong(reason=_NO_MAP)
    return int(text)


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2 or len(numbers) > 2 * _MOST_PIECES or min(numbers, default=0) < 0:
        raise TarWrong(reason=_NO_MAP)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _time(text: bytes | None, seconds: int) -> int:
    if text is None:
        return seconds * 10**9
    whole, _, fraction = text.partition(b".")
    negative = whole.startswith(b"-")
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 12 or (fraction and not fraction.isdigit()):
        raise TarWrong(reason="a header of the archive has a time that is none")
    value = int(digits) * 10**9 + int(fraction[:9].ljust(9, b"0") if fraction else b"0")
    return -value if negative else value


def _records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header: `length key=value\\n` (POSIX, pax Extended Header)."""
    found: dict[bytes, bytes] = {}
    pieces: list[bytes] = []
    place = 0
    while place < len(data) and data[place] != 0:
        space = data.find(b" ", place, place + 20)
        digits = data[place:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : place + length]
        key, equals, value = record.partition(b"=")
        if length < len(digits) + 4 or place + length > len(data) or not record.endswith(b"\n"):
            raise TarWrong(reason="an extended header of the archive is damaged")
        if not equals or not key:
            raise TarWrong(reason="an extended header of the archive is damaged")
        found[key] = value[:-1]
        place += length
        if key in (_OF_SPARSE + b"offset", _OF_SPARSE + b"numbytes"):
            pieces.append(value[:-1])
    if pieces:
        # Format 0.0 says it once for each piece, 0.1 lists them.
        found[_OF_SPARSE + b"map"] = b",".join(pieces)
    return found
