"""Remote endpoints and their key servers: remote.yaml, the user's and the machine's.

The files are those of Apptainer, so each program reads what the other one wrote. What a file says
that is not known here is refused, since writing the file would lose it.
"""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry import accounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT = "DefaultRemote"
DEFAULT_URI = "cloud.apptainer.org"
DEFAULT_KEYSERVER = "https://keys.openpgp.org"
_FILE = "remote.yaml"
_BYTES = 1 << 20
_NAME_MOST = 255


class RemoteError(ApptainerError):
    message = "{text}"


class NoLibrary(RemoteError):
    message = "remote has no library client: {name} names no library"
    hint = "`{program} remote add NAME ADDRESS` adds a remote that has one, --library names one"


class NotYourFile(RemoteError):
    message = "Unable to modify {what}: not root user"


class Keyserver(Record):
    """A key server of an endpoint; one that is not `external` is the endpoint's own."""

    uri: str
    skip: bool = False
    external: bool = False
    insecure: bool = False


class Endpoint(Record):
    """A group of services that one address leads to."""

    uri: str
    token: str = ""
    system: bool = False
    exclusive: bool = False
    insecure: bool = False
    keyservers: tuple[Keyserver, ...] = ()

    def __repr__(self) -> str:
        return f"Endpoint({self.uri!r})"

    @property
    def address(self) -> str:
        """What is asked for its services."""
        return f"{'http' if self.insecure else 'https'}://{self.uri}"


class Credential(Record):
    """What a key server is told of its user."""

    uri: str
    auth: str = ""
    insecure: bool = False

    def __repr__(self) -> str:
        return f"Credential({self.uri!r})"


class Remotes(Record):
    """What a file says; `active` is "" where none is chosen."""

    active: str = ""
    endpoints: Mapping[str, Endpoint] = {}
    credentials: tuple[Credential, ...] = ()

    def endpoint(self, name: str = "") -> Endpoint:
        """Return an endpoint, the active one where no name is given.

        Raises:
            RemoteError: there is none.
        """
        if not name and not self.active:
            raise RemoteError(text="no default remote")
        found = self.endpoints.get(name or self.active)
        if found is None:
            raise RemoteError(text=f"{name or self.active} is not a remote")
        return found

    def with_endpoint(self, name: str, endpoint: Endpoint) -> Remotes:
        """Return the same with one endpoint put in or changed."""
        return self.replace(endpoints={**self.endpoints, name: endpoint})


def user_file(environ: Mapping[str, str]) -> str:
    """Return where the user's file is."""
    home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~")
    return f"{environ.get('APPTAINER_CONFIGDIR', '') or f'{home}/.apptainer'}/{_FILE}"


def system_file() -> str:
    """Return where the machine's file is."""
    return f"{build.SYSCONFDIR}/{_FILE}"


# -- files


_FIELDS: Mapping[str, tuple[str, type]] = {
    "URI": ("uri", str),
    "Token": ("token", str),
    "System": ("system", bool),
    "Exclusive": ("exclusive", bool),
    "Insecure": ("insecure", bool),
}
_KEYSERVER_FIELDS: Mapping[str, tuple[str, type]] = {
    "URI": ("uri", str),
    "Skip": ("skip", bool),
    "External": ("external", bool),
    "Insecure": ("insecure", bool),
}
_CREDENTIAL_FIELDS: Mapping[str, tuple[str, type]] = {
    "URI": ("uri", str),
    "Auth": ("auth", str),
    "Insecure": ("insecure", bool),
}
# Written even where it says nothing, as Apptainer writes it.
_ALWAYS = ("System", "Exclusive", "Skip", "External")


def read(file: str) -> Remotes:
    """Return what a file says; nothing where there is none.

    Raises:
        RemoteError: it is no such file.
    """
    try:
        with open(file, "rb") as stream:
            data = stream.read(_BYTES + 1)
    except FileNotFoundError:
        return Remotes()
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise RemoteError(text=f"while opening remote config file: {file}: {reason}") from None
    reader = _Reader(file)
    if len(data) > _BYTES:
        raise reader.wrong(f"it has more than {_BYTES} bytes")
    import yaml  # most users have no such file

    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise reader.wrong("it is no YAML") from None
    return reader.remotes({} if content is None else content)


