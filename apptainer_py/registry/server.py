"""One server's HTTP: what every client of a remote service asks with.

What a server answers is hostile: every answer has a limit in bytes and in time, a redirection never
carries an account to another host, and never leads from HTTPS to HTTP.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from http.client import HTTPException, InvalidURL
from urllib.parse import urljoin, urlsplit

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry import direct, watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from ssl import SSLContext
    from typing import Any, Self

    from apptainer_py.registry import proxied
    from apptainer_py.registry.direct import Answer

TOKEN_BYTES = 1 << 20
_CHUNK = 1 << 18
TRIES = 5
_REDIRECTIONS = 5
_WAIT_MOST_S = 60.0
# A request with all its tries; one piece of a large answer.
_ANSWER_S, _PIECE_S = 180.0, 300.0
TIMEOUTS_S = (15, 60)  # to connect, and between two packets of an answer
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (403, 405, 501)
_MOVED = (301, 302, 303, 307, 308)
CLIENT = "apptainer-py"
_HEADERS = {"User-Agent": CLIENT, "Accept-Encoding": "identity", "Accept": "*/*"}
_TOO_SLOW = "it does not answer in time"
WHO_IS_ASKED = "authentication required"


class RegistryError(ApptainerError):
    """The registry does not give, or take, what is asked for."""

    message = "{host}: {reason}"


class NotThere(RegistryError):
    """It has no such image or blob."""


class NotAllowed(RegistryError):
    """It wants another account, or one at all."""

    hint = "log in with `{program} registry login docker://{host}`, if you have an account there"


class Interrupted(RegistryError):
    """The bytes of a blob ended too early: the rest can be asked for."""


class Server:
    """One server.  Its methods can be called from several threads."""

    not_allowed: type[RegistryError] = NotAllowed
    tries = TRIES

    def __init__(
        self,
        server: str,
        *,
        https: bool = True,
        checked: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._server = server
        self._base = self._checked(f"{'https' if https else 'http'}://{server}", "")
        self._environ = dict(environ or {})
        self._verify = self._certificates() if checked else False
        self._context: SSLContext | None = None
        self._direct = direct.Connections(self._tls, TIMEOUTS_S)
        self._proxied: proxied.Connections | None = None
        self._answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._direct.close()
        if self._proxied is not None:
            self._proxied.close()

    def _certificates(self) -> str | bool:
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"):
            if path := self._environ.get(name):
                if not os.path.exists(path):
                    raise RegistryError(host=self._server, reason=f"{name}: there is no {path}")
                return path
        return True

    def _tls(self) -> SSLContext:
        if self._context is None:
            import ssl

            named = self._verify if isinstance(self._verify, str) else None
            is_folder = named is not None and os.path.isdir(named)
            context = ssl.create_default_context(
                cafile=None if is_folder else named, capath=named if is_folder else None
            )
            context.set_alpn_protocols(["http/1.1"])
            if not self._verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._context = context
        return self._context

    # -- any file of its host

    def head(self, path: str) -> Mapping[str, str]:
        """Return what a host says of a file; nothing where it says nothing without giving it.

        Raises:
            RegistryError: there is no such file.
        """
        with self._ask("HEAD", path, scope="") as answer:
            if answer.status_code in _NO_HEAD:
                return {}
            self._judge(answer, path, is_file=True)
            facts: Mapping[str, str] = answer.headers
        return facts

    def pieces(self, path: str) -> Iterator[bytes]:
        """Return the bytes of a file as they are stored.

        Raises:
            RegistryError: it cannot be had.
        """
        answer = self._ask("GET", path, scope="")
        self._judge(answer, path, is_file=True)
        return self._pieces(answer)

    def _pieces(self, answer: Answer) -> Iterator[bytes]:
        clock = answer.watch
        try:
            with answer:
                while True:
                    if clock is not None:
                        clock.give(_PIECE_S)
                    if not (piece := answer.read(_CHUNK)):
                        break
                    if clock is not None:
                        # What the caller does with it is not the server's time.
                        clock.give(watch.NO_LIMIT_S)
                    yield piece
        except Exception as error:
            if not is_of_the_net(error):
                raise
            raise Interrupted(host=self._server, reason=words_of(error)) from None
        finally:
            if clock is not None:
                clock.stop()
        if clock is not None and clock.has_cut:
            raise Interrupted(host=self._server, reason=_TOO_SLOW)

    # -- how it is asked

    def _ask(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> Answer:
        """Ask until there is an answer that is worth judging; the caller closes it."""
        url = path if "://" in path else f"{self._base}{path}"
        # Another host, which an upload goes to, is told nothing of the account.
        proved = not self._is_own(url)
        until = time.monotonic() + _ANSWER_S
        for attempt in range(self.tries):
            is_last = attempt == self.tries - 1 or body is not None
            sent = self._proving(url, headers, scope)
            try:
                answer = self._follow(method, url, sent, body)
            except Exception as error:
                if not is_of_the_net(error):
                    raise
                if is_last or time.monotonic() > until or self._is_hopeless(error):
                    raise self._wrong(words_of(error)) from None
                self._wait(attempt, None)
                continue
            self._answered = True
            if not proved and self._is_challenge(answer):
                answer.close()
                proved = True
                if not self._learn(answer.headers.get("WWW-Authenticate", ""), scope):
                    return self._follow(method, url, sent, body)
                continue
            if answer.status_code not in _AGAIN or is_last or time.monotonic() > until:
                return answer
            answer.close()
            self._wait(attempt, answer.headers.get("Retry-After"))
        raise self._wrong("it does not answer")

    def _proving(self, url: str, headers: Mapping[str, str] | None, scope: str) -> dict[str, str]:
        """Return the headers with what is known to prove the account, if the host may know it."""
        sent = dict(headers or {})
        if self._is_own(url):
            self._prove(sent, scope)
        return sent

    def _is_challenge(self, answer: Answer) -> bool:
        # What another host wants to know is not the registry's question.
        return answer.status_code == 401 and self._is_own(answer.url)

    def _is_hopeless(self, error: BaseException) -> bool:
        # Where nobody has ever answered, a wrong address is no busy server.
        is_nowhere = not self._answered and words_of(error) in _NOWHERE
        return is_nowhere or _is_hopeless(error)

    def _follow(self, method: str, url: str, headers: dict[str, str], body: Any) -> Answer:
        host = urlsplit(url).netloc
        for _ in range(_REDIRECTIONS):
            if hasattr(body, "seek"):
                body.seek(0)
            answer = self._sent(method, url, headers, body)
            if answer.status_code not in _MOVED or "Location" not in answer.headers:
                return answer
            answer.close()
            url = self._led(url, answer.headers["Location"])
            if urlsplit(url).netloc != host:
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
        raise self._wrong("it leads from one place to the next without end")

    def _sent(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> Answer:
        sent = {**_HEADERS, **headers}
        proxies = self._proxies(url)
        if not proxies:
            return self._direct.ask(method, url, sent, body)
        from apptainer_py.registry import proxied

        if self._proxied is None:
            self._proxied = proxied.Connections(verify=self._verify, timeouts_s=TIMEOUTS_S)
        return self._proxied.ask(method, url, sent, body, proxies)

    def _is_own(self, url: str) -> bool:
        return _origin(url) == _origin(self._base)

    def _proxies(self, url: str) -> dict[str, str]:
        """Return what the environment wants to be asked in place of a host."""
        # Where the library looks that knows which of them an address goes through.
        names = os.environ  # noqa: TID251 a proxy is no choice of the command line
        if not any(name.lower().endswith("_proxy") for name in names):
            return {}
        from apptainer_py.registry import proxied

        found = proxied.proxies_for(url)
        for name, proxy in found.items():
            address = proxy if "://" in proxy else f"http://{proxy}"
            try:
                wrong = name != "no" and proxy and not _origin(address)[1]
            except ValueError:
                wrong = True
            if wrong:
                # Without the value: it may hold a password.
                raise self._wrong(f"{name}_proxy is no address of a proxy")
        return found

    def _led(self, url: str, location: str) -> str:
        """Return where an answer leads from a place."""
        try:
            return self._checked(urljoin(url, location), url)
        except ValueError:
            raise self._wrong("it leads to what is no place of HTTP") from None

    def _checked(self, url: str, before: str) -> str:
        try:
            parts, _ = urlsplit(url), _origin(url)
        except ValueError:
            words = "leads to what" if before else "has an address that"
            raise self._wrong(f"it {words} is no place of HTTP") from None
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise self._wrong("it leads to what is no place of HTTP")
        if parts.scheme == "http" and urlsplit(before).scheme == "https":
            raise self._wrong(f"it leads from HTTPS to HTTP, at {parts.hostname}")
        return url

    def _wait(self, attempt: int, told: str | None) -> None:
        wait = 0.5 * 2**attempt
        if told and told.isascii() and told.isdecimal():
            wait = float(told[:6])
        if wait > _WAIT_MOST_S:
            raise self._wrong(f"it asks to wait for {wait:.0f} seconds; try again later")
        log.verbose(f"{self._server}: trying again in {wait:g} s")
        time.sleep(wait)

    def _small(self, answer: Answer, limit: int) -> bytes:
        clock = answer.watch
        if clock is not None:
            clock.give(_ANSWER_S)
        try:
            data = answer.read(limit + 1)
            if len(data) <= limit:
                answer.read(1)  # raises where it was cut
            if answer.headers.get("Content-Encoding", "") in ("gzip", "x-gzip"):
                # Not asked for.  The library would unpack without a limit.
                data = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, limit + 1)
        except Exception as error:
            if not is_of_the_net(error):
                raise
            cut = clock is not None and clock.has_cut
            raise self._wrong(_TOO_SLOW if cut else words_of(error)) from None
        if clock is not None:
            clock.stop()
            if clock.has_cut:
                raise self._wrong(_TOO_SLOW)
        if len(data) > limit:
            raise self._wrong(f"an answer has more than {limit} bytes")
        return data

    def _judge(self, answer: Answer, what: str, *, is_file: bool = False) -> None:
        """Raise what an answer that is no success means."""
        if 200 <= answer.status_code < 300:
            return
        told = ""
        try:
            told = _told(self._small(answer, TOKEN_BYTES))
        except RegistryError:
            pass
        answer.close()
        told = f" ({told})" if told and told != WHO_IS_ASKED else ""
        what = what.removeprefix(f"{self._server}/")
        if answer.status_code in (401, 403) and not is_file:
            reason = f"{what} is not to be had {self._who()}: {WHO_IS_ASKED}{told}"
            raise self.not_allowed(host=self._server, reason=reason, program=CLIENT)
        if answer.status_code == 404:
            raise NotThere(host=self._server, reason=f"there is no {what}{told}")
        raise self._wrong(f"{what}: it answers {answer.status_code}{told}")

    def _wrong(self, reason: str) -> RegistryError:
        return RegistryError(host=self._server, reason=reason)

    # -- who asks

    def _prove(self, headers: dict[str, str], scope: str) -> None:
        """Add what says who asks; the server's own host alone is told it."""

    def _learn(self, challenge: str, scope: str) -> bool:
        """Take what the server wants to know; return whether there is more to say than before."""
        return False

    def _who(self) -> str:
        return "without an account"


