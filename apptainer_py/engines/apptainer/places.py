"""Targets that lie below another mount: made in what that one shows, with the caller's rights.

A layer has what lies below no other mount (create.py). Here a directory of the host, or of the
session, gets what is missing in it; it keeps it, and so does the real one's.
"""

from __future__ import annotations

import errno
import os

from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.model.plan import Mount

# linux/openat2.h: RESOLVE_BENEATH, NO_SYMLINKS. A link means another place in the container.
_RESOLVE = 0x08 | 0x04
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_KERNEL = "kernel"


def above(mounts: Sequence[Mount], at: int) -> Mount | None:
    """Return the mount that the target of the one at `at` lies in, if any does."""
    target = mounts[at].target
    found = None
    for mount in mounts[:at]:
        if target.startswith(mount.target.rstrip("/") + "/") and (
            found is None or len(mount.target) >= len(found.target)
        ):
            found = mount
    return found


def make(mounts: Sequence[Mount], at: int, session: int) -> OSError | None:
    """Make the target of the mount at `at` where another mount shows it; why not, if it fails."""
    mount, cover = mounts[at], above(mounts, at)
    if cover is None or cover.kind != "bind" or cover.tag == _KERNEL or not mount.create:
        return None
    below = mount.target[len(cover.target.rstrip("/")) + 1 :]
    if cover.area == protocol.AREA_HOST and _is_device(os.path.join(cover.source, below)):
        return None
    parts = os.fsencode(below).split(b"/")
    try:
        fd = _open_source(cover, session)
    except OSError as error:
        return error
    try:
        for part in parts[:-1]:
            fd = _inside(fd, part)
        _make_last(fd, parts[-1], mount.create)
    except OSError as error:
        return error
    finally:
        os.close(fd)
    return None


def _is_device(path: str) -> bool:
    """Return whether it would lie among the host's devices, where root could make a file."""
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")


def _open_source(cover: Mount, session: int) -> int:
    if cover.area == protocol.AREA_SESSION:
        return os.open(cover.source.lstrip("/"), _DIRECTORY | os.O_NOFOLLOW, dir_fd=session)
    if cover.area == protocol.AREA_HOST:
        return os.open(cover.source, _DIRECTORY)
    raise OSError(errno.EROFS, "it is part of an image")


def _inside(fd: int, name: bytes) -> int:
    """Return a directory in place of another, made where it is missing."""
    try:
        os.mkdir(name, 0o755, dir_fd=fd)
    except FileExistsError:
        pass
    except OSError as error:
        if not os.access(name, os.F_OK, dir_fd=fd, follow_symlinks=False):
            raise OSError(error.errno, error.strerror) from None
    inner = _starter.openat2(fd, name, _DIRECTORY, _RESOLVE)
    os.close(fd)
    return inner


def _make_last(fd: int, name: bytes, kind: str) -> None:
    try:
        if kind == "directory":
            os.mkdir(name, 0o755, dir_fd=fd)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=fd))
    except FileExistsError:
        pass
    except OSError:
        if not os.access(name, os.F_OK, dir_fd=fd, follow_symlinks=False):
            raise


def advice(mounts: Sequence[Mount], at: int, why: OSError | None) -> str:
    """Say why a target is missing, and what to do."""
    target, cover = mounts[at].target, above(mounts, at)
    if cover is None:
        return f"make {target} in the image, or let it have an overlay"
    if why is None:
        return f"nothing can be made in {cover.target}: bind to a place outside of it"
    reason = (why.strerror or "").lower()
    return (
        f"{target} lies in {cover.target}, which shows {cover.source}, and could not be made there "
        f"({reason}): make it yourself, or bind to a place outside of {cover.target}"
    )
