"""Which ids a container of an image has: as many as its caller can give (subuid(5))."""

from __future__ import annotations

import os

from apptainer_py.engines.oci import facts
from apptainer_py.host import subid
from apptainer_py.model.oci_plan import IdMap

_Maps = tuple[IdMap, ...]


def maps_for(*, rootless: bool) -> tuple[_Maps, _Maps]:
    """Return the maps of users and groups; none where no user namespace is needed.

    The caller becomes root of the container; with ranges in /etc/subuid and /etc/subgid there are
    others beside it. Root of a user namespace passes on the ids that it has.
    """
    if not rootless:
        return (), ()
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        return _inherited("uid"), _inherited("gid")
    own = (IdMap(inside=0, outside=uid, count=1),), (IdMap(inside=0, outside=gid, count=1),)
    if not all(map(subid.find_program, ("newuidmap", "newgidmap"))):
        return own
    name = _name_of(uid)
    uids = subid.sub_ranges("/etc/subuid", name, uid)
    gids = subid.sub_ranges("/etc/subgid", name, uid)
    if not uids or not gids:
        return own
    return (*own[0], *_numbered(uids)), (*own[1], *_numbered(gids))


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _numbered(ranges: list[tuple[int, int]]) -> _Maps:
    found, inside = [], 1
    for first, count in ranges:
        found.append(IdMap(inside=inside, outside=first, count=count))
        inside += count
    return tuple(found)


def _inherited(kind: str) -> _Maps:
    found = []
    for line in facts.read_file(f"/proc/self/{kind}_map").splitlines():
        inside, _, count = map(int, line.split())
        found.append(IdMap(inside=inside, outside=inside, count=count))
    return tuple(found)
