"""Connections with a clock: who answers too slowly, or without an end, is cut off.

The timeout of a socket is for one packet; a server that sends a byte a minute never meets it.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEAD_S = 120.0
NO_LIMIT_S = float("inf")
_LOOK_S = 5.0


class Watch:
    """Cuts a connection when its time is up, unless that is set anew or it is stopped."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._until = time.monotonic() + seconds
        self._stopped = threading.Event()
        self.has_cut = False
        threading.Thread(target=self._run, daemon=True).start()

    def give(self, seconds: float) -> None:
        """Set the time that is left."""
        self._until = time.monotonic() + seconds

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if self._stopped.wait(min(left, _LOOK_S)):
                return
        self.has_cut = True
        try:
            # Not the method of a TLS socket, which would be at work in the other thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass


class Watched:
    """What both kinds of connection have in common."""

    sock: Any
    watch: Watch | None = None

    def putrequest(self, *words: Any, **more: Any) -> Any:
        """Begin a request: the answer before it is over."""
        if self.watch is not None:
            self.watch.stop()
            self.watch = None
        return super().putrequest(*words, **more)  # type: ignore[misc]

    def getresponse(self, *words: Any, **more: Any) -> Any:
        """Wait for the head of an answer, but not for ever."""
        watch = Watch(self.sock, HEAD_S)
        try:
            answer = super().getresponse(*words, **more)  # type: ignore[misc]
        except Exception:
            watch.stop()
            if watch.has_cut:
                raise TimeoutError("timed out") from None
            raise
        self.watch = answer.watch = watch
        return answer


class Http(Watched, http.client.HTTPConnection):
    """A plain connection."""


class Https(Watched, http.client.HTTPSConnection):
    """One with TLS."""
