"""A registry's HTTP: the distribution specification, with the ways of proving who one is.

What a registry answers is hostile until its digest says otherwise: every answer has a limit, a
redirection never carries an account to another host, and never leads from HTTPS to HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
import zlib
from urllib.parse import urlencode, urljoin, urlsplit

import requests

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Any, BinaryIO

    from apptainer_py.registry.accounts import Account
    from apptainer_py.registry.reference import Reference

MANIFEST_BYTES = 4 << 20
_TOKEN_BYTES = 1 << 20
_CHUNK = 1 << 20
_TRIES = 5
_REDIRECTIONS = 5
_WAIT_MOST_S = 60.0
_TIMEOUTS_S = (15, 60)  # to connect, and between two pieces of an answer
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (403, 405, 501)
_MOVED = (301, 302, 303, 307, 308)
_CHALLENGE = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
_CLIENT = "apptainer-py"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = (OCI_INDEX, DOCKER_INDEX)
_KINDS = (OCI_MANIFEST, DOCKER_MANIFEST, *INDEXES)


class RegistryError(ApptainerError):
    """The registry does not give, or take, what is asked for."""

    message = "{host}: {reason}"


class NotThere(RegistryError):
    """It has no such image or blob."""


class NotAllowed(RegistryError):
    """It wants another account, or one at all."""

    hint = "log in with `{program} registry login docker://{host}`, if you have an account there"


class Manifest(Record):
    """A manifest or index, as its bytes: their digest is its name."""

    media_type: str
    digest: str
    data: bytes


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of some bytes, as `algorithm:hex`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class Registry:
    """One registry, for one account.  Its methods can be called from several threads."""

    def __init__(
        self,
        server: str,
        *,
        account: Account | None = None,
        https: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._server = server
        self._account = account
        self._https = https
        self._base = self._checked(f"{'https' if https else 'http'}://{server}", "")
        self._tokens: dict[str, str] = {}
        self._basic = False
        self._environ = dict(environ or {})
        self._session = requests.Session()
        # To find out where an answer leads to, it would read all that comes with it.
        self._session.get_redirect_target = lambda answer: None
        # No ~/.netrc: an account comes from where the caller was told it comes from.
        self._session.trust_env = False
        self._session.verify = self._certificates()
        self._session.headers["User-Agent"] = _CLIENT
        self._session.headers["Accept-Encoding"] = "identity"
        adapter = requests.adapters.HTTPAdapter(pool_connections=8, pool_maxsize=8)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()

    def _certificates(self) -> str | bool:
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"):
            if path := self._environ.get(name):
                if not os.path.exists(path):
                    raise RegistryError(host=self._server, reason=f"{name}: there is no {path}")
                return path
        return True

    # -- what it has

    def check(self) -> None:
        """Ask for nothing: an account that is refused here is refused everywhere.

        Raises:
            RegistryError: it is no registry, or refuses the account.
        """
        with self._ask("GET", "/v2/", scope="") as answer:
            if answer.status_code not in (200, 401, 403):
                raise self._wrong(f"it answers {answer.status_code}, as no registry does")
            self._judge(answer, "the account")

    def manifest(self, reference: Reference) -> Manifest:
        """Return the manifest or index of a name, which is what its digest says.

        Raises:
            RegistryError: it cannot be had.
        """
        path = f"/v2/{reference.repository}/manifests/{reference.wanted}"
        headers = {"Accept": ", ".join(_KINDS)}
        what = str(reference)
        with self._ask("GET", path, scope=_scope(reference), headers=headers) as answer:
            self._judge(answer, what)
            data = self._small(answer, MANIFEST_BYTES)
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        digest = digest_of(data, reference.digest.partition(":")[0] or "sha256")
        if reference.digest and digest != reference.digest:
            raise self._wrong(f"the manifest of {what} is another one, {digest}")
        return Manifest(media_type=kind, digest=digest, data=data)

    def blob(
        self, reference: Reference, digest: str, start: int = 0
    ) -> tuple[int, Iterator[bytes]]:
        """Return where the bytes begin, and the bytes; nobody has looked at their digest yet.

        Raises:
            RegistryError: it cannot be had.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        path = f"/v2/{reference.repository}/blobs/{digest}"
        answer = self._ask("GET", path, scope=_scope(reference), headers=headers)
        if answer.status_code == 416:
            answer.close()
            return self.blob(reference, digest)
        self._judge(answer, f"{reference.repository}@{digest[:19]}")
        begins = start if answer.status_code == 206 else 0
        return begins, self._pieces(answer)

    def _pieces(self, answer: requests.Response) -> Iterator[bytes]:
        try:
            with answer:
                while piece := answer.raw.read(_CHUNK):
                    yield piece
        except Exception as error:
            if not _is_of_the_net(error):
                raise
            raise Interrupted(host=self._server, reason=_words(error)) from None

    def has_blob(self, reference: Reference, digest: str) -> bool:
        """Return whether a repository has a blob already."""
        path = f"/v2/{reference.repository}/blobs/{digest}"
        with self._ask("HEAD", path, scope=_scope(reference, push=True)) as answer:
            if answer.status_code == 404:
                return False
            self._judge(answer, f"{reference.repository}@{digest[:19]}")
            return True

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

    # -- what it is given

    def put_blob(self, reference: Reference, digest: str, size: int, opened: BinaryIO) -> None:
        """Give it a blob of so many bytes.

        Raises:
            RegistryError: it does not take it.
        """
        scope = _scope(reference, push=True)
        path = f"/v2/{reference.repository}/blobs/uploads/"
        with self._ask("POST", path, scope=scope, headers={"Content-Length": "0"}) as answer:
            self._judge(answer, f"an upload to {reference.repository}")
            place = answer.headers.get("Location", "")
        if answer.status_code != 202 or not place:
            raise self._wrong(f"it begins no upload, and answers {answer.status_code}")
        url = self._led(f"{self._base}{path}", place)
        url += ("&" if urlsplit(url).query else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._ask("PUT", url, scope=scope, headers=headers, body=opened) as answer:
            self._judge(answer, f"{reference.repository}@{digest[:19]}")

    def put_manifest(self, reference: Reference, media_type: str, data: bytes) -> str:
        """Give it a manifest under the reference's name; return its digest.

        Raises:
            RegistryError: it does not take it.
        """
        path = f"/v2/{reference.repository}/manifests/{reference.wanted}"
        headers = {"Content-Type": media_type}
        scope = _scope(reference, push=True)
        with self._ask("PUT", path, scope=scope, headers=headers, body=data) as answer:
            self._judge(answer, str(reference))
        return digest_of(data)

    # -- how it is asked

    def _ask(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> requests.Response:
        """Ask until there is an answer that is worth judging; the caller closes it."""
        url = path if "://" in path else f"{self._base}{path}"
        # Another host, which an upload goes to, is told nothing of the account.
        proved = not self._is_own(url)
        for attempt in range(_TRIES):
            sent = dict(headers or {})
            if self._is_own(url):
                self._prove(sent, scope)
            try:
                answer = self._follow(method, url, sent, body)
            except Exception as error:
                if not _is_of_the_net(error):
                    raise
                if attempt == _TRIES - 1 or body is not None or _is_hopeless(error):
                    raise self._wrong(_words(error)) from None
                self._wait(attempt, None)
                continue
            # What another host wants to know is not the registry's question.
            if answer.status_code == 401 and not proved and self._is_own(answer.url):
                proved = True
                challenge = answer.headers.get("WWW-Authenticate", "")
                answer.close()
                if not self._learn(challenge, scope):
                    return self._follow(method, url, sent, body)
                continue
            if answer.status_code not in _AGAIN or attempt == _TRIES - 1 or body is not None:
                return answer
            answer.close()
            self._wait(attempt, answer.headers.get("Retry-After"))
        raise self._wrong("it does not answer")

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: Any
    ) -> requests.Response:
        host = urlsplit(url).netloc
        for _ in range(_REDIRECTIONS):
            if hasattr(body, "seek"):
                body.seek(0)
            answer = self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=_TIMEOUTS_S,
                proxies=self._proxies(url),
            )
            if answer.status_code not in _MOVED or "Location" not in answer.headers:
                return answer
            answer.close()
            url = self._led(url, answer.headers["Location"])
            if urlsplit(url).netloc != host:
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
        raise self._wrong("it leads from one place to the next without end")

    def _is_own(self, url: str) -> bool:
        return _origin(url) == _origin(self._base)

    def _proxies(self, url: str) -> dict[str, str]:
        """Return what the environment wants to be asked in place of a host."""
        found = dict(requests.utils.get_environ_proxies(url) or {})
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

    def _small(self, answer: requests.Response, limit: int) -> bytes:
        try:
            data: bytes = answer.raw.read(limit + 1, decode_content=False)
            if answer.headers.get("Content-Encoding", "") in ("gzip", "x-gzip"):
                # Not asked for.  The library would unpack without a limit.
                data = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, limit + 1)
        except Exception as error:
            if not _is_of_the_net(error):
                raise
            raise self._wrong(_words(error)) from None
        if len(data) > limit:
            raise self._wrong(f"an answer has more than {limit} bytes")
        return data

    def _judge(self, answer: requests.Response, what: str, *, is_file: bool = False) -> None:
        """Raise what an answer that is no success means."""
        if 200 <= answer.status_code < 300:
            return
        told = ""
        try:
            told = _told(self._small(answer, _TOKEN_BYTES))
        except RegistryError:
            pass
        answer.close()
        told = f" ({told})" if told else ""
        if answer.status_code in (401, 403) and not is_file:
            who = f"the account {self._account.username!r}" if self._account else "no account"
            reason = f"{what} is not to be had with {who}: authentication required{told}"
            raise NotAllowed(host=self._server, reason=reason, program=_CLIENT)
        if answer.status_code == 404:
            raise NotThere(host=self._server, reason=f"there is no {what}{told}")
        raise self._wrong(f"{what}: it answers {answer.status_code}{told}")

    def _wrong(self, reason: str) -> RegistryError:
        return RegistryError(host=self._server, reason=reason)

    # -- who asks

    def _prove(self, headers: dict[str, str], scope: str) -> None:
        account = self._account
        if scope in self._tokens:
            headers["Authorization"] = f"Bearer {self._tokens[scope]}"
        elif self._basic and account is not None:
            headers["Authorization"] = _basic(account)

    def _learn(self, challenge: str, scope: str) -> bool:
        """Take what a registry wants to know; return whether there is more to say than before."""
        kind, _, rest = challenge.strip().partition(" ")
        facts = dict(_CHALLENGE.findall(rest))
        if kind.lower() == "basic":
            new, self._basic = not self._basic, True
            return new and self._account is not None and not self._account.token
        if kind.lower() == "bearer" and "realm" in facts:
            self._tokens[scope] = self._token(facts, scope)
            return True
        return False

    def _token(self, facts: Mapping[str, str], scope: str) -> str:
        """Get a token (distribution specification, token authentication)."""
        realm = self._checked(facts["realm"], self._base)
        wanted = {"service": facts.get("service", ""), "scope": facts.get("scope", scope)}
        wanted = {name: value for name, value in wanted.items() if value}
        account = self._account
        try:
            if account is not None and account.token:
                form = {
                    **wanted,
                    "grant_type": "refresh_token",
                    "refresh_token": account.token,
                    "client_id": _CLIENT,
                }
                answer = self._session.post(
                    realm,
                    data=form,
                    stream=True,
                    allow_redirects=False,
                    timeout=_TIMEOUTS_S,
                    proxies=self._proxies(realm),
                )
            else:
                headers: dict[str, str] = {}
                if account is not None:
                    headers["Authorization"] = _basic(account)
                url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(wanted)
                answer = self._follow("GET", url, headers, None)
        except Exception as error:
            if not _is_of_the_net(error):
                raise
            raise self._wrong(f"its token service: {_words(error)}") from None
        with answer:
            self._judge(answer, "a token")
            said = _json(self._small(answer, _TOKEN_BYTES))
        token = said.get("token") or said.get("access_token")
        if not isinstance(token, str) or not token or not token.isascii():
            raise self._wrong("its token service gives no token")
        return token


