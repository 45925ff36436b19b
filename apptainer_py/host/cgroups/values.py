"""Formulas from the words of config.json, those of cgroup v1, to the values of cgroup2."""

from __future__ import annotations

from apptainer_py.host.cgroups.driver import CgroupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CPU_PERIOD_DEFAULT_US = 100_000
_SHARES_MIN, _SHARES_MAX = 2, 262_144
_WEIGHT_MAX = 10_000


def limit_text(value: int) -> str:
    """Return a limit as cgroup2 takes it: -1 is `max`."""
    return "max" if value == -1 else str(value)


def cpu_weight(shares: int) -> int:
    """Return cpu.weight for cpu.shares, so that 1024 shares are the default weight of 100.

    The curve is runc's and crun's: 10 ^ ((l² + 125 l) / 612 - 7 / 34) with l = log2(shares).
    """
    if shares == 0:
        return 0
    if shares <= _SHARES_MIN:
        return 1
    if shares >= _SHARES_MAX:
        return _WEIGHT_MAX
    from math import ceil, log2

    exponent = log2(shares)
    return ceil(10 ** ((exponent * exponent + 125 * exponent) / 612 - 7 / 34))


def io_weight(weight: int) -> int:
    """Return io.weight (1 to 10000) for blkio.weight (10 to 1000); 0 stays 0."""
    return 0 if weight == 0 else 1 + (weight - 10) * 9999 // 990


def swap_limit(memory: int, with_swap: int) -> int:
    """Return memory.swap.max for a limit of memory and one of memory with swap; 0 is unset.

    Raises:
        CgroupError: the two contradict each other.
    """
    if memory == -1 and with_swap == 0:
        return -1
    if with_swap in (-1, 0):
        return with_swap
    if with_swap < -1:
        raise CgroupError(text=f"invalid memory swap value: {with_swap}")
    if memory == 0:
        raise CgroupError(text="unable to set swap limit without memory limit")
    if memory < 0:
        raise CgroupError(text=f"invalid memory value: {memory}")
    if with_swap < memory:
        raise CgroupError(text="memory+swap limit should be >= memory limit")
    return with_swap - memory


def memory_writes(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (file, value) for `resources.memory`, in runc's order."""
    limit, with_swap = memory.get("limit") or 0, memory.get("swap") or 0
    swap = swap_limit(limit, with_swap)
    writes = []
    # An equal limit with swap means none at all, and so is written although it is 0.
    if swap or with_swap > 0:
        writes.append(("memory.swap.max", limit_text(swap)))
    if limit:
        writes.append(("memory.max", limit_text(limit)))
    if memory.get("reservation"):
        writes.append(("memory.low", limit_text(memory["reservation"])))
    return writes


def cpu_max(cpu: dict[str, Any]) -> str:
    """Return the value of cpu.max, "" if neither quota nor period is asked for."""
    quota, period = cpu.get("quota") or 0, cpu.get("period") or 0
    if not quota and not period:
        return ""
    return f"{quota if quota > 0 else 'max'} {period or CPU_PERIOD_DEFAULT_US}"


def io_lines(block: dict[str, Any]) -> list[str]:
    """Return the lines for io.max."""
    words = (
        ("throttleReadBpsDevice", "rbps"),
        ("throttleWriteBpsDevice", "wbps"),
        ("throttleReadIOPSDevice", "riops"),
        ("throttleWriteIOPSDevice", "wiops"),
    )
    return [
        f"{one['major']}:{one['minor']} {word}={one['rate']}"
        for key, word in words
        for one in block.get(key) or ()
    ]
