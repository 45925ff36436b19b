"""From a path to an open descriptor and the kind of image behind it.

The path is looked up once; everything after that goes through the descriptor. Nothing but a
regular file or a directory is ever opened for reading, so that a name cannot make us wait on a
FIFO or wake up a device.
"""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Kind = Literal["sif", "squashfs", "ext3", "sandbox"]

HEAD_BYTES = 2048
_SIF_MAGIC = b"SIF_MAGIC"
_LAUNCHER_END = b" run-singularity\n"
_LAUNCHER_MAX_BYTES = 256

_EXT3_MAGIC = 0xEF53
_EXT3_HAS_JOURNAL = 0x4
_EXT3_INCOMPAT = 0x2 | 0x4 | 0x10  # filetype, recover, meta_bg
_EXT3_RO_COMPAT = 0x1 | 0x2 | 0x4  # sparse_super, large_file, btree_dir

_TYPES = {
    0o010000: "a FIFO",
    0o020000: "a character device",
    0o060000: "a block device",
    0o140000: "a socket",
}


_MAKE_ONE = (
    "an image is a SIF file, squashfs, ext3 or a directory: `build` makes one of other things"
)
# By the end of the reason why an image cannot be opened.
_ADVICE = (
    (
        "no such file or directory",
        "look for a typing error, or fetch an image: `pull docker://NAME`",
    ),
    ("path is empty", "name an image: a file, a directory, or an address such as docker://NAME"),
    ("permission denied", "ask its owner to let you read it, and all directories above it"),
)
# As the kernel says it of what lies outside of a root.
UNREACHABLE = "(unreachable)"


class CannotOpen(ImageError):
    """The path leads to nothing that can be read, or to no image."""

    message = "could not open image {image}: {reason}"

    def advice(self) -> str:
        """Return what to do next, by the kernel's or our own reason."""
        reason = str(self.facts["reason"])
        return next((text for end, text in _ADVICE if reason.endswith(end)), _MAKE_ONE)


class RootRefused(ImageError):
    """The image is the host's own root directory."""

    message = "{image} as sandbox is not authorized"


class OpenImage(Record):
    """An image that is open for reading; `offset` is where a bare file system starts, in bytes.

    `realpath` begins with UNREACHABLE where it leads to no such file here.
    """

    fd: int
    path: str
    realpath: str
    dev: int
    ino: int
    uid: int
    gid: int
    mode: int
    size_bytes: int
    kind: Kind
    offset: int = 0


