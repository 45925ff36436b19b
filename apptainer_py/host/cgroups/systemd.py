"""The driver that asks systemd for a scope, and sets in its groups what systemd cannot."""

from __future__ import annotations

import os

from apptainer_py.host.cgroups.driver import CgroupError, Manager
from apptainer_py.host.cgroups.tree import clean_path
from apptainer_py.host.dbus import SYSTEM_BUS, DbusError, Systemd, user_bus
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from apptainer_py.host.cgroups.tree import Tree
    from apptainer_py.host.cgroups.v1 import V1
    from apptainer_py.host.cgroups.v2 import V2
    from apptainer_py.host.dbus import Property
    from apptainer_py.model.oci_plan import CgroupWish, Row

_RUNNING = "/run/systemd/system"
_PERIOD_DEFAULT_US = 100_000
_INFINITY = (1 << 64) - 1
# The first versions that know CPUQuotaPeriodUSec, and AllowedCPUs with AllowedMemoryNodes.
_VERSION_PERIOD, _VERSION_CPUSET = 242, 244


def unit_name(wish: CgroupWish) -> str:
    """Return the unit for `slice:prefix:name`."""
    if wish.path.endswith(".slice"):
        return wish.path
    return f"{wish.scope_prefix}-{wish.path}.scope" if wish.scope_prefix else f"{wish.path}.scope"


def expand_slice(name: str) -> str:
    """Return a slice's path: test-a.slice is /test.slice/test-a.slice (systemd.slice(5)).

    Raises:
        CgroupError: it is no slice's name.
    """
    stem = name.removesuffix(".slice")
    if stem == name or not stem or "/" in name:
        raise CgroupError(text=f"invalid slice name: {name}")
    if stem == "-":
        return ""
    path = prefix = ""
    for part in stem.split("-"):
        if not part:
            raise CgroupError(text=f"invalid slice name: {name}")
        path += f"/{prefix}{part}.slice"
        prefix += f"{part}-"
    return path


def _parent(wish: CgroupWish, *, rootless: bool) -> str:
    return wish.slice_parent or ("user.slice" if rootless else "system.slice")


def _quota(cpu: dict[str, Any], version: int) -> list[Property]:
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 0
    found: list[Property] = []
    if period and version >= _VERSION_PERIOD:
        found.append(("CPUQuotaPeriodUSec", ("t", period)))
    if quota or period:
        per_second = _INFINITY
        if quota > 0:
            # systemd counts in whole percents; rounding down would break limits of groups below.
            per_second = quota * 1_000_000 // (period or _PERIOD_DEFAULT_US)
            per_second = (per_second + 9_999) // 10_000 * 10_000
        found.append(("CPUQuotaPerSecUSec", ("t", per_second)))
    return found


