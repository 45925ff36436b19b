"""The driver for machines that have cgroup2 alone."""

from __future__ import annotations

from apptainer_py.host.cgroups.driver import Manager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_plan import CgroupWish


class V2(Manager):
    """One directory of cgroup2; `top` is where that is mounted."""

    def __init__(
        self, wish: CgroupWish, paths: dict[str, str], *, rootless: bool, top: str
    ) -> None:
        super().__init__(wish, paths, rootless=rootless)
        self.top = top
