"""Images that a Docker daemon has: its HTTP interface, on a socket of this machine or by TCP."""

from __future__ import annotations

import http.client
import os
import socket
from urllib.parse import quote, urlsplit

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TRANSPORT = "docker-daemon"
_DEFAULT = "unix:///var/run/docker.sock"
_TIMEOUT_S = 60
_JSON_BYTES = 4 << 20
_IMAGE_BYTES = 1 << 38
_CHUNK = 1 << 20


class DaemonError(ApptainerError):
    message = "the Docker daemon at {address}: {reason}"


class NoDaemon(DaemonError):
    hint = "DOCKER_HOST or --docker-host names another; users need the group `docker`"


def address_of(chosen: str, environ: Mapping[str, str]) -> str:
    """Return where the daemon is: the command line's word, the environment's, docker's own."""
    return chosen or environ.get("DOCKER_HOST", "") or _DEFAULT


class _Local(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


class Daemon:
    """A daemon by its address."""

    def __init__(self, address: str, environ: Mapping[str, str]) -> None:
        self.address = address
        self._environ = environ

    def _wrong(self, reason: str) -> DaemonError:
        return DaemonError(address=self.address, reason=reason)

    def _connection(self) -> http.client.HTTPConnection:
        scheme, _, rest = self.address.partition("://")
        if scheme == "unix" and rest:
            return _Local(rest)
        if scheme not in ("tcp", "http"):
            raise self._wrong("the address is none of unix://PATH and tcp://HOST:PORT")
        if self._environ.get("DOCKER_TLS_VERIFY") and scheme == "tcp":
            raise self._wrong("TLS (DOCKER_TLS_VERIFY) is not supported yet")
        try:
            parts = urlsplit(self.address)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise self._wrong("the address has no host, or no port")
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)

    def _ask(self, path: str) -> http.client.HTTPResponse:
        connection = self._connection()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = f"it cannot be reached: {words.lower()}"
            raise NoDaemon(address=self.address, reason=reason) from None
        if answer.status != http.client.OK:
            raise self._wrong(_said(answer))
        return answer

    def identity(self, name: str) -> str:
        """Return the digest of an image's configuration.

        Raises:
            DaemonError: it has no such image, or does not answer.
        """
        import json

        self._check(name)
        answer = self._ask(f"/images/{quote(name)}/json")
        try:
            found = json.loads(answer.read(_JSON_BYTES)).get("Id")
        except (ValueError, RecursionError, AttributeError, OSError, http.client.HTTPException):
            found = None
        if not isinstance(found, str) or not found.startswith("sha256:"):
            raise self._wrong("its answer is none that was understood")
        return found

    def _check(self, name: str) -> None:
        tagged = ":" in name.rpartition("/")[2] or "@" in name
        if not name or not tagged:
            reason = f"{name or 'the image'} has neither a tag nor a digest"
            raise self._wrong(f"{reason}, as in {TRANSPORT}:NAME:latest")

    def save(self, name: str, path: str, told: Callable[[int], None]) -> None:
        """Write an image to a file, in the form of `docker save`.

        Raises:
            DaemonError: it has no such image, or ends in the middle.
        """
        answer = self._ask(f"/images/{quote(name)}/get")
        total = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "wb") as file:
            try:
                while data := answer.read(_CHUNK):
                    total += len(data)
                    if total > _IMAGE_BYTES:
                        raise self._wrong("the image is too large")
                    file.write(data)
                    told(len(data))
                if answer.length:
                    raise ConnectionError
            except (TimeoutError, ConnectionError, http.client.HTTPException):
                raise self._wrong(f"it ended after {total} bytes of the image") from None


def _said(answer: http.client.HTTPResponse) -> str:
    import json

    try:
        found = json.loads(answer.read(_JSON_BYTES)).get("message")
    except (ValueError, RecursionError, AttributeError, OSError, http.client.HTTPException):
        found = None
    text = found if isinstance(found, str) and found else f"{answer.status} {answer.reason}"
    return "".join(letter if letter.isprintable() else " " for letter in text[:500]).strip()
