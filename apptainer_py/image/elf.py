"""Which libraries a program asks for: the DT_NEEDED entries of an ELF file, and nothing else."""

from __future__ import annotations

import os
import struct
from struct import unpack_from

_LOAD, _DYNAMIC = 1, 2
_END, _NEEDED, _STRINGS, _STRINGS_BYTES = 0, 1, 5, 10
_HEADER_BYTES = 64
_MOST_SEGMENTS = 64
_MOST_BYTES = 1 << 16


def needed(fd: int) -> list[str]:
    """Return the names of libraries that an open 64-bit file wants; none, if it is something else.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return _needed(fd)
    except (struct.error, ValueError, OverflowError):
        return []


def _needed(fd: int) -> list[str]:
    head = os.pread(fd, _HEADER_BYTES, 0)
    # 64 bits; the byte order is that of every machine that this runs on but for s390x.
    if head[:5] != b"\x7fELF\x02" or head[5:6] not in (b"\x01", b"\x02"):
        return []
    order = "<" if head[5] == 1 else ">"
    (table,) = unpack_from(order + "Q", head, 32)
    size, count = unpack_from(order + "HH", head, 54)
    loads, dynamic = [], b""
    for index in range(min(count, _MOST_SEGMENTS)):
        entry = os.pread(fd, 56, table + index * size)
        kind, _, offset, address, _, file_bytes = unpack_from(order + "IIQQQQ", entry, 0)
        if kind == _LOAD:
            loads.append((address, file_bytes, offset))
        elif kind == _DYNAMIC:
            dynamic = os.pread(fd, min(file_bytes, _MOST_BYTES), offset)
    entries = [unpack_from(order + "QQ", dynamic, at) for at in range(0, len(dynamic) - 15, 16)]
    values = dict(entries)
    if _STRINGS not in values:
        return []
    length = min(values.get(_STRINGS_BYTES, 0), _MOST_BYTES)
    names = os.pread(fd, length, _place(loads, values[_STRINGS]))
    return [_text(names, value) for tag, value in entries if tag == _NEEDED and value < length]


def _place(loads: list[tuple[int, int, int]], address: int) -> int:
    for start, size, offset in loads:
        if start <= address < start + size:
            return address - start + offset
    raise ValueError("the file holds no such address")


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(b"\0", at)].decode("ascii", "replace")
