"""Images beside the root: overlays, and images that something is bound from; judged, not mounted.

Each is opened once, and everything after that goes through the descriptor. What can be mounted is a
`Shown`: it has a number, under which the mounting process knows it.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ImageError, LaunchError
from apptainer_py.base.record import Record
from apptainer_py.engines.apptainer import policy
from apptainer_py.image.detect import CannotOpen, open_image
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.image.detect import OpenImage
    from apptainer_py.image.sif import Partition
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts


class OverlayUnusable(LaunchError):
    """An image cannot be laid over the container."""

    message = "while loading overlay images: {reason}"


class UpperUnusable(LaunchError):
    """A directory cannot take what the container writes."""

    message = "container creation failed: setup of overlay upper dir failed: {reason}"
    hint = "`--overlay {path}:ro` lays it over the container for reading"


class Shown(Record):
    """One file system beside the root: what it is made of, and what for.

    `fs` is "directory", "squashfs" or "ext3"; `device` the FUSE device of the plan through which
    it is served, or -1.
    """

    number: int
    image: OpenImage
    fs: str
    offset: int = 0
    size_bytes: int = 0
    writable: bool = False
    overlay: bool = False
    device: int = -1


def add_overlays(prepared: Prepared, action: ActionRequest, facts: Facts) -> None:
    """Judge every `--overlay`, and choose the layer that takes them (facts §6.2).

    Raises:
        LaunchError: one cannot be used, or not together with others.
    """
    wanted = [spec for text in action.overlay for spec in text.split(",") if spec]
    if not wanted:
        return
    if action.writable:
        raise LaunchError(text="cannot use --overlay in conjunction with --writable")
    if facts.configuration["enable overlay"] == "no":
        raise policy.NotPermitted(
            text="--overlay requires 'enable overlay', but set to 'no' by administrator"
        )
    if not action.writable_tmpfs:
        prepared.layer = protocol.LAYERKIND_OVERLAY
    prepared.underlay_allowed = False
    for spec in wanted:
        path, _, option = spec.partition(":")
        image = _open(path, facts)
        for shown in _parts(prepared, image, facts, writable=option != "ro"):
            _add(prepared, shown, action)
    for shown in prepared.shown:
        if shown.writable:
            make_upper(shown.image)


def _open(path: str, facts: Facts) -> OpenImage:
    try:
        image = open_image(path)
    except ImageError as error:
        reason = error.facts["reason"] if isinstance(error, CannotOpen) else error
        raise OverlayUnusable(reason=f"failed to open overlay image {path}: {reason}") from None
    try:
        policy.check_image(facts, image)
    except policy.NotPermitted as error:
        reason = f"failed to open overlay image {path}: {error}"
        raise policy.ImageNotPermitted(reason=f"while loading overlay images: {reason}") from None
    return image


def _parts(prepared: Prepared, image: OpenImage, facts: Facts, *, writable: bool) -> list[Shown]:
    """Return what an overlay has to show: itself, or its overlay partitions."""
    if image.kind == "sandbox":
        number = len(prepared.shown)
        return [Shown(number=number, image=image, fs="directory", writable=writable, overlay=True)]
    if writable:
        log.warning(f"Overlay image {image.realpath} is not writable, proceeding with read-only")
    if image.kind == "squashfs":
        place = (image.offset, image.size_bytes)
        return [_file(prepared, image, "squashfs", place, facts)]
    if image.kind == "sif":
        return [
            _file(prepared, image, part.fs, (part.offset, part.size_bytes), facts)
            for part in _overlay_partitions(image)
        ]
    raise OverlayUnusable(
        reason=f"failed to open overlay image {image.path}: {image.kind} is not supported yet"
    )


def _overlay_partitions(image: OpenImage) -> tuple[Partition, ...]:
    from apptainer_py.image import sif

    try:
        return sif.partitions(image.fd, sif.OVERLAY)
    except ImageError as error:
        reason = f"while getting overlay partitions in {image.realpath}: {error}"
        raise OverlayUnusable(reason=reason) from None


def _file(
    prepared: Prepared, image: OpenImage, fs: str, place: tuple[int, int], facts: Facts
) -> Shown:
    """Return a file system in a file, at an offset and of a size, for reading."""
    if fs != "squashfs":
        raise OverlayUnusable(
            reason=f"failed to open overlay image {image.path}: {fs} is not supported yet"
        )
    device = -1
    if prepared.inner or not policy.kernel_may_mount(facts):
        device = prepared.fuse_count
        prepared.fuse_count += 1
    return Shown(
        number=len(prepared.shown), image=image, fs=fs, offset=place[0], size_bytes=place[1],
        overlay=True, device=device,
    )  # fmt: skip


def _add(prepared: Prepared, shown: Shown, action: ActionRequest) -> None:
    if len(prepared.shown) >= protocol.LIMIT_IMAGES:
        raise OverlayUnusable(reason=f"there are more than {protocol.LIMIT_IMAGES} of them")
    if shown.writable:
        path = shown.image.realpath
        if action.writable_tmpfs:
            reason = (
                f"you can't specify --writable-tmpfs with another writable overlay image ({path})"
            )
            raise OverlayUnusable(reason=reason)
        for other in prepared.shown:
            if other.writable:
                raise OverlayUnusable(
                    reason="you can't specify more than one writable overlay, "
                    f"{other.image.realpath} contains a writable overlay, requires to use "
                    f"'--overlay {path}:ro'"
                )
        prepared.layer = protocol.LAYERKIND_OVERLAY_USER
    prepared.shown.append(shown)


def make_upper(image: OpenImage) -> None:
    """Make the two directories of an overlay that can be written, as the user."""
    for name in ("upper", "work"):
        path = f"{image.realpath}/{name}"
        try:
            os.mkdir(name, 0o755, dir_fd=image.fd)
            os.chmod(name, 0o755, dir_fd=image.fd)  # upper is the container's root: no umask
        except FileExistsError:
            pass
        except OSError as error:
            reason = f"failed to create {path} directory: {(error.strerror or '').lower()}"
            raise UpperUnusable(reason=reason, path=image.path) from None
        if not stat.S_ISDIR(os.stat(name, dir_fd=image.fd, follow_symlinks=False).st_mode):
            raise UpperUnusable(reason=f"{path} is not a directory", path=image.path)
        if not os.access(name, os.W_OK | os.X_OK, dir_fd=image.fd):
            raise UpperUnusable(reason=f"{path} is not writable", path=image.path)


def plan_flags(prepared: Prepared) -> int:
    """Return what the plan has to say about the images beside the root."""
    flags = 0
    if prepared.layer == protocol.LAYERKIND_OVERLAY_USER:
        flags |= protocol.PLANFLAG_USER_LAYER
    if any(shown.fs == "squashfs" and shown.device < 0 for shown in prepared.shown):
        flags |= protocol.PLANFLAG_KERNEL_IMAGE
    return flags