def is_of_the_net(error: BaseException) -> bool:
    """Return whether an exception is what a network, or its other end, can cause."""
    kinds: tuple[type[BaseException], ...] = (HTTPException, OSError, zlib.error)
    if "urllib3" in sys.modules:
        import urllib3

        kinds = (*kinds, urllib3.exceptions.HTTPError)
    return isinstance(error, kinds)


def _is_hopeless(error: BaseException) -> bool:
    import ssl

    kinds: tuple[type[BaseException], ...] = (ssl.SSLError, InvalidURL)
    if "requests" in sys.modules:
        import requests

        kinds = (*kinds, requests.exceptions.SSLError, requests.exceptions.InvalidURL)
    return isinstance(error, kinds)


_NOWHERE = ("connection refused", "there is no such host")
_CAUSES: tuple[tuple[str, str], ...] = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not one that this machine trusts; "
     "SSL_CERT_FILE names a file with others"),
    ("WRONG_VERSION_NUMBER", "it does not speak HTTPS; --no-https asks without"),
    ("UNKNOWN_PROTOCOL", "it does not speak HTTPS; --no-https asks without"),
    ("Connection refused", "connection refused"),
    ("Name or service not known", "there is no such host"),
    ("Temporary failure in name resolution", "its name cannot be looked up"),
    ("No address associated", "there is no such host"),
    ("timed out", "it does not answer in time"),
    ("Connection reset", "the connection was cut"),
    ("IncompleteRead", "the connection was cut"),
    ("Remote end closed", "the connection was cut"),
    ("Failed to parse", "it has, or leads to, an address that is none"),
)  # fmt: skip


def words_of(error: BaseException) -> str:
    """Return what has gone wrong, for one line."""
    text = str(error)
    return next(
        (words for sign, words in _CAUSES if sign in text), f"it cannot be asked: {text[:200]}"
    )


def json_of(data: bytes) -> dict[str, Any]:
    """Return an object; an empty one for whatever is none."""
    import json

    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port; ValueError for what is no address."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def _told(data: bytes) -> str:
    """Return what a registry says of a failure, made fit for one line."""
    errors = json_of(data).get("errors")
    if not isinstance(errors, list) or not errors or not isinstance(errors[0], dict):
        return ""
    text = errors[0].get("message") or errors[0].get("code") or ""
    return " ".join(text.split())[:200] if isinstance(text, str) else ""


def ask_with_patience(
    work: Callable[[], None], again: Callable[[Interrupted], None], tries: int = TRIES
) -> None:
    """Do something that may be interrupted, and go on with it as long as it gets somewhere."""
    for attempt in range(tries):
        try:
            work()
            return
        except Interrupted as error:
            if attempt == tries - 1:
                raise
            again(error)
            time.sleep(0.2 * 2**attempt)
