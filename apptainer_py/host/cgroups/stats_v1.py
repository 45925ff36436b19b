"""What `events --stats` prints, from the files of cgroup v1 (runc's types/events.go)."""

from __future__ import annotations

from apptainer_py.host.cgroups.driver import CgroupError, read_maybe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TICK_NS = 10_000_000
_CPUSET_NUMBERS = (
    "cpu_exclusive",
    "mem_hardwall",
    "mem_exclusive",
    "memory_migrate",
    "memory_spread_page",
    "memory_spread_slab",
    "memory_pressure",
    "sched_load_balance",
    "sched_relax_domain_level",
)
_RECURSIVE = (
    ("sectorsRecursive", "sectors_recursive"),
    ("ioServiceTimeRecursive", "io_service_time_recursive"),
    ("ioWaitTimeRecursive", "io_wait_time_recursive"),
    ("ioMergedRecursive", "io_merged_recursive"),
    ("ioQueueRecursive", "io_queued_recursive"),
    ("ioTimeRecursive", "time_recursive"),
    ("ioServicedRecursive", "io_serviced_recursive"),
    ("ioServiceBytesRecursive", "io_service_bytes_recursive"),
)
# The first group whose first file says something is the one that counts.
_BLKIO_GROUPS = (
    tuple((key, f"blkio.bfq.{name}") for key, name in _RECURSIVE),
    tuple((key, f"blkio.bfq.{name}") for key, name in _RECURSIVE[-2:]),
    tuple((key, f"blkio.{name}") for key, name in _RECURSIVE),
    tuple((key, f"blkio.throttle.{name}") for key, name in _RECURSIVE[-2:]),
    (
        ("ioServicedRecursive", "blkio.throttle.io_serviced"),
        ("ioServiceBytesRecursive", "blkio.throttle.io_service_bytes"),
    ),
)


