"""The administrator's directives as far as Python judges them; C judges again what it can."""

from __future__ import annotations

import os

from apptainer_py.base.build import SYSCONFDIR
from apptainer_py.base.errors import LaunchError, NotSupported
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from apptainer_py.image.detect import OpenImage
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

    class Caller(Protocol):
        """What a judgement of an image depends on, beside the image."""

        flow: int
        configuration: Mapping[str, object]


class NotPermitted(LaunchError):
    """The administrator's file forbids what was asked for; the audit record calls it refused."""


class Disallowed(NotPermitted):
    """The configuration forbids images of this kind."""

    message = "configuration disallows users from running {kind}"


class ImageNotPermitted(NotPermitted):
    """A `limit container` directive leaves this image out."""

    message = "{reason}"


# File systems whose image is `allow container encrypted`'s.
ENCRYPTED = ("gocryptfs", "encrypted-squashfs")
ECL_FILE = f"{SYSCONFDIR}/ecl.toml"
_KINDS = {
    "sif": ("allow container sif", "unencrypted SIF containers"),
    "squashfs": ("allow container squashfs", "squashFS containers"),
    "ext3": ("allow container extfs", "extFS containers"),
    "sandbox": ("allow container dir", "sandbox containers"),
}
# Directives that, at these values, ask for something on each launch that is not built.
_REFUSING = (
    ("allow monitoring", True, "", "`allow monitoring = yes`"),
    ("enable overlay", "driver", "", "`enable overlay = driver`"),
)


def check_directives(configuration: Mapping[str, object], action: ActionRequest) -> None:
    """Refuse a launch that needs what a directive asks for and we have not.

    Raises:
        NotSupported: names the directive.
    """
    for key, value, way_out, shown in _REFUSING:
        if configuration[key] == value and not (way_out and getattr(action, way_out)):
            raise NotSupported(what=f"{shown} in the configuration")


def check_image(facts: Facts, image: OpenImage) -> None:
    """Refuse an image that the administrator has not allowed.

    Raises:
        Disallowed: this kind of image.
        ImageNotPermitted: its owner, group or path.
        NotSupported: image files are to be mounted by a driver that we have not.
    """
    key, words = _KINDS[image.kind]
    if not facts.configuration[key] and not _is_encrypted(image):
        raise Disallowed(kind=words)
    if facts.configuration["image driver"] and image.kind != "sandbox":
        raise NotSupported(what="`image driver` in the configuration")
    check_limits(facts, image)


def check_limits(facts: Caller, image: OpenImage) -> None:
    """Refuse an image by its owner, group, path or signers, of whatever kind it is.

    Raises:
        ImageNotPermitted: its owner, group or path.
        NotPermitted: the execution control list.
    """
    owners = _list(facts, "limit container owners")
    groups = _list(facts, "limit container groups")
    paths = _list(facts, "limit container paths")
    if owners and not _has_id(owners, image.uid, users=True):
        raise ImageNotPermitted(reason="apptainer image is not owned by required user(s)")
    if groups and not _has_id(groups, image.gid, users=False):
        raise ImageNotPermitted(reason="apptainer image is not owned by required group(s)")
    if paths and not any(_below(image.realpath, path) for path in paths):
        raise ImageNotPermitted(reason="apptainer image is not in an allowed configured path")
    check_signers(facts, image)


def check_signers(facts: Caller, image: OpenImage) -> None:
    """Refuse an image that the execution control list leaves out, where there is one.

    Raises:
        NotPermitted: no rule lets it start.
        ConfigError: the list cannot be followed.
    """
    if has_ecl():
        from apptainer_py.engines.apptainer import ecl

        ecl.check(facts, image)


def _is_encrypted(image: OpenImage) -> bool:
    """Return whether it is for `allow container encrypted` to say."""
    if image.kind != "sif":
        return False
    from apptainer_py.image import sif

    try:
        return sif.primary_partition(image.fd).fs in ENCRYPTED
    except sif.SifError:
        return False


def judges_images(facts: Facts) -> bool:
    """Return whether single images are judged, not their kinds alone."""
    return images_are_limited(facts) or has_ecl()


def has_ecl() -> bool:
    """Return whether there is an execution control list, or what stands in its place."""
    try:
        os.lstat(ECL_FILE)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # whoever reads it says why it cannot be read
    return True


def _list(facts: Caller, key: str) -> tuple[str, ...]:
    value = facts.configuration[key]
    return value if isinstance(value, tuple) else ()


def _has_id(names: tuple[str, ...], number: int, *, users: bool) -> bool:
    import grp
    import pwd

    for name in names:
        try:
            found = (
                int(name)
                if name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
                else pwd.getpwnam(name).pw_uid
                if users
                else grp.getgrnam(name).gr_gid
            )
        except KeyError:
            continue
        if found == number:
            return True
    return False


def _below(path: str, directory: str) -> bool:
    """Compare by components: /data/safe does not permit /data/safe-but-unsafe."""
    if not os.path.isabs(directory):
        return False
    # Apptainer resolves a configured path, and refuses the launch when it leads nowhere.
    try:
        directory = os.path.realpath(directory, strict=True)
    except OSError as error:
        why = (error.strerror or "not a path").lower()
        reason = f"failed to resolve path {directory}: lstat {error.filename}: {why}"
        raise ImageNotPermitted(reason=reason) from None
    return directory == "/" or path == directory or path.startswith(directory + "/")


def images_are_limited(facts: Facts) -> bool:
    """Return whether any `limit container` directive is in force."""
    return any(_list(facts, f"limit container {what}") for what in ("owners", "groups", "paths"))


def kernel_may_mount(facts: Facts) -> bool:
    """Return whether the kernel's squashfs driver mounts the image, not an image server.

    Raises:
        NotSupported: loop devices are to be shared.
    """
    if facts.flow == protocol.FLOW_USERNS:
        return False
    if facts.flow == protocol.FLOW_ROOT:
        found = os.path.exists("/dev/loop-control")
    else:
        allowed = facts.configuration["allow setuid-mount squashfs"]
        found = allowed == "yes" or (allowed == "iflimited" and images_are_limited(facts))
    if found and facts.configuration["shared loop devices"]:
        raise NotSupported(what="`shared loop devices = yes` in the configuration")
    return found
