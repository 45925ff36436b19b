"""Carries out what layers.py has judged: images beside the root, and the overlay over it."""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.model import protocol
from apptainer_py.runtime.mounting import StarterRefused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.create import Creation
    from apptainer_py.engines.apptainer.layers import Shown


def show(creation: Creation) -> None:
    """Make a mount of every image beside the root, and layers of the overlays."""
    for shown in creation.prepared.shown:
        os.close(_mount(creation, shown))
        if shown.overlay:
            _lay(creation, shown)


def _mount(creation: Creation, shown: Shown) -> int:
    mounting, image = creation.mounting, shown.image
    what = f"cannot mount {image.path}"
    flags = protocol.BINDFLAG_WRITABLE if shown.writable else 0
    if shown.fs == "directory":
        flags = flags or protocol.BINDFLAG_READ_ONLY
        facts: tuple[int, ...] = (image.dev, image.ino, shown.number)
        return mounting.image_directory(image.realpath, facts, flags, what)
    if shown.device >= 0:
        fd = mounting.image_fuse(shown.number, shown.device, flags, what)
        mounting.serve_image(shown.device, image.fd, shown.offset, what)
        return fd
    facts = (image.dev, image.ino, shown.offset, shown.size_bytes, shown.number)
    return mounting.image_kernel(image.realpath, facts, flags, what)


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