def open_image(path: str, *, allow_root: bool = False) -> OpenImage:
    """Open an image for reading and tell its kind; the caller owns the descriptor.

    The rules are Apptainer's (facts §5.1): directory, SIF magic, squashfs, ext3, in this order.
    With `allow_root` the host's root directory is a sandbox like any other (to inspect it).

    Raises:
        CannotOpen: no such file, not readable, not a regular file or directory, or no image.
        RootRefused: the directory is the host's root.
    """
    if not path:
        raise CannotOpen(image="", reason="failed to get absolute path: path is empty")
    if "\0" in path:
        raise CannotOpen(image=path, reason="the path holds a NUL byte")
    handle = _look_up(path)
    try:
        facts = os.fstat(handle)
        kind = facts.st_mode & 0o170000
        realpath = _named(handle, facts)
        if kind not in (0o100000, 0o040000):
            raise CannotOpen(
                image=_absolute(path),
                reason=f"it is {_TYPES.get(kind, 'of an unknown type')}, not a file or a directory",
            )
        if kind == 0o040000 and not allow_root and _is_root(facts):
            raise RootRefused(image=realpath)
        fd = _open_for_reading(handle, path, realpath, directory=kind == 0o040000)
    finally:
        os.close(handle)
    try:
        found, offset = ("sandbox", 0) if kind == 0o040000 else _kind_of_file(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return OpenImage(
        fd=fd,
        path=path,
        realpath=realpath,
        dev=facts.st_dev,
        ino=facts.st_ino,
        uid=facts.st_uid,
        gid=facts.st_gid,
        mode=facts.st_mode,
        size_bytes=facts.st_size,
        kind=found,  # type: ignore[arg-type]
        offset=offset,
    )


def _named(handle: int, facts: os.stat_result) -> str:
    """Return where an open file is, marked if nothing leads to it there.

    The kernel tells a path of the mount namespace in which a file was found, which may be one of
    the user's, with any file in any place.
    """
    path = os.readlink(f"/proc/self/fd/{handle}")
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return UNREACHABLE + path
    same = (found.st_dev, found.st_ino) == (facts.st_dev, facts.st_ino)
    return path if same else UNREACHABLE + path


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def _is_root(facts: os.stat_result) -> bool:
    root = os.stat("/")
    return (facts.st_dev, facts.st_ino) == (root.st_dev, root.st_ino)


def _look_up(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        failure = error
    image = _absolute(path)
    if failure.errno == errno.ELOOP:
        reason = "EvalSymlinks: too many links"
    else:
        culprit = _first_missing(image)
        reason = f"lstat {culprit}: {os.strerror(failure.errno or 0).lower()}"
    raise CannotOpen(image=image, reason=f"failed to retrieve path for {image}: {reason}")


def _first_missing(path: str) -> str:
    try:
        return os.path.realpath(path, strict=True)
    except OSError as error:
        return str(error.filename or path)


def _open_for_reading(handle: int, path: str, realpath: str, *, directory: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (os.O_DIRECTORY if directory else 0)
    try:
        return os.open(f"/proc/self/fd/{handle}", flags)
    except PermissionError:
        reason = f"{realpath} is not readable by the current user, check permissions"
    except OSError as error:
        reason = f"open {realpath}: {os.strerror(error.errno or 0).lower()}"
    raise CannotOpen(image=_absolute(path), reason=reason)


def _kind_of_file(fd: int, path: str) -> tuple[str, int]:
    try:
        head = os.pread(fd, HEAD_BYTES, 0)
    except OSError as error:
        reason = f"read: {os.strerror(error.errno or 0).lower()}"
        raise CannotOpen(image=_absolute(path), reason=reason) from None
    try:
        found = kind_of(head)
    except ImageError as error:
        raise CannotOpen(image=_absolute(path), reason=error.facts["reason"]) from None
    if found is None:
        raise CannotOpen(image=_absolute(path), reason="image format not recognized")
    return found


def kind_of(head: bytes) -> tuple[str, int] | None:
    """Return the kind of an image file and where its file system starts, from its first bytes.

    None if no rule fits; a file shorter than 2048 bytes fits none (facts §5.1).

    Raises:
        ImageError: squashfs of a version or compression that nothing here can read.
    """
    if len(head) < HEAD_BYTES:
        return None
    if _SIF_MAGIC in head:
        return "sif", 0
    from apptainer_py.image import squashfs  # not on the way of a sandbox

    start = 0 if head.startswith(squashfs.MAGIC) else _after_launcher(head)
    if head.startswith(squashfs.MAGIC, start):
        squashfs.parse_superblock(head[start:], image="")
        return "squashfs", start
    if is_ext3(head[start:]):
        return "ext3", start
    return None


def _after_launcher(head: bytes) -> int:
    if not head.startswith(b"#!"):
        return 0
    end = head.find(_LAUNCHER_END, 0, _LAUNCHER_MAX_BYTES)
    if end < 0 or b"\n" in head[:end]:
        return 0
    return end + len(_LAUNCHER_END)


def is_ext3(head: bytes) -> bool:
    """Return whether a superblock follows 1024 bytes in, with no feature that ext3 lacks."""
    if len(head) < 1024 + 104:
        return False
    magic = int.from_bytes(head[1024 + 56 : 1024 + 58], "little")
    compat, incompat, ro_compat = (
        int.from_bytes(head[at : at + 4], "little") for at in (1024 + 92, 1024 + 96, 1024 + 100)
    )
    return bool(
        magic == _EXT3_MAGIC
        and compat & _EXT3_HAS_JOURNAL
        and not incompat & ~_EXT3_INCOMPAT
        and not ro_compat & ~_EXT3_RO_COMPAT
    )
