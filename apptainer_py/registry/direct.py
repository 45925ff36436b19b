"""HTTP to a server itself, without a proxy: connections that are kept open and watched.

They are the standard library's: to load a larger one takes longer than most of what is asked.
"""

from __future__ import annotations

import http.client
import select
import threading
from urllib.parse import quote, urlsplit

from apptainer_py.registry import watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from ssl import SSLContext
    from typing import Any, Self

_IDLE_MOST = 8
# Each has the time of one packet to be sent.
_BLOCK = 1 << 17
_LEFT_MOST = 4096
# What an address may have as it is; the rest is written as %XX.
_SAFE = "!#$%&'()*+,/:;=?@[]~"


def _quoted(text: str) -> str:
    """Return a part of an address; a byte that is no UTF-8 stays that byte."""
    return quote(text, safe=_SAFE, errors="surrogateescape")


class Headers(dict[str, str]):
    """The headers of an answer, whichever case they are asked for in."""

    def __init__(self, pairs: Mapping[str, str] | list[tuple[str, str]]) -> None:
        super().__init__()
        for name, value in pairs.items() if hasattr(pairs, "items") else pairs:
            known = dict.get(self, name.lower())
            self[name.lower()] = value if known is None else f"{known}, {value}"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return a header, or what stands for it."""
        return super().get(name.lower(), default)


class Answer:
    """An answer whose head is there; who has it closes it."""

    def __init__(self, url: str, status: int, headers: Headers, clock: watch.Watch | None) -> None:
        self.url = url
        self.status_code = status
        self.headers = headers
        self.watch = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        raise NotImplementedError

    def close(self) -> None:
        """Want no more of it."""
        raise NotImplementedError


class _Direct(Answer):
    """An answer of a connection, which is used again if all of the answer is read."""

    def __init__(self, url: str, connection: Any, response: Any, keep: Callable[[], None]) -> None:
        headers = Headers(response.getheaders())
        super().__init__(url, response.status, headers, response.watch)
        self._connection = connection
        self._response = response
        self._keep = keep
        self._is_open = True

    def read(self, most: int) -> bytes:
        response = self._response
        if response.chunked:
            # A chunk's size is the server's word: only so many bytes are taken at once.
            buffer = bytearray(most)
            data = bytes(memoryview(buffer)[: response.readinto(buffer)])
        else:
            data = response.read(most)
        if not data and response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return data

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        response = self._response
        try:
            if not response.isclosed():
                self._take_what_is_there()
        except (OSError, ValueError, http.client.HTTPException):
            pass  # it is not used again
        if self.watch is not None:
            self.watch.stop()
        cut = self.watch is not None and self.watch.has_cut
        # What is told before the answer (1xx) has that behind it.
        is_over = response.isclosed() and response.status >= http.client.OK
        if is_over and not response.will_close and not cut:
            self._keep()
        else:
            response.close()
            self._connection.close()

    def _take_what_is_there(self) -> None:
        """Read an end that is short and has come already; wait for nothing."""
        left = self._response.length
        if left is None or left > _LEFT_MOST or self._connection.sock is None:
            return
        self._connection.sock.settimeout(0)
        # TLS that has nothing to give raises an error, even where nothing is wanted.
        if not left or len(self._response.fp.peek(left)) >= left:
            self._response.read()


class Connections:
    """The connections to all the places that a client comes to; for several threads."""

    def __init__(
        self, certificates: Callable[[], SSLContext], timeouts_s: tuple[float, float]
    ) -> None:
        self._certificates = certificates
        self._connect_s, self._packet_s = timeouts_s
        self._idle: list[tuple[tuple[str, str, int], Any]] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def ask(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> Answer:
        """Return an answer, whichever it is.

        Raises:
            OSError: there is none, as for http.client.HTTPException.
        """
        parts = urlsplit(url)
        # Without a port the library would take the last part of an IPv6 address for one.
        port = parts.port or (443 if parts.scheme == "https" else 80)
        place = (parts.scheme, parts.hostname or "", port)
        connection = self._taken(place)
        try:
            target = _quoted(parts.path or "/")
            target += f"?{_quoted(parts.query)}" if parts.query else ""
            if connection is None:
                connection = self._made(place)
            connection.sock.settimeout(self._packet_s)
            try:
                connection.request(method, target, body=body, headers=headers)
            except BrokenPipeError:
                pass  # it has read enough of what it is given, and says why
            response = connection.getresponse()
        except BaseException as error:
            if connection is not None:
                connection.close()
            # That of a certificate is a ValueError too.
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                # Without the words: they hold the header that is wrong.
                raise http.client.InvalidURL("Failed to parse") from None
            raise
        return _Direct(url, connection, response, lambda: self._give(place, connection))

    def close(self) -> None:
        """Close those that nobody uses, and keep none from now on."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _made(self, place: tuple[str, str, int]) -> Any:
        scheme, host, port = place
        how: Any = {"timeout": self._connect_s, "blocksize": _BLOCK}
        if scheme == "https":
            connection: Any = watch.Https(host, port, context=self._certificates(), **how)
        else:
            connection = watch.Http(host, port, **how)
        connection.connect()
        return connection

    def _taken(self, place: tuple[str, str, int]) -> Any:
        """Return a connection that waits, unless its other end has said that it is over."""
        while True:
            with self._lock:
                found = next((pair for pair in self._idle if pair[0] == place), None)
                if found is None:
                    return None
                self._idle.remove(found)
            connection = found[1]
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()

    def _give(self, place: tuple[str, str, int], connection: Any) -> None:
        with self._lock:
            fits = not self._is_closed and len(self._idle) < _IDLE_MOST
            if fits and connection.sock is not None:
                self._idle.append((place, connection))
                return
        connection.close()
