"""Libraries of the host: what the dynamic loader's cache knows, and for which machine each is."""

from __future__ import annotations

import os

from apptainer_py.base import build

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

_TIMEOUT_S = 30
_LIST_BYTES = 1 << 20
# What soname() reads of a library at most: its program headers, its dynamic section, a name.
_HEADERS, _DYNAMIC_BYTES, _NAME_BYTES = 64, 1 << 16, 256
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_SONAME = 5, 14
# e_machine of the ELF header: the 32-bit machine whose programs a 64-bit one runs as well.
_COMPAT = {62: 3, 183: 40, 21: 20, 22: 22}


class Found:
    """What a list of drivers led to: libraries, 32-bit libraries, programs and other files."""

    __slots__ = ("files", "libraries", "libraries32", "programs")

    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.libraries32: list[str] = []
        self.programs: list[str] = []
        self.files: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.libraries or self.libraries32 or self.programs or self.files)


def read_list(path: str) -> list[str]:
    """Return the entries of a list such as nvliblist.conf.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.strip() for line in file.read(_LIST_BYTES).splitlines()]
    return [line for line in lines if line and line[0] != "#"]


def cache(ldconfig: str) -> list[tuple[str, str]]:
    """Return name and path of each library in the loader's cache, as `ldconfig -p` prints them.

    Raises:
        OSError: the program cannot be run, or fails.
    """
    import subprocess

    try:
        done = subprocess.run(
            [ldconfig, "-p"], stdin=subprocess.DEVNULL, capture_output=True, env={},
            check=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        raise OSError(0, str(error)) from None
    found = []
    for line in os.fsdecode(done.stdout).splitlines():
        name, arrow, path = line.partition("=>")
        if arrow and path.strip().startswith("/"):
            found.append((name.partition("(")[0].strip(), path.strip()))
    return found


def machine(path: str) -> tuple[int, int]:
    """Return class (1: 32 bits, 2: 64 bits) and machine of an ELF file; (0, 0) if it is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            head = os.read(fd, 20)
        finally:
            os.close(fd)
    except OSError:
        return 0, 0
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return 0, 0
    return head[4], int.from_bytes(head[18:20], _order(head))


def soname(path: str) -> str:
    """Return the name that a library gives itself (DT_SONAME); "" where it has none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        name = _soname(fd)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return "" if "/" in name or name in (".", "..") else name


def _soname(fd: int) -> str:
    head = os.pread(fd, 64, 0)
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2):
        return ""
    wide, order = head[4] == 2, _order(head)
    word = 8 if wide else 4

    def number(data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    at, size, count = (32, 54, 56) if wide else (28, 42, 44)
    start, each = number(head, at, word), number(head, size, 2)
    loads, dynamic = [], b""
    for n in range(min(number(head, count, 2), _HEADERS)):
        entry = _read(fd, each, start + n * each)
        kind, offset = number(entry, 0, 4), number(entry, 8 if wide else 4, word)
        address, length = number(entry, 2 * word, word), number(entry, 4 * word, word)
        if kind == _PT_LOAD:
            loads.append((address, length, offset))
        elif kind == _PT_DYNAMIC:
            dynamic = _read(fd, min(length, _DYNAMIC_BYTES), offset)
    found: dict[int, int] = {}
    for n in range(0, len(dynamic), 2 * word):
        found.setdefault(number(dynamic, n, word), number(dynamic, n + word, word))
    table = found.get(_DT_STRTAB, -1)
    for address, length, offset in loads:
        if _DT_SONAME in found and address <= table < address + length:
            text = _read(fd, _NAME_BYTES, offset + table - address + found[_DT_SONAME])
            name, end, _ = text.partition(b"\0")
            return os.fsdecode(name) if end else ""
    return ""


def _read(fd: int, size: int, offset: int) -> bytes:
    """Read where a file's own numbers point to, which may be anywhere."""
    return os.pread(fd, size, offset) if offset < 1 << 62 else b""


def _order(head: bytes) -> Literal["little", "big"]:
    return "little" if head[5] == 1 else "big"


def resolve(
    entries: Iterable[str], known: list[tuple[str, str]], path: str, *, compat32: bool = False
) -> Found:
    """Find what the entries of a list name.

    An entry with `.so` in it is a library: looked up in the cache by the beginning of its name, or
    an absolute path, with the links beside it that lead there. Another absolute path is a file, any
    other word a program of the search path `path`.
    """
    found = Found()
    ours = machine(build.LIBPYTHON)
    small = (1, _COMPAT.get(ours[1], 0)) if compat32 else (0, -1)
    seen: set[str] = set()
    for entry in entries:
        if ".so" not in os.path.basename(entry):
            _add_other(found, entry, path)
            continue
        for candidate in _candidates(entry, known):
            if candidate in seen:
                continue
            seen.add(candidate)
            kind = machine(candidate)
            if kind == ours:
                _add(found.libraries, candidate)
            elif kind == small:
                _add(found.libraries32, candidate)
    return found


def _add(libraries: list[str], path: str) -> None:
    """Add a library, unless one of that name comes earlier: it would hide this one."""
    name = os.path.basename(path)
    if not any(os.path.basename(other) == name for other in libraries):
        libraries.append(path)


def _candidates(entry: str, known: list[tuple[str, str]]) -> list[str]:
    if not os.path.isabs(entry):
        return [path for name, path in known if name.startswith(entry)]
    folder, name = os.path.split(entry)
    stem = name.partition(".so")[0] + ".so"
    try:
        names = sorted(other for other in os.listdir(folder) if other.startswith(stem))
    except OSError:
        return []
    target = os.path.realpath(entry)
    links = [os.path.join(folder, other) for other in names if other != name]
    return [entry, *(link for link in links if os.path.realpath(link) == target)]


def _add_other(found: Found, entry: str, path: str) -> None:
    if os.path.isabs(entry):
        if os.path.exists(entry) and entry not in found.files:
            found.files.append(entry)
        return
    for directory in path.split(":"):
        program = os.path.join(directory, entry)
        if directory.startswith("/") and os.path.isfile(program) and os.access(program, os.X_OK):
            if program not in found.programs:
                found.programs.append(program)
            return
