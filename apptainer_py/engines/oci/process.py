"""`process` of config.json as numbers: ids, capabilities, limits, scheduling, environment."""

from __future__ import annotations

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.spaces import outside
from apptainer_py.engines.oci.texts import IN_INIT, STARTING, path_bytes, quoted
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import ProcessSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.oci_plan import HostFacts, IdMap

CAPABILITIES = protocol.CAPABILITIES
_SETS = ("effective", "permitted", "inheritable", "bounding", "ambient")

# getrlimit(2), as asm-generic numbers them
RLIMITS = {
    f"RLIMIT_{name}": number
    for number, name in enumerate(
        (
            "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS",
            "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
        )
    )
}  # fmt: skip

_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_SCHEDULER_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_IO_CLASS_SHIFT = 13

_DOMAINS = {"LINUX": 0x0000, "LINUX32": 0x0008}

_MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
_MEMORY_FLAGS = {
    "MPOL_F_STATIC_NODES": 1 << 15,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_NUMA_BALANCING": 1 << 13,
}
_NODES_MAX = 1024
_CPUS_MAX = 1024

_NO_ID = 0xFFFFFFFF
_DEFAULT_UMASK = 0o022


def compile_process(
    process: dict[str, Any],
    linux: dict[str, Any],
    host: HostFacts,
    warnings: list[str],
    *,
    preserve_fds: int,
    tenant: bool,
) -> ProcessSpec:
    """Compile `process`, which has passed check_process(), and what of `linux` acts on it.

    Raises:
        ConfigWrong: a value without meaning for the kernel.
    """
    user = process.get("user", {})
    uid, gid = user.get("uid", 0), user.get("gid", 0)
    _check_ids(uid, gid, user.get("additionalGids", ()), host)
    return ProcessSpec(
        arguments=_arguments(process["args"]),
        environment=_environment(process.get("env", ())),
        cwd=path_bytes(process["cwd"], "process.cwd", f"mkdir {process['cwd']}: {{error}}"),
        uid=uid,
        gid=gid,
        groups=None if host.rootless else tuple(user.get("additionalGids", ())),
        umask=user.get("umask", None if tenant else _DEFAULT_UMASK),
        capabilities=_capabilities(process.get("capabilities"), host, warnings),
        no_new_privileges=process.get("noNewPrivileges", False),
        apparmor_profile=process.get("apparmorProfile", ""),
        selinux_label=process.get("selinuxLabel", ""),
        scheduler=_scheduler(process.get("scheduler")),
        io_priority=_io_priority(process.get("ioPriority"), tenant=tenant),
        personality=_personality(linux.get("personality"), warnings),
        memory_policy=_memory_policy(linux.get("memoryPolicy")),
        preserve_fds=preserve_fds,
        in_user_namespace=any(item.get("type") == "user" for item in linux.get("namespaces", ())),
        tenant=tenant,
    )


def compile_rlimits(limits: list[dict[str, Any]]) -> tuple[tuple[int, int, int], ...]:
    """Compile process.rlimits.

    Raises:
        ConfigWrong: a type is unknown or comes twice, or a soft limit is above the hard one.
    """
    rows: dict[int, tuple[int, int, int]] = {}
    for limit in limits:
        name = limit.get("type", "")
        number = RLIMITS.get(name)
        soft, hard = limit.get("soft", 0), limit.get("hard", 0)
        if number is None:
            text = f"wrong rlimit value: {name}"
        elif number in rows:
            text = f"duplicated rlimit: {name}"
        elif soft > hard:
            text = (
                f"{IN_INIT}error setting rlimits for ready process: error setting rlimit type"
                f" {number}: invalid argument"
            )
        else:
            rows[number] = (number, soft, hard)
            continue
        raise ConfigWrong(key="process.rlimits", text=text)
    return tuple(rows.values())


def check_affinity(affinity: dict[str, Any]) -> tuple[str, str]:
    """Return initial and final of process.execCPUAffinity.

    Raises:
        ConfigWrong: one is no list of CPUs.
    """
    for name in ("initial", "final"):
        why = _list_problem(affinity.get(name, ""), _CPUS_MAX)
        if why:
            text = f"bad CPUAffinity.{name.title()}: {why}"
            raise ConfigWrong(key=f"process.execCPUAffinity.{name}", text=text)
    return affinity.get("initial", ""), affinity.get("final", "")


