"""The configuration that `runc spec` writes, and ways to change it and compile it."""

from __future__ import annotations

import copy
from typing import Any

from apptainer_py.engines.oci.compile import compile_bundle
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import CgroupWish, CreateOptions, HostFacts, OciPlan, Row
from tests import oci_spec

GONE = object()
BUNDLE = "/bundle"
SPACES = ("pid", "network", "ipc", "uts", "mount")


def cgroup_rows(
    wish: CgroupWish, target: str, options: tuple[str, ...], private: bool
) -> list[Row]:
    """Stand in for the rows of host/cgroups: one that can be recognised."""
    words = ",".join(options)
    return [Row(op=protocol.OP_FS, first=b"cgroup", second=f"{target} {words} {private}".encode())]


HOST = HostFacts(
    uid=0,
    gid=0,
    rootless=False,
    cgroup2=False,
    own_spaces={"net": 4026531840},
    permitted=(1 << 41) - 1,
    last_capability=40,
    mount_cgroups=cgroup_rows,
)

# Of the paths that are hidden, and of the mounts, as many as a test needs.
_TARGETS = ("/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup")
SPEC: dict[str, Any] = copy.deepcopy(oci_spec.SPEC)
SPEC["process"]["terminal"] = True
SPEC["mounts"] = [mount for mount in SPEC["mounts"] if mount["destination"] in _TARGETS]
SPEC["linux"]["maskedPaths"] = ["/proc/acpi", "/proc/kcore"]
SPEC["linux"]["readonlyPaths"] = ["/proc/bus", "/proc/sys"]


def edited(*changes: tuple[str, Any]) -> dict[str, Any]:
    """Return the configuration with values changed: ("linux/namespaces/0/type", "user")."""
    config = copy.deepcopy(SPEC)
    for path, value in changes:
        *above, last = path.split("/")
        node: Any = config
        for name in above:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        if value is GONE:
            node.pop(last, None)
        elif isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = copy.deepcopy(value)
    return config


def with_mount(**mount: Any) -> dict[str, Any]:
    """Return a configuration with this mount alone, at /x unless it says otherwise."""
    return edited(("mounts", [{"destination": "/x", **mount}]))


def spaces(*names: str | dict[str, str]) -> list[dict[str, str]]:
    """Return namespaces[] of these names, or of entries as they are."""
    return [{"type": name} if isinstance(name, str) else name for name in names]


def plan_of(
    config: dict[str, Any],
    *,
    host: HostFacts = HOST,
    no_pivot: bool = False,
    systemd: bool = False,
) -> OciPlan:
    """Compile for a container named "box"."""
    options = CreateOptions(container_id="box", no_pivot=no_pivot, systemd_cgroup=systemd)
    return compile_bundle(config, BUNDLE, host, options)


def rows(plan_rows: tuple[Row, ...], *ops: int) -> list[Row]:
    """Return the rows of some operations."""
    return [row for row in plan_rows if row.op in ops]


_NAMES = {
    value: name[3:]
    for name, value in vars(protocol).items()
    if name.startswith("OP_") and type(value) is int
}


def short(row: Row) -> tuple[Any, ...]:
    """Return what a row says, without its sentence: name, flags, numbers, words."""
    words = tuple(word.decode() for word in (row.first, row.second) if word is not None)
    return (_NAMES[row.op], row.flags, row.numbers, *words)
