"""The driver for machines that have cgroup2 alone."""

from __future__ import annotations

import errno
import os

from apptainer_py.host.cgroups.driver import (
    CgroupError,
    Directories,
    processes_below,
    read_file,
    read_maybe,
    write_file,
)
from apptainer_py.host.cgroups.values import cpu_max, cpu_weight, io_lines, io_weight, memory_writes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from apptainer_py.model.oci_plan import CgroupWish

_SIGKILL = 9
_POLLPRI = 2
_FREEZE_TIMEOUT_MS = 10_000
# What a container's own user may change where it has a cgroup namespace (systemd does the same).
_DELEGATED = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n"


class V2(Directories):
    """One directory of cgroup2, whose path is under "" in `paths`; `top` is the mount."""

    def __init__(
        self, wish: CgroupWish, paths: dict[str, str], *, rootless: bool, top: str
    ) -> None:
        super().__init__(wish, paths, rootless=rootless)
        self.top = top

    @property
    def path(self) -> str:
        """The directory, "" where it could not be made."""
        return self.paths.get("", "")

    def check_unused(self) -> None:
        """Refuse a group that others are in.

        Raises:
            CgroupError: it has processes, or is frozen.
        """
        if os.path.isdir(self.path):
            self._check_thawed()
            self._check_empty(self.path)

    def _make_all(self, resources: dict[str, Any]) -> None:
        try:
            self._create(resources)
            self._delegate()
        except CgroupError as error:
            self._undo()
            if not self._forgivable(error):
                raise
            if needs_controllers(resources):
                text = (
                    "rootless needs no limits + no cgrouppath when no permission is granted for "
                    f"cgroups: {error}"
                )
                raise CgroupError(text=text) from None
            del self.paths[""]

    def _create(self, resources: dict[str, Any]) -> None:
        controllers = read_file(self.top, "cgroup.controllers").split()
        current = self.top
        parts = [part for part in self.path[len(self.top) :].split("/") if part]
        for place, part in enumerate(["", *parts]):
            if part:
                current = f"{current}/{part}"
                self._make(current)
                _check_type(current, resources)
            if place < len(parts):
                _enable(current, controllers)

    def _delegate(self) -> None:
        if self.wish.owner is None:
            return
        uid, gid = self.wish.owner
        try:
            os.chown(self.path, uid, gid)
            names = read_maybe("/sys/kernel/cgroup", "delegate") or _DELEGATED
            for name in names.split():
                try:
                    os.chown(f"{self.path}/{name}", uid, gid, follow_symlinks=False)
                except FileNotFoundError:
                    continue
        except OSError as error:
            text = f"unable to chown {self.path}: {error.strerror}"
            raise CgroupError(text=text, errno=error.errno) from None

    def enter_fd(self) -> int:
        """Return the directory, which init is cloned into: no process has to move."""
        if not self.path:
            return -1
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def apply(self, resources: dict[str, Any], *, devices: bool = True) -> None:
        """Set the limits, one controller after the other; `unified` has the last word."""
        if not self.path:
            if needs_controllers(resources):
                text = "cannot set limits: container could not join or create cgroup"
                raise CgroupError(text=text)
            return
        for setter in _SETTERS[:4]:
            setter(self.path, resources)
        if devices:
            self._apply_devices(resources)
        for setter in _SETTERS[4:]:
            setter(self.path, resources)
        _unified(self.path, resources)

    def _apply_devices(self, resources: dict[str, Any]) -> None:
        from apptainer_py.host.cgroups.devices import wanted_rules
        from apptainer_py.host.cgroups.devices_bpf import attach_rules

        try:
            attach_rules(self.path, wanted_rules(resources.get("devices") or ()))
        except CgroupError:
            if not self.rootless:
                raise

    def pids(self) -> list[int]:
        """Return the processes of the group and of those below."""
        return processes_below(self.path) if self.path else []

    def stats(self) -> dict[str, Any]:
        """Return what `events --stats` prints as `data`."""
        from apptainer_py.host.cgroups.stats_v2 import collect

        return collect(self.path) if self.path else {}

    def freeze(self, on: bool) -> None:  # noqa: FBT001
        """Freeze, and wait for the kernel to say so; or thaw."""
        if not self.path:
            super().freeze(on)
            return
        write_file(self.path, "cgroup.freeze", "1" if on else "0")
        if on and not self._wait_frozen():
            write_file(self.path, "cgroup.freeze", "0")
            raise CgroupError(text="timeout waiting for the cgroup to freeze")

    def _wait_frozen(self) -> bool:
        import select

        fd = os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, _POLLPRI)
            while b"frozen 1" not in os.pread(fd, 4096, 0):
                if not poll.poll(_FREEZE_TIMEOUT_MS):
                    return False
            return True
        finally:
            os.close(fd)

    def frozen(self) -> bool:
        """Return whether this very group is frozen, not one above it."""
        return bool(self.path) and (read_maybe(self.path, "cgroup.freeze") or "").strip() == "1"

    def freezer_file(self) -> str:
        """Return the path of cgroup.freeze."""
        return f"{self.path}/cgroup.freeze" if self.path else ""

    def kill(self, number: int) -> None:
        """Send a signal to all processes; SIGKILL in one go where the kernel can."""
        if number == _SIGKILL and self.path and os.path.exists(f"{self.path}/cgroup.kill"):
            write_file(self.path, "cgroup.kill", "1")
            return
        super().kill(number)

    def oom_watch(self) -> tuple[int, int]:
        """Return memory.events, which has something new when poll(2) says so."""
        try:
            return os.open(f"{self.path}/memory.events", os.O_RDONLY | os.O_CLOEXEC), _POLLPRI
        except OSError:
            return super().oom_watch()

    def oom_kills(self) -> int:
        """Return the counter of memory.events."""
        text = read_maybe(self.path, "memory.events") if self.path else None
        for line in (text or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0


def needs_controllers(resources: dict[str, Any]) -> bool:
    """Return whether anything is asked for that only a group of the container's own can hold."""
    return (
        _domain(resources)
        or (resources.get("pids") or {}).get("limit") is not None
        or any((resources.get("cpu") or {}).get(key) for key in ("cpus", "mems"))
    )


def _domain(resources: dict[str, Any]) -> bool:
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    block = resources.get("blockIO") or {}
    return (
        any(memory.get(key) for key in ("limit", "swap", "reservation"))
        or any(cpu.get(key) for key in ("shares", "quota", "period", "burst"))
        or cpu.get("idle") is not None
        or bool(block.get("weight") or io_lines(block))
        or bool(resources.get("hugepageLimits"))
    )


def _check_type(path: str, resources: dict[str, Any]) -> None:
    kind = (read_maybe(path, "cgroup.type") or "").strip()
    if kind in ("", "domain"):
        return
    if _domain(resources):
        state = "in an invalid state" if kind == "domain invalid" else f"in {kind} mode"
        text = f'cannot enter cgroupv2 "{path}" with domain controllers -- it is {state}'
        raise CgroupError(text=text)
    if kind == "domain invalid":
        try:
            write_file(path, "cgroup.type", "threaded")
        except CgroupError:
            return


def _enable(path: str, controllers: list[str]) -> None:
    """Hand down what controllers the kernel lets us; a missing one is noticed when it is set."""
    try:
        write_file(path, "cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
    except CgroupError:
        for name in controllers:
            try:
                write_file(path, "cgroup.subtree_control", f"+{name}")
            except CgroupError:
                continue


def _pids(path: str, resources: dict[str, Any]) -> None:
    limit = (resources.get("pids") or {}).get("limit")
    if limit is not None:
        write_file(path, "pids.max", str(limit) if limit > 0 else "max")


def _memory(path: str, resources: dict[str, Any]) -> None:
    memory = resources.get("memory") or {}
    if memory.get("checkBeforeUpdate"):
        _check_usage(path, memory)
    for name, value in memory_writes(memory):
        write_file(path, name, value)


def _check_usage(path: str, memory: dict[str, Any]) -> None:
    limit, with_swap = memory.get("limit") or 0, memory.get("swap") or 0
    usage = read_maybe(path, "memory.current")
    if usage is None:
        return
    if 0 < with_swap <= int(usage):
        raise CgroupError(text=f"rejecting memory+swap limit {with_swap} <= usage {int(usage)}")
    if 0 < limit <= int(usage):
        raise CgroupError(text=f"rejecting memory limit {limit} <= usage {int(usage)}")


def _io(path: str, resources: dict[str, Any]) -> None:
    block = resources.get("blockIO") or {}
    bfq = os.path.exists(f"{path}/io.bfq.weight")
    if block.get("weight"):
        if bfq:
            write_file(path, "io.bfq.weight", str(block["weight"]))
        else:
            write_file(path, "io.weight", str(io_weight(block["weight"])))
    for one in block.get("weightDevice") or ():
        if bfq and one.get("weight"):
            line = f"{one['major']}:{one['minor']} {one['weight']}"
            write_file(path, "io.bfq.weight", line)
    for line in io_lines(block):
        write_file(path, "io.max", line)


def _cpu(path: str, resources: dict[str, Any]) -> None:
    cpu = resources.get("cpu") or {}
    if cpu.get("idle") is not None:
        write_file(path, "cpu.idle", str(cpu["idle"]))
    weight = cpu_weight(cpu.get("shares") or 0)
    if weight:
        write_file(path, "cpu.weight", str(weight))
    burst, limit = cpu.get("burst"), cpu_max(cpu)
    again = False
    if burst is not None:
        try:
            write_file(path, "cpu.max.burst", str(burst))
        except CgroupError as error:
            # It may not be more than the quota, which may be about to grow.
            if error.facts.get("errno") != errno.EINVAL or not cpu.get("quota"):
                raise
            again = True
    if limit:
        write_file(path, "cpu.max", limit)
    if again:
        write_file(path, "cpu.max.burst", str(burst))


def _cpuset(path: str, resources: dict[str, Any]) -> None:
    cpu = resources.get("cpu") or {}
    for key in ("cpus", "mems"):
        if cpu.get(key):
            write_file(path, f"cpuset.{key}", cpu[key])


def _hugetlb(path: str, resources: dict[str, Any]) -> None:
    for one in resources.get("hugepageLimits") or ():
        prefix, limit = f"hugetlb.{one['pageSize']}", str(one["limit"])
        write_file(path, f"{prefix}.max", limit)
        if os.path.exists(f"{path}/{prefix}.rsvd.max"):
            write_file(path, f"{prefix}.rsvd.max", limit)


def _rdma(path: str, resources: dict[str, Any]) -> None:
    from apptainer_py.host.cgroups.v1 import rdma_lines

    if resources.get("rdma"):
        for line in rdma_lines(resources):
            write_file(path, "rdma.max", line)


_SETTERS: tuple[Callable[[str, dict[str, Any]], None], ...] = (
    _pids,
    _memory,
    _io,
    _cpu,
    _cpuset,
    _hugetlb,
    _rdma,
)


def _unified(path: str, resources: dict[str, Any]) -> None:
    unified = resources.get("unified") or {}
    available: list[str] | None = None
    for name, value in unified.items():
        if "/" in name:
            text = f'unified resource "{name}" must be a file name (no slashes)'
            raise CgroupError(text=text)
        try:
            for line in value.split("\n") if "\n" in value else [value]:
                if line or line == value:
                    write_file(path, name, line)
        except CgroupError as error:
            if error.facts.get("errno") in (errno.EPERM, errno.EACCES, errno.ENOENT):
                controller, dot, _ = name.partition(".")
                if not dot:
                    text = f'unified resource "{name}" must be in the form CONTROLLER.PARAMETER'
                    raise CgroupError(text=text) from None
                if available is None:
                    available = (read_maybe(path, "cgroup.controllers") or "").split()
                if controller not in available and controller != "cgroup":
                    text = (
                        f'unified resource "{name}" can\'t be set: controller "{controller}" '
                        "not available"
                    )
                    raise CgroupError(text=text) from None
            raise CgroupError(text=f'unable to set unified resource "{name}": {error}') from None
