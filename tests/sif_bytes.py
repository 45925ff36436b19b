"""SIF files made of given numbers, right or wrong, for tests of whatever reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

TABLE_OFFSET = 4096
ENTRY_BYTES = 585
TOTAL = 48
DATA_OFFSET = TABLE_OFFSET + TOTAL * ENTRY_BYTES
PARTITION_OFFSET = 36864
SQUASHFS = struct.pack(
    "<4sIIIIHHHHHHQQ", b"hsqs", 1, 0, 131072, 0, 1, 17, 0, 1, 4, 0, 0, 4096
).ljust(4096, b"\0")

DEFFILE, PARTITION, GENERIC_JSON = 0x4001, 0x4004, 0x4006


def entry(data_type: int, ident: int, offset: int, size: int, **more: int | bytes) -> bytes:
    """Return one descriptor; `more` are its other fields by name."""
    return struct.pack(
        "<iBIIIqqqqqqq128s384s",
        data_type,
        more.get("used", 1),
        ident,
        more.get("group", 0xF0000001),
        more.get("link", 0),
        offset,
        size,
        size,
        more.get("created", 0),
        more.get("modified", 0),
        0,
        0,
        more.get("name", b""),
        more.get("extra", b""),
    )


def partition(
    ident: int = 3,
    offset: int = PARTITION_OFFSET,
    size: int = len(SQUASHFS),
    *,
    fs: int = 1,
    part: int = 2,
    arch: bytes = b"02\0",
    **more: int,
) -> bytes:
    """Return the descriptor of a partition, if not said otherwise the primary squashfs one."""
    extra = struct.pack("<ii3s", fs, part, arch)
    return entry(PARTITION, ident, offset, size, extra=extra, **more)


def sif(
    entries: Sequence[bytes] | None = None,
    *,
    content: bytes | None = None,
    launch: bytes = b"#!/usr/bin/env run-singularity\n",
    magic: bytes = b"SIF_MAGIC",
    version: bytes = b"01",
    total: int = TOTAL,
    table_offset: int = TABLE_OFFSET,
    table_bytes: int = TOTAL * ENTRY_BYTES,
) -> bytes:
    """Return a whole file with these descriptors and, at 36864, an (empty) squashfs."""
    entries = [partition()] if entries is None else entries
    header = struct.pack(
        "<32s10s3s3s16sqqqqqqqq",
        launch,
        magic,
        version,
        b"02",
        bytes(range(16)),
        0,
        0,
        TOTAL - len(entries),
        total,
        table_offset,
        table_bytes,
        DATA_OFFSET,
        PARTITION_OFFSET + len(SQUASHFS) - DATA_OFFSET,
    )
    data = bytearray(PARTITION_OFFSET)
    data[: len(header)] = header
    table = b"".join(entries)
    data[TABLE_OFFSET : TABLE_OFFSET + len(table)] = table
    return bytes(data) + (SQUASHFS if content is None else content)