class Interrupted(RegistryError):
    """The bytes of a blob ended too early: the rest can be asked for."""


def _basic(account: Account) -> str:
    pair = f"{account.username}:{account.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _scope(reference: Reference, *, push: bool = False) -> str:
    return f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"


def _is_of_the_net(error: BaseException) -> bool:
    import http.client

    import urllib3

    kinds = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException)
    return isinstance(error, (*kinds, OSError, zlib.error))


def _is_hopeless(error: BaseException) -> bool:
    kinds = (requests.exceptions.SSLError, requests.exceptions.InvalidURL)
    return isinstance(error, kinds)


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
    ("Failed to parse", "it has, or leads to, an address that is none"),
)  # fmt: skip


def _words(error: BaseException) -> str:
    text = str(error)
    return next(
        (words for sign, words in _CAUSES if sign in text), f"it cannot be asked: {text[:200]}"
    )


def _json(data: bytes) -> dict[str, Any]:
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
    errors = _json(data).get("errors")
    if not isinstance(errors, list) or not errors or not isinstance(errors[0], dict):
        return ""
    text = errors[0].get("message") or errors[0].get("code") or ""
    return " ".join(text.split())[:200] if isinstance(text, str) else ""


def ask_with_patience(
    work: Callable[[], None], again: Callable[[Interrupted], None], tries: int = _TRIES
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
