"""Key servers, in the protocol that they all have: HTTP with /pks/lookup and /pks/add (HKP).

A server is not trusted: an answer has a size and a time, is not followed elsewhere from https to
plain http, and what it says is a key is cut to the key that was asked for by whoever asked.
"""

from __future__ import annotations

from urllib.parse import urlencode

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry import services
from apptainer_py.registry.server import RegistryError
from apptainer_py.registry.services import Service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ANSWER_BYTES_MAX = 1 << 20
_OK = 200
_HKP_PORT = 11371


class KeyserverError(ApptainerError):
    """The server does not answer, or not with what it was asked for; `status` 0: not at all."""

    message = "{reason}"


class Place(Record):
    """A key server, and what it is told of its user; `checked` by its certificate."""

    uri: str
    authorization: str = ""
    checked: bool = True
    environ: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"


def address(uri: str) -> str:
    """Return a server's address as one of HTTP; hkp: and hkps: are names for such."""
    if uri.startswith("hkps://"):
        return f"https://{uri.removeprefix('hkps://')}"
    if uri.startswith("hkp://"):
        host = uri.removeprefix("hkp://").rstrip("/")
        has_port = host.rpartition("]")[2].count(":") == 1
        return f"http://{host}" if has_port else f"http://{host}:{_HKP_PORT}"
    return uri


def is_one(uri: str) -> bool:
    """Return whether an address can be that of a key server."""
    return address(uri).startswith(("http://", "https://"))


def get(place: Place, fingerprint: str) -> bytes:
    """Return what a server has for a fingerprint or a key's number, as text.

    Raises:
        KeyserverError: it has nothing, or does not answer.
    """
    query = {"exact": "on", "op": "get", "search": f"0x{fingerprint.lower()}"}
    return _request(place, f"/pks/lookup?{urlencode(query)}")


def index(place: Place, words: str) -> bytes:
    """Return the keys of a server that have these words in their names, one line each.

    Raises:
        KeyserverError: it does not answer.
    """
    query = {
        "fingerprint": "on", "op": "index", "options": "mr", "search": words, "x-pagesize": "256",
    }  # fmt: skip
    return _request(place, f"/pks/lookup?{urlencode(query)}")


def add(place: Place, armored: bytes) -> None:
    """Send a public key to a server.

    Raises:
        KeyserverError: it does not answer, or does not take the key.
    """
    body = urlencode({"keytext": armored.decode("ascii")}).encode()
    _request(place, "/pks/add", body)


def check(place: Place) -> None:
    """Ask a server whether it takes what it is told of its user.

    Raises:
        KeyserverError: it does not.
    """
    _request(place, "/")


def _request(place: Place, path: str, body: bytes | None = None) -> bytes:
    import http.client

    kind = "application/x-www-form-urlencoded"
    try:
        with Service(
            address(place.uri),
            authorization=place.authorization,
            checked=place.checked,
            environ=place.environ,
        ) as server:
            status, answer = server.raw(path, body, kind, ANSWER_BYTES_MAX)
    except RegistryError as error:
        raise KeyserverError(reason=error, status=0) from None
    if status != _OK:
        reason = http.client.responses.get(status, "unknown status")
        raise KeyserverError(reason=f"{status} {reason}", status=status)
    return answer


def same(first: str, second: str) -> bool:
    """Return whether two addresses are one server."""
    return services.same(address(first), address(second))
