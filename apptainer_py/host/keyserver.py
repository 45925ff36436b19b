"""Key servers, in the protocol that they all have: HTTP with /pks/lookup and /pks/add (HKP).

A server is not trusted: an answer has a size and a time, is not followed elsewhere from https to
plain http, and what it says is a key is cut to the key that was asked for by whoever asked.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "https://keys.openpgp.org"
ANSWER_BYTES_MAX = 1 << 20
_SECONDS = 30
_REDIRECTS = 3
_MOVED = (301, 302, 303, 307, 308)
_OK = 200


class KeyserverError(ApptainerError):
    """The server does not answer, or not with what it was asked for; `status` 0: not at all."""

    message = "{reason}"


def get(server: str, fingerprint: str) -> bytes:
    """Return what a server has for a fingerprint or a key's number, as text.

    Raises:
        KeyserverError: it has nothing, or does not answer.
    """
    query = {"exact": "on", "op": "get", "search": f"0x{fingerprint.lower()}"}
    return _request("GET", server, "/pks/lookup", query)


def index(server: str, words: str) -> bytes:
    """Return the keys of a server that have these words in their names, one line each.

    Raises:
        KeyserverError: it does not answer.
    """
    query = {
        "fingerprint": "on", "op": "index", "options": "mr", "search": words, "x-pagesize": "256",
    }  # fmt: skip
    return _request("GET", server, "/pks/lookup", query)


def add(server: str, armored: bytes) -> None:
    """Send a public key to a server.

    Raises:
        KeyserverError: it does not answer, or does not take the key.
    """
    _request("POST", server, "/pks/add", {"keytext": armored.decode("ascii")})


def _request(method: str, server: str, path: str, fields: Mapping[str, str]) -> bytes:
    import http.client
    from urllib.parse import urlencode, urljoin

    coded = urlencode(fields)
    address = server.rstrip("/") + path
    body = coded.encode() if method == "POST" else None
    if body is None:
        address += f"?{coded}"
    status, answer = 0, b""
    try:
        for _ in range(1 + _REDIRECTS):
            status, moved, answer = _once(method, address, body)
            if status not in _MOVED or not moved:
                break
            following = urljoin(address, moved)
            if address.startswith("https:") and not following.startswith("https:"):
                raise KeyserverError(
                    reason=f"{address}: sent on to an address without TLS", status=0
                )
            address = following
    except (OSError, http.client.HTTPException, ValueError) as error:
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise KeyserverError(reason=f"{method} {address}: {words.lower()}", status=0) from None
    if status != _OK:
        reason = http.client.responses.get(status, "unknown status")
        raise KeyserverError(reason=f"{status} {reason}", status=status)
    return answer


def _once(method: str, address: str, body: bytes | None) -> tuple[int, str, bytes]:
    """Return status, new address and content of one answer."""
    import http.client
    import time
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not parts.hostname or parts.username:
        raise KeyserverError(reason=f"{address}: not an address with http:// or https://", status=0)
    connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=_SECONDS)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"Connection": "close", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        content, deadline = b"", time.monotonic() + _SECONDS
        while part := answer.read1(1 << 16):
            content += part
            if len(content) > ANSWER_BYTES_MAX or time.monotonic() > deadline:
                raise KeyserverError(
                    reason=f"{address}: the answer is larger than {ANSWER_BYTES_MAX} bytes, or "
                    f"takes more than {_SECONDS} seconds",
                    status=0,
                )
        return answer.status, answer.getheader("Location", ""), content
    finally:
        connection.close()