class _Reader:
    """From the values of a file to records, each of which is checked."""

    def __init__(self, file: str) -> None:
        self._file = file

    def wrong(self, reason: str) -> RemoteError:
        return RemoteError(text=f"while parsing remote config data: {self._file}: {reason}")

    def remotes(self, content: object) -> Remotes:
        top = self._mapping(content, "the file", ("Active", "Remotes", "Credentials"))
        active = top.get("Active") or ""
        if not isinstance(active, str):
            raise self.wrong("Active is no name")
        rows = self._mapping(top.get("Remotes") or {}, "Remotes", None)
        endpoints = {name: self._endpoint(name, row) for name, row in rows.items()}
        credentials = tuple(
            Credential(**self._fields(row, "Credentials", _CREDENTIAL_FIELDS))
            for row in self._list(top.get("Credentials"), "Credentials")
        )
        return Remotes(active=active, endpoints=endpoints, credentials=credentials)

    def _endpoint(self, name: str, row: object) -> Endpoint:
        row = dict(self._mapping(row or {}, name, (*_FIELDS, "Keyservers")))
        keyservers = tuple(
            Keyserver(**self._fields(one, f"{name}: Keyservers", _KEYSERVER_FIELDS))
            for one in self._list(row.pop("Keyservers", None), f"{name}: Keyservers")
        )
        return Endpoint(keyservers=keyservers, **self._fields(row, name, _FIELDS))

    def _fields(
        self, row: object, where: str, fields: Mapping[str, tuple[str, type]]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"uri": ""}
        for key, value in self._mapping(row, where, tuple(fields)).items():
            name, kind = fields[key]
            if value is None:
                continue
            if not isinstance(value, kind):
                raise self.wrong(f"{where}: {key} is not what it should be")
            found[name] = value
        return found

    def _mapping(
        self, value: object, where: str, known: tuple[str, ...] | None
    ) -> Mapping[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self.wrong(f"{where} is not what it should be")
        for key in value:
            if known is not None and key not in known:
                raise self.wrong(f"{where} has {key[:100]!r}, which is not known")
        return value

    def _list(self, value: object, where: str) -> list[Any]:
        if value is not None and not isinstance(value, list):
            raise self.wrong(f"{where} is not what it should be")
        return value or []


def write(file: str, remotes: Remotes, *, for_all: bool = False) -> None:
    """Replace a file; nobody but its owner reads it, unless it is the machine's.

    Raises:
        AccountError: it cannot be written.
    """
    import yaml

    content: dict[str, Any] = {"Active": remotes.active, "Remotes": {}}
    for name in sorted(remotes.endpoints):
        endpoint = remotes.endpoints[name]
        row = _row(endpoint, _FIELDS)
        if endpoint.keyservers:
            row["Keyservers"] = [_row(one, _KEYSERVER_FIELDS) for one in endpoint.keyservers]
        content["Remotes"][name] = row
    if remotes.credentials:
        content["Credentials"] = [_row(one, _CREDENTIAL_FIELDS) for one in remotes.credentials]
    text = yaml.safe_dump(content, sort_keys=False, indent=4, allow_unicode=True)
    accounts.write_private(file, text.encode(), for_all=for_all)


def _row(record: Record, fields: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    values = {key: getattr(record, name) for key, (name, _) in fields.items()}
    return {key: value for key, value in values.items() if value or key in _ALWAYS}


# -- both files together


def load(file: str) -> Remotes:
    """Return what a user's file says, with what the machine's adds to it and demands.

    Raises:
        RemoteError: one of them cannot be read.
    """
    return merged(read(file), of_machine())


def of_machine() -> Remotes:
    """Return what the machine's file says, or what holds without one."""
    found = read(system_file())
    if not found.endpoints:
        endpoint = Endpoint(uri=DEFAULT_URI, system=True)
        found = found.replace(active=found.active or DEFAULT, endpoints={DEFAULT: endpoint})
    return found


def merged(own: Remotes, machine: Remotes) -> Remotes:
    """Return a user's endpoints and the machine's; one that is exclusive there is the active one.

    An endpoint of the user's own has its name for itself, but not that of an exclusive one.
    """
    endpoints = {
        name: endpoint.replace(system=False, exclusive=False)
        for name, endpoint in own.endpoints.items()
    }
    active = own.active
    for name, theirs in machine.endpoints.items():
        mine = own.endpoints.get(name)
        if mine is not None and not mine.system and not theirs.exclusive:
            continue
        # A token is for the address that it was given for.
        token = mine.token if mine is not None and mine.uri == theirs.uri else ""
        endpoints[name] = theirs.replace(token=token, system=True)
        active = name if theirs.exclusive else active
    return own.replace(active=active or machine.active, endpoints=endpoints)


def check_name(name: str) -> None:
    """Raise RemoteError for what is no name of an endpoint."""
    if not name.strip() or not name.isprintable() or len(name) > _NAME_MOST:
        raise RemoteError(text="invalid name: cannot have empty name")
