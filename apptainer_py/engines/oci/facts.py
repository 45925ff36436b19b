"""What compiling a configuration needs to know of this machine and of the caller."""

from __future__ import annotations

import os

from apptainer_py.base.files import read_at_most
from apptainer_py.model.oci_plan import HostFacts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_call import OciCall

_SPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
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


def host_facts(call: OciCall) -> HostFacts:
    """Return the facts."""
    uid = os.geteuid()
    spaces = {}
    for name in _SPACES:
        try:
            spaces[name] = os.stat(f"/proc/self/ns/{name}").st_ino
        except FileNotFoundError:
            continue
    status = read_file("/proc/self/status")
    permitted = status.partition(b"\nCapPrm:")[2].split(None, 1)[0]
    return HostFacts(
        uid=uid,
        gid=os.getegid(),
        rootless=is_rootless(call, uid),
        cgroup2=os.path.exists(_CGROUP2_MAGIC_PLACE),
        own_spaces=spaces,
        permitted=int(permitted, 16),
        last_capability=int(read_file("/proc/sys/kernel/cap_last_cap")),
    )
