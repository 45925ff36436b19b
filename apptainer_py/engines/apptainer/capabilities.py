"""Capabilities by name, and which of them a payload gets (capabilities(7))."""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.build import SYSCONFDIR
from apptainer_py.base.errors import ApptainerError, ConfigError
from apptainer_py.base.files import read_at_most
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.plan import Capabilities

NAMES = tuple(protocol.CAPABILITY_NAMES.values())
ALL = (1 << len(NAMES)) - 1
FILE = f"{SYSCONFDIR}/capability.json"
FILE_BYTES = 1 << 16  # CONFIG_FILE_BYTES, to which C holds it too
# Escapes, and what needs one; no name of an account has them.
_NOT_IN_FILE = (b"\\", b"\x7f")
_NOT_THE_FORM = "is not JSON of the form users, groups: each once, of names with lists, no escapes"


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
            log.warning(f"won't {doing} unknown capability: CAP_{name}")
    return mask


def read_file() -> bytes:
    """Return the administrator's capability.json; nothing where there is none.

    Raises:
        ConfigError: it cannot be read, or somebody other than root could have written it.
    """
    try:
        fd = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(file=FILE, reason=(error.strerror or "unreadable").lower()) from None
    facts = os.fstat(fd)
    if facts.st_uid != 0 or facts.st_mode & 0o022 or not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise ConfigError(file=FILE, reason="must be owned by root and writable by nobody else")
    return read_at_most(fd, FILE_BYTES)


def _members(value: object) -> tuple[tuple[str, object], ...]:
    """Return the members of an object, or of a null."""
    if not isinstance(value, tuple | None):
        raise TypeError
    return value or ()


def entries(text: bytes) -> list[tuple[str, str, list[str]]]:
    """Return (section, name, capabilities) for each entry; starter/grants.c reads the same form.

    Raises:
        ConfigError: the text has another form.
    """
    import json

    if not text.strip():
        return []
    found = []
    seen: set[str] = set()
    try:
        if any(odd in text for odd in _NOT_IN_FILE):
            raise ValueError
        for section, names in _members(json.loads(text.decode(), object_pairs_hook=tuple)):
            if section not in ("users", "groups") or section in seen:
                raise TypeError
            seen.add(section)
            for name, words in _members(names):
                if not isinstance(words, list | None):
                    raise TypeError
                if not all(isinstance(word, str) for word in words or []):
                    raise TypeError
                found.append((section, name, words or []))
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(file=FILE, reason=_NOT_THE_FORM) from None
    return found


def _allowed(uid: int, gids: list[int]) -> int:
    """Return what the administrator's capability.json grants this user and these groups."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = ""
    mask = 0
    for section, name, words in entries(read_file()):
        if section == "users":
            ours = name == user
        else:
            try:
                ours = bool(gids) and grp.getgrnam(name).gr_gid in gids
            except KeyError:
                ours = False
        if ours:
            mask |= sum({1 << NAMES.index(word[4:]) for word in words if _is_name(word)})
    return mask


def _is_name(word: str) -> bool:
    return word[:4] == "CAP_" and word[4:] in NAMES


def _warn(what: str, mask: int) -> None:
    if mask:
        words = ",".join(f"CAP_{name}" for bit, name in enumerate(NAMES) if mask >> bit & 1)
        log.warning(f"{what}: {words}")


def of_a_namespace() -> int:
    """Return what the creator of a user namespace has in it: all that the kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as source:
        return ALL & ((2 << int(source.read(16))) - 1)


def for_user(add: str, drop: str, uid: int, permitted: int, *, userns: bool) -> Capabilities:
    """Return an ordinary user's payload sets: nothing but what was asked for and granted.

    `permitted` is what the setuid flow can hand out at all.  In a user namespace everything is
    granted: it is worth nothing outside.
    """
    wanted = parse_names(add, "add")
    dropped = parse_names(drop, "drop")
    if wanted and userns:
        wanted &= of_a_namespace()
    elif wanted:
        granted = _allowed(uid, os.getgroups())
        _warn("not authorized to add capability", wanted & ~granted)
        wanted &= granted & ~dropped
        _warn("this system cannot give the capability", wanted & ~permitted)
        wanted &= permitted
    wanted &= ~dropped
    return (wanted, wanted, wanted, wanted, wanted)


def for_root(options: Mapping[str, object], default: str, permitted: int) -> Capabilities:
    """Return root's payload sets, never more than root has here.

    `options` has keep_privs, no_privs, add_caps, drop_caps; `default` is the directive
    `root default capabilities`: full, file or no.
    """
    match default_of_root(options, default):
        case "full":
            held = permitted
        case "file":
            held = _allowed(0, []) & permitted
        case _:
            held = 0
    held |= parse_names(str(options["add_caps"]), "add") & permitted
    held &= ~parse_names(str(options["drop_caps"]), "drop")
    # Uid 0 keeps these over execve; an inheritable set would outlive a change to another user.
    return (held, held, 0, held, 0)


def default_of_root(options: Mapping[str, object], default: str) -> str:
    """Return full, file or no: what the command line makes of `root default capabilities`."""
    if options["no_privs"]:
        return "no"
    return "full" if options["keep_privs"] else default
