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
from apptainer_py.engines.apptainer import extfs, policy
from apptainer_py.image.detect import CannotOpen, open_image
from apptainer_py.model import protocol
from apptainer_py.model.plan import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.binds import Bind
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
    it is served, or -1. `fd` is open for what is done with it, and holds the lock of an ext3 image.
    """

    number: int
    image: OpenImage
    fs: str
    fd: int = -1
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
        if shown.writable and shown.fs == "directory":
            make_upper(shown.image.fd, shown.image.realpath, shown.image.path)


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
    try:
        found = _files(prepared, image, facts, writable=writable)
    except extfs.ExtfsUnusable as error:
        raise OverlayUnusable(
            reason=f"failed to open overlay image {image.path}: {error}"
        ) from None
    if writable and not any(shown.writable for shown in found):
        log.warning(f"Overlay image {image.realpath} is not writable, proceeding with read-only")
    return found


def _files(prepared: Prepared, image: OpenImage, facts: Facts, *, writable: bool) -> list[Shown]:
    if image.kind != "sif":
        place = (image.offset, image.size_bytes - image.offset)
        return [of_file(prepared, image, image.kind, place, facts, writable=writable)]
    found: list[Shown] = []
    for part in _overlay_partitions(image):
        place = (part.offset, part.size_bytes)
        shown = of_file(
            prepared, image, part.fs, place, facts, writable=writable, number=len(found)
        )
        writable = writable and not shown.writable
        found.append(shown)
    return found


def _overlay_partitions(image: OpenImage) -> tuple[Partition, ...]:
    from apptainer_py.image import sif

    try:
        return sif.partitions(image.fd, sif.OVERLAY)
    except ImageError as error:
        reason = f"while getting overlay partitions in {image.realpath}: {error}"
        raise OverlayUnusable(reason=reason) from None


def of_file(  # noqa: PLR0913
    prepared: Prepared,
    image: OpenImage,
    fs: str,
    place: tuple[int, int],
    facts: Facts,
    *,
    writable: bool = False,
    overlay: bool = True,
    number: int = 0,
) -> Shown:
    """Return a file system in a file, at an offset and of a size; `number` are beside it already.

    Raises:
        ExtfsUnusable: an ext3 image is damaged, in use, or cannot be mounted here.
        OverlayUnusable: of a type that nothing here mounts.
    """
    fd, device = image.fd, -1
    if fs == "ext3":
        fd, writable = extfs.prepare(image, place, facts, writable=writable)
        kernel = extfs.kernel_may_mount(facts)
    elif fs == "squashfs":
        kernel = policy.kernel_may_mount(facts)
        writable = False
    else:
        raise OverlayUnusable(
            reason=f"failed to open overlay image {image.path}: {fs} is not supported yet"
        )
    if prepared.inner or not kernel:
        device = prepared.fuse_count
        prepared.fuse_count += 1
    return Shown(
        number=len(prepared.shown) + number, image=image, fs=fs, fd=fd, offset=place[0],
        size_bytes=place[1], writable=writable, overlay=overlay, device=device,
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
        served = shown.device >= 0
        prepared.layer = (
            protocol.LAYERKIND_OVERLAY_SERVED if served else protocol.LAYERKIND_OVERLAY_USER
        )
        if served and not os.path.exists(extfs.OVERLAY_SERVER):
            raise extfs.ServerMissing(path=extfs.OVERLAY_SERVER, package="fuse-overlayfs")
    prepared.shown.append(shown)


def make_upper(fd: int, where: str, given: str, *, by_root: bool = False) -> None:
    """Make the two directories of an overlay that can be written, as the user.

    `by_root`: whoever writes there is root of ids that are more than the user's own.
    """
    for name in ("upper", "work"):
        path = f"{where}/{name}"
        try:
            os.mkdir(name, 0o755, dir_fd=fd)
            # Upper is the container's root: no umask. Its owner may have put a link there since.
            made = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd
            )
            os.fchmod(made, 0o755)
            os.close(made)
        except FileExistsError:
            pass
        except OSError as error:
            reason = f"failed to create {path} directory: {(error.strerror or '').lower()}"
            raise UpperUnusable(reason=reason, path=given) from None
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise UpperUnusable(reason=f"{path} is not a directory", path=given)
        if not by_root and not os.access(name, os.W_OK | os.X_OK, dir_fd=fd):
            raise UpperUnusable(reason=f"{path} is not writable", path=given)


def plan_flags(prepared: Prepared) -> int:
    """Return what the plan has to say about the images; an overlay server's device is its last."""
    flags = 0
    if prepared.layer == protocol.LAYERKIND_OVERLAY_USER:
        flags |= protocol.PLANFLAG_USER_LAYER
    elif prepared.layer == protocol.LAYERKIND_OVERLAY_SERVED:
        flags |= protocol.PLANFLAG_SERVED_LAYER
        prepared.fuse_count += 1
    for shown in prepared.shown:
        if shown.device < 0 and shown.fs == "squashfs":
            flags |= protocol.PLANFLAG_KERNEL_IMAGE
        elif shown.device < 0 and shown.fs == "ext3":
            flags |= protocol.PLANFLAG_KERNEL_EXTFS
    return flags


