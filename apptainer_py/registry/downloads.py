"""Files of the web: `http://` and `https://`."""

from __future__ import annotations

import os
from urllib.parse import urlsplit, urlunsplit

from apptainer_py.registry.client import Interrupted, Registry, RegistryError, ask_with_patience

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

_CHUNK = 1 << 20


class Source:
    """A file of the web, as it is now; `version` changes when the file does."""

    def __init__(self, url: str, *, environ: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if not parts.hostname or parts.username is not None:
            raise RegistryError(host=url, reason="it names no host, or an account as well")
        self._path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._host = parts.netloc
        https = parts.scheme == "https"
        self._server = Registry(parts.netloc, https=https, environ=environ)
        answer = self._server.ask("HEAD", self._path)
        self.version = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
        size = answer.headers.get("Content-Length", "")
        self.size_bytes = int(size) if size.isascii() and size.isdecimal() else -1

    def __enter__(self) -> Source:
        self._server.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def write(self, path: str, told: Callable[[int], None]) -> None:
        """Write the file to a path.

        Raises:
            RegistryError: it cannot be had as a whole.
        """
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            ask_with_patience(lambda: self._whole(fd, told), lambda error: os.ftruncate(fd, 0))
        finally:
            os.close(fd)

    def _whole(self, fd: int, told: Callable[[int], None]) -> None:
        place = 0
        for piece in self._server.pieces(self._path):
            os.pwrite(fd, piece, place)
            place += len(piece)
            told(len(piece))
        if self.size_bytes >= 0 and place != self.size_bytes:
            reason = f"{place} bytes came of {self.size_bytes}"
            raise Interrupted(host=self._host, reason=reason)
