"""The driver for cgroup v1, and for hybrid machines, where cgroup2 is there but holds no limits."""

from __future__ import annotations

import errno
import os

from apptainer_py.host.cgroups.devices import read_rules, wanted_rules
from apptainer_py.host.cgroups.driver import (
    CgroupError,
    Directories,
    group_row,
    processes_below,
    read_file,
    read_maybe,
    write_file,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.oci_plan import Row

# runc's order, which decides what is set, and what has been set, when one of them fails.
_ORDER = (
    "cpuset",
    "devices",
    "memory",
    "cpu",
    "pids",
    "blkio",
    "hugetlb",
    "net_cls",
    "net_prio",
    "rdma",
)
_FREEZE_TRIES = 1000
_POLLIN = 1
NO_UNIFIED = "invalid configuration: cannot use unified on cgroup v1"


class V1(Directories):
    """A directory in each hierarchy; `paths` has cgroup2's, where there is one, under ""."""

    def check_unused(self) -> None:
        """Refuse a group that others are in.

        Raises:
            CgroupError: it has processes or is frozen, or cannot do what is wanted at all.
        """
        if self.wish.resources and self.wish.resources.get("unified"):
            raise CgroupError(text=NO_UNIFIED)
        if "devices" not in self.paths and not self.rootless:
            raise CgroupError(text="cgroup: subsystem does not exist: devices")
        self._check_thawed()
        path = self.paths.get("devices")
        if path is not None and os.path.isdir(path):
            self._check_empty(path)

    def _make_all(self, resources: dict[str, Any]) -> None:
        for controller, path in list(self.paths.items()):
            try:
                self._create_one(controller, path, resources)
            except CgroupError as error:
                if not self._forgivable(error):
                    raise
                del self.paths[controller]

    def _create_one(self, controller: str, path: str, resources: dict[str, Any]) -> None:
        if controller == "cpuset":
            self._make_cpuset(path, resources.get("cpu") or {})
            return
        self._make(path)
        if controller == "cpu":
            # A process of a real-time class may not join a group without a share of that time.
            set_realtime(path, resources.get("cpu") or {})

    def _make_cpuset(self, path: str, cpu: dict[str, Any]) -> None:
        new = []
        one = path
        # A group without processors or memory takes no process, nor a group below it any.
        while not os.path.isdir(one):
            new.append(one)
            one = one.rpartition("/")[0]
        for inner in reversed(new):
            self._make(inner)
            if inner != path:
                inherit_cpuset(inner)
        set_cpuset(path, cpu)
        inherit_cpuset(path)
        # Only the container's own is ours to remove again.
        self.made = [made for made in self.made if made not in new or made == path]

    def join_rows(self) -> list[Row]:
        """Return a row a hierarchy; `tasks` moves one thread and needs no lock of all others."""
        paths = dict.fromkeys(path for name, path in self.paths.items() if name)
        return [group_row(path, "tasks") for path in paths]

    def enter_fd(self) -> int:
        """Return the cgroup2 directory of a hybrid machine, which init is cloned into."""
        path = self.paths.get("")
        return -1 if path is None else os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def apply(self, resources: dict[str, Any], *, devices: bool = True) -> None:
        """Set the limits, one controller after the other."""
        if resources.get("unified"):
            raise CgroupError(text=NO_UNIFIED)
        for controller in _ORDER:
            if controller == "devices" and not devices:
                continue
            path = self.paths.get(controller)
            if path is None:
                self._check_unset(controller, resources)
                continue
            try:
                _SETTERS[controller](path, resources)
            except CgroupError:
                # A user namespace has no say over devices; its own mounts are nodev anyway.
                if controller == "devices" and self.rootless:
                    continue
                raise

    def _check_unset(self, controller: str, resources: dict[str, Any]) -> None:
        if controller == "devices" or not _asks_for(controller, resources):
            return
        text = f"cannot set {controller} limit: container could not join or create cgroup"
        raise CgroupError(text=text)

    def pids(self) -> list[int]:
        """Return the processes in the devices hierarchy, or in the first that there is."""
        path = self.paths.get("devices") or next(iter(self.paths.values()), None)
        return [] if path is None else processes_below(path)

    def stats(self) -> dict[str, Any]:
        """Return what `events --stats` prints as `data`."""
        from apptainer_py.host.cgroups.stats_v1 import collect

        return collect(self.paths)

    def freeze(self, on: bool) -> None:  # noqa: FBT001
        """Freeze, with patience: new processes may appear while the kernel is at it."""
        path = self.paths.get("freezer")
        if path is None:
            super().freeze(on)
            return
        if not on:
            write_file(path, "freezer.state", "THAWED")
            return
        try:
            _freeze(path)
        except CgroupError:
            # Half frozen is worse than running.
            write_file(path, "freezer.state", "THAWED")
            raise

    def frozen(self) -> bool:
        """Return whether this very group is frozen, not one above it."""
        path = self.paths.get("freezer")
        if path is None:
            return False
        state = (read_maybe(path, "freezer.state") or "").strip()
        if state not in ("FROZEN", "FREEZING"):
            return False
        return (read_maybe(path, "freezer.self_freezing") or "1").strip() == "1"

    def freezer_file(self) -> str:
        """Return the path of freezer.state."""
        path = self.paths.get("freezer")
        return "" if path is None else f"{path}/freezer.state"

    def oom_watch(self) -> tuple[int, int]:
        """Return an eventfd that the kernel adds to; closing it ends the watch."""
        path = self.paths.get("memory")
        if path is None:
            return super().oom_watch()
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            control = os.open(f"{path}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                write_file(path, "cgroup.event_control", f"{event} {control}")
            finally:
                os.close(control)
        except BaseException:
            os.close(event)
            raise
        return event, _POLLIN

    def oom_kills(self) -> int:
        """Return the counter of memory.oom_control."""
        path = self.paths.get("memory")
        text = None if path is None else read_maybe(path, "memory.oom_control")
        for line in (text or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0


def _freeze(path: str) -> None:
    import time

    for attempt in range(1, _FREEZE_TRIES):
        if attempt % 50 == 0:
            write_file(path, "freezer.state", "THAWED")
            time.sleep(0.01)
        write_file(path, "freezer.state", "FROZEN")
        state = read_file(path, "freezer.state").strip()
        if state == "FROZEN":
            return
        if state != "FREEZING":
            raise CgroupError(text=f"unexpected state {state} while freezing")
    raise CgroupError(text="unable to freeze")


def inherit_cpuset(path: str) -> None:
    """Give a group the processors and memory nodes of the one above, where it has none."""
    above = path.rpartition("/")[0]
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not read_file(path, name).strip():
            write_file(path, name, read_file(above, name).strip())


def set_cpuset(path: str, cpu: dict[str, Any]) -> None:
    """Set the processors and memory nodes that are asked for."""
    for key, name in (("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")):
        if cpu.get(key):
            write_file(path, name, cpu[key])


def _cpuset(path: str, resources: dict[str, Any]) -> None:
    set_cpuset(path, resources.get("cpu") or {})


def _devices(path: str, resources: dict[str, Any]) -> None:
    target = wanted_rules(resources.get("devices") or ())
    current = read_rules(read_file(path, "devices.list"))
    for allow, line in current.transition(target):
        write_file(path, "devices.allow" if allow else "devices.deny", line)
    after = read_rules(read_file(path, "devices.list"))
    if not target.default_allow and after != target:
        raise CgroupError(text="resulting devices cgroup doesn't precisely match target")
    if after.default_allow != target.default_allow:
        raise CgroupError(text="resulting devices cgroup doesn't match target mode")


def _set_memory_limit(path: str, limit: int) -> None:
    if not limit:
        return
    try:
        write_file(path, "memory.limit_in_bytes", str(limit))
    except CgroupError as error:
        if error.facts.get("errno") != errno.EBUSY:
            raise
        usage = read_file(path, "memory.usage_in_bytes").strip()
        peak = read_file(path, "memory.max_usage_in_bytes").strip()
        text = f"unable to set memory limit to {limit} (current usage: {usage}, peak usage: {peak})"
        raise CgroupError(text=text) from None


def _set_swap_limit(path: str, limit: int) -> None:
    if limit:
        write_file(path, "memory.memsw.limit_in_bytes", str(limit))


def _memory(path: str, resources: dict[str, Any]) -> None:
    memory = resources.get("memory") or {}
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    if limit == -1 and swap == 0 and os.path.exists(f"{path}/memory.memsw.limit_in_bytes"):
        swap = -1
    swap_first = False
    if limit and swap:
        # Memory may never be more than memory with swap, not even between the two writes.
        swap_first = swap == -1 or int(read_file(path, "memory.limit_in_bytes")) < swap
    if swap_first:
        _set_swap_limit(path, swap)
    _set_memory_limit(path, limit)
    if not swap_first:
        _set_swap_limit(path, swap)
    if memory.get("reservation"):
        write_file(path, "memory.soft_limit_in_bytes", str(memory["reservation"]))
    if memory.get("disableOOMKiller"):
        write_file(path, "memory.oom_control", "1")
    swappiness = memory.get("swappiness")
    if swappiness is None or swappiness in (-1, (1 << 64) - 1):
        return
    if not 0 <= swappiness <= 100:
        text = f"invalid memory swappiness value: {swappiness} (valid range is 0-100)"
        raise CgroupError(text=text)
    write_file(path, "memory.swappiness", str(swappiness))


def _later(path: str, name: str, value: str) -> bool:
    """Write a value that may depend on one still to be written; return whether it has to wait."""
    try:
        write_file(path, name, value)
    except CgroupError as error:
        if error.facts.get("errno") != errno.EINVAL:
            raise
        return True
    return False


def set_realtime(path: str, cpu: dict[str, Any]) -> None:
    """Set period and share of real-time processes, in the order that the kernel accepts."""
    period, runtime = cpu.get("realtimePeriod") or 0, cpu.get("realtimeRuntime") or 0
    again = False
    if period:
        if runtime:
            again = _later(path, "cpu.rt_period_us", str(period))
        else:
            write_file(path, "cpu.rt_period_us", str(period))
    if runtime:
        write_file(path, "cpu.rt_runtime_us", str(runtime))
    if again:
        write_file(path, "cpu.rt_period_us", str(period))


def _set_shares(path: str, shares: int) -> None:
    write_file(path, "cpu.shares", str(shares))
    # The kernel takes any number, and makes it fit.
    kept = int(read_file(path, "cpu.shares"))
    if shares > kept:
        raise CgroupError(text=f"the maximum allowed cpu-shares is {kept}")
    if shares < kept:
        raise CgroupError(text=f"the minimum allowed cpu-shares is {kept}")


def _set_burst(path: str, burst: int) -> bool:
    try:
        return _later(path, "cpu.cfs_burst_us", str(burst))
    except CgroupError as error:
        # Older kernels have no such file, and runc goes on.
        if error.facts.get("errno") == errno.ENOENT:
            return False
        raise


def _cpu(path: str, resources: dict[str, Any]) -> None:
    cpu = resources.get("cpu") or {}
    if cpu.get("shares"):
        _set_shares(path, cpu["shares"])
    period, quota, burst = cpu.get("period") or 0, cpu.get("quota") or 0, cpu.get("burst")
    period_again = bool(period) and _later(path, "cpu.cfs_period_us", str(period))
    burst_again = burst is not None and _set_burst(path, burst)
    if quota:
        write_file(path, "cpu.cfs_quota_us", str(quota))
        if period_again:
            write_file(path, "cpu.cfs_period_us", str(period))
        if burst_again:
            write_file(path, "cpu.cfs_burst_us", str(burst))
    elif period_again:
        write_file(path, "cpu.cfs_period_us", str(period))
    if cpu.get("idle") is not None:
        write_file(path, "cpu.idle", str(cpu["idle"]))
    set_realtime(path, cpu)


def _pids(path: str, resources: dict[str, Any]) -> None:
    limit = (resources.get("pids") or {}).get("limit")
    if limit is not None:
        write_file(path, "pids.max", str(limit) if limit > 0 else "max")


THROTTLES = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device"),
)


def _blkio(path: str, resources: dict[str, Any]) -> None:
    block = resources.get("blockIO") or {}
    weight = "blkio.weight"
    # Which scheduler's file it is depends on the kernel; the first is named where both lack.
    if not os.path.exists(f"{path}/{weight}") and os.path.exists(f"{path}/blkio.bfq.weight"):
        weight = "blkio.bfq.weight"
    if block.get("weight"):
        write_file(path, weight, str(block["weight"]))
    if block.get("leafWeight"):
        write_file(path, "blkio.leaf_weight", str(block["leafWeight"]))
    for one in block.get("weightDevice") or ():
        device = f"{one['major']}:{one['minor']}"
        if one.get("weight"):
            write_file(path, f"{weight}_device", f"{device} {one['weight']}")
        if one.get("leafWeight"):
            write_file(path, "blkio.leaf_weight_device", f"{device} {one['leafWeight']}")
    for key, name in THROTTLES:
        for one in block.get(key) or ():
            write_file(path, name, f"{one['major']}:{one['minor']} {one['rate']}")


def _hugetlb(path: str, resources: dict[str, Any]) -> None:
    for one in resources.get("hugepageLimits") or ():
        prefix, limit = f"hugetlb.{one['pageSize']}", str(one["limit"])
        write_file(path, f"{prefix}.limit_in_bytes", limit)
        if os.path.exists(f"{path}/{prefix}.rsvd.limit_in_bytes"):
            write_file(path, f"{prefix}.rsvd.limit_in_bytes", limit)


def _net_cls(path: str, resources: dict[str, Any]) -> None:
    number = (resources.get("network") or {}).get("classID")
    if number:
        write_file(path, "net_cls.classid", str(number))


def _net_prio(path: str, resources: dict[str, Any]) -> None:
    for one in (resources.get("network") or {}).get("priorities") or ():
        write_file(path, "net_prio.ifpriomap", f"{one['name']} {one['priority']}")


def rdma_lines(resources: dict[str, Any]) -> list[str]:
    """Return the lines for rdma.max."""
    lines = []
    for device, limits in (resources.get("rdma") or {}).items():
        words = [device]
        if limits.get("hcaHandles") is not None:
            words.append(f"hca_handle={limits['hcaHandles']}")
        if limits.get("hcaObjects") is not None:
            words.append(f"hca_object={limits['hcaObjects']}")
        lines.append(" ".join(words))
    return lines


def _rdma(path: str, resources: dict[str, Any]) -> None:
    for line in rdma_lines(resources):
        write_file(path, "rdma.max", line)


_SETTERS = {
    "cpuset": _cpuset,
    "devices": _devices,
    "memory": _memory,
    "cpu": _cpu,
    "pids": _pids,
    "blkio": _blkio,
    "hugetlb": _hugetlb,
    "net_cls": _net_cls,
    "net_prio": _net_prio,
    "rdma": _rdma,
}
_KEYS: dict[str, tuple[str, ...]] = {
    "cpuset": ("cpus", "mems"),
    "cpu": ("shares", "quota", "period", "burst", "idle", "realtimePeriod", "realtimeRuntime"),
    "memory": ("limit", "swap", "reservation", "swappiness", "disableOOMKiller"),
    "net_cls": ("classID",),
    "net_prio": ("priorities",),
}
_OBJECTS = {
    "cpuset": "cpu",
    "net_cls": "network",
    "net_prio": "network",
    "blkio": "blockIO",
    "hugetlb": "hugepageLimits",
}


def _asks_for(controller: str, resources: dict[str, Any]) -> bool:
    """Return whether anything is asked of a controller."""
    wanted = resources.get(_OBJECTS.get(controller, controller)) or {}
    if controller == "pids":
        return wanted.get("limit") is not None
    keys = _KEYS.get(controller)
    return bool(wanted) if keys is None else any(wanted.get(key) for key in keys)
