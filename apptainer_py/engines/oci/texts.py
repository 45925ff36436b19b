"""The sentences of runc: clients read them, so a failed row or key is told in its words."""

from __future__ import annotations

import os

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_plan import Row
    from apptainer_py.runtime.nest import RowFailed

# What stands before every failure that runc meets after it has started the container's first
# process; many a value is wrong for runc only there, while compiling sees it before anything is.
# A row's own sentence is without it.
STARTING = "unable to start container process: "
IN_INIT = f"{STARTING}error during container init: "

_LONGEST_PATH = 4095
_ENOENT = 2

# Values of replies.
_LOCKED = {
    1: "cannot clear locked flags: operation not permitted",
    2: "cannot change locked atime flags: operation not permitted",
}
_IS_ROOT = 3
_IN_PROC = {4: "inside /proc", 7: "not of type proc"}
_NOT_ORDINARY = {5: "proc", 6: "sysfs"}
_MOUNTING = 8
_ENTER_CWD = 3
_PREP_LIST = 4


def row_failure(failed: RowFailed) -> str:
    """Return runc's sentence for a row that was refused, without what stands before it."""
    return row_failed(failed.row, failed.code, failed.errno, failed.value)


def row_failed(row: Row, code: int, errno: int, value: int = 0) -> str:
    """Return the same for a row, and an ERR_*, an errno and the value of its reply."""
    if code == protocol.ERR_SYSTEM and (why := _reason(row, value, errno)):
        mount = row.says.partition(": mount src=")[0].partition(": create mountpoint for ")[0]
        return f"{mount}: {why}" if row.op != protocol.OP_ENTER else f"{why}{errno_text(errno)}"
    if row.op == protocol.OP_PREP and value == _PREP_LIST:
        text = "error starting setns process: error setting initial CPU affinity"
        return f"{text}: {errno_text(errno)}"
    if row.op == protocol.OP_SYSCTL and errno == _ENOENT:
        name = (row.first or b"").decode().replace("/", ".")
        return f"open sysctl {name} file: {errno_text(errno)}"
    error = errno_text(errno) if errno else protocol.ERR_TEXTS.get(code, "unknown error")
    return row.says.replace("{error}", error)


def _reason(row: Row, value: int, errno: int) -> str:
    """Return what starter/init_mounts.c and init_enter.c say by a number (enum why), or ""."""
    place = os.fsdecode(row.first or b"")
    if row.op == protocol.OP_ENTER:
        return f"mkdir {place}: " if value == _ENTER_CWD else ""
    if row.op == protocol.OP_ATTR:
        return _LOCKED.get(value, "")
    if row.op != protocol.OP_PLACE:
        return ""
    if value == _MOUNTING:
        return errno_text(errno)
    if value in _NOT_ORDINARY:
        return f"filesystem {quoted(_NOT_ORDINARY[value])} must be mounted on ordinary directory"
    create = f"create mountpoint for {place} mount: "
    if value == _IS_ROOT:
        return f"{create}mountpoint {quoted(place)} is on the top of rootfs"
    if value not in _IN_PROC:
        return ""
    safety = f"check proc-safety of {place} mount: {quoted(place)} cannot be mounted because it is"
    return f"{create}{safety} {_IN_PROC[value]}"


def errno_text(number: int) -> str:
    """Return what Go prints for an errno: the C library's text in lower case."""
    return os.strerror(number).lower()


def quoted(text: str) -> str:
    """Return `text` as Go's %q prints it."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(map(_escaped, text)) + '"'


_SHORT = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r"}


def _escaped(char: str) -> str:
    if char in ('"', "\\"):
        return f"\\{char}"
    if char.isprintable():
        return char
    if char in _SHORT:
        return f"\\{_SHORT[char]}"
    number = ord(char)
    if number < 0x80:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def path_bytes(text: str, key: str, says: str = "{error}", *, where: str = IN_INIT) -> bytes:
    """Return a path or word of the configuration as the kernel takes it.

    Raises:
        ConfigWrong: it has a NUL in it or is longer than a path can be; `says` tells it.
    """
    data = text.encode()
    if len(data) > _LONGEST_PATH:
        says = says.replace("{error}", "file name too long")
    elif 0 in data:
        says = says.replace("{error}", "invalid argument")
    else:
        return data
    raise ConfigWrong(key=key, text=where + says)
