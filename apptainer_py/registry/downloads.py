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
        # Without the address: it may hold a password.
        reason = "the address has no host or no fit port, or an account as well"
        wrong = RegistryError(host=url.partition(":")[0], reason=reason)
        try:
            parts = urlsplit(url)
            if not parts.hostname or parts.username is not None or parts.port == 0:
                raise wrong
        except ValueError:
            raise wrong from None
        self._path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._host = parts.netloc
        https = parts.scheme == "https"
        self._server = Registry(parts.netloc, https=https, environ=environ)
        facts = self._server.head(self._path)
        self.version = facts.get("ETag") or facts.get("Last-Modified", "")
        size = facts.get("Content-Length", "")
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
