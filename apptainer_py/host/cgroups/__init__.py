"""Control groups of containers: one interface, three drivers (cgroup v1 and hybrid, v2, none)."""

from __future__ import annotations

# Its modules import this package; it can import them only when it is there (frozen bundles).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.host.cgroups.driver import Manager as Manager
    from apptainer_py.host.cgroups.tree import Tree
    from apptainer_py.model.oci_plan import CgroupWish


def find_manager(kind: str, wish: CgroupWish, *, rootless: bool, bus: str = "") -> Manager:
    """Return the driver for a new container; `kind` is cgroupfs, systemd or disabled.

    For cgroupfs, `wish.path` is cgroupsPath or, without one, the container's name: a relative path
    lies below the caller's own groups. For systemd, `wish` names slice, prefix and name of a unit,
    and `bus` may be the address of the user's own bus.

    Raises:
        CgroupError: this machine has no control groups, or no systemd.
    """
    if kind == "disabled":
        return _disabled(wish, rootless=rootless)
    from apptainer_py.host.cgroups.tree import find_tree

    tree = find_tree()
    if kind == "systemd":
        from apptainer_py.host.cgroups.systemd import find_unit

        return find_unit(tree, wish, rootless=rootless, bus=bus)
    return _driver(tree, wish, None, rootless=rootless)


def open_manager(
    kind: str,
    wish: CgroupWish,
    directories: Sequence[str],
    *,
    rootless: bool = False,
    bus: str = "",
) -> Manager:
    """Return the driver of a container that exists, by the directories that its record names."""
    if kind == "disabled" or not directories:
        return _disabled(wish, rootless=rootless)
    from apptainer_py.host.cgroups.tree import find_tree

    tree = find_tree()
    if kind == "systemd":
        from apptainer_py.host.cgroups.systemd import open_unit

        return open_unit(tree, wish, directories, rootless=rootless, bus=bus)
    return _driver(tree, wish, directories, rootless=rootless)


def _disabled(wish: CgroupWish, *, rootless: bool) -> Manager:
    from apptainer_py.host.cgroups.driver import Disabled

    return Disabled(wish, {}, rootless=rootless)


def _driver(
    tree: Tree, wish: CgroupWish, directories: Sequence[str] | None, *, rootless: bool
) -> Manager:
    if tree.unified_only:
        from apptainer_py.host.cgroups.v2 import V2

        paths = tree.new_paths(wish.path) if directories is None else tree.known_paths(directories)
        return V2(wish, paths, rootless=rootless, top=tree.unified)
    from apptainer_py.host.cgroups.v1 import V1

    paths = tree.new_paths(wish.path) if directories is None else tree.known_paths(directories)
    return V1(wish, paths, rootless=rootless)
