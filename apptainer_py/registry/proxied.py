"""HTTP through the proxies that the environment names: `requests` knows their kinds."""

from __future__ import annotations

import requests
import urllib3

from apptainer_py.registry import watch
from apptainer_py.registry.direct import Answer, Headers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class _Http(watch.Watched, urllib3.connection.HTTPConnection):  # type: ignore[misc]
    pass


class _Https(watch.Watched, urllib3.connection.HTTPSConnection):  # type: ignore[misc]
    pass


class _HttpPool(urllib3.HTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _Http


class _HttpsPool(urllib3.HTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _Https


_POOLS = {"http": _HttpPool, "https": _HttpsPool}


class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc]
    """Connections of `requests` that are watched, through a proxy too."""

    def init_poolmanager(self, *words: Any, **more: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*words, **more)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *words: Any, **more: Any) -> Any:
        """Make those of a proxy."""
        manager = super().proxy_manager_for(*words, **more)
        manager.pool_classes_by_scheme = _POOLS
        return manager


def proxies_for(url: str) -> dict[str, str]:
    """Return what the environment wants to be asked in place of a host."""
    return dict(requests.utils.get_environ_proxies(url) or {})


def watch_of(answer: Any) -> watch.Watch | None:
    """Return the watch of an answer of `requests`."""
    for found in (answer.raw, getattr(answer.raw, "_original_response", None)):
        if isinstance(clock := getattr(found, "watch", None), watch.Watch):
            return clock
    return None


class _Proxied(Answer):
    def __init__(self, url: str, answer: Any) -> None:
        super().__init__(url, answer.status_code, Headers(answer.headers), watch_of(answer))
        self._answer = answer

    def read(self, most: int) -> bytes:
        data: bytes = self._answer.raw.read(most, decode_content=False)
        return data

    def close(self) -> None:
        self._answer.close()


class Connections:
    """The connections through proxies; for several threads."""

    def __init__(self, *, verify: str | bool, timeouts_s: tuple[float, float]) -> None:
        self._timeouts_s = timeouts_s
        self._session = requests.Session()
        # To find out where an answer leads to, it would read all that comes with it.
        self._session.get_redirect_target = lambda answer: None
        # No ~/.netrc: an account comes from where the caller was told it comes from.
        self._session.trust_env = False
        self._session.verify = verify
        adapter = Adapter(pool_connections=8, pool_maxsize=8)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def ask(
        self, method: str, url: str, headers: Mapping[str, str], body: Any, proxies: dict[str, str]
    ) -> Answer:
        """Return an answer, whichever it is.

        Raises:
            OSError: there is none, as for urllib3.exceptions.HTTPError.
        """
        try:
            answer = self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=self._timeouts_s,
                proxies=proxies,
            )
        except UnicodeError:
            raise requests.exceptions.InvalidURL("Failed to parse") from None
        return _Proxied(url, answer)

    def close(self) -> None:
        """Close them."""
        self._session.close()
