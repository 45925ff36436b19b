"""The services of an endpoint: where they are, who one is to them, and how they are."""

from __future__ import annotations

from urllib.parse import urlsplit

from apptainer_py.registry import remotes
from apptainer_py.registry.server import RegistryError, Server, json_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.registry.remotes import Endpoint

LIBRARY, KEYSERVER, TOKEN = "library", "keyserver", "token"
_PLACE = "/assets/config/config.prod.json"
_ENDING = "API"
_SYNONYMS = {"keystore": KEYSERVER}
_ANSWER_BYTES = 1 << 20
_VERSION_CHARS = 80


class Service(Server):
    """A service that speaks JSON, and is told a token where there is one."""

    tries = 1

    def __init__(
        self,
        address: str,
        *,
        authorization: str = "",
        checked: bool = True,
        environ: Mapping[str, str],
    ) -> None:
        # Without the address: it may hold a password.
        wrong = RegistryError(host="address", reason="it has no http:// or https://, or no host")
        try:
            parts = urlsplit(address)
            fits = parts.hostname and parts.username is None and not parts.query
        except ValueError:
            raise wrong from None
        if not fits or parts.scheme not in ("http", "https"):
            raise wrong
        place = f"{parts.netloc}{parts.path.rstrip('/')}"
        https = parts.scheme == "https"
        super().__init__(place, https=https, checked=checked, environ=environ)
        self._authorization = authorization

    def _prove(self, headers: dict[str, str], scope: str) -> None:
        # An address that is signed for one use says itself who may use it.
        if self._authorization and scope != SIGNED:
            headers["Authorization"] = self._authorization

    def _who(self) -> str:
        return "with this token" if self._authorization else "without a token"

    def json(self, method: str, path: str, what: str, body: bytes | None = None) -> dict[str, Any]:
        """Return an answer's JSON object, an empty one where it is none.

        Raises:
            RegistryError: it does not answer, or says no.
        """
        headers = {"Content-Type": "application/json"} if body is not None else None
        with self._ask(method, path, scope="", headers=headers, body=body) as answer:
            self._judge(answer, what)
            return json_of(self._small(answer, _ANSWER_BYTES))

    def raw(self, path: str, body: bytes | None, kind: str, limit: int) -> tuple[int, bytes]:
        """Return status and content of an answer, whichever it is.

        Raises:
            RegistryError: it does not answer, or too slowly, or with too much.
        """
        headers = {"Content-Type": kind} if body is not None else None
        method = "GET" if body is None else "POST"
        with self._ask(method, path, scope="", headers=headers, body=body) as answer:
            return answer.status_code, self._small(answer, limit)

    def status(self, path: str) -> int:
        """Return how it answers to a path."""
        with self._ask("GET", path, scope="") as answer:
            status: int = answer.status_code
        return status


SIGNED = "signed"


def bearer(token: str) -> str:
    """Return what a service is told of a token."""
    return f"Bearer {token}" if token else ""


def of_endpoint(endpoint: Endpoint, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses of an endpoint's services by their names.

    Raises:
        RegistryError: it does not say.
    """
    if endpoint.uri == remotes.DEFAULT_URI:
        return {KEYSERVER: remotes.DEFAULT_KEYSERVER}
    with Service(endpoint.address, environ=environ) as server:
        said = server.json("GET", _PLACE, "configuration")
    found = {}
    for key, value in said.items():
        uri = value.get("uri") if isinstance(value, dict) else None
        if not isinstance(uri, str) or not uri.startswith(("http://", "https://")):
            continue
        if not endpoint.insecure and not uri.startswith("https://"):
            reason = f"it leads from HTTPS to HTTP, for its service {key[:40]!r}"
            raise RegistryError(host=endpoint.uri, reason=reason)
        name = key.removesuffix(_ENDING)
        found[_SYNONYMS.get(name, name)] = uri
    if not found:
        raise RegistryError(host=endpoint.uri, reason="it names no services")
    return found


def version(uri: str, environ: Mapping[str, str]) -> str | None:
    """Return what a service says of its version, None where it does not answer."""
    try:
        with Service(uri, environ=environ) as server:
            said = server.json("GET", "/version", "version").get("data")
    except RegistryError:
        return None
    value = said.get("version") if isinstance(said, dict) else None
    fits = isinstance(value, str) and value.isprintable()
    return str(value)[:_VERSION_CHARS] if fits else ""


def check_token(endpoint: Endpoint, token: str, environ: Mapping[str, str]) -> None:
    """Ask an endpoint whether it takes a token.

    Raises:
        RegistryError: it does not.
    """
    uri = of_endpoint(endpoint, environ).get(TOKEN)
    if not uri:
        raise RegistryError(host=endpoint.uri, reason="no authentication service found")
    with Service(uri, authorization=bearer(token), environ=environ) as server:
        status = server.status("/v1/token-status")
    if status != 200:
        told = "Invalid Credentials" if status in (401, 403, 404) else f"it answers {status}"
        raise RegistryError(host=endpoint.uri, reason=f"error response from server: {told}")


def same(first: str, second: str) -> bool:
    """Return whether two addresses are one place."""
    try:
        places = [
            (parts.scheme, (parts.hostname or "").lower(), parts.port, parts.path.rstrip("/"))
            for parts in (urlsplit(first), urlsplit(second))
        ]
    except ValueError:
        return False
    return places[0] == places[1]