def check_mapped(process: dict[str, Any], uids: tuple[IdMap, ...], gids: tuple[IdMap, ...]) -> None:
    """Check that a process in a user namespace with these maps can have its ids.

    Raises:
        ConfigWrong: one is not mapped.
    """
    user = process.get("user", {})
    uid, gid = user.get("uid", 0), user.get("gid", 0)
    text = ""
    if gids and any(outside(gids, group) is None for group in user.get("additionalGids", ())):
        text = "setgroups: invalid argument"
    elif gids and outside(gids, gid) is None:
        text = f"cannot setgid to unmapped gid {gid} in user namespace"
    elif uids and outside(uids, uid) is None:
        text = f"cannot setuid to unmapped uid {uid} in user namespace"
    if text:
        raise ConfigWrong(key="process.user", text=f"{IN_INIT}unable to setup user: {text}")


def _check_ids(uid: int, gid: int, groups: tuple[int, ...], host: HostFacts) -> None:
    text = ""
    if uid == _NO_ID:
        text = f"cannot setuid to unmapped uid {uid} in user namespace"
    elif gid == _NO_ID:
        text = f"cannot setgid to unmapped gid {gid} in user namespace"
    elif groups and host.rootless:
        text = "cannot set any additional groups in a rootless container"
    elif _NO_ID in groups:
        text = "setgroups: invalid argument"
    if text:
        raise ConfigWrong(key="process.user", text=f"{IN_INIT}unable to setup user: {text}")


def _arguments(words: list[str]) -> tuple[bytes, ...]:
    for word in words:
        if "\0" in word:
            first = quoted(words[0])
            why = "executable file not found in $PATH" if "\0" in words[0] else "invalid argument"
            raise ConfigWrong(key="process.args", text=f"{IN_INIT}exec: {first}: {why}")
    return tuple([word.encode() for word in words])


def _environment(words: list[str]) -> tuple[bytes, ...]:
    """As runc: a later variable of the same name wins, and takes the later place."""
    seen: dict[str, str] = {}
    for word in words:
        name, equals, _ = word.partition("=")
        why = ""
        if not equals:
            why = "missing '='"
        elif not name:
            why = "name cannot be empty"
        elif "\0" in word:
            why = "contains nul byte (\\x00)"
            name = quoted(name)
            raise ConfigWrong(
                key="process.env", text=f"{IN_INIT}invalid environment variable {name}: {why}"
            )
        if why:
            raise ConfigWrong(
                key="process.env", text=f"{IN_INIT}invalid environment variable: {why}"
            )
        seen.pop(name, None)
        seen[name] = word
    return tuple([word.encode() for word in seen.values()])


def _capabilities(
    sets: dict[str, list[str]] | None, host: HostFacts, warnings: list[str]
) -> tuple[int, int, int, int, int] | None:
    """Without the key none is dropped, as by runc; a name that this kernel lacks is warned of."""
    if sets is None:
        return None
    unknown: set[str] = set()
    masks: dict[str, int] = {}
    for name in _SETS:
        mask = 0
        for word in sets.get(name, ()):
            number = CAPABILITIES.get(word, host.last_capability + 1)
            if number > host.last_capability:
                unknown.add(word)
            else:
                mask |= 1 << number
        masks[name] = mask
    if unknown:
        names = " ".join(sorted(unknown))
        warnings.append(f"ignoring unknown or unavailable capabilities: [{names}]")
    # What is effective must be permitted, and the kernel says so without naming a key.
    if masks["effective"] & ~masks["permitted"]:
        text = f"{IN_INIT}unable to apply caps: can't apply capabilities: operation not permitted"
        raise ConfigWrong(key="process.capabilities.effective", text=text)
    # The kernel's rule (capabilities(7)); who asks for more is told, and goes without.
    had = masks["permitted"] & masks["inheritable"]
    warnings += [
        f"can't raise ambient capability {word}: operation not permitted"
        for word in sets.get("ambient", ())
        if not had >> CAPABILITIES.get(word, 0) & 1 and word not in unknown
    ]
    return (
        masks["effective"],
        masks["permitted"],
        masks["inheritable"],
        masks["bounding"],
        masks["ambient"],
    )


def _scheduler(value: dict[str, Any] | None) -> tuple[int, int, int, int, int, int, int] | None:
    if value is None:
        return None
    policy = value.get("policy", "")
    nice, priority = value.get("nice", 0), value.get("priority", 0)
    times = value.get("runtime", 0), value.get("deadline", 0), value.get("period", 0)
    words = value.get("flags", ())
    text = _scheduler_problem(policy, nice, priority, times)
    unknown = [word for word in words if word not in _SCHEDULER_FLAGS]
    if unknown and not text:
        text = f"{IN_INIT}invalid scheduler flag: {unknown[0]}"
    if text:
        raise ConfigWrong(key="process.scheduler", text=text)
    flags = 0
    for word in words:
        flags |= _SCHEDULER_FLAGS[word]
    return (_POLICIES[policy], nice, priority, flags, *times)


