"""What starter-monitor is told of its container, as the bytes that starter/monitor.h describes."""

from __future__ import annotations

import struct

from apptainer_py.base.record import Record

MAGIC = b"APYMON1\0"
FORMATS = ("basic", "kubernetes", "json")
_HEADER = struct.Struct("=8sIIIiiiii3iiiIQ")
_TERMINAL, _OWN_STREAMS, _READS = 1, 2, 4
_BYTES_MAX = 4 << 20


class MonitorData(Record):
    """One container with a monitor; descriptors are -1 where there is none.

    `state` is the state as one line of JSON, up to the status and from behind it, without the
    closing brace; `sockets` the two members that name them. `streams` are our ends of the
    container's stdin, stdout and stderr. `created_ns` counts nanoseconds since 1970. What follows
    in the launcher that waits is nothing ("c"), the start ("d"), or all of `run` ("r").
    """

    init_pid: int
    created_ns: int
    state: tuple[bytes, bytes]
    sockets: bytes
    log: bytes
    log_format: str
    pid_file: bytes
    sync_socket: bytes
    freezer: bytes
    root: bytes
    name: bytes
    dir_fd: int
    attach_fd: int
    control_fd: int
    log_fd: int
    streams: tuple[int, int, int]
    pty_fd: int
    ready_fd: int
    own_streams: bool
    reads: bool
    following: str


def monitor_frame(data: MonitorData) -> bytes:
    """Return the bytes of the sealed file.

    Raises:
        ValueError: a text has a NUL in it, or they are too long.
    """
    texts = [
        *data.state,
        data.sockets,
        data.log,
        data.pid_file,
        data.sync_socket,
        data.freezer,
        data.root,
        data.name,
    ]
    if any(b"\0" in text for text in texts):
        raise ValueError("a text for the monitor has a NUL in it")
    body = b"".join([text + b"\0" for text in texts])
    total = _HEADER.size + len(body)
    if total > _BYTES_MAX:
        raise ValueError("the annotations are too long for the monitor")
    flags = _TERMINAL if data.pty_fd >= 0 else 0
    flags |= _OWN_STREAMS if data.own_streams else 0
    flags |= _READS if data.reads else 0
    head = _HEADER.pack(
        MAGIC,
        total,
        flags,
        FORMATS.index(data.log_format),
        data.init_pid,
        data.dir_fd,
        data.attach_fd,
        data.control_fd,
        data.log_fd,
        *data.streams,
        data.pty_fd,
        data.ready_fd,
        ord(data.following),
        data.created_ns,
    )
    return head + body
