"""Changes to a SIF file in place: objects are added and deleted, the primary partition chosen.

Whoever is killed midway leaves a file that every reader understands: data goes behind what the
header knows of, then the header is told of the space, then the descriptor is written as unused, and
one byte makes it count. What was in the file before is never written over.
"""

from __future__ import annotations

import os
import struct

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import arch as archs
from apptainer_py.image import sif

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apptainer_py.image.sif import Descriptor, Header

DESCRIPTORS_TOTAL = 48
DESCRIPTORS_OFFSET = 4096
DATA_OFFSET = DESCRIPTORS_OFFSET + DESCRIPTORS_TOTAL * sif.DESCRIPTOR_BYTES
PARTITION_ALIGNMENT = 4096
NAME_BYTES = 128
_HEADER = struct.Struct("<32s10s3s3s16sqqqqqqqq")
_DESCRIPTOR = struct.Struct("<iBIIIqqqqqqq128s384s")
_ARCH_AT, _MODIFIED_AT, _FREE_AT, _DATA_BYTES_AT = 45, 72, 80, 120
_USED_AT, _MODIFIED_IN_ENTRY, _EXTRA_AT, _PART_TYPE_AT = 4, 49, 201, 205
_UNKNOWN_ARCH = b"00\0"
_CHUNK_BYTES = 1 << 20


class NewObject(Record):
    """An object to add: its content is `content`, or everything that `source` has."""

    data_type: int
    content: bytes = b""
    source: int = -1
    group: int = 0
    link: int = 0
    link_is_group: bool = False
    name: bytes = b""
    extra: bytes = b""
    alignment: int = 0


class _Place(Record):
    slot: int
    offset: int
    size_bytes: int
    gap_bytes: int


def create(path: str, *, now_s: int, identity: bytes = b"") -> None:
    """Make an empty SIF file; an existing one is replaced when the new one is whole.

    `identity` is its UUID, a random one where it is left out.

    Raises:
        OSError: the directory cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f".{name[:200]}.{os.urandom(8).hex()}")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
    try:
        identity = identity or _random_uuid()
        header = _HEADER.pack(
            b"", b"SIF_MAGIC", b"01", _UNKNOWN_ARCH, identity, now_s, now_s,
            DESCRIPTORS_TOTAL, DESCRIPTORS_TOTAL, DESCRIPTORS_OFFSET,
            DATA_OFFSET - DESCRIPTORS_OFFSET, DATA_OFFSET, 0,
        )  # fmt: skip
        _write(fd, header.ljust(DATA_OFFSET, b"\0"), 0)
        os.fsync(fd)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    finally:
        os.close(fd)


def _random_uuid() -> bytes:
    uuid = bytearray(os.urandom(16))
    uuid[6] = uuid[6] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def open_to_change(path: str) -> int:
    """Return a descriptor of a SIF file that nobody else changes until it is closed.

    Raises:
        OSError: it cannot be opened for writing.
        SifError: it is no SIF file.
    """
    import fcntl
    import stat

    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(image=path, reason="not a regular file")
        fcntl.flock(fd, fcntl.LOCK_EX)
        sif.read_descriptors(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def add(fd: int, objects: Sequence[NewObject], *, now_s: int) -> tuple[int, ...]:
    """Add objects to an open SIF file, all of them or none; return their numbers.

    Raises:
        SifError: the file is damaged.
        ImageError: it has no descriptor left, or has a primary partition already.
        OSError: it cannot be written, or is full.
    """
    header = sif.read_header(fd)
    entries = sif.read_descriptors(fd, header)
    slots = _free_slots(fd, header)
    if len(slots) < len(objects):
        raise ImageError(image="", reason="no descriptor available")
    _check_primaries(entries, objects)
    before = os.fstat(fd).st_size
    end = _data_end(fd, header, entries)
    places: list[_Place] = []
    try:
        for slot, entry in zip(slots, objects, strict=False):
            at = -(-end // entry.alignment) * entry.alignment if entry.alignment > 0 else end
            size = _write_content(fd, entry, at)
            places.append(_Place(slot=slot, offset=at, size_bytes=size, gap_bytes=at - end))
            end = at + size
        if os.fstat(fd).st_size < end:
            os.ftruncate(fd, end)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, before)
        raise
    _put(fd, _DATA_BYTES_AT, "<q", end - header.data_offset)
    for place, entry in zip(places, objects, strict=True):
        _write(fd, _packed(place, entry, now_s), _slot_at(header, place.slot))
    os.fsync(fd)
    for place in places:
        _put(fd, _slot_at(header, place.slot) + _USED_AT, "B", 1)
    for entry in objects:
        if entry.data_type == sif.PARTITION and _part_type(entry.extra) == sif.PRIMARY_SYSTEM:
            _write(fd, entry.extra[8:11], _ARCH_AT)
    _count(fd, now_s, -len(objects))
    return tuple(place.slot + 1 for place in places)


def delete(fd: int, ident: int, *, now_s: int) -> None:
    """Take an object out of the table; its bytes stay where they are.

    Raises:
        ImageError: there is no such object.
        OSError: the file cannot be written.
    """
    header = sif.read_header(fd)
    entry = sif.find_object(sif.read_descriptors(fd, header), ident)
    at = _slot_at(header, _slot_of(fd, header, entry))
    _put(fd, at + _USED_AT, "B", 0)
    os.fsync(fd)
    _write(fd, bytes(sif.DESCRIPTOR_BYTES), at)
    if entry.data_type == sif.PARTITION and _part_type(entry.extra) == sif.PRIMARY_SYSTEM:
        _write(fd, _UNKNOWN_ARCH, _ARCH_AT)
    _count(fd, now_s, 1)


def set_primary(fd: int, ident: int, *, now_s: int) -> None:
    """Make a system partition the primary one, and the primary one a system partition.

    Raises:
        ImageError: there is no such object, or it is no system partition.
        OSError: the file cannot be written.
    """
    header = sif.read_header(fd)
    entries = sif.read_descriptors(fd, header)
    chosen = sif.find_object(entries, ident)
    if chosen.data_type != sif.PARTITION:
        raise ImageError(image="", reason="data object not a partition")
    part_type = _part_type(chosen.extra)
    if part_type == sif.PRIMARY_SYSTEM:
        return
    if part_type != sif.SYSTEM:
        raise ImageError(image="", reason="data object not a system partition")
    primaries = [
        entry
        for entry in entries
        if entry.data_type == sif.PARTITION and _part_type(entry.extra) == sif.PRIMARY_SYSTEM
    ]
    for entry, wanted in [*((e, sif.SYSTEM) for e in primaries), (chosen, sif.PRIMARY_SYSTEM)]:
        at = _slot_at(header, _slot_of(fd, header, entry))
        _put(fd, at + _PART_TYPE_AT, "<i", wanted)
        _put(fd, at + _MODIFIED_IN_ENTRY, "<q", now_s)
    _write(fd, chosen.extra[8:11], _ARCH_AT)
    _count(fd, now_s, 0)


def partition_extra(fs: int, part_type: int, arch: str) -> bytes:
    """Return what a partition's descriptor says beyond the common fields.

    Raises:
        ImageError: SIF has no code for the architecture.
    """
    for code, known in archs.SIF_CODES.items():
        if known == arch:
            return struct.pack("<ii3s", fs, part_type, code)
    raise ImageError(image="", reason=f"unknown architecture: {arch}")


def signature_extra(hash_type: int, fingerprint: bytes) -> bytes:
    """Return what a signature's descriptor says beyond the common fields."""
    return struct.pack("<i256s", hash_type, fingerprint)


