"""Capabilities by name, and which of them a payload gets (capabilities(7))."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.build import SYSCONFDIR
from apptainer_py.base.errors import ApptainerError, ConfigError, NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.plan import Capabilities

NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE"
    " NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO"
    " SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME"
    " SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG"
    " WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
ALL = (1 << len(NAMES)) - 1
FILE = f"{SYSCONFDIR}/capability.json"
_FILE_BYTES = 1 << 20


class RootOnly(ApptainerError):
    """An option that only root may use."""

    message = "Could not configure {option}: {option} requires root privileges"


def parse_names(text: str, doing: str) -> int:
    """Return a mask for a comma list of names, with or without CAP_, in any case, or "all"."""
    mask = 0
    for word in text.split(","):
        name = word.strip().upper().removeprefix("CAP_")
        if not name:
            continue
        if name == "ALL":
            mask |= ALL
        elif name in NAMES:
            mask |= 1 << NAMES.index(name)
        else:
            log.warning(f"won't {doing} unknown capability: {word.strip()}")
    return mask


def _allowed(uid: int, gids: list[int], keys: tuple[str, ...] = ("users", "groups")) -> int:
    """Return what the administrator's capability.json grants this user and these groups."""
    import grp
    import json
    import pwd

    try:
        fd = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ConfigError(file=FILE, reason=(error.strerror or "unreadable").lower()) from None
    with open(fd, "rb") as source:
        facts = os.fstat(fd)
        if facts.st_uid != 0 or facts.st_mode & 0o022 or not os.path.isfile(f"/proc/self/fd/{fd}"):
            raise ConfigError(file=FILE, reason="must be owned by root and writable by nobody else")
        text = source.read(_FILE_BYTES)
    try:
        table = json.loads(text) if text.strip() else {}
        names: list[str] = []
        if "users" in keys:
            names += table.get("users", {}).get(pwd.getpwuid(uid).pw_name, [])
        if "groups" in keys:
            for gid in gids:
                names += table.get("groups", {}).get(grp.getgrgid(gid).gr_name, [])
        return parse_names(",".join(names), "grant")
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(file=FILE, reason="is not JSON of the form users, groups") from None
    except KeyError:
        return 0


def _warn_refused(mask: int) -> None:
    if mask:
        words = ",".join(f"CAP_{name}" for bit, name in enumerate(NAMES) if mask >> bit & 1)
        log.warning(f"not authorized to add capability: {words}")


def for_user(add: str, drop: str, uid: int, *, userns: bool) -> Capabilities:
    """Return an ordinary user's payload sets: nothing but what was asked for and granted."""
    if not add:
        return (0, 0, 0, 0, 0)
    wanted = parse_names(add, "add")
    if not userns:
        # Stage 2 runs Python with the payload's identity, which in this flow must hold nothing.
        if wanted & _allowed(uid, os.getgroups()):
            raise NotSupported(what="a capability from capability.json in the setuid flow")
        _warn_refused(wanted)
        return (0, 0, 0, 0, 0)
    wanted &= ~parse_names(drop, "drop")
    return (wanted, wanted, wanted, wanted, wanted)


def for_root(
    options: Mapping[str, object], default: str, permitted: int, *, target_is_root: bool
) -> Capabilities:
    """Return root's payload sets, never more than root has here.

    `options` has keep_privs, no_privs, add_caps, drop_caps; `default` is the directive
    `root default capabilities`: full, file or no.
    """
    if options["keep_privs"]:
        held = permitted
    elif options["no_privs"] or default == "no":
        held = 0
    elif default == "file":
        held = _allowed(0, [], keys=("users",)) & permitted
    else:
        held = permitted
    held |= parse_names(str(options["add_caps"]), "add") & permitted
    held &= ~parse_names(str(options["drop_caps"]), "drop")
    if target_is_root:
        return (held, held, 0, held, 0)
    return (held, held, held, held, held)