def _scheduler_problem(policy: str, nice: int, priority: int, times: tuple[int, ...]) -> str:
    if not policy:
        return "scheduler policy is required"
    if policy in ("SCHED_OTHER", "SCHED_BATCH") and not -20 <= nice <= 19:
        return f"invalid scheduler.nice: {nice} when scheduler.policy is {policy}"
    if priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        return "scheduler.priority can only be specified for SchedFIFO or SchedRR policy"
    if any(times) and policy != "SCHED_DEADLINE":
        return "scheduler runtime/deadline/period can only be specified for SchedDeadline policy"
    if policy not in _POLICIES:
        return f"{IN_INIT}invalid scheduler policy: {policy}"
    if priority < 0:
        return f"{IN_INIT}error setting scheduler: invalid argument"
    return ""


def _io_priority(value: dict[str, Any] | None, *, tenant: bool) -> int | None:
    if value is None:
        return None
    level, name = value.get("priority", 0), value.get("class", "")
    if not 0 <= level <= 7:
        text = f"invalid ioPriority.Priority: {level}"
    elif name not in _IO_CLASSES:
        text = f"invalid ioPriority.Class: {quoted(name)}"
        if tenant:
            text = f"{STARTING}invalid io priority class: {name}"
    else:
        return int(_IO_CLASSES[name] << _IO_CLASS_SHIFT | level)
    raise ConfigWrong(key="process.ioPriority", text=text)


def _personality(value: dict[str, Any] | None, warnings: list[str]) -> int | None:
    if value is None:
        return None
    domain = value.get("domain", "")
    if domain not in _DOMAINS:
        text = f"invalid personality domain {domain}"
        raise ConfigWrong(key="linux.personality.domain", text=text)
    if value.get("flags"):
        flags = " ".join(value["flags"])
        warnings.append(
            f"ignoring unsupported personality flags: [{flags}] because personality flag has not"
            " supported at this time"
        )
    return _DOMAINS[domain]


def _memory_policy(value: dict[str, Any] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    mode, nodes = value.get("mode", ""), value.get("nodes", "")
    text = ""
    if mode not in _MEMORY_MODES:
        text = f"invalid memory policy mode {quoted(mode)}"
    flags = 0
    for word in value.get("flags", ()):
        flags |= _MEMORY_FLAGS.get(word, 0)
        if word not in _MEMORY_FLAGS and not text:
            text = f"invalid memory policy flag {quoted(word)}"
    why = _list_problem(nodes, _NODES_MAX)
    if why and not text:
        text = f"invalid memory policy nodes {quoted(nodes)}: {why}"
    mask = 0 if text else _list_mask(nodes)
    if not text:
        text = _memory_nodes_problem(mode, mask, flags)
    if text:
        raise ConfigWrong(key="linux.memoryPolicy", text=text)
    return _MEMORY_MODES[mode] | flags, mask


def _memory_nodes_problem(mode: str, mask: int, flags: int) -> str:
    """set_mempolicy(2): which modes take nodes."""
    count = mask.bit_count()
    if mode in ("MPOL_DEFAULT", "MPOL_LOCAL") and count:
        return f"memory policy mode requires 0 nodes but got {count}"
    if mode not in ("MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED") and not count:
        return "memory policy mode requires at least one node but got 0"
    both = _MEMORY_FLAGS["MPOL_F_STATIC_NODES"] | _MEMORY_FLAGS["MPOL_F_RELATIVE_NODES"]
    if flags & both == both:
        return (
            "memory policy flags MPOL_F_STATIC_NODES and MPOL_F_RELATIVE_NODES exclude each other"
        )
    if flags & _MEMORY_FLAGS["MPOL_F_NUMA_BALANCING"] and mode != "MPOL_BIND":
        return "memory policy flag MPOL_F_NUMA_BALANCING requires mode MPOL_BIND"
    return ""


def _list_problem(text: str, limit: int) -> str:
    """Return what is wrong with a list like "0-3,8", or ""."""
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        for word in (first, last) if dash else (first,):
            if not (word.isascii() and word.isdigit()):
                return f"strconv.ParseUint: parsing {quoted(word)}: invalid syntax"
            if len(word) > 9 or int(word) >= limit:
                return f"values larger than {limit - 1} are not supported"
        if dash and int(first) > int(last):
            return f"invalid range {quoted(part)}"
    return ""


def _list_mask(text: str) -> int:
    mask = 0
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        end = int(last) if dash else int(first)
        mask |= (1 << end + 1) - (1 << int(first))
    return mask
