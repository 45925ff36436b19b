"""A seccomp filter under which mknod(2) of a device seems to succeed.

In a user namespace the kernel makes no devices for anybody, and package managers give up at the
first that they cannot make. No file appears. What overlays make as a mark, a character device 0:0,
is left to the kernel.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# linux/seccomp.h, linux/audit.h, linux/filter.h
_ALLOW, _SUCCEED = 0x7FFF0000, 0x00050000
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_LINE_BYTES, _SET_SECCOMP, _MODE_FILTER = 8, 22, 2
_TYPE, _CHARACTER, _BLOCK = 0o170000, 0o020000, 0o060000
# Machine: its number, and for each call of mknod's kind which argument the mode is.
_MACHINES: Final = {
    "x86_64": (0xC000003E, ((133, 1), (259, 2))),
    "aarch64": (0xC00000B7, ((33, 2),)),
}


def _line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return (value << 32 | no << 24 | yes << 16 | code).to_bytes(8, "little")


def _argument(number: int) -> int:
    return _ARGUMENTS + 8 * number


def program(machine: str = "") -> bytes:
    """Return the filter for seccomp(2); no bytes for a machine that is not known."""
    found = _MACHINES.get(machine or os.uname().machine)
    if found is None:
        return b""
    arch, calls = found
    lines = [_line(_LOAD, _ARCH), _line(_EQUAL, arch, 1), _line(_RETURN, _ALLOW)]
    for number, mode in calls:
        lines += [
            _line(_LOAD, _NUMBER),
            _line(_EQUAL, number, 0, 8),
            _line(_LOAD, _argument(mode)),
            _line(_AND, _TYPE),
            _line(_EQUAL, _BLOCK, 4),
            _line(_EQUAL, _CHARACTER, 1),
            _line(_RETURN, _ALLOW),
            _line(_LOAD, _argument(mode + 1)),
            _line(_EQUAL, 0, 1),
            _line(_RETURN, _SUCCEED),
        ]
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def apply() -> None:
    """Have this process and its children see that, from now on.

    Raises:
        OSError: the kernel takes no filter from it.
    """
    import ctypes

    code = program()
    if not code:
        return
    lines = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("count", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    filled = Program(len(code) // _LINE_BYTES, ctypes.addressof(lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filled), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
