"""Reader of SIF files; every number in the file is hostile until it has been compared.

Offsets are those of the SIF specification 1.0: a header of 128 bytes, then a table of
descriptors of 585 bytes, little-endian and packed.
"""

from __future__ import annotations

import os
import struct

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import arch, detect, squashfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER_BYTES = 128
DESCRIPTOR_BYTES = 585
MAX_DESCRIPTORS = 4096
GROUP_MASK = 0xF0000000

DEFFILE = 0x4001
ENV_VARS = 0x4002
LABELS = 0x4003
PARTITION = 0x4004
SIGNATURE = 0x4005
GENERIC_JSON = 0x4006
GENERIC = 0x4007
CRYPTO_MESSAGE = 0x4008
SBOM = 0x4009
OCI_ROOT_INDEX = 0x400A
OCI_BLOB = 0x400B

SQUASHFS, EXT3, ARCHIVE, RAW, ENCRYPTED_SQUASHFS, GOCRYPTFS = range(1, 7)
SYSTEM, PRIMARY_SYSTEM, DATA, OVERLAY = range(1, 5)
OPENPGP, PEM = range(1, 3)
CLEAR_SIGNED, RSA_OAEP = 0x100, 0x200

_FILE_SYSTEMS = {
    SQUASHFS: "squashfs",
    EXT3: "ext3",
    RAW: "raw",
    ENCRYPTED_SQUASHFS: "encrypted-squashfs",
    GOCRYPTFS: "gocryptfs",
}
_PART_TYPES = {PRIMARY_SYSTEM: "primary-system", DATA: "data", OVERLAY: "overlay"}

_HEADER = struct.Struct("<32s10s3s3s16sqqqqqqqq")
_DESCRIPTOR = struct.Struct("<iBIIIqqqqqqq128s384s")
_PARTITION_EXTRA = struct.Struct("<ii3s")
_MAGIC = b"SIF_MAGIC\0"
_VERSION = b"01\0"


class SifError(ImageError):
    """A number or a magic in the file is wrong, or the image is not for this host."""

    message = "could not open image {image}: {reason}"
    hint = "see what it holds with `sif list`; fetch or build it again if it is damaged"


class NoRootFileSystem(SifError):
    """Not exactly one partition is the primary one."""

    message = "while getting root filesystem in {image}: {reason}"


class Header(Record):
    """The global header, as it stands in the file; times in seconds since 1970."""

    launch: bytes
    version: bytes
    arch: bytes
    id: bytes
    created_s: int
    modified_s: int
    descriptors_free: int
    descriptors_total: int
    descriptors_offset: int
    descriptors_bytes: int
    data_offset: int
    data_bytes: int


class Descriptor(Record):
    """One object of the file, as it stands in its table: offset and size are not verified."""

    data_type: int
    id: int
    group: int
    link: int
    link_is_group: bool
    offset: int
    size_bytes: int
    created_s: int
    modified_s: int
    name: bytes
    extra: bytes
    raw: bytes = b""


class Partition(Record):
    """A file system inside the file, whole and apart from every other one."""

    id: int
    group: int
    offset: int
    size_bytes: int
    fs: str
    arch: str
    part_type: str


class Layout(Record):
    """The partitions of one SIF file; overlays are those that belong to the primary's group."""

    primary: Partition
    overlays: tuple[Partition, ...]


def read_header(fd: int) -> Header:
    """Return the global header of an open SIF file.

    Raises:
        SifError: too short, another magic or version.
    """
    raw = _read(fd, HEADER_BYTES, 0, "reading global header")
    (launch, magic, version, machine, identity, *numbers) = _HEADER.unpack(raw)
    if magic != _MAGIC:
        raise _refused(fd, "invalid SIF magic")
    if version != _VERSION:
        raise _refused(fd, "incompatible SIF version")
    return Header(
        launch=launch.rstrip(b"\0"),
        version=version.rstrip(b"\0"),
        arch=machine.rstrip(b"\0"),
        id=identity,
        created_s=numbers[0],
        modified_s=numbers[1],
        descriptors_free=numbers[2],
        descriptors_total=numbers[3],
        descriptors_offset=numbers[4],
        descriptors_bytes=numbers[5],
        data_offset=numbers[6],
        data_bytes=numbers[7],
    )


