"""ext3 images: whether one is whole, who may mount it, and the lock on its bytes."""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import LaunchError
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.image.detect import OpenImage
    from apptainer_py.runtime.contexts import Facts

SERVER = f"{build.LIBEXECDIR}/bin/fuse2fs"
OVERLAY_SERVER = f"{build.LIBEXECDIR}/bin/fuse-overlayfs"
ROOT_DEVICE = 1
_F_OFD_SETLK = 37  # fcntl.h: the lock belongs to the open file, whoever holds it
_SUPERBLOCK_BYTES = 1024 + 104


class ExtfsUnusable(LaunchError):
    """An ext3 image cannot be used as it is."""

    message = "{reason}"


class ServerMissing(LaunchError):
    """The program that serves such images is not installed."""

    message = "{path} is not installed"
    hint = "install the package {package} and then apptainer-py again (./install)"


def not_writable(image: OpenImage) -> LaunchError:
    """Return the exception for a file that `-w` needs to write and cannot."""
    return LaunchError(
        text=f"could not use {image.realpath} for writing, you don't have write permissions"
    )


def kernel_may_mount(facts: Facts) -> bool:
    """Return whether the kernel's driver may read ext3 images for this caller."""
    if facts.flow == protocol.FLOW_USERNS:
        return False
    if facts.flow == protocol.FLOW_ROOT:
        return os.path.exists("/dev/loop-control")
    return bool(facts.configuration["allow setuid-mount extfs"])


def prepare(
    image: OpenImage, place: tuple[int, int], facts: Facts, *, writable: bool
) -> tuple[int, bool]:
    """Return a descriptor that holds a lock on the image's bytes, and whether it can be written.

    Raises:
        ExtfsUnusable: the file system is damaged or larger than its place, or in use.
        ServerMissing: nothing here can mount it.
    """
    offset, size_bytes = place
    _check_size(image, offset, size_bytes)
    if not kernel_may_mount(facts) and not os.path.exists(SERVER):
        raise ServerMissing(path=SERVER, package="fuse2fs")
    fd = -1
    if writable:
        fd = _open_for_writing(image)
    writable = fd >= 0
    if fd < 0:
        fd = os.open(f"/proc/self/fd/{image.fd}", os.O_RDONLY | os.O_CLOEXEC)
    _lock(fd, image, offset, size_bytes, writable=writable)
    return fd, writable


def _open_for_writing(image: OpenImage) -> int:
    try:
        return os.open(f"/proc/self/fd/{image.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def _check_size(image: OpenImage, offset: int, size_bytes: int) -> None:
    """A file system that reaches beyond its place would be written over what lies behind it."""
    head = os.pread(image.fd, _SUPERBLOCK_BYTES, offset)[1024:]
    blocks, shift = (int.from_bytes(head[at : at + 4], "little") for at in (4, 24))
    if shift > 6 or blocks << (10 + shift) > size_bytes or blocks == 0:
        raise ExtfsUnusable(
            reason=f"the ext3 file system in {image.realpath} is damaged: it does not fit into its "
            f"{size_bytes} bytes; e2fsck(8) may repair it"
        )


def _lock(fd: int, image: OpenImage, offset: int, size_bytes: int, *, writable: bool) -> None:
    import fcntl
    import struct

    kind = fcntl.F_WRLCK if writable else fcntl.F_RDLCK
    wanted = struct.pack("hh4xqqi4x", kind, 0, offset, size_bytes, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, wanted)
    except BlockingIOError:
        how = "for writing, currently in use by another process"
        if not writable:
            how = "for reading, currently in use for writing by another process"
        raise ExtfsUnusable(
            reason=f"while locking ext3 partition from {image.realpath}: can't open "
            f"{image.realpath} {how}"
        ) from None
    except OSError:
        pass  # a file system without locks, as NFS may be; the real one goes on too
