"""`capability add|avail|drop|list`: the administrator's capability.json, shown and changed.

Nothing is printed here: the answers are texts for stdout, and warnings.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError, ConfigError
from apptainer_py.base.record import Record
from apptainer_py.engines.apptainer import capabilities
from apptainer_py.host.config_file import replace
from apptainer_py.model.capability_texts import TEXTS

_DOING = {"add": "add", "drop": "drop", "list": "list", "avail": "list available"}
_SECTIONS = {"user": "users", "group": "groups"}


class CapabilityError(ApptainerError):
    """A capability command cannot be carried out."""

    message = "Unable to {doing} capabilities: {reason}"


class Grants(Record):
    """capability.json as it is read: of each section the names, and what each was granted."""

    users: dict[str, list[str]]
    groups: dict[str, list[str]]

    def section(self, kind: str) -> dict[str, list[str]]:
        """Return the entries of a kind, "user" or "group"."""
        return self.users if kind == "user" else self.groups


def add(words: str, *, user: str = "", group: str = "") -> list[str]:
    """Grant capabilities; return the warnings.

    Raises:
        CapabilityError: the caller is not root, or there is no such user or group.
    """
    return _change("add", words, user, group)


def drop(words: str, *, user: str = "", group: str = "") -> list[str]:
    """Take capabilities back; return the warnings.

    Raises:
        CapabilityError: the caller is not root, or there is no such user or group, or nothing
            was granted.
    """
    return _change("drop", words, user, group)


def listing(name: str | None, *, as_json: bool = False) -> str:
    """Return what was granted: to all, or to the user and the group `name`.

    Raises:
        CapabilityError: nothing was.
    """
    if name == "":
        raise _failure("list", "while listing capabilities: must specify a user or a group")
    grants = _read("list")
    shown = {
        kind: {
            who: words
            for who, words in grants.section(kind).items()
            if words and name in (None, who)
        }
        for kind in _SECTIONS
    }
    if not any(shown.values()):
        whom = "users or groups" if name is None else f"user/group {name}"
        raise _failure("list", f"no capability set for {whom}")
    if as_json:
        return _json({_SECTIONS[kind]: entries for kind, entries in shown.items()}) + "\n"
    return "".join(
        f"{who} [{kind}]: {','.join(words)}\n"
        for kind, entries in shown.items()
        for who, words in entries.items()
    )


def avail(words: str, *, as_json: bool = False) -> str:
    """Return what capabilities allow: all of them, or those that are named.

    Raises:
        CapabilityError: one of the names is none.
    """
    known, unknown = _names(words or "all")
    if unknown:
        raise _failure("avail", f"unknown capabilities found in: {','.join(unknown)}")
    if as_json:
        return _json({word: TEXTS[word[4:]] for word in known}) + "\n"
    return "".join(f"{f'{word}:':<22} {TEXTS[word[4:]]}\n" for word in known)


def _failure(command: str, reason: object) -> CapabilityError:
    return CapabilityError(doing=_DOING[command], reason=reason)


def _json(data: object) -> str:
    import json

    return json.dumps(data, indent="\t", ensure_ascii=False)


def _names(words: str) -> tuple[list[str], list[str]]:
    """Return the names that are capabilities, each once, and those that are none."""
    given = [word.strip().upper() for word in words.split(",")] if words else []
    full = [word if word.startswith("CAP_") else f"CAP_{word}" for word in given]
    if "CAP_ALL" in full:
        return [f"CAP_{name}" for name in sorted(TEXTS)], []
    known = [word for word in full if word[4:] in capabilities.NAMES]
    return list(dict.fromkeys(known)), [word for word in full if word not in known]


def _read(command: str) -> Grants:
    doing = "opening capability config file"
    try:
        text = capabilities.read_file()
        doing = "parsing capability config data"
        entries = capabilities.entries(text)
    except ConfigError as error:
        raise _failure(command, f"while {doing}: {error}") from None
    found: dict[str, dict[str, list[str]]] = {"users": {}, "groups": {}}
    for section, name, words in entries:
        entry = found[section].setdefault(name, [])
        entry += [word for word in words if word not in entry]
    return Grants(**found)


def _change(command: str, words: str, user: str, group: str) -> list[str]:
    if os.geteuid() != 0:
        reason = "while managing capability file: only root user can manage capabilities"
        raise _failure(command, reason)
    if not user and not group:
        raise _failure(command, "no user or group specified")
    known, unknown = _names(words)
    warnings = [f"Ignoring unknown capabilities: [{' '.join(unknown)}]"] if unknown else []
    with _Lock():
        grants = _read(command)
        for kind, name in (("user", user), ("group", group)):
            if name:
                warnings += _CHANGES[command](grants.section(kind), known, kind, name)
        _write(command, grants)
    return warnings


class _Lock:
    """One change at a time: who comes later waits, and reads what the other has written.

    The file is root's alone, so that nobody else can keep root waiting.
    """

    def __enter__(self) -> None:
        import fcntl

        name = f"{os.path.dirname(capabilities.FILE)}/.capability.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = os.open(name, flags, 0o600)
        except OSError as error:
            raise ConfigError(file=name, reason=f"cannot be opened: {error.strerror}") from None
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _check_exists(command: str, kind: str, name: str) -> None:
    import grp
    import pwd

    try:
        _ = pwd.getpwnam(name) if kind == "user" else grp.getgrnam(name)
    except (KeyError, ValueError):
        text = f"while setting capabilities for {kind} {name}: {kind} does not exist"
        raise _failure(command, text) from None
    if any(c < " " or c in '"\\\x7f' for c in name):
        text = f"the name of {kind} {name} holds a character that capability.json cannot hold"
        raise _failure(command, text)


def _add(held: dict[str, list[str]], known: list[str], kind: str, name: str) -> list[str]:
    _check_exists("add", kind, name)
    warnings = []
    entry = held.get(name, [])
    for word in known:
        if word in entry:
            warnings.append(f"Won't add capability '{word}', already assigned to {kind} {name}")
            continue
        entry.append(word)
        if kind == "user":
            warnings += [
                f"Adding '{word}' capability will likely allow user {name} to escalate privilege "
                "on the host",
                f"Use 'apptainer-py capability drop --user {name} {word}' to reverse this action "
                "if necessary",
            ]
    if entry:
        held[name] = entry
    return warnings


def _drop(held: dict[str, list[str]], known: list[str], kind: str, name: str) -> list[str]:
    _check_exists("drop", kind, name)
    if name not in held:
        raise _failure(
            "drop",
            f"while setting capabilities for {kind} {name}: {kind} '{name}' doesn't have any "
            "capability assigned",
        )
    entry = held[name]
    warnings = []
    for word in known:
        if word in entry:
            entry.remove(word)
        else:
            warnings.append(f"Won't drop capability '{word}', not assigned to {kind} {name}")
    if not entry:
        del held[name]
    return warnings


_CHANGES = {"add": _add, "drop": _drop}


def _write(command: str, grants: Grants) -> None:
    """Write the file whole, in the form that starter/grants.c reads."""
    text = _json({name: entries for name, entries in grants.asdict().items() if entries}) + "\n"
    if len(text.encode("utf-8", "surrogateescape")) > capabilities.FILE_BYTES:
        raise _failure(command, f"{capabilities.FILE} would become larger than the starter reads")
    replace(capabilities.FILE, text)
