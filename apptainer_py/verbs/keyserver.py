"""`keyserver add|remove|login|logout|list`: the key servers of an endpoint, in remote.yaml."""

from __future__ import annotations

import base64

from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry import active, keyserver, remotes, services
from apptainer_py.registry.keyserver import Place
from apptainer_py.registry.remotes import Credential, Keyserver, RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.registry.accounts import Account
    from apptainer_py.registry.remotes import Endpoint, Remotes

_LOCK = "🔒"


class CannotLogIn(ApptainerError):
    message = "while login to {uri}: {reason}"


class CannotLogOut(ApptainerError):
    message = "while logout from {uri}: {reason}"


def add(
    name: str, uri: str, environ: Mapping[str, str], *, order: int | None, insecure: bool
) -> None:
    """Add a key server to an endpoint of the machine's file.

    Raises:
        ApptainerError: there is one of that address, or the order is out of range.
    """
    found, name, endpoint = _of_machine(name, environ)
    if not uri.strip() or not keyserver.is_one(uri) or not uri.isprintable():
        raise RemoteError(text="invalid URI: a key server has http://, https:// or hkp(s)://")
    rows = list(endpoint.keyservers)
    most = 1 + sum(not row.skip for row in rows)
    place = most if order is None else order
    if not 0 < place <= most:
        words = f"order is out of range: maximum is {most}" if place > most else "order must be > 0"
        raise RemoteError(text=words)
    there = next((row for row in rows if keyserver.same(row.uri, uri)), None)
    if there is not None and (there.external or not there.skip):
        raise RemoteError(text=f"{uri} is already configured")
    added = Keyserver(uri=uri, external=True, insecure=insecure)
    if there is not None:
        rows.remove(there)
        added = there.replace(skip=False)
    used = [number for number, row in enumerate(rows) if not row.skip]
    rows.insert(used[place - 1] if place <= len(used) else len(rows), added)
    _keep(found, name, endpoint.replace(keyservers=tuple(rows)))


def remove(name: str, uri: str, environ: Mapping[str, str]) -> None:
    """Take a key server from an endpoint of the machine's file; one stays.

    Raises:
        ApptainerError: there is no such, or it is the last one.
    """
    found, name, endpoint = _of_machine(name, environ)
    used = [row for row in endpoint.keyservers if not row.skip]
    there = next((row for row in used if keyserver.same(row.uri, uri)), None)
    if there is None:
        raise RemoteError(text=f"keyserver {uri} is not configured")
    if len(used) == 1:
        raise RemoteError(text=f"the primary keyserver {uri} can't be removed")
    rows = [
        row.replace(skip=True) if row is there else row
        for row in endpoint.keyservers
        if row is not there or not row.external
    ]
    _keep(found, name, endpoint.replace(keyservers=tuple(rows)))


def _of_machine(name: str, environ: Mapping[str, str]) -> tuple[Remotes, str, Endpoint]:
    found = remotes.of_machine()
    try:
        endpoint = found.endpoint(name)
    except RemoteError as error:
        raise RemoteError(text=f"no endpoint found: {error}") from None
    return found, name or found.active, active.with_own(endpoint, environ)


def _keep(found: Remotes, name: str, endpoint: Endpoint) -> None:
    changed = found.with_endpoint(name, endpoint.replace(system=True, token=""))
    remotes.write(remotes.system_file(), changed, for_all=True)


def login(file: str, uri: str, account: Account, environ: Mapping[str, str]) -> None:
    """Keep what a key server, which the administrator has added, is told of its user.

    Raises:
        ApptainerError: it does not accept it.
    """
    found = remotes.load(file)
    configured = [
        row
        for endpoint in found.endpoints.values()
        for row in endpoint.keyservers
        if row.external and keyserver.same(row.uri, uri)
    ]
    if not configured:
        reason = f"no external keyserver configuration found for {uri}"
        raise CannotLogIn(uri=uri, reason=reason)
    if not account.password:
        raise CannotLogIn(uri=uri, reason="a password is required")
    authorization = services.bearer(account.password)
    if account.username:
        pair = f"{account.username}:{account.password}".encode()
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    insecure = configured[0].insecure
    place = Place(uri=uri, authorization=authorization, checked=not insecure, environ=environ)
    try:
        keyserver.check(place)
    except ApptainerError as error:
        raise CannotLogIn(uri=uri, reason=f"error response from server: {error}") from None
    rest = tuple(one for one in found.credentials if not keyserver.same(one.uri, uri))
    kept = Credential(uri=uri, auth=authorization, insecure=insecure)
    remotes.write(file, found.replace(credentials=(*rest, kept)))


def logout(file: str, uri: str) -> None:
    """Forget what a key server is told.

    Raises:
        ApptainerError: nothing is kept for it.
    """
    if not keyserver.is_one(uri):
        raise CannotLogOut(uri=uri, reason="transport is not supported")
    found = remotes.load(file)
    rest = tuple(one for one in found.credentials if not keyserver.same(one.uri, uri))
    if len(rest) == len(found.credentials):
        raise CannotLogOut(uri=uri, reason="there is no account for it")
    remotes.write(file, found.replace(credentials=rest))


def listing(file: str, name: str, environ: Mapping[str, str], *, as_json: bool) -> str:
    """Return the key servers of all endpoints, or of one.

    Raises:
        ApptainerError: there is no such endpoint.
    """
    found = remotes.load(file)
    chosen = {name: found.endpoint(name)} if name else found.endpoints
    rows = {key: _servers(endpoint, environ) for key, endpoint in sorted(chosen.items())}
    if as_json:
        return _json(found, rows)
    text = ""
    for key, servers in rows.items():
        system = "*" if found.endpoints[key].system else ""
        text += f"\n{key} {system}{'^' if key == found.active else ''}\n"
        if servers is None:
            text += "   (unable to fetch associated keyserver info for this endpoint)\n"
        for number, row in enumerate(servers or (), 1):
            text += f"   #{number}  {row.uri}  {'' if row.insecure else _LOCK}\n"
    return f"{text}\n(* = system endpoint, ^ = default endpoint)\n"


def _servers(endpoint: Endpoint, environ: Mapping[str, str]) -> list[Keyserver] | None:
    try:
        asked = active.with_own(endpoint, environ)
    except ApptainerError:
        return None
    return [row for row in asked.keyservers if not row.skip]


def _json(found: Remotes, rows: Mapping[str, list[Keyserver] | None]) -> str:
    import json

    value = [
        {
            "remote": key,
            "global": found.endpoints[key].system,
            "default": key == found.active,
            "keyservers": None
            if servers is None
            else [{"uri": row.uri, "secure": not row.insecure} for row in servers],
        }
        for key, servers in rows.items()
    ]
    return json.dumps({"remotes": value}, indent=4) + "\n"
