"""A container of the OCI runtime specification as data: what the `oci` engine compiles and does."""

from __future__ import annotations

from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Row(Record):
    """One operation of server INIT in starter/protocol.def.

    `fd` names a descriptor that the driver passes with the row ("" for none); `says` is the text of
    its failure, with {error} for what errno means.
    """

    op: int
    flags: int = 0
    numbers: tuple[int, ...] = ()
    first: bytes | None = None
    second: bytes | None = None
    fd: str = ""
    says: str = "{error}"


class IdMap(Record):
    """One line of uid_map or gid_map (user_namespaces(7))."""

    inside: int
    outside: int
    count: int


class Hook(Record):
    """One entry of `hooks` (config.md, POSIX-platform Hooks); `timeout_seconds` 0 means none."""

    kind: str
    path: str
    arguments: tuple[str, ...] = ()
    environment: tuple[str, ...] | None = None
    timeout_seconds: int = 0


class ProcessSpec(Record):
    """What `process` of config.json asks for, resolved to numbers.

    Capability sets are bit masks in the order effective, permitted, inheritable, bounding, ambient;
    None keeps what the process has. `scheduler` is (policy, nice, priority, flags, runtime_ns,
    deadline_ns, period_ns); `io_priority` and `memory_policy` (mode with flags, nodes as a bit
    mask) are as the system calls take them. An `empty` one runs no program: it stays, and reaps.
    A `tied` one is killed when the launch is.
    """

    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...]
    cwd: bytes
    uid: int
    gid: int
    groups: tuple[int, ...] | None = None
    umask: int | None = None
    capabilities: tuple[int, int, int, int, int] | None = None
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    selinux_label: str = ""
    scheduler: tuple[int, int, int, int, int, int, int] | None = None
    io_priority: int | None = None
    personality: int | None = None
    memory_policy: tuple[int, int] | None = None
    preserve_fds: int = 0
    in_user_namespace: bool = False
    tenant: bool = False
    empty: bool = False
    tied: bool = False


class CgroupWish(Record):
    """Where a container's processes belong; `resources` is config.json's own object.

    `properties` are a systemd unit's: (name, (D-Bus signature, value)).
    """

    path: str
    resources: dict[str, Any]
    scope_prefix: str = ""
    slice_parent: str = ""
    private_namespace: bool = False
    owner: tuple[int, int] | None = None
    properties: tuple[tuple[str, tuple[str, Any]], ...] = ()


class HostFacts(Record):
    """What compiling needs to know of this machine and caller; the callables ask it, if need be.

    `inode_of` returns the inode of a namespace file, `joined_maps` the id maps of a user namespace
    that is to be joined (None: unknown); both raise OSError. `resctrl` names what the machine can
    divide: "L3", "MB". `mount_cgroups` returns the rows that mount cgroups for a wish: target,
    options, whether the container has a cgroup namespace of its own.
    """

    uid: int
    gid: int
    rootless: bool
    cgroup2: bool
    own_spaces: dict[str, int]
    permitted: int
    last_capability: int
    selinux: bool = False
    kcore: bool = True
    resctrl: tuple[str, ...] = ()
    inode_of: Callable[[str], int] | None = None
    joined_maps: Callable[[str], tuple[tuple[IdMap, ...], tuple[IdMap, ...]]] | None = None
    mount_cgroups: Callable[[CgroupWish, str, tuple[str, ...], bool], list[Row]] | None = None


class CreateOptions(Record):
    """The flags of `create` and `run` that shape the plan."""

    container_id: str
    no_pivot: bool = False
    no_new_keyring: bool = False
    preserve_fds: int = 0
    systemd_cgroup: bool = False
    rootless: bool = False


class ExecOptions(Record):
    """The flags of `exec` that shape the plan."""

    container_id: str
    preserve_fds: int = 0
    cgroups: tuple[str, ...] = ()
    ignore_paused: bool = False


class OciPlan(Record):
    """All that is done for one container or one more process in it, in order.

    `join_paths` are (CLONE_NEW* kind, path); `new_spaces` lacks CLONE_NEWCGROUP, which is a flag of
    `mapped`. `setup` ends with ROOT_BUNDLE (or is TENANT), `assemble` with what hooks may see, and
    `inside` begins with ENTER: between the two come resources, hooks and RUN_HOOKS. `rlimits` are
    (number, soft, hard). A row's `fd` is a name in `idmaps`, whose entries without maps are paths
    of user namespaces. HOME is not in the environment unless it was given: it is looked up in the
    container. `affinity` is (initial, final) of execCPUAffinity, `warnings` are for the log.
    """

    join_paths: tuple[tuple[int, str], ...]
    new_spaces: int
    time_offsets: tuple[int, int, int, int] | None
    uid_maps: tuple[IdMap, ...]
    gid_maps: tuple[IdMap, ...]
    prepare: tuple[Row, ...]
    mapped: Row
    setup: tuple[Row, ...]
    assemble: tuple[Row, ...]
    inside: tuple[Row, ...]
    process: ProcessSpec
    rlimits: tuple[tuple[int, int, int], ...]
    cgroup: CgroupWish
    hooks: tuple[Hook, ...]
    terminal: bool = False
    console_size: tuple[int, int] = (0, 0)
    seccomp: dict[str, Any] | None = None
    resctrl: dict[str, Any] | None = None
    netdevs: dict[str, str] | None = None
    annotations: dict[str, str] = {}
    root: str = ""
    idmaps: tuple[tuple[str, tuple[IdMap, ...], tuple[IdMap, ...]], ...] = ()
    affinity: tuple[str, str] = ("", "")
    warnings: tuple[str, ...] = ()
