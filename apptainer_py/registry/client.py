"""A registry's HTTP: the distribution specification, with the ways of proving who one is.

What a registry answers is hostile until its digest says otherwise (`server`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from urllib.parse import urlencode, urlsplit

from apptainer_py.base.record import Record
from apptainer_py.registry.server import (
    CLIENT,
    TOKEN_BYTES,
    WHO_IS_ASKED,
    Interrupted,
    NotAllowed,
    NotThere,
    RegistryError,
    Server,
    ask_with_patience,
    is_of_the_net,
    json_of,
    words_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from apptainer_py.registry.accounts import Account
    from apptainer_py.registry.library import Part
    from apptainer_py.registry.reference import Reference

__all__ = [
    "INDEXES",
    "OCI_MANIFEST",
    "Interrupted",
    "Manifest",
    "NotAllowed",
    "NotThere",
    "Registry",
    "RegistryError",
    "ask_with_patience",
    "digest_of",
]

MANIFEST_BYTES = 4 << 20
_CHALLENGE = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = (OCI_INDEX, DOCKER_INDEX)
_KINDS = (OCI_MANIFEST, DOCKER_MANIFEST, *INDEXES)


class Manifest(Record):
    """A manifest or index, as its bytes: their digest is its name."""

    media_type: str
    digest: str
    data: bytes


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of some bytes, as `algorithm:hex`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class Registry(Server):
    """One registry, for one account.  Its methods can be called from several threads."""

    def __init__(
        self,
        server: str,
        *,
        account: Account | None = None,
        https: bool = True,
        checked: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(server, https=https, checked=checked, environ=environ)
        self._account = account
        self._tokens: dict[str, str] = {}
        self._basic = False

    # -- what it has

    def check(self) -> None:
        """Ask for nothing: an account that is refused here is refused everywhere.

        Raises:
            RegistryError: it is no registry, or refuses the account.
        """
        with self._ask("GET", "/v2/", scope="") as answer:
            if answer.status_code not in (200, 401, 403):
                raise self._wrong(f"it answers {answer.status_code}, as no registry does")
            if answer.status_code in (401, 403):
                # No hint at a login: this is one.
                raise self._wrong(f"it lets nobody in {self._who()}: {WHO_IS_ASKED}")
            self._judge(answer, "/v2/")

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

    def has_blob(self, reference: Reference, digest: str) -> bool:
        """Return whether a repository has a blob already."""
        path = f"/v2/{reference.repository}/blobs/{digest}"
        with self._ask("HEAD", path, scope=_scope(reference, push=True)) as answer:
            if answer.status_code == 404:
                return False
            self._judge(answer, f"{reference.repository}@{digest[:19]}")
            return True

    # -- what it is given

    def put_blob(
        self, reference: Reference, digest: str, size: int, opened: BinaryIO | Part
    ) -> None:
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

    # -- who asks

    def _who(self) -> str:
        if self._account is None:
            return "without an account"
        return f"with the account {self._account.username!r}"

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
                    "client_id": CLIENT,
                }
                kind = {"Content-Type": "application/x-www-form-urlencoded"}
                answer = self._sent("POST", realm, kind, urlencode(form).encode())
            else:
                headers: dict[str, str] = {}
                if account is not None:
                    headers["Authorization"] = _basic(account)
                url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(wanted)
                answer = self._follow("GET", url, headers, None)
        except Exception as error:
            if not is_of_the_net(error):
                raise
            raise self._wrong(f"its token service: {words_of(error)}") from None
        with answer:
            self._judge(answer, "a token")
            said = json_of(self._small(answer, TOKEN_BYTES))
        token = said.get("token") or said.get("access_token")
        if not isinstance(token, str) or not token or not token.isascii():
            raise self._wrong("its token service gives no token")
        return token


def _basic(account: Account) -> str:
    pair = f"{account.username}:{account.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _scope(reference: Reference, *, push: bool = False) -> str:
    return f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"
