"""What a container's process becomes, as the bytes that starter/process.h describes."""

from __future__ import annotations

import struct

from apptainer_py.base.build import BUILD_ID
from apptainer_py.base.errors import ApptainerError
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_plan import ProcessSpec

MAGIC = b"APYPRC1\0"
LISTENER_FLAG = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER of linux/seccomp.h
_NODE_BYTES = 128
_HEADER = struct.Struct("=8sII64sIIII5QIIII128sIiIIQQQQ7I7I")
_FILTER_BYTES = 8  # struct sock_filter
_FRAME_BYTES_MAX = 16 << 20

_NO_NEW_PRIVS = 1
_SET_GROUPS = 2
_SET_CAPS = 4
_SET_UMASK = 8
_SET_SCHEDULER = 16
_SET_IO_PRIORITY = 32
_SET_PERSONALITY = 64
_SET_MEMORY_POLICY = 128
_TENANT = 256
_USERNS = 512
_LISTENER = 1024
_EMPTY = 2048
_TIED = 4096
# What EINVAL means there.
_UNMAPPED = {
    protocol.GOSTEP_UID: "cannot setuid to unmapped uid {uid} in user namespace",
    protocol.GOSTEP_GID: "cannot setgid to unmapped gid {gid} in user namespace",
}


class FrameRefused(ApptainerError):
    """A process that no frame can hold; the kernel could not either."""

    message = "the container's process cannot be described: {why}"


def process_frame(
    spec: ProcessSpec, program: bytes, hooks: bytes, *, program_flags: int = 0
) -> bytes:
    """Return the frame for row PROCESS, to be sealed in a memfd.

    `program` is the seccomp filter ("" for none), `program_flags` what seccomp(2) takes with it;
    `hooks` is the startContainer part of model/hook_frame.py, empty without such hooks.

    Raises:
        FrameRefused: a string has a NUL in it, a number does not fit, or it is too long.
    """
    parts = [
        _numbers(spec.groups or ()),
        (program, len(program) // _FILTER_BYTES),
        _strings(spec.arguments),
        _strings(spec.environment),
        _strings((spec.cwd,) if spec.cwd else ()),
        _strings((spec.selinux_label.encode(),) if spec.selinux_label else ()),
        (hooks, int(bool(hooks))),
    ]
    body = bytearray()
    ends = []
    for content, _ in parts:
        body += bytes(-len(body) % 8) + content
        ends.append(_HEADER.size + len(body))
    if ends[-1] > _FRAME_BYTES_MAX:
        raise FrameRefused(why="arguments and environment are longer than 16 MiB")
    try:
        head = _header(spec, program_flags, [count for _, count in parts], ends)
    except (struct.error, OverflowError):
        raise FrameRefused(why="a number is out of range") from None
    return head + body


def _numbers(numbers: tuple[int, ...]) -> tuple[bytes, int]:
    try:
        return struct.pack(f"={len(numbers)}I", *numbers), len(numbers)
    except struct.error:
        raise FrameRefused(why="a group id is out of range") from None


def _strings(strings: tuple[bytes, ...]) -> tuple[bytes, int]:
    content = b"".join([string + b"\0" for string in strings])
    if content.count(0) != len(strings):
        raise FrameRefused(why="a string has a NUL in it")
    return content, len(strings)


def _flags(spec: ProcessSpec, program_flags: int) -> int:
    return (
        (_NO_NEW_PRIVS if spec.no_new_privileges else 0)
        | (_SET_GROUPS if spec.groups is not None else 0)
        | (_SET_CAPS if spec.capabilities is not None else 0)
        | (_SET_UMASK if spec.umask is not None else 0)
        | (_SET_SCHEDULER if spec.scheduler is not None else 0)
        | (_SET_IO_PRIORITY if spec.io_priority is not None else 0)
        | (_SET_PERSONALITY if spec.personality is not None else 0)
        | (_SET_MEMORY_POLICY if spec.memory_policy is not None else 0)
        | (_TENANT if spec.tenant else 0)
        | (_USERNS if spec.in_user_namespace else 0)
        | (_EMPTY if spec.empty else 0)
        | (_TIED if spec.tied else 0)
        | (_LISTENER if program_flags & LISTENER_FLAG else 0)
    )


def _header(spec: ProcessSpec, program_flags: int, counts: list[int], ends: list[int]) -> bytes:
    policy, nice, priority, sched_flags, *times = spec.scheduler or (0, 0, 0, 0, 0, 0, 0)
    mode, nodes = spec.memory_policy or (0, 0)
    return _HEADER.pack(
        MAGIC,
        ends[-1],
        _flags(spec, program_flags),
        BUILD_ID.encode(),
        spec.uid,
        spec.gid,
        spec.umask or 0,
        spec.preserve_fds,
        *(spec.capabilities or (0, 0, 0, 0, 0)),
        program_flags,
        spec.personality or 0,
        spec.io_priority or 0,
        mode,
        nodes.to_bytes(_NODE_BYTES, "little"),
        policy,
        nice,
        priority,
        0,
        sched_flags,
        *times,
        *counts,
        *ends,
    )


def failure_text(spec: ProcessSpec, step: int, reason: str) -> str:
    """Return runc's text for a PROCESS or GO that failed; `step` is the value of the reply."""
    template = protocol.GOSTEP_TEXTS.get(step, "{error}")
    if reason == "invalid argument" and step in _UNMAPPED:
        template = f"unable to setup user: {_UNMAPPED[step]}"
    program = spec.arguments[0].decode(errors="backslashreplace")
    return template.format(
        error=reason,
        cwd=_quoted(spec.cwd.decode(errors="backslashreplace")),
        program=_quoted(program),
        path=program,
        uid=spec.uid,
        gid=spec.gid,
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