def _part_type(extra: bytes) -> int:
    return int.from_bytes(extra[4:8], "little", signed=True)


def _check_primaries(entries: Sequence[Descriptor], objects: Sequence[NewObject]) -> None:
    rows = [*((e.data_type, e.extra) for e in entries), *((o.data_type, o.extra) for o in objects)]
    found = [
        at
        for at, (kind, extra) in enumerate(rows)
        if kind == sif.PARTITION and _part_type(extra) == sif.PRIMARY_SYSTEM
    ]
    if len(found) > 1 and found[-1] >= len(entries):
        raise ImageError(image="", reason="image already contains a primary partition")


def _slot_at(header: Header, slot: int) -> int:
    return header.descriptors_offset + slot * sif.DESCRIPTOR_BYTES


def _used(fd: int, header: Header) -> Iterator[tuple[int, bytes]]:
    for slot in range(header.descriptors_total):
        yield slot, os.pread(fd, sif.DESCRIPTOR_BYTES, _slot_at(header, slot))


def _free_slots(fd: int, header: Header) -> list[int]:
    # An object's number is that of its place, which a strange table may have given away.
    rows = [(slot, raw) for slot, raw in _used(fd, header) if len(raw) == sif.DESCRIPTOR_BYTES]
    taken = {int.from_bytes(raw[5:9], "little") for _, raw in rows if raw[_USED_AT]}
    return [slot for slot, raw in rows if not raw[_USED_AT] and slot + 1 not in taken]


def _slot_of(fd: int, header: Header, entry: Descriptor) -> int:
    return next(slot for slot, raw in _used(fd, header) if raw == entry.raw)


def _data_end(fd: int, header: Header, entries: Sequence[Descriptor]) -> int:
    for entry in entries:
        sif.check_inside(fd, entry)
    # What has been read of the table; its size in the header may be any number.
    table_end = header.descriptors_offset + header.descriptors_total * sif.DESCRIPTOR_BYTES
    ends = [entry.offset + entry.size_bytes for entry in entries]
    known = header.data_offset + header.data_bytes
    end = max(known, sif.HEADER_BYTES, table_end, *ends, 0)
    if known < 0 or end > max(os.fstat(fd).st_size, table_end) + (1 << 20):
        raise ImageError(image="", reason="the header's sizes are not those of the file")
    return end


def _write_content(fd: int, entry: NewObject, at: int) -> int:
    if entry.source < 0:
        _write(fd, entry.content, at)
        return len(entry.content)
    size = 0
    while chunk := os.pread(entry.source, _CHUNK_BYTES, size):
        _write(fd, chunk, at + size)
        size += len(chunk)
    return size


def _packed(place: _Place, entry: NewObject, now_s: int) -> bytes:
    group = entry.group | sif.GROUP_MASK
    link = entry.link | sif.GROUP_MASK if entry.link_is_group else entry.link
    return _DESCRIPTOR.pack(
        entry.data_type, 0, place.slot + 1, group, link, place.offset, place.size_bytes,
        place.gap_bytes + place.size_bytes, now_s, now_s, 0, 0, entry.name, entry.extra,
    )  # fmt: skip


def _count(fd: int, now_s: int, change: int) -> None:
    free = sif.read_header(fd).descriptors_free + change
    _put(fd, _MODIFIED_AT, "<qq", now_s, max(0, free))
    os.fsync(fd)


def _put(fd: int, at: int, form: str, *values: int) -> None:
    _write(fd, struct.pack(form, *values), at)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
