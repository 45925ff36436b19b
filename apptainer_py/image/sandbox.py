"""Files inside a sandbox directory, with its own symbolic links and never a file outside of it.

Each component is opened by itself and without following links; a link is then followed by this
module, from the sandbox's root if it is absolute, and `..` goes back along the directories that
were opened and never asks the kernel. So a directory that is moved while we walk cannot lead out.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LINKS = 40
MAX_ENTRIES = 65536


class NotThere(ImageError):
    """A path in the sandbox leads nowhere."""


def read_file(root_fd: int, path: str, *, limit_bytes: int) -> bytes | None:
    """Return the content of a regular file in a sandbox, or None if there is none.

    `root_fd` is the open directory that `/` stands for.

    Raises:
        ImageError: the file is larger than the limit, or the user may not read it.
    """
    try:
        handle = _walk(root_fd, path)
    except NotThere:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        return _read_whole(handle, path, limit_bytes)
    except OSError as error:
        raise ImageError(image=path, reason=_words(error)) from None
    finally:
        os.close(handle)


def list_directory(root_fd: int, path: str) -> tuple[str, ...]:
    """Return the sorted names in a directory of a sandbox; none if it is not there.

    Raises:
        ImageError: it has too many entries, or the user may not read it.
    """
    try:
        handle = _walk(root_fd, path)
    except NotThere:
        return ()
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            return ()
        return _names(handle, path)
    except OSError as error:
        raise ImageError(image=path, reason=_words(error)) from None
    finally:
        os.close(handle)


def is_directory(root_fd: int, path: str) -> bool:
    """Return whether a path in a sandbox leads to a directory."""
    try:
        handle = _walk(root_fd, path)
    except NotThere:
        return False
    try:
        return stat.S_ISDIR(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _walk(root_fd: int, path: str) -> int:
    """Return an O_PATH descriptor of what a path in the sandbox means."""
    trail: list[int] = []
    waiting = _parts(path)
    links = 0
    try:
        while waiting:
            name = waiting.pop()
            if name == "..":
                if trail:
                    os.close(trail.pop())
                continue
            handle = _step(trail[-1] if trail else root_fd, name, path)
            if not stat.S_ISLNK(os.fstat(handle).st_mode):
                trail.append(handle)
                continue
            links += 1
            target = _link_target(handle, path)
            if links > MAX_LINKS:
                raise NotThere(image=path, reason="too many levels of symbolic links")
            if target.startswith("/"):
                while trail:
                    os.close(trail.pop())
            waiting += _parts(target)
        if trail:
            return trail.pop()
        return os.open(f"/proc/self/fd/{root_fd}", os.O_PATH | os.O_CLOEXEC)
    finally:
        for handle in trail:
            os.close(handle)


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _step(at: int, name: str, path: str) -> int:
    try:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except (OSError, ValueError) as error:
        raise NotThere(image=path, reason=_words(error)) from None


def _link_target(handle: int, path: str) -> str:
    try:
        return os.readlink("", dir_fd=handle)
    except OSError as error:
        raise NotThere(image=path, reason=_words(error)) from None
    finally:
        os.close(handle)


def _read_whole(handle: int, path: str, limit_bytes: int) -> bytes:
    fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return b"".join(_chunks(fd, path, limit_bytes))
    finally:
        os.close(fd)


def _chunks(fd: int, path: str, limit_bytes: int) -> Iterator[bytes]:
    left = limit_bytes
    while chunk := os.read(fd, min(65536, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise ImageError(image=path, reason=f"larger than {limit_bytes} bytes")
        yield chunk


def _names(handle: int, path: str) -> tuple[str, ...]:
    found: list[str] = []
    fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                if len(found) == MAX_ENTRIES:
                    raise ImageError(image=path, reason=f"more than {MAX_ENTRIES} entries")
                found.append(entry.name)
    finally:
        os.close(fd)
    return tuple(sorted(found))


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)