def read_descriptors(fd: int, header: Header | None = None) -> tuple[Descriptor, ...]:
    """Return the objects that an open SIF file lists, in the order of its table.

    Raises:
        SifError: no SIF file, or a table that is too large, outside of the file or cut short.
    """
    header = header or read_header(fd)
    total, offset = header.descriptors_total, header.descriptors_offset
    if not 0 <= total <= MAX_DESCRIPTORS:
        raise _refused(fd, f"reading descriptors: {total} is not between 0 and {MAX_DESCRIPTORS}")
    if offset < 0:
        raise _refused(fd, f"reading descriptors: readat {_name_of(fd)}: negative offset")
    if total * DESCRIPTOR_BYTES > header.descriptors_bytes:
        cut = "EOF" if header.descriptors_bytes == 0 else "unexpected EOF"
        raise _refused(fd, f"reading descriptors: {cut}")
    if total and offset < HEADER_BYTES:
        raise _refused(fd, "reading descriptors: the table lies inside the header")
    table = _read(fd, total * DESCRIPTOR_BYTES, offset, "reading descriptors")
    return tuple(
        _descriptor(table, start)
        for start in range(0, total * DESCRIPTOR_BYTES, DESCRIPTOR_BYTES)
        if table[start + 4]
    )


def _descriptor(table: bytes, start: int) -> Descriptor:
    (data_type, _, ident, group, link, offset, size, _, created, modified, _, _, name, extra) = (
        _DESCRIPTOR.unpack_from(table, start)
    )
    return Descriptor(
        data_type=data_type,
        id=ident,
        group=group & ~GROUP_MASK,
        link=link & ~GROUP_MASK,
        link_is_group=link & GROUP_MASK == GROUP_MASK,
        offset=offset,
        size_bytes=size,
        created_s=created,
        modified_s=modified,
        name=name.rstrip(b"\0"),
        extra=extra,
        raw=table[start : start + DESCRIPTOR_BYTES],
    )


def raw_fields(entry: Descriptor) -> tuple[Any, ...]:
    """Return every field of a descriptor as it stands in the table."""
    return _DESCRIPTOR.unpack(entry.raw)


def layout(fd: int, *, host: str | None = None) -> Layout:
    """Return the partitions of an open SIF file that may be mounted.

    `host` is the architecture that must be able to run the primary one; None means this host's.

    Raises:
        NoRootFileSystem: no primary system partition, or more than one.
        SifError: a partition that is outside of the file, overlaps something that is mounted or
            parsed, is of an unknown or wrong type, or is for another architecture.
    """
    header = read_header(fd)
    objects = read_descriptors(fd, header)
    mine = [(o, *partition_facts(o)) for o in objects if o.data_type == PARTITION]
    primaries = [row for row in mine if row[2] == PRIMARY_SYSTEM]
    if len(primaries) != 1:
        reason = "no root filesystem found"
        if primaries:
            reason = f"{len(primaries)} primary system partitions found, one is needed"
        raise NoRootFileSystem(image=_name_of(fd), reason=reason)
    chosen = primaries[0][0]
    wanted = [
        row
        for row in mine
        if row[2] == PRIMARY_SYSTEM or (row[2] == OVERLAY and chosen.group in (0, row[0].group))
    ]
    parts = tuple(_partition(fd, header, *row) for row in wanted)
    _check_apart(fd, parts)
    primary = next(part for part in parts if part.part_type == "primary-system")
    _check_arch(fd, primary, host)
    return Layout(
        primary=primary,
        overlays=tuple(part for part in parts if part.part_type == "overlay"),
    )


def partitions(fd: int, part_type: int) -> tuple[Partition, ...]:
    """Return the partitions of one type (DATA or OVERLAY), in the order of the file's table.

    Beside a root file system with a group, overlays of other groups are left out, as by `layout`:
    no signature of the root is over them.

    Raises:
        SifError: as `layout`, but for a root file system that is missing or another machine's.
    """
    header = read_header(fd)
    objects = read_descriptors(fd, header)
    mine = [(o, *partition_facts(o)) for o in objects if o.data_type == PARTITION]
    groups = {row[0].group for row in mine if row[2] == PRIMARY_SYSTEM}
    wanted = [
        row
        for row in mine
        if row[2] == PRIMARY_SYSTEM
        or (row[2] == part_type and (part_type != OVERLAY or groups <= {0, row[0].group}))
    ]
    parts = tuple(_partition(fd, header, *row) for row in wanted)
    _check_apart(fd, parts)
    return tuple(part for part in parts if part.part_type == _PART_TYPES[part_type])


def primary_partition(fd: int, *, host: str | None = None) -> Partition:
    """Return the partition that holds the root file system.

    Raises:
        SifError: as `layout`.
    """
    return layout(fd, host=host).primary


def partition_facts(entry: Descriptor) -> tuple[int, int, str]:
    """Return file-system number, partition-type number and architecture of a partition."""
    fs, part_type, machine = _PARTITION_EXTRA.unpack_from(entry.extra)
    return fs, part_type, arch_name(machine)


def arch_name(code: bytes) -> str:
    """Return the name of an architecture code, or `unknown`."""
    return arch.SIF_CODES.get(code.rstrip(b"\0"), "unknown")


