"""What `events --stats` prints, from the files of cgroup2, in the words of v1 (as runc does)."""

from __future__ import annotations

import os

from apptainer_py.host.cgroups.driver import read_maybe
from apptainer_py.host.cgroups.stats_v1 import read_number, read_pairs, without_zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNLIMITED = (1 << 64) - 1
_OPERATIONS = {
    "rbytes": ("ioServiceBytesRecursive", "Read"),
    "wbytes": ("ioServiceBytesRecursive", "Write"),
    "rios": ("ioServicedRecursive", "Read"),
    "wios": ("ioServicedRecursive", "Write"),
}


def _cpu(path: str) -> dict[str, Any]:
    values = read_pairs(path, "cpu.stat")
    usage = without_zeros({"total": values.get("usage_usec", 0) * 1000})
    usage["kernel"] = values.get("system_usec", 0) * 1000
    usage["user"] = values.get("user_usec", 0) * 1000
    throttling = {
        "periods": values.get("nr_periods", 0),
        "throttledPeriods": values.get("nr_throttled", 0),
        "throttledTime": values.get("throttled_usec", 0) * 1000,
    }
    found: dict[str, Any] = {"usage": usage, "throttling": without_zeros(throttling)}
    _add_pressure(found, path, "cpu.pressure")
    return found


def _limit(path: str, name: str) -> int:
    text = (read_maybe(path, name) or "0").strip()
    return _UNLIMITED if text == "max" else int(text)


def _memory(path: str) -> dict[str, Any]:
    raw = dict(sorted(read_pairs(path, "memory.stat").items()))
    used = read_number(path, "memory.current") or 0
    limit = _limit(path, "memory.max")
    swap_limit = _limit(path, "memory.swap.max")
    peak = read_number(path, "memory.peak") or 0
    swap = {
        "limit": swap_limit if swap_limit == _UNLIMITED else min(swap_limit + limit, _UNLIMITED),
        **without_zeros({"usage": (read_number(path, "memory.swap.current") or 0) + used}),
        "failcnt": 0,
    }
    found: dict[str, Any] = without_zeros({"cache": raw.get("file", 0)})
    usage = without_zeros({"usage": used, "max": peak})
    found["usage"] = {"limit": limit, **usage, "failcnt": 0}
    found["swap"] = swap
    found["kernel"] = {"limit": 0, "failcnt": 0}
    found["kernelTCP"] = {"limit": 0, "failcnt": 0}
    if raw:
        found["raw"] = raw
    _add_pressure(found, path, "memory.pressure")
    return found


def _blkio(path: str) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (read_maybe(path, "io.stat") or "").splitlines():
        device, *words = line.split()
        major, _, minor = device.partition(":")
        for word in words:
            name, _, value = word.partition("=")
            if name not in _OPERATIONS or not minor:
                continue
            key, operation = _OPERATIONS[name]
            entry = without_zeros({"major": int(major), "minor": int(minor), "op": operation})
            entry.update(without_zeros({"value": int(value)}))
            found.setdefault(key, []).append(entry)
    result: dict[str, Any] = dict(found)
    _add_pressure(result, path, "io.pressure")
    return result


def _add_pressure(found: dict[str, Any], path: str, name: str) -> None:
    # Kernels without pressure stall information have no such file, or one that cannot be read.
    lines = {}
    for line in (read_maybe(path, name) or "").splitlines():
        kind, *words = line.split()
        values: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            number = float(value)
            values[key] = int(number) if number.is_integer() else number
        lines[kind] = values
    if lines:
        found["psi"] = lines


def _hugetlb(path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in os.listdir(path):
        if not name.startswith("hugetlb.") or not name.endswith(".current") or ".rsvd." in name:
            continue
        prefix = name.removesuffix(".current")
        failures = read_pairs(path, f"{prefix}.events").get("max", 0)
        usage = without_zeros({"usage": read_number(path, name)})
        found[prefix.removeprefix("hugetlb.")] = {**usage, "failcnt": failures}
    return found


def collect(path: str) -> dict[str, Any]:
    """Return the `data` object for a container with this directory.

    Raises:
        CgroupError: a file cannot be read.
    """
    current = read_number(path, "pids.current")
    if current is None:
        # Without the controller they can still be counted.
        current = len((read_maybe(path, "cgroup.procs") or "").split())
    pids = {
        "current": current,
        "limit": read_number(path, "pids.max"),
    }
    return {
        "cpu": _cpu(path),
        "cpuset": {
            "cpu_exclusive": 0,
            "mem_hardwall": 0,
            "mem_exclusive": 0,
            "memory_migrate": 0,
            "memory_spread_page": 0,
            "memory_spread_slab": 0,
            "memory_pressure": 0,
            "sched_load_balance": 0,
            "sched_relax_domain_level": 0,
        },
        "memory": _memory(path),
        "pids": without_zeros(pids),
        "blkio": _blkio(path),
        "hugetlb": _hugetlb(path),
        "intel_rdt": {},
        "network_interfaces": None,
    }
