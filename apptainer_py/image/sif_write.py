"""Writer of minimal SIF files: definition file, inspect metadata, one squashfs.

The layout is the one that Apptainer 1.4 writes (facts §5.2), so that either program can read,
sign and extend what the other one wrote.
"""

from __future__ import annotations

import os
import struct

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import arch as archs
from apptainer_py.image import sif, squashfs, squashfs_start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

LAUNCHER = b"#!/usr/bin/env run-singularity\n"
METADATA_NAME = b"inspect-metadata.json"
OCI_CONFIG_NAME = b"oci-config.json"

_DESCRIPTORS_OFFSET = 4096
_DESCRIPTORS_TOTAL = 48
_DATA_OFFSET = _DESCRIPTORS_OFFSET + _DESCRIPTORS_TOTAL * sif.DESCRIPTOR_BYTES
_PARTITION_ALIGNMENT = 4096
_GROUP = sif.GROUP_MASK | 1
_HEADER = struct.Struct("<32s10s3s3s16sqqqqqqqq")
_DESCRIPTOR = struct.Struct("<iBIIIqqqqqqq128s384s")


class _Placed(Record):
    data_type: int
    offset: int
    size_bytes: int
    gap_bytes: int
    name: bytes = b""
    extra: bytes = b""
    link: int = 0


def write_sif(  # noqa: PLR0913 each is an object of the file
    target: str,
    squashfs_path: str,
    *,
    arch: str,
    deffile: bytes | None = None,
    metadata: bytes | None = None,
    oci_config: bytes | None = None,
    epoch: int | None = None,
    fs: int = sif.SQUASHFS,
    message: bytes = b"",
    quick_start: bool = False,
) -> None:
    """Write a SIF file around a squashfs file; an existing target is replaced at the end.

    `arch` is a name such as `amd64`; without `deffile`, `metadata` or `oci_config` (both JSON) its
    object is left out. `fs` says what the squashfs holds, `message` leads to the key of an
    encrypted one. With `quick_start`, what programs read first is put in uncompressed.
    With `epoch`, in seconds since 1970, the same input gives the same bytes. The mode is 0755
    less the umask.

    Raises:
        ImageError: the input is not a squashfs or the architecture has no code.
        OSError: the target's folder cannot be written, or is full.
    """
    code = _arch_code(arch, target)
    folder, name = os.path.split(os.path.abspath(target))
    partial = os.path.join(folder, f".{name[:200]}.{os.urandom(8).hex()}")
    source = os.open(squashfs_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        squashfs.read_superblock(source, 0, image=squashfs_path)
        out = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        try:
            objects = (
                (sif.DEFFILE, b"", deffile),
                (sif.GENERIC_JSON, METADATA_NAME, metadata),
                (sif.GENERIC_JSON, OCI_CONFIG_NAME, oci_config),
            )
            extra = struct.pack("<ii3s", fs, sif.PRIMARY_SYSTEM, code)
            content = _content(source, quick_start=quick_start)
            _fill(out, content, extra=extra, objects=objects, message=message, epoch=epoch)
            os.fsync(out)
            os.rename(partial, target)
        except BaseException:
            os.unlink(partial)
            raise
        finally:
            os.close(out)
    finally:
        os.close(source)


def _arch_code(name: str, target: str) -> bytes:
    for code, known in archs.SIF_CODES.items():
        if known == name:
            return code
    raise ImageError(image=target, reason=f"SIF has no code for the architecture {name}")


def _fill(
    out: int,
    source: Iterable[bytes],
    *,
    extra: bytes,
    objects: Sequence[tuple[int, bytes, bytes | None]],
    message: bytes,
    epoch: int | None,
) -> None:
    import hashlib
    import time

    digest = hashlib.sha256()
    end = _DATA_OFFSET
    placed: list[_Placed] = []
    for data_type, name, content in objects:
        if not content:
            continue
        placed.append(
            _Placed(
                data_type=data_type, offset=end, size_bytes=len(content), gap_bytes=0, name=name
            )
        )
        _write_all(out, content, end)
        digest.update(len(content).to_bytes(8, "little") + content)
        end += len(content)
    start = -(-end // _PARTITION_ALIGNMENT) * _PARTITION_ALIGNMENT
    size = _copy(source, out, start, digest.update)
    placed.append(
        _Placed(
            data_type=sif.PARTITION,
            offset=start,
            size_bytes=size,
            gap_bytes=start - end,
            extra=extra,
        )
    )
    end = start + size
    if message:
        placed.append(_message(message, end, link=len(placed)))
        _write_all(out, message, end)
        digest.update(message)
        end += len(message)
    now = int(time.time()) if epoch is None else epoch
    identity = os.urandom(16) if epoch is None else digest.digest()[:16]
    table = b"".join(_pack_object(number, entry, now) for number, entry in enumerate(placed, 1))
    _write_all(out, table.ljust(_DATA_OFFSET - _DESCRIPTORS_OFFSET, b"\0"), _DESCRIPTORS_OFFSET)
    _write_all(out, _pack_header(extra[8:11], identity, now, len(placed), end), 0)


def _message(content: bytes, offset: int, *, link: int) -> _Placed:
    return _Placed(
        data_type=sif.CRYPTO_MESSAGE,
        offset=offset,
        size_bytes=len(content),
        gap_bytes=0,
        extra=struct.pack("<ii", sif.PEM, sif.RSA_OAEP),
        link=link,
    )


def _pack_object(number: int, entry: _Placed, now_s: int) -> bytes:
    padded = entry.gap_bytes + entry.size_bytes
    return _DESCRIPTOR.pack(
        entry.data_type,
        1,
        number,
        _GROUP,
        entry.link,
        entry.offset,
        entry.size_bytes,
        padded,
        now_s,
        now_s,
        0,
        0,
        entry.name,
        entry.extra,
    )


def _pack_header(code: bytes, identity: bytes, now_s: int, used: int, end: int) -> bytes:
    # RFC 4122, version 4, variant 1: what every reader of the 16 bytes expects them to be.
    uuid = bytearray(identity)
    uuid[6] = uuid[6] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    return _HEADER.pack(
        LAUNCHER,
        b"SIF_MAGIC",
        b"01",
        code,
        bytes(uuid),
        now_s,
        now_s,
        _DESCRIPTORS_TOTAL - used,
        _DESCRIPTORS_TOTAL,
        _DESCRIPTORS_OFFSET,
        _DATA_OFFSET - _DESCRIPTORS_OFFSET,
        _DATA_OFFSET,
        end - _DATA_OFFSET,
    )


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _content(source: int, *, quick_start: bool) -> Iterator[bytes]:
    whole = squashfs_start.Piece(offset=0, size_bytes=os.fstat(source).st_size)
    pieces = squashfs_start.rearranged(source) if quick_start else [whole]
    return squashfs_start.chunks(source, pieces)


def _copy(source: Iterable[bytes], target: int, offset: int, saw: Callable[[bytes], None]) -> int:
    size = 0
    for chunk in source:
        _write_all(target, chunk, offset + size)
        saw(chunk)
        size += len(chunk)
    return size