def bit_array(text: str) -> bytes:
    """Return a list such as 0-3,8 as systemd's array of bits, the lowest byte first."""
    from apptainer_py.host.cgroups.stats_v1 import read_list

    mask = sum(1 << number for number in set(read_list(text)))
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _cpuset(cpu: dict[str, Any], version: int) -> list[Property]:
    if version < _VERSION_CPUSET:
        return []
    words = (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes"))
    return [(name, ("ay", bit_array(cpu[key]))) for key, name in words if cpu.get(key)]


def _tasks(resources: dict[str, Any]) -> list[Property]:
    limit = (resources.get("pids") or {}).get("limit") or 0
    if not limit:
        return []
    return [("TasksMax", ("t", limit if limit > 0 else _INFINITY))]


def _devices(resources: dict[str, Any]) -> list[Property]:
    from apptainer_py.host.cgroups.devices import wanted_rules

    rules = wanted_rules(resources.get("devices") or ())
    if rules.default_allow:
        # systemd knows no list of exceptions from everything; ours holds until it does its work.
        policy = "strict" if rules.exceptions else "auto"
        return [("DevicePolicy", ("s", policy)), ("DeviceAllow", ("a(ss)", []))]
    allowed = []
    for (kind, major, minor), access in rules.exceptions.items():
        path = _device_path(kind, major, minor)
        if path:
            allowed.append((path, access))
    return [
        ("DevicePolicy", ("s", "strict")),
        # An empty list takes away what an earlier one has allowed.
        ("DeviceAllow", ("a(ss)", [])),
        ("DeviceAllow", ("a(ss)", allowed)),
    ]


def _device_path(kind: str, major: int, minor: int) -> str:
    """Return how systemd names devices (systemd.resource-control(5)), "" where it cannot."""
    word = {"b": "block", "c": "char"}[kind]
    if major == -1:
        return f"{word}-*" if minor == -1 else ""
    if minor == -1:
        group = _device_group(kind, major)
        return f"{word}-{group}" if group else ""
    path = f"/dev/{word}/{major}:{minor}"
    return path if os.path.exists(path) else ""


def _device_group(kind: str, major: int) -> str:
    from apptainer_py.host.cgroups.driver import read_file

    section = ""
    for line in read_file("/proc", "devices").splitlines():
        if line.endswith("devices:"):
            section = line[:1].lower()
            continue
        number, _, name = line.strip().partition(" ")
        if section == kind and number == str(major):
            return name
    return ""


def v1_properties(resources: dict[str, Any], version: int) -> list[Property]:
    """Return the properties of a unit on cgroup v1."""
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    block = resources.get("blockIO") or {}
    found = _devices(resources)
    if memory.get("limit"):
        found.append(("MemoryLimit", ("t", memory["limit"] & _INFINITY)))
    if cpu.get("shares"):
        found.append(("CPUShares", ("t", cpu["shares"])))
    found += _quota(cpu, version)
    if block.get("weight"):
        found.append(("BlockIOWeight", ("t", block["weight"])))
    return [*found, *_tasks(resources), *_cpuset(cpu, version)]


def v2_properties(resources: dict[str, Any], version: int) -> list[Property]:
    """Return the properties of a unit on cgroup2."""
    from apptainer_py.host.cgroups.values import cpu_weight, swap_limit

    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    found = _devices(resources)
    limit = memory.get("limit") or 0
    if limit:
        found.append(("MemoryMax", ("t", limit & _INFINITY)))
    if memory.get("reservation"):
        found.append(("MemoryLow", ("t", memory["reservation"] & _INFINITY)))
    swap = swap_limit(limit, memory.get("swap") or 0)
    if swap:
        found.append(("MemorySwapMax", ("t", swap & _INFINITY)))
    idle = cpu.get("idle")
    weight = cpu_weight(cpu.get("shares") or 0)
    if idle == 1 and version >= 252:
        # CPUWeight=idle; cpu.idle is what it becomes.
        found.append(("CPUWeight", ("t", 0)))
    elif weight:
        found.append(("CPUWeight", ("t", weight)))
    found += [*_quota(cpu, version), *_tasks(resources), *_cpuset(cpu, version)]
    for name, value in (resources.get("unified") or {}).items():
        found += unified_property(name, value.strip(), version)
    return found


_UNIFIED = {
    "cpu.weight": "CPUWeight",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}


def unified_property(name: str, value: str, version: int) -> list[Property]:
    """Return the property for a file of cgroup2, nothing for those that systemd does not know.

    Raises:
        CgroupError: the value is not one for this file.
    """
    try:
        if name == "cpu.max":
            quota, *period = value.split()
            cpu = {"quota": -1 if quota == "max" else int(quota)}
            cpu["period"] = int(period[0]) if period else _PERIOD_DEFAULT_US
            return _quota(cpu, version)
        if name in ("cpuset.cpus", "cpuset.mems"):
            return _cpuset({name.removeprefix("cpuset."): value}, version)
        if name in _UNIFIED:
            return [(_UNIFIED[name], ("t", _INFINITY if value == "max" else int(value)))]
    except (ValueError, IndexError):
        text = f'unified resource "{name}" value conversion error: "{value}"'
        raise CgroupError(text=text) from None
    return []


class Unit(Manager):
    """A scope or slice of systemd; `inner` is the driver for the files of its groups."""

    def __init__(self, inner: V1 | V2, *, is_v2: bool, address: str) -> None:
        super().__init__(inner.wish, inner.paths, rootless=inner.rootless)
        self.inner = inner
        self.is_v2 = is_v2
        self.name = unit_name(inner.wish)
        self._address = address

    def unit(self) -> str:
        """Return the unit's name."""
        return self.name

    def create(self, pid: int = 0, *others: int) -> None:
        """Have systemd start the unit with a process in it, and make the groups that it leaves out.

        Raises:
            CgroupError: systemd refuses, or one of the groups cannot be made.
        """
        self.inner.check_unused()
        # A scope cannot be empty; the process that will clone the container's first is there.
        if not pid and _starter.in_stage():
            pid = _starter.stage()["init_pid"]
        self._with_systemd("start", self._properties(pid, *others))
        try:
            self.inner.make_groups()
        except BaseException:
            self._with_systemd("stop")
            raise

    def _properties(self, pid: int, *others: int) -> list[Property]:
        parent = _parent(self.wish, rootless=self.rootless)
        is_slice = self.name.endswith(".slice")
        found: list[Property] = [("Description", ("s", f"libcontainer container {self.wish.path}"))]
        if is_slice:
            found.append(("Wants", ("as", [parent])))
        else:
            found.append(("Slice", ("s", parent)))
            found.append(("Delegate", ("b", True)))
            if pid:
                found.append(("PIDs", ("au", [pid, *others])))
        accounting = "IOAccounting" if self.is_v2 else "BlockIOAccounting"
        for name in ("MemoryAccounting", "CPUAccounting", accounting, "TasksAccounting"):
            found.append((name, ("b", True)))
        found.append(("DefaultDependencies", ("b", False)))
        return [*found, *self.wish.properties]

    def _with_systemd(self, what: str, properties: Sequence[Property] = ()) -> None:
        try:
            systemd = Systemd(self._address)
            try:
                if what == "start":
                    systemd.start_unit(self.name, properties)
                elif what == "stop":
                    systemd.stop_unit(self.name)
                else:
                    compiled = self._resource_properties(systemd.version())
                    systemd.set_properties(self.name, compiled)
            finally:
                systemd.close()
        except DbusError as error:
            text = f'unable to {what} unit "{self.name}": {error}'
            raise CgroupError(text=text) from None

    def _resource_properties(self, version: int) -> list[Property]:
        compile_them = v2_properties if self.is_v2 else v1_properties
        found = compile_them(self._resources, version)
        if self._with_devices:
            return found
        return [one for one in found if one[0] not in ("DevicePolicy", "DeviceAllow")]

    def join_rows(self) -> list[Row]:
        """Return rows for the hierarchies that systemd does not move processes in."""
        rows = self.inner.join_rows()
        own = self.paths.get("name=systemd", "")
        return [row for row in rows if row.first != f"{own}/tasks".encode()]

    def enter_fd(self) -> int:
        """Return the cgroup2 directory, if there is one."""
        return self.inner.enter_fd()

    def apply(self, resources: dict[str, Any], *, devices: bool = True) -> None:
        """Set the unit's properties, then what systemd has no words for in the files."""
        self._resources = resources
        self._with_devices = devices
        # systemd denies every device for a moment: nobody in the group may notice.
        stopped = False
        if not self.is_v2 and devices and not self.inner.frozen() and self.inner.pids():
            self.inner.freeze(on=True)
            stopped = True
        try:
            self._with_systemd("set the properties of")
        finally:
            if stopped:
                self.inner.freeze(on=False)
        self.inner.apply(resources, devices=devices)

    def pids(self) -> list[int]:
        """Return the processes of the unit."""
        return self.inner.pids()

    def stats(self) -> dict[str, Any]:
        """Return what `events --stats` prints as `data`."""
        return self.inner.stats()

    def freeze(self, on: bool) -> None:  # noqa: FBT001
        """Freeze or thaw, by the files."""
        self.inner.freeze(on)

    def frozen(self) -> bool:
        """Return whether the unit is frozen."""
        return self.inner.frozen()

    def freezer_file(self) -> str:
        """Return the file that tells so."""
        return self.inner.freezer_file()

    def oom_watch(self) -> tuple[int, int]:
        """Return what says that memory has run out."""
        return self.inner.oom_watch()

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed for want of memory."""
        return self.inner.oom_kills()

    def kill(self, number: int) -> None:
        """Send a signal to all processes."""
        self.inner.kill(number)

    def remove(self) -> None:
        """Have systemd stop the unit, and remove what it does not know of."""
        problem: CgroupError | None = None
        try:
            self._with_systemd("stop")
        except CgroupError as error:
            problem = error
        self.inner.remove()
        if problem is not None:
            raise problem


def _address(bus: str, *, rootless: bool) -> str:
    return (bus or user_bus(os.geteuid())) if rootless else SYSTEM_BUS


def _check_running() -> None:
    if not os.path.isdir(_RUNNING):
        text = (
            "systemd cgroup flag passed, but systemd support for managing cgroups is not available"
        )
        raise CgroupError(text=text)


def find_unit(tree: Tree, wish: CgroupWish, *, rootless: bool, bus: str = "") -> Unit:
    """Return the driver for a new unit.

    Raises:
        CgroupError: this machine does not run systemd, or the slice's name is none.
    """
    _check_running()
    address = _address(bus, rootless=rootless)
    inner = expand_slice(_parent(wish, rootless=rootless)) + f"/{unit_name(wish)}"
    above = _manager_group(address) if rootless else ""
    if tree.unified_only:
        paths = tree.new_paths(clean_path(f"{above}{inner}"))
    else:
        paths = {}
        for one in tree.hierarchies:
            for controller in one.controllers:
                paths[controller] = (
                    f"{one.target}{clean_path(_first_group(one.controllers) + inner)}"
                )
    return _unit(tree, wish, paths, address, rootless=rootless)


def open_unit(
    tree: Tree, wish: CgroupWish, directories: Sequence[str], *, rootless: bool, bus: str = ""
) -> Unit:
    """Return the driver for a unit that exists: its name is the last part of its directories."""
    address = _address(bus, rootless=rootless)
    unit = _unit(tree, wish, tree.known_paths(directories), address, rootless=rootless)
    unit.name = directories[0].rpartition("/")[2]
    return unit


def _unit(
    tree: Tree, wish: CgroupWish, paths: dict[str, str], address: str, *, rootless: bool
) -> Unit:
    from apptainer_py.host.cgroups.v1 import V1
    from apptainer_py.host.cgroups.v2 import V2

    driver: V1 | V2
    if tree.unified_only:
        driver = V2(wish, paths, rootless=rootless, top=tree.unified)
    else:
        driver = V1(wish, paths, rootless=rootless)
    return Unit(driver, is_v2=tree.unified_only, address=address)


def _manager_group(address: str) -> str:
    try:
        systemd = Systemd(address)
        try:
            return str(systemd.get("ControlGroup"))
        finally:
            systemd.close()
    except DbusError as error:
        raise CgroupError(text=f"unable to ask systemd for its own group: {error}") from None


def _first_group(controllers: Sequence[str]) -> str:
    """Return the group of the first process, below which systemd works; newer ones have a scope."""
    from apptainer_py.host.cgroups.driver import read_file
    from apptainer_py.host.cgroups.tree import own_groups

    for names, path in own_groups(read_file("/proc/1", "cgroup")):
        if names == tuple(controllers):
            return path.removesuffix("init.scope").rstrip("/")
    return ""
