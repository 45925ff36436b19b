"""Who a build is: root itself, or root of a user namespace that belongs to the caller.

With ranges of subordinate ids (/etc/subuid) every id of an image can be given to a file; without,
there is root alone, and programs that insist on others need the `fakeroot` command in the image.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.host import subid, subid_file
from apptainer_py.kernel import _container
from apptainer_py.model.oci_plan import IdMap
from apptainer_py.runtime.fakeroot import Namespaces, needs_setuid
from apptainer_py.runtime.fakeroot import NoNamespace as _Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_NEWNS: Final = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000


class NoNamespace(ApptainerError):
    message = "building as {user} needs a user namespace, which could not be made: {reason}"
    hint = "the administrator allows them (user.max_user_namespaces), or builds as root"


class Identity(Record):
    """The maps are empty for root itself; `owns_all` tells that ids of images can be given away.

    `setuid` tells that the setuid starter makes the namespaces, which the kernel denies the caller.
    """

    uid_maps: tuple[IdMap, ...] = ()
    gid_maps: tuple[IdMap, ...] = ()
    owns_all: bool = True
    setuid: bool = False

    @property
    def is_root(self) -> bool:
        """Whether the build is the host's root."""
        return not self.uid_maps


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def choose(
    *, fakeroot: bool, ignore_subuid: bool, ignore_userns: bool, userns: bool = False
) -> Identity:
    """Return who the build will be; with `userns` nothing of it is setuid.

    Raises:
        ApptainerError: root asked for ranges that it has not, or there is no way at all.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and not fakeroot:
        return Identity()
    name = _name(uid)
    if ignore_userns:
        raise NoNamespace(user=name, reason="--ignore-userns was given")
    setuid = not userns and needs_setuid()
    ranges = None if ignore_subuid else _ranges(name, rights=uid == 0 or setuid)
    if uid == 0 and ranges is None:
        subid_file.check(subid_file.SUBUID, name, uid)
    if ranges is not None:
        own = (IdMap(inside=0, outside=uid, count=1), IdMap(inside=0, outside=gid, count=1))
        maps = (own[0], ranges[0]), (own[1], ranges[1])
        return Identity(uid_maps=maps[0], gid_maps=maps[1], setuid=setuid)
    if fakeroot and not ignore_subuid:
        log.info("User not listed in /etc/subuid, trying root-mapped namespace")
    return Identity(
        uid_maps=(IdMap(inside=0, outside=uid, count=1),),
        gid_maps=(IdMap(inside=0, outside=gid, count=1),),
        owns_all=False,
        setuid=setuid,
    )


def _ranges(name: str, *, rights: bool) -> tuple[IdMap, IdMap] | None:
    found = []
    for path, tool in ((subid_file.SUBUID, "newuidmap"), (subid_file.SUBGID, "newgidmap")):
        entry = subid_file.find(subid_file.read(path), name, os.geteuid())
        if entry is None or entry.disabled or entry.count < subid_file.WANTED:
            return None
        if not rights and subid.find_program(tool) is None:
            return None
        found.append(IdMap(inside=1, outside=entry.first, count=entry.count))
    return found[0], found[1]


def namespaces(identity: Identity) -> Namespaces:
    """Return new namespaces in which the build is root.

    Raises:
        NoNamespace: they are not to be had.
    """
    try:
        return Namespaces(ranges=identity.owns_all, setuid=identity.setuid)
    except _Refused as error:
        raise NoNamespace(user=_name(os.geteuid()), reason=error.facts["reason"]) from None


def hide_mounts() -> None:
    """Have root's own build mount what nobody else sees, and what goes with its last process."""
    try:
        _container.unshare(_NEWNS)
        _container.mount(b"none", b"/", b"", _MS_REC | _MS_SLAVE)
    except OSError:
        log.debug("no mount namespace of its own; trees are copied")
