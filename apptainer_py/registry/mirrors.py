"""Where an image is asked for: containers-registries.conf(5), which podman and Apptainer read.

Of the tables, the one with the longest `prefix` counts.  Its mirrors are asked first, in their
order, and then its own `location`.
"""

from __future__ import annotations

import os
import tomllib

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry import reference as names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from apptainer_py.registry.reference import Reference

_SYSTEM = "/etc/containers"
_OWN = ".config/containers"
_FILE = "registries.conf"
_FILE_BYTES = 1 << 20
# `pull-from-mirror`: whether a name with a digest, or one without, is asked for there.
_TAKES = {"all": (True, True), "digest-only": (True, False), "tag-only": (False, True)}


class WrongFile(ApptainerError):
    """A file about registries cannot be used."""

    message = "{file}: {reason}"


class Blocked(ApptainerError):
    message = "{name} may not be fetched: {file} blocks {prefix}"


class Place(Record):
    """One address of an image; `insecure` ones may lack a certificate, or HTTPS."""

    reference: Reference
    insecure: bool = False


class _Table(Record):
    """A `[[registry]]`, and the file that has it."""

    file: str
    prefix: str
    row: dict[str, Any]


def places(wanted: Reference, environ: Mapping[str, str]) -> tuple[Place, ...]:
    """Return where an image is asked for, the first first; what no table speaks of, at its host.

    Raises:
        WrongFile: a file cannot be read, or says what cannot be.
        Blocked: the administrator, or the user, does not want it fetched.
    """
    tables: dict[str, _Table] = {}
    for file in _files(environ):
        tables |= {table.prefix: table for table in _tables(file)}
    fitting = [(_matched(wanted, prefix), table) for prefix, table in tables.items()]
    length, table = max(fitting, key=lambda pair: pair[0], default=(0, None))
    if not length or table is None:
        return (Place(reference=wanted),)
    if _flag(table, table.row, "blocked"):
        raise Blocked(name=str(wanted), file=table.file, prefix=table.prefix)
    found = [
        _place(wanted, length, table, mirror)
        for mirror in _mirrors(table, has_digest=bool(wanted.digest))
    ]
    return (*found, _place(wanted, length, table, table.row))


def _files(environ: Mapping[str, str]) -> Iterator[str]:
    home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~")
    folders = [_SYSTEM, *([f"{home}/{_OWN}"] if home.startswith("/") else [])]
    mains = [file for folder in folders if os.path.isfile(file := f"{folder}/{_FILE}")]
    yield from mains[-1:]
    for folder in folders:
        try:
            parts = sorted(os.listdir(f"{folder}/{_FILE}.d"))
        except OSError:
            continue
        yield from (f"{folder}/{_FILE}.d/{name}" for name in parts if name.endswith(".conf"))


def _tables(file: str) -> Iterator[_Table]:
    content = _read(file)
    rows = content.get("registry", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise WrongFile(file=file, reason="`registry` is no list of tables, as in [[registry]]")
    for row in (*rows, *_of_version_1(content)):
        prefix = _text(file, row, "prefix") or _text(file, row, "location")
        if not prefix:
            raise WrongFile(file=file, reason="a [[registry]] has neither prefix nor location")
        yield _Table(file=file, prefix=prefix.rstrip("/"), row=row)


def _of_version_1(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the tables that the older form of the file stands for."""
    old = content.get("registries")
    if not isinstance(old, dict):
        return
    merged: dict[str, dict[str, Any]] = {}
    for kind, key in (("insecure", "insecure"), ("block", "blocked")):
        part = old.get(kind)
        hosts = part.get("registries", []) if isinstance(part, dict) else []
        for host in hosts if isinstance(hosts, list) else []:
            merged.setdefault(str(host), {"location": str(host)})[key] = True
    yield from merged.values()


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_FILE_BYTES + 1)
    except OSError as error:
        raise WrongFile(file=file, reason=(error.strerror or "unreadable").lower()) from None
    if len(data) > _FILE_BYTES:
        raise WrongFile(file=file, reason=f"it has more than {_FILE_BYTES} bytes")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise WrongFile(
            file=file, reason=f"it is no TOML: {' '.join(str(error).split())}"
        ) from None


def _text(file: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise WrongFile(file=file, reason=f"{key} is no text")
    return value


def _flag(table: _Table, row: dict[str, Any], key: str) -> bool:
    value = row.get(key, False)
    if not isinstance(value, bool):
        raise WrongFile(file=table.file, reason=f"{key} of {table.prefix} is not true or false")
    return value


def _matched(wanted: Reference, prefix: str) -> int:
    """Return how much of a name a prefix stands for; 0 where it is the name of something else."""
    text = str(wanted)
    host, slash, path = prefix.partition("/")
    if host.startswith("*."):
        if not wanted.host.endswith(host[1:]):
            return 0
        prefix = f"{wanted.host}{slash}{path}"
    # After a host a colon begins a port, and that is another registry.
    ends = "/:@" if slash else "/"
    fits = text == prefix or (text.startswith(prefix) and text[len(prefix)] in ends)
    return len(prefix) if fits else 0


def _mirrors(table: _Table, *, has_digest: bool) -> Iterator[dict[str, Any]]:
    rows = table.row.get("mirror", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise WrongFile(file=table.file, reason=f"the mirrors of {table.prefix} are no tables")
    digests_alone = _flag(table, table.row, "mirror-by-digest-only")
    for row in rows:
        word = _text(table.file, row, "pull-from-mirror") or (
            "digest-only" if digests_alone else "all"
        )
        if word not in _TAKES or not row.get("location"):
            wrong = f"pull-from-mirror = {word!a}" if word not in _TAKES else "without location"
            raise WrongFile(file=table.file, reason=f"a mirror of {table.prefix}: {wrong}")
        if _TAKES[word][0 if has_digest else 1]:
            yield row


def _place(wanted: Reference, length: int, table: _Table, row: dict[str, Any]) -> Place:
    location = _text(table.file, row, "location").rstrip("/")
    insecure = _flag(table, row, "insecure")
    if not location:
        return Place(reference=wanted, insecure=insecure)
    try:
        there = names.parse(f"{location}{str(wanted)[length:]}", docker=False)
    except names.BadReference as error:
        raise WrongFile(file=table.file, reason=f"location {location!a}: {error}") from None
    return Place(reference=there, insecure=insecure)
