"""Whole files by descriptor: in a stage the built-in `open` costs a millisecond when first used."""

from __future__ import annotations

import os

# What is more is memory of its own from the system for each call.
_PART_BYTES = 1 << 16


def read_at_most(fd: int, size: int) -> bytes:
    """Read `size` bytes, or what is there, from a descriptor; then close it.

    Raises:
        OSError: as read(2) fails.
    """
    parts = []
    try:
        while size > 0 and (part := os.read(fd, min(size, _PART_BYTES))):
            parts.append(part)
            size -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte to a descriptor; then close it.

    Raises:
        OSError: as write(2) or close(2) fails, for want of space above all.
    """
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)
