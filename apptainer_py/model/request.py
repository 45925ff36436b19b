"""What the user asked for: a command line and its environment, understood but not yet judged."""

from __future__ import annotations

from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Which rank of several this is. The launcher (starter/launcher_scan.c) looks for the same names.
# What one program has started in the job of another has the variables of both: the inner one's
# come first.
RANK_VARIABLES = (
    "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID",
    "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK", "SLURM_PROCID",
)  # fmt: skip


class Invocation(Record):
    """What every command line has.

    `message_level` is −4 (fatal errors only) to 5 (everything); `colour` None leaves the choice to
    the terminal; `notes` are messages that the parser has for the user: (level, text).
    """

    command: str
    message_level: int = 1
    colour: bool | None = None
    config_file: str = ""
    build_config: bool = False
    trace_file: str = ""
    notes: tuple[tuple[int, str], ...] = ()


class Parsed(Invocation):
    """A command that starts no container.

    `command` is the whole path ("sif list"; "" for the program alone), `options` has every option
    of that command by its long name. `help` asks for the help text of `command`.
    """

    options: Mapping[str, object]
    arguments: tuple[str, ...] = ()
    help: bool = False


class ActionRequest(Invocation):
    """An `exec`, `run`, `shell` or `test`: a field for each option, named after it.

    Options that imply others are resolved: `compat` has set `containall`, `no_init`, `no_umask`,
    `no_eval` and `writable_tmpfs`; `containall` has set `contain`, `cleanenv`, `ipc` and `pid`;
    `hostname` has set `uts`; `no_pid` has cleared `pid`. Empty text means "not given".
    `instance` is the name that an instance will have, or the one that is joined; its command is
    `start` or `run`. `bind` and `mount` are as typed: commas inside one entry are not split yet.
    """

    image: str
    arguments: tuple[str, ...] = ()
    instance: str = ""

    add_caps: str = ""
    allow_setuid: bool = False
    app: str = ""
    apply_cgroups: str = ""
    bind: tuple[str, ...] = ()
    blkio_weight: int = 0
    blkio_weight_device: tuple[str, ...] = ()
    boot: bool = False
    cdi_dirs: tuple[str, ...] = ()
    cleanenv: bool = False
    compat: bool = False
    compat32: bool = False
    contain: bool = False
    containall: bool = False
    containlibs: tuple[str, ...] = ()
    cpu_shares: int = -1
    cpus: str = ""
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    cwd: str = ""
    device: tuple[str, ...] = ()
    dns: str = ""
    drop_caps: str = ""
    env: tuple[tuple[str, str], ...] = ()
    env_file: tuple[str, ...] = ()
    fakeroot: bool = False
    fusemount: tuple[str, ...] = ()
    home: str = ""
    hostname: str = ""
    ignore_fakeroot_command: bool = False
    ignore_subuid: bool = False
    ignore_userns: bool = False
    intel_hpu: bool = False
    ipc: bool = False
    keep_privs: bool = False
    memory: str = ""
    memory_reservation: str = ""
    memory_swap: str = ""
    mount: tuple[str, ...] = ()
    net: bool = False
    netns_path: str = ""
    network: str = ""
    network_args: tuple[str, ...] = ()
    no_env: tuple[str, ...] = ()
    no_eval: bool = False
    no_home: bool = False
    no_init: bool = False
    no_mount: tuple[str, ...] = ()
    no_nv: bool = False
    no_pid: bool = False
    no_privs: bool = False
    no_rocm: bool = False
    no_umask: bool = False
    nv: bool = False
    nvccli: bool = False
    oci: bool = False
    oom_kill_disable: bool = False
    overlay: tuple[str, ...] = ()
    passphrase: bool = False
    pem_path: str = ""
    pid: bool = False
    pid_file: str = ""
    pids_limit: int = 0
    rocm: bool = False
    runscript_timeout: str = ""
    scratch: tuple[str, ...] = ()
    security: tuple[str, ...] = ()
    sharens: bool = False
    shell: str = ""
    underlay: bool = False
    unsquash: bool = False
    userns: bool = False
    uts: bool = False
    workdir: str = ""
    writable: bool = False
    writable_tmpfs: bool = False


# Options that limit resources, and what each is where it is not given.
_LIMITS = (
    ("blkio_weight", 0),
    ("blkio_weight_device", ()),
    ("cpu_shares", -1),
    ("cpus", ""),
    ("cpuset_cpus", ""),
    ("cpuset_mems", ""),
    ("memory", ""),
    ("memory_reservation", ""),
    ("memory_swap", ""),
    ("oom_kill_disable", False),
    ("pids_limit", 0),
)


def limits_of(action: ActionRequest) -> dict[str, object]:
    """Return the options that limit resources and were given: name of the field → value."""
    return {name: value for name, unset in _LIMITS if (value := getattr(action, name)) != unset}
