"""`--security`: the payload's identity, its seccomp filter, its label; loaded when it is given."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError, NotSupported
from apptainer_py.base.record import Record
from apptainer_py.engines.apptainer import capabilities
from apptainer_py.engines.apptainer.mounts import User
from apptainer_py.host import seccomp
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.plan import Capabilities, ContainerPlan
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

KEYS = ("uid", "gid", "seccomp", "apparmor", "selinux")
_GROUPS_MAX = protocol.LIMIT_GROUPS
_IDS = 2**32 - 1  # the last number means "no change" in every call
_SYS_ADMIN = 1 << 21
_NO_GAIN = protocol.PLANFLAG_NO_NEW_PRIVS
_NONE = (0, 0, 0, 0, 0)


class SecurityWrong(LaunchError):
    """--security says something that cannot be."""

    message = "{text}"
    hint = "it takes " + ", ".join(f"{key}:…" for key in KEYS)


class IdentityWrong(LaunchError):
    """The payload cannot have the ids that were asked for."""

    message = "Could not configure target UID/GID: {reason}"


class NotApplied(LaunchError):
    """What was asked for cannot be in force, so nothing is started."""

    message = "failed to apply security configuration: {reason}"


class Security(Record):
    """What --security asks for; None and "" are not given."""

    uid: int | None = None
    gids: tuple[int, ...] = ()
    seccomp: str = ""
    label: tuple[int, str] | None = None

    @property
    def changes_identity(self) -> bool:
        """Return whether the payload is to be somebody else's, and held like one."""
        return self.uid is not None or bool(self.gids)


def read(words: tuple[str, ...], facts: Facts) -> Security:
    """Return what the options say, as far as this caller may say it.

    Raises:
        LaunchError: a key is not known, is there twice, or cannot be applied here.
    """
    given: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition(":")
        if key not in KEYS:
            raise SecurityWrong(text=f"--security {word}: there is no such setting")
        if not value:
            raise SecurityWrong(text=f"--security {word}: its value is missing")
        if key in given:
            raise SecurityWrong(text=f"--security: {key} is there twice")
        given[key] = value
    uid, gids = _identity(given, facts)
    return Security(uid=uid, gids=gids, seccomp=given.get("seccomp", ""), label=_label(given))


def _identity(given: dict[str, str], facts: Facts) -> tuple[int | None, tuple[int, ...]]:
    for key in ("uid", "gid"):
        if key not in given:
            continue
        if facts.flow == protocol.FLOW_SETUID:
            reason = f"{key} security feature with suid mode requires root privileges"
            raise IdentityWrong(reason=reason)
    uid = _number(given["uid"], "UID") if "uid" in given else None
    gids = tuple(_number(text, "GID") for text in given.get("gid", "").split(":") if text)
    if uid is not None and uid == facts.uid:
        uid = None
    if facts.flow == protocol.FLOW_USERNS and len(gids) > 1:
        log.warning("--security gid: in a user namespace there is no group but the first")
        gids = gids[:1]
    if len(gids) > _GROUPS_MAX:
        log.warning(f"you can't specify more than {_GROUPS_MAX} group IDs")
    return uid, gids[:_GROUPS_MAX]


def _number(text: str, kind: str) -> int:
    reason = "invalid syntax"
    if text.isascii() and text.isdigit():
        if len(text) <= 10 and int(text) < _IDS:
            return int(text)
        reason = "value out of range"
    raise IdentityWrong(
        reason=f'failed to parse provided {kind}: strconv.ParseUint: parsing "{text}": {reason}'
    )


def _label(given: dict[str, str]) -> tuple[int, str] | None:
    """Return the label; without it the payload would not be what was meant."""
    wanted = [(key, kind, is_on) for key, kind, is_on in _LABELS if key in given]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise NotApplied(reason="you can't specify both an apparmor profile and a SELinux label")
    key, kind, is_on = wanted[0]
    if not is_on():
        raise NotApplied(reason=f"{key} requested, but is not enabled or supported on this system")
    text = given[key]
    if len(os.fsencode(text)) >= protocol.LIMIT_LABEL_BYTES or not text.isprintable():
        raise SecurityWrong(text=f"--security {key}: this is no label")
    return (kind, text)


