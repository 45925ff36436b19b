"""Who each process of a launch is: the identity table of docs/architecture.md, as tests read it."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

FLOWS = {
    "setuid": [],
    "userns": ["-u"],
    "root": [],
    "fakeroot": ["-f"],
    "fakeroot-u": ["-u", "-f"],
}
NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time")
PAYLOAD_BIRTH = "EXEC_PAYLOAD"
# Which hooks of an engine run where.
HOOKS = {
    "MASTER": [
        "INIT_CONFIG",
        "PREPARE_CONFIG",
        "CREATE_CONTAINER",
        "POST_START_PROCESS",
        "MONITOR_CONTAINER",
        "CLEANUP_CONTAINER",
    ],
    "STAGE2": ["INIT_CONFIG", "START_PROCESS"],
}

# `dropped` is keeper from the payload's execve on, START the host helpers. No process but the
# payload after its execve is dumpable; no set is inheritable or ambient. Words: mixed is (user, 0,
# 0, user); all is what the caller's bounding set, or root, permits; own the caller's bounding set;
# admin is CAP_SYS_ADMIN. Namespaces: those of the host, of the container, or the host's but for the
# user namespace (inner). Of fakeroot, the setuid flow with -f, and fakeroot-u: inner ids are root's
# of the container's namespace, the user's outside; every is all that the kernel knows, in all sets.
TABLE = """
flow    process       ids    effective  permitted  bounding  no_new_privs  namespaces
setuid  KEEPER        mixed  none       all        all       no            host
setuid  dropped       user   none       none       none      yes           host
setuid  MASTER        user   none       none       none      yes           host
setuid  RPC           user   admin      admin      admin     no            container
setuid  READER        user   none       none       admin     yes           container
setuid  IMAGE_SERVER  user   none       none       none      yes           host
setuid  SHIM          user   none       none       none      yes           container
setuid  STAGE2        user   none       none       none      yes           container
setuid  payload       user   none       none       none      yes           container
userns  KEEPER        user   none       none       own       no            host
userns  dropped       user   none       none       none      yes           inner
userns  MASTER        user   none       none       own       yes           host
userns  HOST_HELPER   user   none       none       own       no            host
userns  RPC           user   admin      admin      admin     no            container
userns  METHODS       user   admin      admin      admin     no            container
userns  READER        user   none       none       admin     yes           container
userns  IMAGE_SERVER  user   none       none       none      yes           inner
userns  SHIM          user   none       none       none      yes           container
userns  STAGE2        user   none       none       none      yes           container
userns  payload       user   none       none       none      yes           container
root    KEEPER        user   none       all        all       no            host
root    dropped       user   none       all        all       no            host
root    MASTER        user   all        all        all       no            host
root    HOST_HELPER   user   all        all        all       no            host
root    RPC           user   all        all        all       no            container
root    METHODS       user   admin      admin      admin     no            container
root    IMAGE_SERVER  user   none       none       none      yes           host
root    SHIM          user   all        all        all       no            container
root    STAGE2        user   all        all        all       no            container
root    payload       user   all        all        all       no            container
fakeroot KEEPER       mixed  none       all        all       no            host
fakeroot dropped      user   none       none       none      yes           host
fakeroot MASTER       user   none       none       none      yes           host
fakeroot RPC          inner  every      every      every     no            container
fakeroot IMAGE_SERVER user   none       none       none      yes           host
fakeroot SHIM         inner  every      every      every     yes           container
fakeroot STAGE2       inner  every      every      every     yes           container
fakeroot payload      inner  every      every      every     yes           container
fakeroot-u KEEPER       user   none       none       own       no            host
fakeroot-u dropped      user   none       none       own       yes           host
fakeroot-u MASTER       user   none       none       own       yes           host
fakeroot-u RPC          inner  every      every      every     no            container
fakeroot-u IMAGE_SERVER user   none       none       own       yes           host
fakeroot-u SHIM         inner  every      every      every     yes           container
fakeroot-u STAGE2       inner  every      every      every     yes           container
fakeroot-u payload      inner  every      every      every     yes           container
"""


def hooks_of(flow: str) -> dict[str, list[str]]:
    """Return which hooks run where; without an interpreter stage 2 has nothing to prepare."""
    return HOOKS if flow.startswith("fakeroot") else {**HOOKS, "STAGE2": ["START_PROCESS"]}


def table(flow: str) -> dict[str, dict[str, str]]:
    """Return the rows of a flow by process."""
    head, *rows = (line.split() for line in TABLE.strip().splitlines())
    dicts = [dict(zip(head, row, strict=True)) for row in rows]
    return {row["process"]: row for row in dicts if row["flow"] == flow}


def own_capabilities() -> int:
    """Return what root may do here: some machines have no CAP_SYS_RESOURCE."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    raise AssertionError("no CapBnd")


