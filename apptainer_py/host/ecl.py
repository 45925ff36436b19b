"""The execution control list, ecl.toml: whose signature an image needs, by its directory."""

from __future__ import annotations

import os
import stat

from apptainer_py.base.build import SYSCONFDIR
from apptainer_py.base.errors import ConfigError
from apptainer_py.base.files import read_at_most
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

ECL_FILE = f"{SYSCONFDIR}/ecl.toml"
KEYRING = f"{SYSCONFDIR}/global-pgp-public"
MODES = ("whitelist", "whitestrict", "blacklist")
_FILE_BYTES = 1 << 20
_KEYRING_BYTES = 1 << 24
_FINGERPRINT_CHARS = 40
_KEYS = {"activated": bool, "legacyinsecure": bool, "execgroup": list}
_GROUP_KEYS = {"tagname": str, "mode": str, "dirpath": str, "keyfp": list}


class EclWrong(ConfigError):
    """The list cannot be followed, so nothing is started by it."""

    message = "while validating ECL configuration: {reason}"


class ExecGroup(Record):
    """A rule: images of a directory ("" is every one), and the keys that it is about."""

    tag: str
    mode: str
    directory: str
    fingerprints: frozenset[str]


class Ecl(Record):
    """The administrator's execution control list; with `legacy` old signatures count, too."""

    active: bool
    legacy: bool
    groups: tuple[ExecGroup, ...]

    def group_for(self, path: str) -> ExecGroup | None:
        """Return the first rule for an image at a resolved path: its own directory's, or any's."""
        directory = os.path.dirname(path)
        return next((g for g in self.groups if g.directory in ("", directory)), None)


def read(*, of_root: bool) -> Ecl:
    """Return the administrator's list; `of_root` says that root alone may have written it.

    Raises:
        ConfigError: it cannot be read, is not root's alone, or says what it must not.
    """
    import tomllib

    text = _read_file(ECL_FILE, _FILE_BYTES, of_root=of_root)
    if text is None:
        return Ecl(active=False, legacy=False, groups=())
    try:
        data = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise EclWrong(reason=f"{ECL_FILE}: {error}") from None
    return _check(data)


def read_keyring(*, of_root: bool) -> bytes:
    """Return the administrator's public keys; nothing where there are none.

    Raises:
        ConfigError: they cannot be read, or are not root's alone.
    """
    return _read_file(KEYRING, _KEYRING_BYTES, of_root=of_root) or b""


def _read_file(path: str, limit: int, *, of_root: bool) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(file=path, reason=(error.strerror or "unreadable").lower()) from None
    facts = os.fstat(fd)
    wrong = not stat.S_ISREG(facts.st_mode) or facts.st_size > limit
    if of_root:
        wrong = wrong or not _is_roots(facts) or not _parents_are_roots(path)
    if wrong:
        os.close(fd)
        raise ConfigError(file=path, reason="must be owned by root and writable by nobody else")
    return read_at_most(fd, limit)


def _is_roots(facts: os.stat_result) -> bool:
    return facts.st_uid == 0 and not facts.st_mode & 0o022


def _parents_are_roots(path: str) -> bool:
    while path != "/":
        path = os.path.dirname(path)
        if not _is_roots(os.stat(path, follow_symlinks=False)):
            return False
    return True


def _typed(data: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    for key, value in data.items():
        if key not in keys:
            raise EclWrong(reason=f"{where}: there is no key {key}")
        if type(value) is not keys[key]:
            raise EclWrong(reason=f"{where}: {key} has the wrong type")


def _check(data: dict[str, Any]) -> Ecl:
    _typed(data, _KEYS, ECL_FILE)
    groups = tuple(_group(entry) for entry in data.get("execgroup", ()))
    seen: set[str] = set()
    for group in groups:
        if group.directory in seen:
            reason = f"a specific dirpath can only appear in one execgroup: {group.directory}"
            raise EclWrong(reason=reason)
        seen.add(group.directory)
    return Ecl(
        active=data.get("activated", False),
        legacy=data.get("legacyinsecure", False),
        groups=groups,
    )


def _group(entry: object) -> ExecGroup:
    if not isinstance(entry, dict):
        raise EclWrong(reason=f"{ECL_FILE}: an execgroup has the wrong type")
    _typed(entry, _GROUP_KEYS, f"{ECL_FILE}: execgroup")
    if entry.get("mode") not in MODES:
        raise EclWrong(reason=f"the mode field can only be either: {', '.join(MODES)}")
    directory = entry.get("dirpath", "")
    if directory:
        _check_directory(directory)
    keys = entry.get("keyfp", [])
    for key in keys:
        if (
            not isinstance(key, str)
            or len(key) != _FINGERPRINT_CHARS
            or any(c not in "0123456789abcdefABCDEF" for c in key)
        ):
            raise EclWrong(reason=f"expecting a {_FINGERPRINT_CHARS} chars hex fingerprint string")
    return ExecGroup(
        tag=entry.get("tagname", ""),
        mode=entry["mode"],
        directory=directory,
        fingerprints=frozenset(key.upper() for key in keys),
    )


def _check_directory(directory: str) -> None:
    try:
        resolved = os.path.realpath(directory, strict=True)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "not a path").lower()
        raise EclWrong(reason=f"lstat {directory}: {reason}") from None
    if not os.path.isabs(directory) or resolved != directory:
        reason = "all execgroup dirpath`s should be fully cleaned with symlinks resolved"
        raise EclWrong(reason=reason)
