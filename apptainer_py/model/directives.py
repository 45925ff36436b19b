"""The administrator's file as data: its values, what becomes of each, what they decide."""

from __future__ import annotations

from apptainer_py.base.record import Record
from apptainer_py.model.directive_table import ROWS, Config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

ENFORCED = "ENFORCED"
ADVISORY = "ADVISORY"
REFUSES = "REFUSES"

_BY_USERNS = (
    "allow_container_dir",
    "allow_container_sif",
    "allow_container_squashfs",
    "limit_container_groups",
    "limit_container_owners",
    "limit_container_paths",
)
_LIMITS = ("limit container owners", "limit container groups", "limit container paths")


class Directive(Record):
    """One row of starter/config.def; `allowed` and `enforcement` are explained there."""

    key: str
    kind: str
    default: str
    allowed: tuple[str, ...]
    enforcement: str
    sentence: str

    @property
    def field(self) -> str:
        """The name of the directive's field in `Config`."""
        return field_of(self.key)

    @property
    def is_list(self) -> bool:
        """Whether the directive may be repeated."""
        return self.kind == "LIST"


class Person(Record):
    """A user whom the rules are asked about; groups are (name, number)."""

    name: str
    uid: int
    groups: tuple[tuple[str, int], ...] = ()


class Surroundings(Record):
    """What the rules depend on beside the file.

    `setuid_obstacles` says why the setuid flow is closed to everybody.
    """

    setuid_obstacles: tuple[str, ...] = ()
    user_namespaces: bool = True


class Decision(Record):
    """One answer, and the directive (or the fact) that gives it."""

    subject: str
    answer: str
    rule: str


def field_of(key: str) -> str:
    """Return the name of a directive's field in `Config`."""
    return key.replace(" ", "_").replace("-", "_")


def directives() -> tuple[Directive, ...]:
    """Return all directives, in the order of the table."""
    return tuple(
        Directive(
            key=key,
            kind=kind,
            default=default,
            allowed=tuple(allowed.split("|")) if allowed else (),
            enforcement=enforcement,
            sentence=sentence,
        )
        for _, key, kind, default, allowed, enforcement, sentence in ROWS
    )


def config_from(values: Mapping[str, Any]) -> Config:
    """Return the record for values by key, as `parse_config` gives them.

    Raises:
        TypeError: a key is no directive.
    """
    return Config(**{field_of(key): value for key, value in values.items()})


def value_text(value: object) -> str:
    """Return a value as the file would have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value)


def changed(config: Config, *enforcements: str) -> tuple[Directive, ...]:
    """Return the directives of these enforcements whose value is not the default."""
    defaults = Config()
    return tuple(
        directive
        for directive in directives()
        if directive.enforcement in enforcements
        and getattr(config, directive.field) not in (getattr(defaults, directive.field), ())
    )


def unenforceable(config: Config) -> tuple[str, ...]:
    """Return the restrictions that a user escapes in a user namespace of his own.

    There he mounts and runs any image without us; only a host without unprivileged user namespaces
    holds him to them.
    """
    defaults = Config()
    return tuple(
        directive.key
        for directive in directives()
        if directive.field in _BY_USERNS
        and getattr(config, directive.field) != getattr(defaults, directive.field)
    )


def _names(items: tuple[str, ...], name: str, number: int) -> bool:
    return any(item == name or _is_number(item, number) for item in items)


def _is_number(item: str, number: int) -> bool:
    return item.isascii() and item.isdecimal() and item.lstrip("0") == str(number).lstrip("0")


def setuid_decision(config: Config, person: Person) -> Decision:
    """Return whether the file lets a user into the setuid flow, and which directive says so.

    Users and groups add up: being named in one of the two lists is enough. Root needs neither.
    """
    subject = "setuid flow"
    if person.uid == 0:
        return Decision(subject=subject, answer="not needed", rule="the user is root")
    if not config.allow_setuid:
        return Decision(subject=subject, answer="refused", rule="allow setuid")
    users, groups = config.allow_setuid_users, config.allow_setuid_groups
    if not users and not groups:
        return Decision(subject=subject, answer="allowed", rule="allow setuid")
    if _names(users, person.name, person.uid):
        return Decision(subject=subject, answer="allowed", rule="allow setuid users")
    if any(_names(groups, name, number) for name, number in person.groups):
        return Decision(subject=subject, answer="allowed", rule="allow setuid groups")
    rule = "allow setuid users" if users else "allow setuid groups"
    return Decision(subject=subject, answer="refused", rule=rule)


def kernel_squashfs(config: Config) -> bool:
    """Return whether the kernel mounts an ordinary user's squashfs in the setuid flow."""
    if config.allow_setuid_mount_squashfs == "iflimited":
        limits = (
            config.limit_container_owners
            or config.limit_container_groups
            or config.limit_container_paths
        )
        return bool(limits)
    return config.allow_setuid_mount_squashfs == "yes"


