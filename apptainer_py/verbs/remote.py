"""`remote add|use|list|remove|login|logout|status|get-login-password`: endpoints in remote.yaml."""

from __future__ import annotations

from urllib.parse import urlsplit

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry import active, remotes, services
from apptainer_py.registry.remotes import Endpoint, RemoteError, Remotes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TOKEN_LEAST, _TOKEN_MOST = 200, 1 << 16
_SECURE, _INSECURE, _YES = "✓", "✗!", "✓"


class NeedsInsecure(RemoteError):
    message = "http URI requires --insecure or APPTAINER_ADD_INSECURE=true"


class File(Record):
    """The file that a command changes, the machine's or a user's."""

    path: str
    is_system: bool = False

    def read(self) -> Remotes:
        """Return what holds: for a user, with what the machine's file says."""
        if self.is_system:
            found = remotes.of_machine()
            rows = {name: row.replace(system=True) for name, row in found.endpoints.items()}
            return found.replace(endpoints=rows)
        return remotes.load(self.path)

    def write(self, changed: Remotes) -> None:
        """Keep it."""
        if self.is_system:
            rows = {name: row.replace(token="") for name, row in changed.endpoints.items()}
            changed = changed.replace(endpoints=rows, credentials=())
        remotes.write(self.path, changed, for_all=self.is_system)


def add(file: File, name: str, address: str, *, insecure: bool, chosen: bool) -> None:
    """Add an endpoint; with `chosen`, it is the active one from now on.

    Raises:
        ApptainerError: there is one of that name, or the address is none.
    """
    remotes.check_name(name)
    if address.startswith("http://") and not insecure:
        raise NeedsInsecure
    found = file.read()
    if name in found.endpoints:
        raise RemoteError(text=f"{name} is already a remote")
    endpoint = Endpoint(
        uri=_place_of(address),
        system=file.is_system,
        insecure=insecure and not address.startswith("https://"),
    )
    changed = found.with_endpoint(name, endpoint)
    if chosen and not any(row.exclusive for row in found.endpoints.values()):
        changed = changed.replace(active=name)
    file.write(changed)


def _place_of(address: str) -> str:
    """Return host, port and path of an address, which may have http:// or https://."""
    if not address.strip():
        raise RemoteError(text="invalid URI: cannot have empty URI")
    full = address if "://" in address else f"https://{address}"
    wrong = RemoteError(text="invalid URI: it is no address with http:// or https://")
    try:
        parts = urlsplit(full)
        fits = parts.hostname and parts.port != 0 and parts.username is None and not parts.query
    except ValueError:
        raise wrong from None
    if not fits or parts.scheme not in ("http", "https") or not full.isprintable() or " " in full:
        raise wrong
    return f"{parts.netloc}{parts.path.rstrip('/')}"


def remove(file: File, name: str) -> None:
    """Forget an endpoint.

    Raises:
        ApptainerError: there is none, or it is the machine's.
    """
    found = file.read()
    endpoint = found.endpoint(name) if name else None
    if endpoint is None:
        raise RemoteError(text=f"{name} is not a remote")
    if endpoint.system and not file.is_system:
        raise RemoteError(text=f"{name} is global and can't be removed")
    rows = {key: row for key, row in found.endpoints.items() if key != name}
    kept = "" if found.active == name else found.active
    file.write(found.replace(endpoints=rows, active=kept))


def use(file: File, name: str, *, exclusive: bool) -> None:
    """Make an endpoint the active one; with `exclusive`, for everybody on the machine.

    Raises:
        ApptainerError: there is none, or the administrator wants another one.
    """
    found = file.read()
    endpoint = found.endpoints.get(name)
    if endpoint is None:
        raise RemoteError(text=f"{name} is not a remote")
    bound = [key for key, row in found.endpoints.items() if row.exclusive and key != name]
    if bound and not file.is_system:
        text = f"could not use {name}: remote {bound[0]} has been set exclusive by the system "
        raise RemoteError(text=f"{text}administrator")
    if file.is_system:
        # One at most is exclusive, and the active one.
        rows = {key: row.replace(exclusive=False) for key, row in found.endpoints.items()}
        found = found.replace(endpoints=rows).with_endpoint(
            name, endpoint.replace(exclusive=exclusive)
        )
    file.write(found.replace(active=name))


def token_of(file: File, name: str) -> str:
    """Return the token that is kept for an endpoint.

    Raises:
        RemoteError: there is no such endpoint.
    """
    return file.read().endpoint(name).token


