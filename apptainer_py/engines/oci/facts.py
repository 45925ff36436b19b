"""What compiling a configuration needs to know of this machine and of the caller."""

from __future__ import annotations

import os

from apptainer_py.base.files import read_at_most
from apptainer_py.model.oci_plan import HostFacts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import CgroupWish, IdMap, Row

_SPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
# Where systemd of an ordinary user is found, if not at the usual place.
USER_BUS = "DBUS_SESSION_BUS_ADDRESS"
_WHOLE_MAP = [b"0", b"0", b"4294967295"]
_CGROUP2_MAGIC_PLACE = "/sys/fs/cgroup/cgroup.controllers"


def read_file(path: str, size: int = 65536) -> bytes:
    """Return the beginning of a file.

    Raises:
        OSError: it cannot be read.
    """
    return read_at_most(os.open(path, os.O_RDONLY | os.O_CLOEXEC), size)


def is_rootless(call: OciCall, uid: int) -> bool:
    """Return whether the caller lacks the machine's root rights, or --rootless says so."""
    if call.rootless in ("true", "false"):
        return call.rootless == "true"
    return uid != 0 or read_file("/proc/self/uid_map").split() != _WHOLE_MAP


def has_cgroup2() -> bool:
    """Return whether control groups are of version 2 alone."""
    return os.path.exists(_CGROUP2_MAGIC_PLACE)


def _inode_of(path: str) -> int:
    return os.stat(path).st_ino


def _joined_maps(path: str) -> tuple[tuple[IdMap, ...], tuple[IdMap, ...]]:
    """Return the maps of a user namespace, by the maps of the process whose file it is."""
    os.stat(path)
    parts = path.split("/")
    if len(parts) != 5 or parts[1] != "proc" or parts[3:] != ["ns", "user"]:
        raise OSError(0, "its maps are unknown")
    return _maps(f"/proc/{parts[2]}/uid_map"), _maps(f"/proc/{parts[2]}/gid_map")


def _maps(path: str) -> tuple[IdMap, ...]:
    from apptainer_py.model.oci_plan import IdMap

    found = []
    for line in read_file(path).splitlines():
        inside, outside, count = map(int, line.split())
        found.append(IdMap(inside=inside, outside=outside, count=count))
    return tuple(found)


def _resctrl() -> tuple[str, ...]:
    try:
        names = os.listdir("/sys/fs/resctrl/info")
    except OSError:
        return ()
    return tuple(name for name in ("L3", "MB") if name in names)


def host_facts(call: OciCall, environment: Mapping[str, str]) -> HostFacts:
    """Return the facts."""
    uid = os.geteuid()
    rootless = is_rootless(call, uid)
    spaces = {}
    for name in _SPACES:
        try:
            spaces[name] = os.stat(f"/proc/self/ns/{name}").st_ino
        except FileNotFoundError:
            continue
    status = read_file("/proc/self/status")
    permitted = status.partition(b"\nCapPrm:")[2].split(None, 1)[0]

    def mount_cgroups(
        wish: CgroupWish,
        target: str,
        options: tuple[str, ...],
        private: bool,  # noqa: FBT001 as HostFacts says
    ) -> list[Row]:
        from apptainer_py.host.cgroups import find_manager

        bus = environment.get(USER_BUS, "")
        manager = find_manager(call.cgroup_manager, wish, rootless=rootless, bus=bus)
        return manager.mount_rows(target, options, private)

    return HostFacts(
        uid=uid,
        gid=os.getegid(),
        rootless=rootless,
        cgroup2=has_cgroup2(),
        own_spaces=spaces,
        permitted=int(permitted, 16),
        last_capability=int(read_file("/proc/sys/kernel/cap_last_cap")),
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
        kcore=os.path.exists("/proc/kcore"),
        resctrl=_resctrl(),
        inode_of=_inode_of,
        joined_maps=_joined_maps,
        mount_cgroups=mount_cgroups,
    )
