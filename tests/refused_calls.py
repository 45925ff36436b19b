"""System calls that a child process is refused, as by a security module or an old kernel."""

from __future__ import annotations

import ctypes
import os

OPENAT2 = 437
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1)
_PR_SET_SECCOMP, _FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)


def refuse(number: int, error: int, *, no_new_privs: bool = True) -> None:
    """Have a system call fail in this process and all that it starts; for a `preexec_fn`.

    Without no_new_privs only root can, and a setuid bit still counts.
    """
    code = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, number),
        (6, 0, 0, 0x50000 | error),
        (6, 0, 0, 0x7FFF0000),
    ]
    packed = b"".join(
        a.to_bytes(2, "little") + bytes((b, c)) + e.to_bytes(4, "little") for a, b, c, e in code
    )
    data = ctypes.create_string_buffer(packed)
    program = len(code).to_bytes(8, "little") + ctypes.addressof(data).to_bytes(8, "little")
    if no_new_privs:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(program), 0, 0) != 0:
        os._exit(1)