def find_object(objects: tuple[Descriptor, ...], ident: int) -> Descriptor:
    """Return the object with a number.

    Raises:
        ImageError: the number is 0, or none or several objects have it.
    """
    if ident == 0:
        raise ImageError(image="", reason="invalid object ID")
    found = [entry for entry in objects if entry.id == ident]
    if len(found) != 1:
        reason = "multiple objects found" if found else "object not found"
        reason = reason if objects else "no objects in image"
        raise ImageError(image="", reason=reason)
    return found[0]


def read_object(fd: int, entry: Descriptor, *, limit_bytes: int) -> bytes:
    """Return the content of an object.

    Raises:
        SifError: it is larger than the limit or not all inside the file.
    """
    check_inside(fd, entry)
    if entry.size_bytes > limit_bytes:
        raise _refused(
            fd, f"object {entry.id} has {entry.size_bytes} bytes, the limit is {limit_bytes}"
        )
    return _read(fd, entry.size_bytes, entry.offset, f"reading object {entry.id}")


def check_inside(fd: int, entry: Descriptor) -> None:
    """Check that an object lies inside the file, after the header.

    Raises:
        SifError: it does not.
    """
    if entry.offset < 0 or entry.size_bytes < 0:
        raise _refused(fd, f"object {entry.id} has a negative offset or size")
    if entry.offset < HEADER_BYTES:
        raise _refused(fd, f"object {entry.id} overlaps the header")
    size = os.fstat(fd).st_size
    if entry.offset + entry.size_bytes > size:
        raise _refused(
            fd,
            f"object {entry.id} ends at byte {entry.offset + entry.size_bytes}, "
            f"the file has {size}: it is incomplete or damaged",
        )


def _partition(
    fd: int, header: Header, entry: Descriptor, fs: int, part_type: int, machine: str
) -> Partition:
    check_inside(fd, entry)
    if entry.size_bytes == 0:
        raise _refused(fd, f"object {entry.id} is an empty partition")
    table_end = header.descriptors_offset + header.descriptors_total * DESCRIPTOR_BYTES
    if entry.offset < table_end and header.descriptors_offset < entry.offset + entry.size_bytes:
        raise _refused(fd, f"object {entry.id} overlaps the table of descriptors")
    if fs not in _FILE_SYSTEMS:
        raise _refused(fd, "while checking system partition header: unknown filesystem type")
    _check_content(fd, entry, fs)
    return Partition(
        id=entry.id,
        group=entry.group,
        offset=entry.offset,
        size_bytes=entry.size_bytes,
        fs=_FILE_SYSTEMS[fs],
        arch=machine,
        part_type=_PART_TYPES[part_type],
    )


def _check_content(fd: int, entry: Descriptor, fs: int) -> None:
    want = min(entry.size_bytes, detect.HEAD_BYTES)
    try:
        head = os.pread(fd, want, entry.offset)
    except OSError as error:
        raise _refused(fd, f"while checking system partition header: {error.strerror}") from None
    if fs == SQUASHFS:
        try:
            facts = squashfs.parse_superblock(head, image="")
        except ImageError as error:
            reason = f"error while checking squashfs header: {error.facts['reason']}"
            raise _refused(fd, f"while checking system partition header: {reason}") from None
        if facts.used_bytes > entry.size_bytes:
            raise _refused(
                fd,
                f"object {entry.id} holds {entry.size_bytes} bytes of a squashfs "
                f"of {facts.used_bytes}",
            )
    elif fs == EXT3 and not detect.is_ext3(head):
        raise _refused(
            fd, "while checking system partition header: error while checking ext3 header"
        )


def _check_apart(fd: int, parts: tuple[Partition, ...]) -> None:
    # A writable overlay laid over the root file system's bytes would rewrite a signed image.
    ordered = sorted(parts, key=lambda part: part.offset)
    for before, after in zip(ordered, ordered[1:], strict=False):  # noqa: RUF007
        if before.offset + before.size_bytes > after.offset:
            raise _refused(fd, f"partitions {before.id} and {after.id} overlap")


def _check_arch(fd: int, part: Partition, host: str | None) -> None:
    host = host or arch.host_arch()
    if part.arch not in ("unknown", host) and not arch.can_run(part.arch, host):
        raise _refused(
            fd, f"the image's architecture ({part.arch}) could not run on the host's ({host})"
        )


def _read(fd: int, size_bytes: int, offset: int, doing: str) -> bytes:
    try:
        data = os.pread(fd, size_bytes, offset)
        while data and len(data) < size_bytes:
            more = os.pread(fd, size_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        path = _name_of(fd)
        raise _refused(fd, f"{doing}: read {path}: {(error.strerror or '').lower()}") from None
    except OverflowError:
        raise _refused(fd, f"{doing}: impossible offset {offset}") from None
    if len(data) < size_bytes:
        raise _refused(fd, f"{doing}: {'unexpected EOF' if data else 'EOF'}")
    return data


def _name_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _refused(fd: int, reason: str) -> SifError:
    return SifError(image=_name_of(fd), reason=reason)