def own_overlays(prepared: Prepared, action: ActionRequest, facts: Facts) -> None:
    """Lay the overlay partitions of a SIF file over its root; with `-w` one takes what is written.

    Raises:
        LaunchError: nothing in the file can be written, or overlays are forbidden.
    """
    image = prepared.image
    parts = _overlay_partitions(image)
    if action.writable and not any(part.fs == "ext3" for part in parts):
        raise LaunchError(text=f"no SIF writable overlay partition found in {image.path}")
    if parts and facts.configuration["enable overlay"] == "no":
        if action.writable:
            raise policy.NotPermitted(
                text="writable overlay partition requires 'enable overlay', but set to 'no' by "
                "administrator"
            )
        log.warning(
            f"The overlay partition of {image.path} is left out: 'enable overlay' is set to 'no' "
            "by administrator"
        )
        return
    if parts:
        prepared.layer = protocol.LAYERKIND_OVERLAY
        prepared.underlay_allowed = False
    try:
        found = _files(prepared, image, facts, writable=action.writable)
    except extfs.ExtfsUnusable as error:
        raise LaunchError(text=str(error)) from None
    if action.writable and not any(shown.writable for shown in found):
        raise extfs.not_writable(image)
    for shown in found:
        _add(prepared, shown, action)


def image_bind(prepared: Prepared, bind: Bind, facts: Facts) -> Mount:
    """Return the mount of something in an image; an image that is shown already is taken again.

    Raises:
        LaunchError: there is no such image, or nothing in it that can be bound from.
    """
    try:
        image = open_image(bind.source)
    except ImageError as error:
        reason = error.facts["reason"] if isinstance(error, CannotOpen) else error
        raise LaunchError(
            text="while loading data bind images: failed to load data image "
            f"{bind.source}: {reason}"
        ) from None
    policy.check_image(facts, image)
    fs, place = _bound_part(image, bind.image_id)
    shown = _shown_already(prepared, image, place)
    if shown is None:
        shown = of_file(
            prepared, image, fs, place, facts, writable=not bind.read_only, overlay=False
        )
        if not shown.writable and not bind.read_only:
            log.warning(f"Data image {image.realpath} is not writable, proceeding with read-only")
        if shown.number >= protocol.LIMIT_IMAGES:
            raise OverlayUnusable(reason=f"there are more than {protocol.LIMIT_IMAGES} of them")
        prepared.shown.append(shown)
    return Mount(
        kind="bind", source=bind.image_source, target=bind.target, tag="userbinds",
        area=protocol.AREA_IMAGE, options=shown.number, required=True,
        flags=protocol.BINDFLAG_READ_ONLY if bind.read_only else 0,
    )  # fmt: skip


def _shown_already(prepared: Prepared, image: OpenImage, place: tuple[int, int]) -> Shown | None:
    for shown in prepared.shown:
        same = (shown.image.dev, shown.image.ino) == (image.dev, image.ino)
        if same and not shown.overlay and shown.offset == place[0]:
            return shown
    return None


def _bound_part(image: OpenImage, ident: int) -> tuple[str, tuple[int, int]]:
    """Return type and place of the file system that is bound from."""
    if image.kind == "sandbox":
        raise LaunchError(
            text=f"container creation failed: could not use {image.realpath} for image binding: "
            "not supported image format"
        )
    if image.kind != "sif":
        return image.kind, (image.offset, image.size_bytes - image.offset)
    from apptainer_py.image import sif

    try:
        parts = sif.partitions(image.fd, sif.DATA)
        if ident:
            parts = (*parts, *sif.partitions(image.fd, sif.OVERLAY), sif.layout(image.fd).primary)
            parts = tuple(part for part in parts if part.id == ident)
    except ImageError as error:
        raise LaunchError(text=f"container creation failed: {error}") from None
    if not parts:
        raise LaunchError(
            text=f"container creation failed: no data partition found in {image.realpath}"
        )
    return parts[0].fs, (parts[0].offset, parts[0].size_bytes)
