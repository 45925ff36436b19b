"""The record of a container, as starter/record.h lays it out: what the C commands read."""

from __future__ import annotations

import struct

from apptainer_py.base.record import Record

MAGIC = b"APYREC1\0"
VERSION = 1
PHASE_CREATING, PHASE_CREATED = 1, 2
FLAG_PIDNS, FLAG_CGROUP2, FLAG_PYTHON, FLAG_SYSTEMD, FLAG_ROOTLESS = 1, 2, 4, 8, 16
FLAG_MONITOR, FLAG_TERMINAL = 32, 64
_PARTS = 6
_HEADER = struct.Struct(f"=8sIIIIiiQQQ{2 * _PARTS}I")


# What changes while a container is made: phase, flags, creator, first process, their starts.
_PROGRESS = struct.Struct("=IIiiQQ")
PROGRESS_AT = 16


class RecordData(Record):
    """What is known of a container outside of it.

    `state` is the JSON that `state` prints, around pid and status; `freezer` a file or "";
    `cgroups` directories, a child before its parent; the hooks are frames of model/hook_frame.py,
    or empty. Times: `*_start` are clock ticks since boot, `created_ns` nanoseconds since 1970.
    """

    container_id: str
    phase: int
    flags: int = 0
    creator_pid: int
    creator_start: int
    init_pid: int = 0
    init_start: int = 0
    created_ns: int = 0
    state: tuple[bytes, bytes, bytes]
    freezer: str = ""
    cgroups: tuple[str, ...] = ()
    poststart: bytes = b""
    poststop: bytes = b""


class BadRecord(ValueError):
    """A file that is no record, or one of another version."""


def record_frame(record: RecordData) -> bytes:
    """Return the bytes of the file.

    Raises:
        ValueError: a string has a NUL in it.
    """
    strings: list[list[bytes]] = [
        [_encode(record.container_id)],
        list(record.state),
        [_encode(record.freezer)] if record.freezer else [],
        [_encode(path) for path in record.cgroups],
    ]
    if any(b"\0" in text for part in strings for text in part):
        raise ValueError("a string of the record has a NUL in it")
    parts = [b"".join(text + b"\0" for text in part) for part in strings]
    parts += [record.poststart, record.poststop]
    counts = [len(part) for part in strings] + [0, 0]
    ends, end = [], _HEADER.size
    for part in parts:
        end += len(part)
        ends.append(end)
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        end,
        record.phase,
        record.flags,
        record.creator_pid,
        record.init_pid,
        record.creator_start,
        record.init_start,
        record.created_ns,
        *counts,
        *ends,
    )
    return head + b"".join(parts)


def progress(frame: bytes, phase: int, init_pid: int, init_start: int) -> bytes:
    """Return what stands at PROGRESS_AT of the same record when the container has come further."""
    _, flags, creator, _, creator_start, _ = _PROGRESS.unpack_from(frame, PROGRESS_AT)
    return _PROGRESS.pack(phase, flags, creator, init_pid, creator_start, init_start)


def read_record(data: bytes) -> RecordData:
    """Take such a file apart.

    Raises:
        BadRecord: it is not one, or of another version.
    """
    if len(data) < _HEADER.size:
        raise BadRecord("the record is too short")
    magic, version, total, phase, flags, creator, init, *rest = _HEADER.unpack_from(data)
    times, counts, ends = rest[:3], rest[3 : 3 + _PARTS], rest[3 + _PARTS :]
    starts = [_HEADER.size, *ends[:-1]]
    if (magic, version, total, ends[-1]) != (MAGIC, VERSION, len(data), len(data)):
        raise BadRecord("the record is of another version")
    if any(start > end for start, end in zip(starts, ends, strict=True)):
        raise BadRecord("the record is malformed")
    parts = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    texts = [_strings(part, count) for part, count in zip(parts[:4], counts, strict=False)]
    if [len(texts[0]), len(texts[1])] != [1, 3] or len(texts[2]) > 1:
        raise BadRecord("the record is malformed")
    return RecordData(
        container_id=_decode(texts[0][0]),
        phase=phase,
        flags=flags,
        creator_pid=creator,
        creator_start=times[0],
        init_pid=init,
        init_start=times[1],
        created_ns=times[2],
        state=(texts[1][0], texts[1][1], texts[1][2]),
        freezer=_decode(texts[2][0]) if texts[2] else "",
        cgroups=tuple(map(_decode, texts[3])),
        poststart=parts[4],
        poststop=parts[5],
    )


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _strings(part: bytes, count: int) -> list[bytes]:
    texts = part.split(b"\0")
    if texts.pop() != b"" or len(texts) != count:
        raise BadRecord("the record is malformed")
    return texts
