"""A mount of type cgroup in a container, as rows: what it shows is the container's own groups."""

from __future__ import annotations

from apptainer_py.host.cgroups.tree import find_tree
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.host.cgroups.tree import Hierarchy

_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_SAFE = _NOSUID | _NODEV | _NOEXEC
_RECURSIVE = 1


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def rows_for(
    paths: dict[str, str], target: str, options: Sequence[str], *, private_namespace: bool
) -> list[Row]:
    """Return the rows for cgroup hierarchies at `target`.

    `paths` are the container's directories; for those it lacks, the caller's own are shown.
    """
    tree = find_tree()
    says = f'error mounting "cgroup" to rootfs at "{target}": {{error}}'
    read_only = _RDONLY if "ro" in options else 0
    if tree.unified_only:
        (one,) = tree.hierarchies
        # /proc/PID/cgroup names paths from the root of the cgroup namespace, and so must the mount.
        return _unified_rows(None if private_namespace else one.target, target, read_only, says)
    rows = [
        Row(op=protocol.OP_FS, first=b"tmpfs", second=b"tmpfs", says=says),
        Row(op=protocol.OP_FSOPT, first=b"mode", second=b"755", says=says),
        Row(op=protocol.OP_ATTR, numbers=(_SAFE, 0, 0), says=says),
        Row(op=protocol.OP_PLACE, first=_bytes(target), says=says),
    ]
    links: list[Row] = []
    for one in tree.hierarchies:
        if one.controllers == ("",):
            continue
        name = one.target.rpartition("/")[2]
        place = _bytes(f"{target}/{name}")
        rows += _hierarchy_rows(one, paths, private_namespace=private_namespace, says=says)
        rows.append(Row(op=protocol.OP_ATTR, numbers=(_SAFE | read_only, 0, 0), says=says))
        rows.append(Row(op=protocol.OP_PLACE, first=place, says=says))
        if "," in name:
            links += [
                Row(
                    op=protocol.OP_LINK,
                    first=_bytes(name),
                    second=_bytes(f"{target}/{word}"),
                    says=says,
                )
                for word in name.split(",")
            ]
    rows += links
    if read_only:
        rows.append(
            Row(
                op=protocol.OP_REMOUNT,
                first=_bytes(target),
                numbers=(_SAFE | _RDONLY, 0),
                says=says,
            )
        )
    return rows


def bind_places(paths: dict[str, str], target: str) -> list[tuple[str, str]]:
    """Return (place, directory) of what is bound for each hierarchy of v1 at `target`."""
    tree = find_tree()
    if tree.unified_only:
        return []
    return [
        (f"{target}/{one.target.rpartition('/')[2]}", _shown_directory(one, paths))
        for one in tree.hierarchies
        if one.controllers != ("",)
    ]


def _shown_directory(one: Hierarchy, paths: dict[str, str]) -> str:
    return paths.get(one.controllers[0]) or one.own_directory()


def _hierarchy_rows(
    one: Hierarchy, paths: dict[str, str], *, private_namespace: bool, says: str
) -> list[Row]:
    if not private_namespace:
        shown = _bytes(_shown_directory(one, paths))
        return [Row(op=protocol.OP_TREE, flags=_RECURSIVE, first=shown, says=says)]
    named = one.controllers[0].startswith("name=")
    source = b"systemd" if named else b"cgroup"
    rows = [Row(op=protocol.OP_FS, first=b"cgroup", second=source, says=says)]
    for word in one.controllers:
        if word.startswith("name="):
            rows.append(Row(op=protocol.OP_FSOPT, first=b"none", says=says))
            value = _bytes(word.removeprefix("name="))
            rows.append(Row(op=protocol.OP_FSOPT, first=b"name", second=value, says=says))
        else:
            rows.append(Row(op=protocol.OP_FSOPT, first=_bytes(word), says=says))
    return rows


def _unified_rows(shown: str | None, target: str, read_only: int, says: str) -> list[Row]:
    if shown is None:
        first = Row(op=protocol.OP_FS, first=b"cgroup2", second=b"cgroup", says=says)
    else:
        first = Row(op=protocol.OP_TREE, flags=_RECURSIVE, first=_bytes(shown), says=says)
    return [
        first,
        Row(op=protocol.OP_ATTR, numbers=(_SAFE | read_only, 0, 0), says=says),
        Row(op=protocol.OP_PLACE, first=_bytes(target), says=says),
    ]
