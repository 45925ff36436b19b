"""The control groups of a container that exists, by what its record says of them."""

from __future__ import annotations

from apptainer_py.engines.oci.facts import USER_BUS
from apptainer_py.host.cgroups import open_manager
from apptainer_py.model.oci_plan import CgroupWish
from apptainer_py.model.record_frame import FLAG_ROOTLESS, FLAG_SYSTEMD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.record_frame import RecordData


def groups_of(
    record: RecordData,
    environment: Mapping[str, str],
    path: str = "",
    resources: dict[str, Any] | None = None,
) -> Manager:
    """Return what made them, ready to change or remove them.

    `path` and `resources` are what the container was made with, for who changes limits.
    """
    wish = CgroupWish(path=path, resources=resources or {})
    kind = "cgroupfs"
    if not record.cgroups:
        kind = "disabled"
    elif record.flags & FLAG_SYSTEMD:
        kind = "systemd"
    return open_manager(
        kind,
        wish,
        record.cgroups,
        rootless=bool(record.flags & FLAG_ROOTLESS),
        bus=environment.get(USER_BUS, ""),
    )