def without_zeros(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not empty."""
    return {key: value for key, value in values.items() if value}


def read_pairs(path: str | None, name: str) -> dict[str, int]:
    """Return the `key number` lines of a file, nothing if it is missing."""
    text = read_maybe(path, name) if path else None
    found = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        if value.isdecimal():
            found[key] = int(value)
    return found


def read_number(path: str | None, name: str) -> int | None:
    """Return the number in a file; None if it is missing, 0 for `max`."""
    text = read_maybe(path, name) if path else None
    if text is None:
        return None
    text = text.strip()
    return int(text) if text.lstrip("-").isdecimal() else 0


def read_list(text: str) -> list[int]:
    """Return the numbers of a list such as 0-3,8 (cpuset(7)).

    Raises:
        CgroupError: it is none.
    """
    found: list[int] = []
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise CgroupError(text=f"invalid list of numbers {text!r}") from None
    return found


def _cpu(cpu: str | None, account: str | None) -> dict[str, Any]:
    per_cpu = [int(word) for word in _words(account, "cpuacct.usage_percpu")]
    user, kernel = [], []
    for line in _lines(account, "cpuacct.usage_all")[1:]:
        words = line.split()
        user.append(int(words[1]))
        kernel.append(int(words[2]))
    ticks = read_pairs(account, "cpuacct.stat")
    usage = without_zeros(
        {
            "total": read_number(account, "cpuacct.usage") or 0,
            "percpu": per_cpu,
            "percpu_kernel": kernel,
            "percpu_user": user,
        }
    )
    usage["kernel"] = ticks.get("system", 0) * _TICK_NS
    usage["user"] = ticks.get("user", 0) * _TICK_NS
    throttled = read_pairs(cpu, "cpu.stat")
    throttling = {
        "periods": throttled.get("nr_periods", 0),
        "throttledPeriods": throttled.get("nr_throttled", 0),
        "throttledTime": throttled.get("throttled_time", 0),
    }
    return {"usage": usage, "throttling": without_zeros(throttling)}


def _words(path: str | None, name: str) -> list[str]:
    return ((read_maybe(path, name) if path else None) or "").split()


def _lines(path: str | None, name: str) -> list[str]:
    return ((read_maybe(path, name) if path else None) or "").splitlines()


def _cpuset(path: str | None) -> dict[str, Any]:
    cpus = read_list("".join(_words(path, "cpuset.cpus")))
    mems = read_list("".join(_words(path, "cpuset.mems")))
    numbers = {name: read_number(path, f"cpuset.{name}") or 0 for name in _CPUSET_NUMBERS}
    found: dict[str, Any] = {}
    if cpus:
        found["cpus"] = cpus
    found["cpu_exclusive"] = numbers.pop("cpu_exclusive")
    if mems:
        found["mems"] = mems
    return {**found, **numbers}


def _memory_part(path: str | None, prefix: str) -> dict[str, int]:
    found = {"limit": read_number(path, f"{prefix}.limit_in_bytes") or 0}
    found.update(
        without_zeros(
            {
                "usage": read_number(path, f"{prefix}.usage_in_bytes"),
                "max": read_number(path, f"{prefix}.max_usage_in_bytes"),
            }
        )
    )
    found["failcnt"] = read_number(path, f"{prefix}.failcnt") or 0
    return found


def _memory(path: str | None) -> dict[str, Any]:
    raw = dict(sorted(read_pairs(path, "memory.stat").items()))
    found: dict[str, Any] = {"cache": raw["cache"]} if raw.get("cache") else {}
    parts = (
        ("usage", "memory"),
        ("swap", "memory.memsw"),
        ("kernel", "memory.kmem"),
        ("kernelTCP", "memory.kmem.tcp"),
    )
    for key, prefix in parts:
        found[key] = _memory_part(path, prefix)
    if raw:
        found["raw"] = raw
    return found


def _blkio_entries(path: str, name: str) -> list[dict[str, Any]]:
    found = []
    for line in _lines(path, name):
        words = line.replace(":", " ").split()
        if len(words) < 3:
            continue
        entry: dict[str, Any] = without_zeros({"major": int(words[0]), "minor": int(words[1])})
        if len(words) == 4:
            entry["op"] = words[2]
        entry.update(without_zeros({"value": int(words[-1])}))
        found.append(entry)
    return found


def _blkio(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    for group in _BLKIO_GROUPS:
        if not _blkio_entries(path, group[0][1]):
            continue
        return without_zeros({key: _blkio_entries(path, name) for key, name in group})
    return {}


def _hugetlb(path: str | None) -> dict[str, Any]:
    import os

    found: dict[str, Any] = {}
    for name in os.listdir(path) if path else ():
        if not name.endswith(".usage_in_bytes") or ".rsvd." in name:
            continue
        prefix = name.removesuffix(".usage_in_bytes")
        usage = {
            "usage": read_number(path, name),
            "max": read_number(path, f"{prefix}.max_usage_in_bytes"),
        }
        failures = read_number(path, f"{prefix}.failcnt") or 0
        found[prefix.removeprefix("hugetlb.")] = {**without_zeros(usage), "failcnt": failures}
    return found


def collect(paths: dict[str, str]) -> dict[str, Any]:
    """Return the `data` object for a container whose directories are these, by controller.

    Raises:
        CgroupError: a file cannot be read.
    """
    pids = {
        "current": read_number(paths.get("pids"), "pids.current"),
        "limit": read_number(paths.get("pids"), "pids.max"),
    }
    return {
        "cpu": _cpu(paths.get("cpu"), paths.get("cpuacct")),
        "cpuset": _cpuset(paths.get("cpuset")),
        "memory": _memory(paths.get("memory")),
        "pids": without_zeros(pids),
        "blkio": _blkio(paths.get("blkio")),
        "hugetlb": _hugetlb(paths.get("hugetlb")),
        "intel_rdt": {},
        "network_interfaces": None,
    }
