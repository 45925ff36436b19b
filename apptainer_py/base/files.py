"""Whole files by descriptor: in a stage the built-in `open` costs a millisecond when first used."""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import LaunchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_TMPDIRS = ("APPTAINER_TMPDIR", "SINGULARITY_TMPDIR", "TMPDIR")
# What is more is memory of its own from the system for each call.
_PART_BYTES = 1 << 16
_COPIED_BYTES = 16 << 20


def read_at_most(fd: int, size: int) -> bytes:
    """Read `size` bytes, or what is there, from a descriptor; then close it.

    Raises:
        OSError: as read(2) fails.
    """
    parts = []
    try:
        while size > 0 and (part := os.read(fd, min(size, _PART_BYTES))):
            parts.append(part)
            size -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def copy_rest(reading: int, writing: int) -> None:
    """Copy what is left of an open file to another one.

    Raises:
        OSError: as read(2) or write(2) fails, for want of space above all.
    """
    try:
        while os.copy_file_range(reading, writing, _COPIED_BYTES):
            pass
    except OSError as error:
        # From one file system to another, and on some of those of a network.
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        while data := os.read(reading, _COPIED_BYTES):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(writing, rest) :]


def write_all(fd: int, data: bytes) -> None:
    """Write every byte to a descriptor; then close it.

    Raises:
        OSError: as write(2) or close(2) fails, for want of space above all.
    """
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)


def open_nameless(folder: int, flags: int, mode: int) -> int:
    """Make a file that has no name, and is gone if its maker is; `give_name` keeps it.

    Raises:
        OSError: it cannot be made, or the file system has no such files, as NFS.
    """
    return os.open(".", flags | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=folder)


def give_name(fd: int, folder: int, name: str) -> None:
    """Have an open file appear in a directory under one more name, or its first.

    Raises:
        FileExistsError: the name is taken.
        OSError: as linkat(2) fails.
    """
    # By its directory, or Python would make a link to the link in /proc.
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder)


def temporary_directory(environment: Mapping[str, str], given: str = "") -> str:
    """Return where temporary files go: what an option gives, or else the environment names."""
    return given or next(filter(None, (environment.get(name, "") for name in _TMPDIRS)), "/tmp")


def own_directory(path: str) -> None:
    """Make a directory that is the caller's alone if it lacks; refuse one of somebody else.

    Raises:
        LaunchError: it cannot be made, or others may write to it.
    """
    import stat

    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise LaunchError(text=f"{path}: {(error.strerror or '').lower()}") from None
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or stat.S_IMODE(found.st_mode) & 0o022
    ):
        raise LaunchError(text=f"{path} is not a directory of your own that nobody else can write")
