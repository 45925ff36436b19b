"""`instance stats`: what an instance uses, from what the kernel says of its processes.

No control group is needed: all processes of an instance descend from its first, but those that have
joined it, which are in the same pid namespace.
"""

from __future__ import annotations

import os
import select
import time

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.base.record import Record
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FIRST_S, _EACH_S = 0.2, 1.0
_CLEAR = "\033[H\033[2J"
_HEAD = ("INSTANCE NAME", "CPU USAGE", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
# Fields of /proc/PID/stat behind the name: parent, user and system time, children's, resident.
_PARENT, _USER, _SYSTEM, _RESIDENT = 1, 11, 12, 21


class StatsForRoot(ApptainerError):
    message = "Only the root user can look at stats of a user's instance"


class Usage(Record):
    """What all processes of an instance use together."""

    ticks: int
    memory: int
    read: int
    written: int
    pids: int


def instance_stats(
    *, name: str, user: str, uid: int, as_json: bool, once: bool, clear: bool
) -> Iterator[str]:
    """Yield pages until the instance ends, or one.

    Raises:
        StatsForRoot: somebody else's instance is asked for.
        UsageError: there is no such instance.
    """
    if user and uid != 0:
        raise StatsForRoot
    owner = instances.owner(user or uid)
    found = instances.find(owner, name) if instances.is_name(name) else None
    folder = -1 if found is None else instances.open_running(found, owner)
    if found is None or folder < 0:
        raise UsageError(text="no instance found")
    log.info(f"Stats for {found.name} instance of {found.image} (PID={found.pid})")
    return _pages(found, folder, as_json=as_json, once=once or as_json, clear=clear)


def _pages(
    instance: instances.Instance, folder: int, *, as_json: bool, once: bool, clear: bool
) -> Iterator[str]:
    before, at = measure(instance.pid), time.monotonic()
    pause = _FIRST_S
    while True:
        select.select([], [], [], pause)
        try:
            instances.look(folder)
        except OSError:
            return
        now, then = measure(instance.pid), time.monotonic()
        seconds = (now.ticks - before.ticks) / os.sysconf("SC_CLK_TCK")
        percent = max(0.0, 100 * seconds / (then - at))
        if as_json:
            yield _json(instance, now, percent)
        else:
            yield (_CLEAR if clear and not once else "") + table(instance.name, now, percent)
        if once:
            return
        before, at, pause = now, then, _EACH_S


def _fields(pid: int) -> list[int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as source:
            rest = source.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return [0, *(int(field) for field in rest[1:])]


def _space(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0  # one that is closed to us, as the first process is


def _members(first: int) -> dict[int, list[int]]:
    every = {int(name): _fields(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    living = {pid: fields for pid, fields in every.items() if fields is not None}
    inside = {first} & living.keys()
    grown = True
    while grown:
        more = {pid for pid, fields in living.items() if fields[_PARENT] in inside} - inside
        inside |= more
        grown = bool(more)
    spaces = {_space(pid) for pid in inside} - {0}
    inside |= {pid for pid in living if _space(pid) in spaces}
    return {pid: living[pid] for pid in inside}


def _io(pid: int) -> tuple[int, int]:
    found = {"read_bytes": 0, "write_bytes": 0}
    try:
        with open(f"/proc/{pid}/io") as source:
            for line in source:
                key, _, value = line.partition(":")
                if key in found:
                    found[key] = int(value)
    except OSError:
        pass  # somebody else's, or gone
    return found["read_bytes"], found["write_bytes"]


def measure(first: int) -> Usage:
    """Return what the processes of an instance use at this moment."""
    members = _members(first)
    page = os.sysconf("SC_PAGE_SIZE")
    moved = [_io(pid) for pid in members]
    return Usage(
        ticks=sum(fields[_USER] + fields[_SYSTEM] for fields in members.values()),
        memory=sum(fields[_RESIDENT] for fields in members.values()) * page,
        read=sum(read for read, _ in moved),
        written=sum(written for _, written in moved),
        pids=len(members),
    )


def size_text(count: float) -> str:
    """Return a number of bytes with four digits at most."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.4g}{_UNITS[unit]}"


def _limit() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(name: str, usage: Usage, percent: float) -> str:
    """Return the numbers as a table with its head."""
    limit = _limit()
    row = (
        name,
        f"{percent:.2f}%",
        f"{size_text(usage.memory)} / {size_text(limit)}",
        f"{100 * usage.memory / limit:.2f}%",
        f"{size_text(usage.read)} / {size_text(usage.written)}",
        str(usage.pids),
    )
    widths = [max(len(head), len(cell)) + 4 for head, cell in zip(_HEAD, row, strict=True)]
    widths[-1] = 0
    return "".join(
        "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in (_HEAD, row)
    )


def _json(instance: instances.Instance, usage: Usage, percent: float) -> str:
    import json

    limit = _limit()
    shown = {
        "instance": instance.name,
        "pid": instance.pid,
        "cpuPercent": round(percent, 2),
        "memory": {
            "usage": usage.memory,
            "limit": limit,
            "percent": round(100 * usage.memory / limit, 2),
        },
        "blockIO": {"read": usage.read, "write": usage.written},
        "pids": usage.pids,
    }
    return json.dumps(shown, indent="\t") + "\n"