def host_namespaces() -> list[int]:
    """Return the inode numbers of this process's namespaces, in the order of the trace."""
    return [os.stat(f"/proc/self/ns/{name}").st_ino for name in NAMESPACES]


def expected(
    row: dict[str, str], who: pwd.struct_passwd, differing: set[str], *, outside: bool = False
) -> dict[str, object]:
    """Return a row in the words of the trace; `differing` are the container's own namespaces.

    `outside` is how the host sees it.
    """
    every = (2 << int(Path("/proc/sys/kernel/cap_last_cap").read_text())) - 1
    more = every if row["permitted"] == "every" and row["process"] != "RPC" else 0
    sets = {
        "every": every,
        "none": 0,
        "all": own_capabilities(),
        "own": own_capabilities(),
        "admin": 1 << 21,
    }
    inner = row["ids"] == "inner" and not outside
    user, group = (0, 0) if inner else (who.pw_uid, who.pw_gid)
    spaces = {"host": set(), "inner": {"user"}, "container": set(differing)}[row["namespaces"]]
    if row["flow"] in ("userns", "fakeroot", "fakeroot-u") and row["namespaces"] == "container":
        spaces |= {"user"}
    return {
        "uid": [user, 0, 0, user] if row["ids"] == "mixed" else [user] * 4,
        "gid": [group] * 4,
        "caps": [sets[row["effective"]], sets[row["permitted"]], more, sets[row["bounding"]], more],
        "no_new_privs": int(row["no_new_privs"] == "yes"),
        "securebits": 0,
        "dumpable": 0,
        "differ": spaces,
    }


def traced(event: dict[str, object]) -> dict[str, object]:
    """Return the identity in a line of the trace."""
    pairs = zip(NAMESPACES, event["namespaces"], host_namespaces(), strict=True)
    names = ("uid", "gid", "caps", "no_new_privs", "securebits", "dumpable")
    found = {name: event[name] for name in names}
    return {**found, "differ": {name for name, here, host in pairs if here != host}}


def seen(pid: int, *, dumpable: int = 0) -> dict[str, object]:
    """Return the identity of a running process as /proc shows it to root.

    A process that is not dumpable shows as root's there, so `dumpable` cannot be told for root's.
    """
    facts: dict[str, list[str]] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        facts[name] = value.split()
    uid = [int(word) for word in facts["Uid"]]
    if uid[1] != 0:
        dumpable = int(os.stat(f"/proc/{pid}/environ").st_uid != 0)
    numbers = [os.stat(f"/proc/{pid}/ns/{name}").st_ino for name in NAMESPACES]
    pairs = zip(NAMESPACES, numbers, host_namespaces(), strict=True)
    return {
        "uid": uid,
        "gid": [int(word) for word in facts["Gid"]],
        "caps": [int(facts[f"Cap{name}"][0], 16) for name in ("Eff", "Prm", "Inh", "Bnd", "Amb")],
        "no_new_privs": int(facts["NoNewPrivs"][0]),
        "securebits": 0,
        "dumpable": dumpable,
        "differ": {name for name, here, host in pairs if here != host},
    }
