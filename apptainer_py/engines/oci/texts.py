"""The sentences of runc: clients read them, so a failed row or key is told in its words."""

from __future__ import annotations

import os
from errno import ENOENT

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.runtime.nest import RowFailed

    from apptainer_py.model.oci_plan import Row

# What stands before every failure that runc meets after it has started the container's first
# process; many a value is wrong for runc only there, while compiling sees it before anything is.
# A row's own sentence is without it.
STARTING = "unable to start container process: "
IN_INIT = f"{STARTING}error during container init: "

_LONGEST_PATH = 4095


def row_failure(failed: RowFailed) -> str:
    """Return runc's sentence for a row that was refused, without what stands before it."""
    return row_failed(failed.row, failed.code, failed.errno)


def row_failed(row: Row, code: int, errno: int) -> str:
    """Return the same for a row, an ERR_* and an errno."""
    if row.op == protocol.OP_SYSCTL and errno == ENOENT:
        name = (row.first or b"").decode().replace("/", ".")
        return f"open sysctl {name} file: {errno_text(errno)}"
    error = errno_text(errno) if errno else protocol.ERR_TEXTS.get(code, "unknown error")
    return row.says.replace("{error}", error)


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
