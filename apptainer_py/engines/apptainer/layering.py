"""Carries out what layers.py has judged: images beside the root, and the overlay over it."""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer import extfs, layers
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.runtime.mounting import StarterRefused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.create import Creation
    from apptainer_py.engines.apptainer.layers import Shown


# linux/openat2.h: IN_ROOT, NO_MAGICLINKS
_RESOLVE = 0x10 | 0x02


def show(creation: Creation) -> None:
    """Make a mount of every image beside the root, and layers of the overlays."""
    for shown in creation.prepared.shown:
        root = _mount(creation, shown)
        if shown.overlay:
            if shown.writable and shown.fs == "ext3":
                degree = creation.prepared.fakeroot
                layers.make_upper(
                    root, shown.image.realpath, shown.image.path,
                    by_root=degree is not None and degree.subids,
                )  # fmt: skip
            _lay(creation, shown)
        else:
            _find_sources(creation, shown, root)
        os.close(root)


def _mount(creation: Creation, shown: Shown) -> int:
    mounting, image = creation.mounting, shown.image
    what = f"cannot mount {image.path}"
    flags = protocol.BINDFLAG_WRITABLE if shown.writable else 0
    if shown.fs == "ext3":
        flags |= protocol.BINDFLAG_EXTFS
    if shown.fs == "directory":
        flags = flags or protocol.BINDFLAG_READ_ONLY
        facts: tuple[int, ...] = (image.dev, image.ino, shown.number)
        return mounting.image_directory(image.realpath, facts, flags, what)
    if shown.device >= 0:
        fd = mounting.image_fuse(shown.number, shown.device, flags, what)
        if shown.fs == "ext3":
            mounting.serve_extfs(
                shown.device, shown.fd, shown.offset, what, writable=shown.writable
            )
        else:
            mounting.serve_image(shown.device, image.fd, shown.offset, what)
        return fd
    facts = (image.dev, image.ino, shown.offset, shown.size_bytes, shown.number)
    return mounting.image_kernel(image.realpath, facts, flags, what)


def _find_sources(creation: Creation, shown: Shown, root: int) -> None:
    """Find out what is bound from an image: a directory or a file."""
    mounts = creation.prepared.mounts
    for at, mount in enumerate(mounts):
        if mount.area != protocol.AREA_IMAGE or mount.options != shown.number:
            continue
        try:
            fd = _starter.openat2(root, os.fsencode(mount.source), os.O_PATH, _RESOLVE)
        except OSError:
            raise LaunchError(
                text=f"container creation failed: {mount.source} doesn't exist in image "
                f"{shown.image.realpath}"
            ) from None
        kind = "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        os.close(fd)
        mounts[at] = mount.replace(create=kind)


def _lay(creation: Creation, shown: Shown) -> None:
    flags = protocol.BINDFLAG_WRITABLE if shown.writable else 0
    path = shown.image.realpath
    try:
        creation.mounting.image_layer(shown.number, flags, f"cannot use the overlay {path}")
    except StarterRefused as error:
        if error.facts["code"] != protocol.ERR_UPPER:
            raise
        reason = os.strerror(int(str(error.facts["errno"]))).lower()
        raise LaunchError(
            text=f"container creation failed: setup of overlay upper dir failed: {path}/upper or "
            f"{path}/work: {reason}; they must be directories, and no links"
        ) from None


def failed(creation: Creation, error: StarterRefused) -> LaunchError:
    """Return what to tell the user where the kernel does not lay the overlays over the image."""
    writable = [shown.image.path for shown in creation.prepared.shown if shown.writable]
    if not writable:
        return error
    way_out = f"`--overlay {writable[0]}:ro` needs no upper layer"
    if error.facts["code"] == protocol.ERR_NAMESPACE:
        return LaunchError(
            text="container creation failed: a writable overlay needs a user namespace, and the "
            f"system allows none (user.max_user_namespaces); {way_out}"
        )
    return LaunchError(text=f"{error}; {way_out}")


def root_extfs(creation: Creation) -> int:
    """Mount a root that is an ext3 image, and keep its lock."""
    prepared, mounting = creation.prepared, creation.mounting
    image, what = prepared.image, prepared.what
    writable = prepared.writable_root
    flags = protocol.BINDFLAG_EXTFS | (protocol.BINDFLAG_WRITABLE if writable else 0)
    if not prepared.fuse:
        facts = (image.dev, image.ino, prepared.offset, prepared.size_bytes)
        return mounting.root_squashfs(image.realpath, facts, what, flags)
    device = extfs.ROOT_DEVICE
    root = mounting.root_fuse(device, what, flags)
    mounting.serve_extfs(device, prepared.root_fd, prepared.offset, what, writable=writable)
    return root