def decisions(config: Config, person: Person, around: Surroundings) -> tuple[Decision, ...]:
    """Return everything that the file decides about one user's launches."""
    return (
        *_flows(config, person, around),
        *_images(config, around),
        *_switches(config),
    )


def _flows(config: Config, person: Person, around: Surroundings) -> tuple[Decision, ...]:
    setuid = setuid_decision(config, person)
    if setuid.answer == "allowed" and around.setuid_obstacles:
        setuid = setuid.replace(answer="refused", rule=around.setuid_obstacles[0])
    if not around.user_namespaces:
        answer, rule = "refused", "the kernel lets no ordinary user make a user namespace"
    else:
        answer, rule = "allowed" if config.allow_user_ns else "refused", "allow user ns"
    return (setuid, Decision(subject="user-namespace flow", answer=answer, rule=rule))


def _images(config: Config, around: Surroundings) -> tuple[Decision, ...]:
    kinds = (
        ("SIF image", "allow container sif"),
        ("squashfs image", "allow container squashfs"),
        ("sandbox directory", "allow container dir"),
        ("encrypted image", "allow container encrypted"),
        ("ext3 image", "allow container extfs"),
    )
    table = {directive.key: directive for directive in directives()}
    found = []
    for subject, key in kinds:
        allowed = getattr(config, field_of(key))
        later = "refused (not supported yet)" if table[key].enforcement == REFUSES else "allowed"
        found.append(Decision(subject=subject, answer=later if allowed else "refused", rule=key))
    for key in _LIMITS:
        if items := getattr(config, field_of(key)):
            said = f"only {key.rsplit(' ', 1)[1]} {value_text(items)}"
            found.append(Decision(subject="any image", answer=said, rule=key))
    reader = "kernel" if kernel_squashfs(config) else "image server"
    found.append(
        Decision(subject="squashfs is read by", answer=reader, rule="allow setuid-mount squashfs")
    )
    return tuple(found)


def _switches(config: Config) -> tuple[Decision, ...]:
    size = "no limit" if config.memory_fs_type == "ramfs" else f"{config.sessiondir_max_size} MiB"
    rows = (
        ("binds by the user", config.user_bind_control, "user bind control"),
        ("IPC namespace", config.allow_ipc_ns, "allow ipc ns"),
        ("PID namespace", config.allow_pid_ns, "allow pid ns"),
        ("UTS namespace", config.allow_uts_ns, "allow uts ns"),
        ("overlay", config.enable_overlay != "no", "enable overlay"),
        ("underlay", config.enable_underlay != "no", "enable underlay"),
    )
    return (
        *(
            Decision(subject=subject, answer="allowed" if allowed else "refused", rule=key)
            for subject, allowed, key in rows
        ),
        Decision(
            subject="loop devices", answer=str(config.max_loop_devices), rule="max loop devices"
        ),
        Decision(subject="session directory", answer=size, rule="sessiondir max size"),
        Decision(subject="audit record", answer=config.audit_log, rule="audit log"),
    )