def _apparmor_is_on() -> bool:
    try:
        with open("/sys/module/apparmor/parameters/enabled", "rb") as answer:
            return answer.read(1) == b"Y"
    except OSError:
        return False


def _selinux_is_on() -> bool:
    return os.path.exists("/sys/fs/selinux/enforce")


_LABELS = (
    ("apparmor", protocol.LABELKIND_APPARMOR, _apparmor_is_on),
    ("selinux", protocol.LABELKIND_SELINUX, _selinux_is_on),
)


def capabilities_of(action: ActionRequest, facts: Facts) -> Capabilities:
    """Return the sets of a payload that root starts as somebody else: what is named, no more."""
    for option in ("keep_privs", "allow_setuid"):
        if getattr(action, option):
            raise capabilities.RootOnly(option="--" + option.replace("_", "-"))
    if facts.flow == protocol.FLOW_USERNS:
        return _NONE
    held = capabilities.parse_names(action.add_caps, "add") & facts.permitted
    held &= ~capabilities.parse_names(action.drop_caps, "drop")
    return (held, held, held, held, held)


def apply(
    security: Security,
    plan: ContainerPlan,
    prepared: Prepared,
    action: ActionRequest,
    facts: Facts,
) -> ContainerPlan:
    """Return the plan with the payload's identity; fill the payload's filter and account.

    Raises:
        ApptainerError: root may not have that, or the filter is not to be had.
    """
    if security.changes_identity:
        _check_names(action, facts)
        # Root's own supplementary groups are nothing for somebody else.
        held = protocol.PLANFLAG_GROUPS | protocol.PLANFLAG_NO_NEW_PRIVS
        plan = plan.replace(
            uid=facts.uid if security.uid is None else security.uid,
            gid=security.gids[0] if security.gids else facts.gid,
            groups=security.gids if len(security.gids) > 1 else (),
            caps=capabilities_of(action, facts),
            flags=plan.flags | (held if facts.flow == protocol.FLOW_ROOT else held & _NO_GAIN),
        )
        prepared.user = _account(prepared.user, plan.uid, plan.gid, facts)
    if security.label:
        prepared.label = packed(security.label)
        plan = plan.replace(flags=plan.flags | protocol.PLANFLAG_LABEL)
    if security.seccomp:
        prepared.filter = program(security, plan.caps)
        # Else the kernel would take no filter from this payload (seccomp(2)).
        if not plan.caps[0] & _SYS_ADMIN:
            plan = plan.replace(flags=plan.flags | protocol.PLANFLAG_NO_NEW_PRIVS)
    return plan


def _check_names(action: ActionRequest, facts: Facts) -> None:
    """Refuse, in a user namespace, what the payload's own one below it is too small for."""
    if facts.flow != protocol.FLOW_USERNS:
        return
    for option in ("add_caps", "instance", "sharens"):
        if getattr(action, option):
            name = {"instance": "an instance"}.get(option, "--" + option.replace("_", "-"))
            raise NotSupported(what=f"--security uid and gid in a user namespace, with {name}")


def packed(label: tuple[int, str]) -> list[bytes]:
    """Return a label for stage 2's message."""
    return [b"%d" % label[0], os.fsencode(label[1])]


def _account(user: User, uid: int, gid: int, facts: Facts) -> User:
    """Return the payload's account: the target's name, in the caller's home.

    A number of a user's own choice, which nobody has, is the user's under another number.
    """
    import pwd

    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = user.name
        if facts.uid == 0:
            log.warning(f"user: unknown userid {uid}")
            name = str(uid)
    return User(name, user.home, user.home_source, uid, gid)


def program(security: Security, caps: Capabilities) -> list[bytes]:
    """Return the filter for stage 2's message: the program in hexadecimal digits, and its flags.

    Raises:
        SeccompError: the profile cannot be read or compiled.
    """
    from apptainer_py.host import seccomp_profile
    from apptainer_py.runtime.interpreter import load_container_module

    load_container_module()
    names = frozenset(
        f"CAP_{name}" for bit, name in enumerate(capabilities.NAMES) if caps[3] >> bit & 1
    )
    profile = seccomp_profile.read(security.seccomp)
    resolved = seccomp_profile.resolve(profile, names, os.uname().machine)
    code, flags = seccomp.program(resolved, None)
    return [code.hex().encode(), b"%d" % flags]
