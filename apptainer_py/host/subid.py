"""Id maps of a new user namespace, written by ourselves or by newuidmap and newgidmap (shadow)."""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.model.oci_plan import IdMap

_PROGRAM_FOLDERS = ("/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/local/bin")
_OUTPUT_BYTES = 4096
_FILE_BYTES = 1 << 20


class MapError(ApptainerError):
    message = "{text}"


def map_text(lines: Sequence[IdMap]) -> bytes:
    """Return the text for uid_map or gid_map (user_namespaces(7))."""
    return "".join(f"{one.inside} {one.outside} {one.count}\n" for one in lines).encode()


def tool_arguments(tool: str, pid: int, lines: Sequence[IdMap]) -> list[str]:
    """Return the command line of newuidmap or newgidmap."""
    words = [tool, str(pid)]
    for one in lines:
        words += [str(one.inside), str(one.outside), str(one.count)]
    return words


def write_maps(
    pid: int, uid_maps: Sequence[IdMap], gid_maps: Sequence[IdMap], *, rootless: bool
) -> None:
    """Write both maps of the user namespace that a process has just made.

    A caller without rights who maps his own group alone gives up setgroups(2) for it, as the kernel
    demands (CVE-2014-8989); for more, shadow's programs judge by /etc/subuid and /etc/subgid.

    Raises:
        MapError: the kernel or those programs refuse.
    """
    if rootless and _own_only(gid_maps, os.getegid()):
        _write(pid, "setgroups", b"deny")
    _write_map(pid, "uid_map", "newuidmap", uid_maps)
    _write_map(pid, "gid_map", "newgidmap", gid_maps)


def _own_only(lines: Sequence[IdMap], own: int) -> bool:
    return len(lines) == 1 and lines[0].outside == own and lines[0].count == 1


def _write(pid: int, name: str, data: bytes) -> None:
    path = f"/proc/{pid}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        text = f"failed to update {path}: {(error.strerror or '').lower()}"
        raise MapError(text=text, errno=error.errno) from None


def _write_map(pid: int, name: str, tool: str, lines: Sequence[IdMap]) -> None:
    if not lines:
        return
    try:
        _write(pid, name, map_text(lines))
    except MapError as error:
        if error.facts["errno"] != errno.EPERM:
            raise
        program = find_program(tool)
        if program is None:
            raise MapError(
                text=f"{error}, and {tool} is not installed", errno=errno.EPERM
            ) from None
        _run(program, tool_arguments(tool, pid, lines))


def find_program(name: str, folders: Sequence[str] = _PROGRAM_FOLDERS) -> str | None:
    """Return where a program of the system is; the caller's PATH is not asked."""
    for folder in folders:
        path = f"{folder}/{name}"
        if os.access(path, os.X_OK):
            return path
    return None


def _run(program: str, words: list[str]) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_DUP2, writing, 2)]
        child = os.posix_spawn(program, words, {}, file_actions=actions)
    except OSError as error:
        os.close(reading)
        raise MapError(text=f"{program}: {error.strerror}", errno=error.errno) from None
    finally:
        os.close(writing)
    said = read_at_most(reading, _OUTPUT_BYTES).decode("utf-8", "replace").strip()
    _, status = os.waitpid(child, 0)
    if status:
        text = f"{words[0]} failed: {' '.join(said.split())}"
        raise MapError(text=text, errno=errno.EPERM)


def sub_ranges(path: str, name: str, number: int) -> list[tuple[int, int]]:
    """Return (first, count) for each range that /etc/subuid or /etc/subgid gives a user.

    Lines that are not of three fields, or whose numbers are none, count for nothing (subuid(5)).
    """
    try:
        data = read_at_most(os.open(path, os.O_RDONLY | os.O_CLOEXEC), _FILE_BYTES)
    except OSError:
        return []
    found = []
    for line in data.decode("utf-8", "replace").splitlines():
        owner, *rest = line.strip().split(":")
        if owner not in (name, str(number)) or len(rest) != 2:
            continue
        if all(word.isascii() and word.isdecimal() for word in rest) and int(rest[1]):
            found.append((int(rest[0]), int(rest[1])))
    return found
