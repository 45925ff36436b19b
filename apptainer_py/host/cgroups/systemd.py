"""The driver that asks systemd for a scope and leaves it in charge of the groups."""

from __future__ import annotations

from apptainer_py.base.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.host.cgroups.driver import Manager
    from apptainer_py.host.cgroups.tree import Tree
    from apptainer_py.model.oci_plan import CgroupWish


def find_unit(tree: Tree, wish: CgroupWish, *, rootless: bool) -> Manager:
    """Return the driver for a new scope."""
    raise NotSupported(what="the systemd cgroup manager")


def open_unit(
    tree: Tree, wish: CgroupWish, directories: Sequence[str], *, rootless: bool
) -> Manager:
    """Return the driver for a scope that exists."""
    raise NotSupported(what="the systemd cgroup manager")
