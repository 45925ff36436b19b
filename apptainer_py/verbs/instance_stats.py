"""`instance stats`: what an instance uses, from its control groups or else from its processes.

Without groups all processes of an instance are those that descend from its first, and those that
have joined it, which are in the same pid namespace. The JSON keys are Apptainer's.
"""

from __future__ import annotations

import os
import select
import time

from apptainer_py.base import log, packages
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.base.record import Record
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

_FIRST_S, _EACH_S = 0.2, 1.0
_CLEAR = "\033[H\033[2J"
_HEAD = ("INSTANCE NAME", "CPU USAGE", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class StatsForRoot(ApptainerError):
    message = "Only the root user can look at stats of a user's instance"


class NoLibrary(ApptainerError):
    message = "instance stats needs psutil, which is not installed"
    hint = "install the package python3-psutil"


class Usage(Record):
    """What all processes of an instance use together."""

    cpu_ns: int
    memory: int
    limit: int
    read: int
    written: int
    pids: int


def instance_stats(  # noqa: PLR0913 an option each
    name: str,
    environ: Mapping[str, str],
    *,
    user: str,
    uid: int,
    as_json: bool,
    once: bool,
    clear: bool,
) -> Iterator[str]:
    """Yield pages until the instance ends, or one.

    Raises:
        StatsForRoot: somebody else's instance is asked for.
        UsageError: there is no such instance.
    """
    found, folder = _running(name, user, uid, environ)
    if as_json and not once:
        log.warning("JSON output is only available for a single timepoint (--no-stream)")
    log.info(f"Stats for {found.name} instance of {found.image} (PID={found.pid})")
    return _pages(found, folder, as_json=as_json, once=once or as_json, clear=clear)


def usage_now(name: str, environ: Mapping[str, str], *, user: str, uid: int) -> Usage:
    """Return what an instance uses at this moment.

    Raises:
        StatsForRoot, UsageError: as `instance_stats`.
        NoLibrary: the library that looks into processes is missing.
    """
    found, folder = _running(name, user, uid, environ)
    os.close(folder)
    return measure(found)


def _running(
    name: str, user: str, uid: int, environ: Mapping[str, str]
) -> tuple[instances.Instance, int]:
    """Return the record of an instance that runs, and its directory of /proc."""
    if user and uid != 0:
        raise StatsForRoot
    owner = instances.owner_asked(user, uid, environ)
    found = instances.find(owner, name) if instances.is_name(name) else None
    folder = -1 if found is None else instances.open_running(found, owner)
    if found is None or folder < 0:
        raise UsageError(text="no instance found")
    return found, folder


def _pages(
    instance: instances.Instance, folder: int, *, as_json: bool, once: bool, clear: bool
) -> Iterator[str]:
    before, at = measure(instance), time.monotonic()
    pause = _FIRST_S
    while True:
        select.select([], [], [], pause)
        try:
            instances.look(folder)
        except OSError:
            return
        now, then = measure(instance), time.monotonic()
        if as_json:
            yield _json(now)
        else:
            percent = max(0.0, 100e-9 * (now.cpu_ns - before.cpu_ns) / (then - at))
            yield (_CLEAR if clear and not once else "") + table(instance.name, now, percent)
        if once:
            return
        before, at, pause = now, then, _EACH_S


def measure(instance: instances.Instance) -> Usage:
    """Return what an instance uses at this moment.

    Raises:
        NoLibrary: the library that looks into processes is missing.
    """
    if instance.cgroup:
        found = _of_groups(instance.pid)
        if found is not None:
            return found
    return _of_processes(instance.pid)


# ---- control groups ----


def _of_groups(pid: int) -> Usage | None:
    from apptainer_py.host.cgroups.driver import CgroupError, read_file
    from apptainer_py.host.cgroups.tree import parse_tree

    try:
        tree = parse_tree(read_file("/proc/self", "mountinfo"), read_file(f"/proc/{pid}", "cgroup"))
        paths = {
            controller: one.own_directory()
            for one in tree.hierarchies
            for controller in one.controllers
        }
        return usage_of(paths, unified=tree.unified_only)
    except CgroupError:
        return None


def usage_of(paths: Mapping[str, str], *, unified: bool) -> Usage:
    """Return what the groups in these directories, by controller, have used.

    Raises:
        CgroupError: a file cannot be read.
    """
    if unified:
        from apptainer_py.host.cgroups import stats_v2

        found = stats_v2.collect(paths[""])
    else:
        from apptainer_py.host.cgroups import stats_v1

        found = stats_v1.collect(dict(paths))
    memory = found["memory"]["usage"]
    return Usage(
        cpu_ns=found["cpu"]["usage"].get("total", 0),
        memory=memory.get("usage", 0),
        limit=min(memory["limit"] or _installed(), _installed()),
        read=_moved(found, "Read"),
        written=_moved(found, "Write"),
        pids=found["pids"].get("current", 0),
    )


def _moved(found: Mapping[str, Any], operation: str) -> int:
    entries = found["blkio"].get("ioServiceBytesRecursive", ())
    return sum(one.get("value", 0) for one in entries if one.get("op") == operation)


# ---- processes ----


def _space(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0  # one that is closed to us, as the first process is


def _of_processes(first: int) -> Usage:
    packages.allow()
    try:
        import psutil  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise NoLibrary from None
    below = {first}
    every = sorted(psutil.process_iter(["ppid"]), key=lambda one: one.pid)
    living = {one.pid: one for one in every}
    grown = True
    while grown:
        more = {pid for pid, one in living.items() if one.info["ppid"] in below} - below
        below |= more
        grown = bool(more)
    spaces = {_space(pid) for pid in below} - {0}
    below |= {pid for pid in living if _space(pid) in spaces}
    rows = []
    for pid in below & living.keys():
        try:
            rows.append(_of_one(living[pid]))
        except psutil.NoSuchProcess:
            continue  # it has ended since
    cpu, memory, read, written = (
        (sum(column) for column in zip(*rows, strict=True)) if rows else (0,) * 4
    )
    return Usage(
        cpu_ns=int(cpu * 1e9),
        memory=int(memory),
        limit=_installed(),
        read=int(read),
        written=int(written),
        pids=len(rows),
    )


def _of_one(process: Any) -> tuple[float, int, int, int]:
    facts = process.as_dict(["cpu_times", "memory_info", "io_counters"])
    spent, held, moved = facts["cpu_times"], facts["memory_info"], facts["io_counters"]
    # None: it is somebody else's.
    read, written = (moved.read_bytes, moved.write_bytes) if moved else (0, 0)
    return spent.user + spent.system, held.rss, read, written


def size_text(count: float) -> str:
    """Return a number of bytes with four digits at most."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.4g}{_UNITS[unit]}"


def _installed() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(name: str, usage: Usage, percent: float) -> str:
    """Return the numbers as a table with its head."""
    row = (
        name,
        f"{percent:.2f}%",
        f"{size_text(usage.memory)} / {size_text(usage.limit)}",
        f"{100 * usage.memory / usage.limit:.2f}%",
        f"{size_text(usage.read)} / {size_text(usage.written)}",
        str(usage.pids),
    )
    widths = [max(len(head), len(cell)) + 4 for head, cell in zip(_HEAD, row, strict=True)]
    widths[-1] = 0
    return "".join(
        "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in (_HEAD, row)
    )


def _json(usage: Usage) -> str:
    import json

    moved = [{"op": "Read", "value": usage.read}, {"op": "Write", "value": usage.written}]
    shown = {
        "cpu_stats": {"cpu_usage": {"total_usage": usage.cpu_ns}},
        "memory_stats": {"usage": {"usage": usage.memory, "limit": usage.limit}},
        "pids_stats": {"current": usage.pids},
        "blkio_stats": {"io_service_bytes_recursive": moved},
    }
    return json.dumps(shown, indent="\t") + "\n"
