"""Lists of byte strings by name, packed for the way from master to stage 2."""

from __future__ import annotations

import struct

# What a program that exists and cannot be executed lacks; both stages say it.
LIBRARY_MISSING = "a shared library is likely missing in the image"
_COUNT = struct.Struct("<I")


def pack(lists: dict[bytes, list[bytes]]) -> bytes:
    """Return the lists as one byte string: counts and lengths are 32-bit little-endian."""
    parts = [_COUNT.pack(len(lists))]
    for name, items in lists.items():
        parts += [_COUNT.pack(len(name)), name, _COUNT.pack(len(items))]
        for item in items:
            parts += [_COUNT.pack(len(item)), item]
    return b"".join(parts)


def unpack(data: bytes) -> dict[bytes, list[bytes]]:
    """Return what `pack` was given.

    Raises:
        ValueError: the data is cut short, or has more than it says.
    """
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise ValueError("a message is cut short")
        at += 4
        return int(_COUNT.unpack_from(data, at - 4)[0])

    def text() -> bytes:
        nonlocal at
        size = number()
        if at + size > len(data):
            raise ValueError("a message is cut short")
        at += size
        return data[at - size : at]

    lists = {}
    for _ in range(number()):
        name = text()
        lists[name] = [text() for _ in range(number())]
    if at != len(data):
        raise ValueError("a message is too long")
    return lists