def place_for_tokens(file: File, name: str) -> str:
    """Return where an endpoint's user gets a token.

    Raises:
        RemoteError: there is no such endpoint.
    """
    return f"{file.read().endpoint(name).address}/auth/tokens"


def token_in(path: str) -> str:
    """Return the token that a file holds, in its first line.

    Raises:
        RemoteError: there is none.
    """
    try:
        with open(path, encoding="ascii") as stream:
            line = stream.readline(_TOKEN_MOST).strip()
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise RemoteError(text=f"while reading tokenfile: {path}: {reason}") from None
    except UnicodeDecodeError:
        raise RemoteError(text=f"while reading tokenfile: {path}: it is no text") from None
    if len(line) < _TOKEN_LEAST:
        raise RemoteError(text="while reading tokenfile: token is too short to be valid")
    return line


def login(file: File, name: str, token: str, environ: Mapping[str, str]) -> None:
    """Keep a token that an endpoint accepts.

    Raises:
        ApptainerError: it does not.
    """
    found = file.read()
    endpoint = found.endpoint(name)
    if not token.isascii() or not token.isprintable():
        raise RemoteError(text="while verifying token: it has characters that no token has")
    try:
        services.check_token(endpoint, token, environ)
    except ApptainerError as error:
        raise RemoteError(text=f"while verifying token: {error}") from None
    file.write(found.with_endpoint(name or found.active, endpoint.replace(token=token)))


def logout(file: File, name: str) -> None:
    """Forget the token of an endpoint.

    Raises:
        ApptainerError: there is no such endpoint.
    """
    found = file.read()
    endpoint = found.endpoint(name)
    file.write(found.with_endpoint(name or found.active, endpoint.replace(token="")))


def listing(file: File, *, as_json: bool) -> str:
    """Return the endpoints, never their tokens."""
    found = file.read()
    rows = [
        {
            "name": name,
            "uri": row.uri,
            "default": name == found.active,
            "global": row.system,
            "exclusive": row.exclusive,
            "secure": not row.insecure,
            "loggedIn": bool(row.token),
        }
        for name, row in sorted(found.endpoints.items())
    ]
    if as_json:
        return _json({"remotes": rows})
    lines = [("NAME", "URI", "DEFAULT?", "GLOBAL?", "EXCLUSIVE?", "SECURE?")]
    lines += [
        (
            str(row["name"]),
            str(row["uri"]),
            _YES if row["default"] else "",
            _YES if row["global"] else "",
            _YES if row["exclusive"] else "",
            _SECURE if row["secure"] else _INSECURE,
        )
        for row in rows
    ]
    return "\n" + table(lines)


def status(file: File, name: str, environ: Mapping[str, str], *, as_json: bool) -> tuple[str, bool]:
    """Return how the services of an endpoint are, and whether the token is a good one.

    Raises:
        ApptainerError: it does not say.
    """
    endpoint = file.read().endpoint(name)
    try:
        places = services.of_endpoint(endpoint, environ)
    except ApptainerError as error:
        raise RemoteError(text=f"while retrieving services: {error}") from None
    rows = []
    for service, uri in sorted(places.items()):
        told = services.version(uri, environ)
        state = "N/A" if told is None else "OK"
        rows.append((service.title(), state, told or "", uri))
    words, valid = "No authentication token set (logged out).", True
    if endpoint.token:
        words = "Valid authentication token set (logged in)."
        try:
            services.check_token(endpoint, endpoint.token, environ)
        except ApptainerError:
            words, valid = "Authentication token is invalid (please login again).", False
    if as_json:
        keys = ("service", "status", "version", "uri")
        facts = [dict(zip(keys, row, strict=True)) for row in rows]
        return _json({"services": facts, "loggedIn": bool(endpoint.token) and valid}), valid
    lines = [("SERVICE", "STATUS", "VERSION", "URI"), *rows]
    return f"{table(lines)}\n{words}\n", valid


def login_password(environ: Mapping[str, str]) -> str:
    """Return the password of the user's account in the registry of the active library.

    Raises:
        ApptainerError: there is none.
    """
    with active.library(environ) as library:
        return library.registry_password()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, as Go's tabwriter sets them."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "".join(
        "".join(
            cell if place == len(row) - 1 else f"{cell:<{widths[place] + 2}}"
            for place, cell in enumerate(row)
        )
        + "\n"
        for row in rows
    )


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=4) + "\n"
