"""Libraries of Sylabs' kind (`library://`): names, and the requests of their REST interface.

An image is what its hash says; a library that gives another one, or more, is not believed.
"""

from __future__ import annotations

import json
import re
from urllib.parse import quote, urlencode

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.registry.server import (
    CLIENT,
    TRIES,
    Interrupted,
    NotAllowed,
    NotThere,
    RegistryError,
)
from apptainer_py.registry.services import SIGNED, Service, bearer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, BinaryIO

SCHEME = "library"
LATEST = "latest"
_SHORTER = "the file has become shorter"
_PREFIX = "sha256."
_HASH = re.compile(r"sha256\.[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_+~-][A-Za-z0-9_.+~-]{0,127}")
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
# A larger file is sent in parts; that is where Apptainer begins with it.
_WHOLE_MOST = 64 << 20
_PARTS_MOST = 10000
_QUERY_LEAST = 3
_V2_TAGS = (2, 0, 0)


class BadName(ApptainerError):
    message = "{name} is no name of an image in a library: {reason}"
    hint = "a name is library://[HOST/]ENTITY/COLLECTION/CONTAINER[:TAG]"


class LoggedOut(NotAllowed):
    """The library wants to know who asks, and no token is kept for it."""

    hint = "log in with `{program} remote login`, if you have an account there"


class Name(Record):
    """An image in a library; `host` is "" for that of the active endpoint."""

    host: str
    path: str
    tags: tuple[str, ...]

    @property
    def tag(self) -> str:
        """The one that is pulled."""
        return self.tags[0] if self.tags else LATEST

    def __str__(self) -> str:
        return f"{self.path}:{self.tag}"

    @property
    def file_stem(self) -> str:
        """What a file with this image is called, without its ending."""
        return f"{self.path.rpartition('/')[2]}_{self.tag}"


def parse(text: str) -> Name:
    """Return what stands behind `library:`.

    With one part, or three, it has no host.

    Raises:
        BadName: it is none.
    """
    rest = text.removeprefix("//")
    place, colon, last = rest.rpartition(":")
    if not colon or "/" in last:
        place, last = rest, ""
    parts = place.lstrip("/").split("/")
    host = ""
    if text.startswith("//") and not rest.startswith("/") and len(parts) not in (1, 3):
        host, *parts = parts
        if not _HOST.fullmatch(host):
            raise BadName(name=_plain(text), reason=f"{host[:100]!r} is no host")
    if len(parts) > 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise BadName(name=_plain(text), reason=f"{'/'.join(parts)[:100]!r} is no path")
    tags = tuple(last.split(",")) if colon and last else ()
    if rest.endswith(":") or not all(_NAME.fullmatch(tag) for tag in tags):
        raise BadName(name=_plain(text), reason=f"{last[:100]!r} is no tag")
    return Name(host=host, path="/".join(parts), tags=tags)


class Image(Record):
    """What a library says of an image: `hash` is `sha256.HEX`."""

    ident: str
    hash: str
    size_bytes: int
    uploaded: bool


class Found(Record):
    """An image that a search has found."""

    path: str
    tags: tuple[str, ...]
    description: str
    fingerprints: tuple[str, ...]
    size_bytes: int


class Content(Record):
    """A file to be given: its descriptor, and what its bytes are."""

    opened: BinaryIO
    size_bytes: int
    sha256: str
    md5: str


class Library(Service):
    """One library, for one token."""

    not_allowed = LoggedOut
    tries = TRIES

    def __init__(self, address: str, *, token: str, environ: Mapping[str, str]) -> None:
        super().__init__(address, authorization=bearer(token), environ=environ)

    # -- what it has

    def image(self, name: Name, arch: str) -> Image:
        """Return what there is under a name.

        Raises:
            NotThere: nothing is.
            RegistryError: it does not answer, or with what makes no sense.
        """
        try:
            said = self._data("GET", f"/v1/images/{_quoted(str(name))}?{_query(arch)}", str(name))
        except NotThere:
            reason = f"image does not exist in the library: {name} ({arch})"
            raise NotThere(host=self._server, reason=reason) from None
        found = self._image(said)
        if name.tag.startswith(_PREFIX) and found.hash != name.tag:
            raise self._wrong(f"{name}: it has another image under that hash")
        return found

    def _image(self, said: Mapping[str, Any]) -> Image:
        ident, hashed, size = said.get("id"), said.get("hash"), said.get("size", 0)
        if not isinstance(ident, str) or not _ID.fullmatch(ident):
            raise self._wrong("what it says of an image makes no sense: it has no number")
        if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
            raise self._wrong("what it says of an image makes no sense: it has no hash")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
            raise self._wrong("what it says of an image makes no sense: its size is none")
        uploaded = said.get("uploaded") is True
        return Image(ident=ident, hash=hashed, size_bytes=size, uploaded=uploaded)

    def content(self, name: Name, arch: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
        """Return where the bytes begin, and the bytes; nobody has looked at their hash yet.

        Raises:
            RegistryError: they cannot be had.
        """
        path = f"/v1/imagefile/{_quoted(str(name))}?{_query(arch)}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._ask("GET", path, scope="", headers=headers)
        if answer.status_code == 416:
            answer.close()
            return self.content(name, arch)
        self._judge(answer, str(name))
        return (start if answer.status_code == 206 else 0), self._pieces(answer)

    def search(self, words: str, arch: str, *, signed: bool) -> list[Found]:
        """Return the images that words lead to.

        Raises:
            RegistryError: it does not answer, or there are too few words.
        """
        if len(words) < _QUERY_LEAST:
            reason = f"bad query '{words}'. You must search for at least {_QUERY_LEAST} characters"
            raise self._wrong(reason)
        query = {"arch": arch, **({"signed": "true"} if signed else {}), "value": words}
        rows = self._data("GET", f"/v1/search?{urlencode(query)}", "search").get("image")
        return [_found(row) for row in rows or () if isinstance(row, dict)]

    def delete(self, name: Name, arch: str) -> None:
        """Take an image away.

        Raises:
            RegistryError: it cannot be.
        """
        path = f"/v1/images/{_quoted(str(name))}?{_query(arch)}"
        with self._ask("DELETE", path, scope="") as answer:
            self._judge(answer, f"{name} ({arch})")

    def registry_password(self) -> str:
        """Return what its user's account in the library's own registry has for a password.

        Raises:
            RegistryError: it has none.
        """
        user = self.json("GET", "/v1/rbac/users/current", "current user")
        facts = user.get("oidc_user_meta")
        secret = facts.get("secret") if isinstance(facts, dict) else None
        if not isinstance(secret, str) or not secret or not secret.isprintable():
            raise self._wrong("user does not have cli token set")
        return secret

    # -- what it is given

    def push(
        self,
        name: Name,
        arch: str,
        content: Content,
        description: str,
        told: Callable[[int], None],
    ) -> bool:
        """Give it an image under all its tags; return whether the bytes had to be sent.

        Raises:
            RegistryError: it does not take it.
        """
        entity, collection, container = name.path.split("/")
        above = self._made("entities", entity, {"name": entity})
        place = f"{entity}/{collection}"
        above = self._made("collections", place, {"name": collection, "entity": above})
        above = self._made("containers", name.path, {"name": container, "collection": above})
        exact = name.replace(tags=(f"{_PREFIX}{content.sha256}",))
        try:
            image = self.image(exact, arch)
        except NotThere:
            fresh = {"hash": exact.tag, "container": above, "description": description}
            image = self._image(self._created("images", fresh))
        if not image.uploaded:
            self._upload(image.ident, content, told)
        for tag in name.tags or (LATEST,):
            self._tag(above, arch, tag, image.ident)
        return not image.uploaded

    def _made(self, kind: str, name: str, row: Mapping[str, str]) -> str:
        """Return the number of a record, which is made where there is none."""
        try:
            said = self._data("GET", f"/v1/{kind}/{_quoted(name)}", name)
        except NotThere:
            said = self._created(kind, {**row, "description": "No description"})
        ident = said.get("id")
        if not isinstance(ident, str) or not _ID.fullmatch(ident):
            raise self._wrong(f"{name}: what it says makes no sense: it has no number")
        return ident

    def _created(self, kind: str, row: Mapping[str, str]) -> dict[str, Any]:
        what = f"making {row.get('name') or row.get('hash')}"
        return self._data("POST", f"/v1/{kind}", what, json.dumps(row).encode())

    def _tag(self, container: str, arch: str, tag: str, image: str) -> None:
        if self._knows_arches():
            row = {"Arch": arch, "Tag": tag, "ImageID": image}
            self._data("POST", f"/v2/tags/{container}", tag, json.dumps(row).encode())
        else:
            row = {"Tag": tag, "ImageID": image}
            self._data("POST", f"/v1/tags/{container}", tag, json.dumps(row).encode())

    def _knows_arches(self) -> bool:
        said = self._data("GET", "/version", "version").get("apiVersion")
        numbers = re.findall(r"\d+", said if isinstance(said, str) else "")[:3]
        return tuple(int(number[:9]) for number in numbers) >= _V2_TAGS

    def _upload(self, ident: str, content: Content, told: Callable[[int], None]) -> None:
        if content.size_bytes > _WHOLE_MOST:
            try:
                self._upload_parts(ident, content, told)
                return
            except NotThere:
                pass  # not every library takes parts
        place = f"/v2/imagefile/{ident}"
        wanted = {
            "filesize": content.size_bytes, "sha256sum": content.sha256, "md5sum": content.md5
        }  # fmt: skip
        said = self._data("POST", place, "upload", json.dumps(wanted).encode())
        self._put(said.get("uploadURL"), Part(content.opened, 0, content.size_bytes, told))
        self._data("PUT", f"{place}/_complete", "upload", b"{}")

    def _upload_parts(self, ident: str, content: Content, told: Callable[[int], None]) -> None:
        place = f"/v2/imagefile/{ident}/_multipart"
        size = content.size_bytes
        said = self._data("POST", place, "upload", json.dumps({"filesize": size}).encode())
        upload, count, each = self._parts_of(said, size)
        options = said.get("options")
        plain = isinstance(options, dict) and options.get("s3compliant") == "false"
        done = []
        try:
            for number in range(1, count + 1):
                start = each * (number - 1)
                part = Part(content.opened, start, min(each, size - start), told)
                token = self._upload_part(place, upload, number, part, plain=plain)
                done.append({"partNumber": number, "token": token})
        except RegistryError:
            self._abort(place, upload)
            raise
        finished = {"uploadID": upload, "completedParts": done}
        self._data("PUT", f"{place}_complete", "upload", json.dumps(finished).encode())

    def _parts_of(self, said: Mapping[str, Any], size: int) -> tuple[str, int, int]:
        """Return the number of an upload, how many parts it has, and the size of each."""
        upload, count, each = (said.get(key) for key in ("uploadID", "totalParts", "partSize"))
        if isinstance(upload, str) and isinstance(count, int) and isinstance(each, int):
            last = size - each * (count - 1)
            if 0 < count <= _PARTS_MOST and 0 < last <= each:
                return upload, count, each
        raise self._wrong("the parts that it wants of an upload make no sense")

    def _upload_part(self, place: str, upload: str, number: int, part: Part, *, plain: bool) -> str:
        hashed = "" if plain else part.sha256()
        wanted = {
            "partSize": len(part), "uploadID": upload, "partNumber": number, "sha256sum": hashed
        }  # fmt: skip
        said = self._data("PUT", place, "upload", json.dumps(wanted).encode())
        return self._put(said.get("presignedURL"), part, hashed)

    def _abort(self, place: str, upload: str) -> None:
        try:
            body = json.dumps({"uploadID": upload}).encode()
            self._data("PUT", f"{place}_abort", "upload", body)
        except RegistryError:
            pass  # what broke the upload is told

    def _put(self, url: object, part: Part, hashed: str = "") -> str:
        if not isinstance(url, str) or "://" not in url:
            raise self._wrong("it names no place for the upload")
        url = self._led(self._base, url)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(part))}
        if hashed or "x-amz-content-sha256" in url:
            headers["x-amz-content-sha256"] = hashed or part.sha256()
        with self._ask("PUT", url, scope=SIGNED, headers=headers, body=part) as answer:
            self._judge(answer, "the place for the upload", is_file=True)
            token: str = answer.headers.get("ETag", "")
        return token

    def _data(self, method: str, path: str, what: str, body: bytes | None = None) -> dict[str, Any]:
        said = self.json(method, path, what, body).get("data")
        return said if isinstance(said, dict) else {}


class Part:
    """A part of a file, as the body of a request."""

    def __init__(
        self, opened: BinaryIO, start: int, size: int, told: Callable[[int], None]
    ) -> None:
        self._opened, self._start, self._size, self._told = opened, start, size, told
        self._place = 0

    def __len__(self) -> int:
        return self._size

    def tell(self) -> int:
        """Return what is read of it."""
        return self._place

    def seek(self, place: int) -> None:
        """Begin again."""
        self._place = place

    def read(self, most: int = -1) -> bytes:
        """Return what follows."""
        import os

        left = self._size - self._place
        wanted = left if most < 0 else min(most, left)
        data = os.pread(self._opened.fileno(), wanted, self._start + self._place)
        if wanted and not data:
            raise Interrupted(host=CLIENT, reason=_SHORTER)  # the server would wait for the rest
        self._place += len(data)
        self._told(len(data))
        return data

    def sha256(self) -> str:
        """Return the hash of its bytes."""
        import hashlib
        import os

        found, place, end = hashlib.sha256(), self._start, self._start + self._size
        while place < end:
            data = os.pread(self._opened.fileno(), min(1 << 20, end - place), place)
            if not data:
                raise Interrupted(host=CLIENT, reason=_SHORTER)
            found.update(data)
            place += len(data)
        return found.hexdigest()


def _found(row: Mapping[str, Any]) -> Found:
    def text(value: object) -> str:
        printed = value if isinstance(value, str) else ""
        return "".join(c if c.isprintable() else " " for c in printed)[:1000]

    def texts(value: object) -> tuple[str, ...]:
        return tuple(text(one) for one in value) if isinstance(value, list) else ()

    names = [text(row.get(key)) for key in ("entityName", "collectionName", "containerName")]
    size = row.get("size")
    return Found(
        path="/".join(names),
        tags=texts(row.get("tags")),
        description=text(row.get("description")),
        fingerprints=texts(row.get("fingerprints")),
        size_bytes=size if isinstance(size, int) and size >= 0 else 0,
    )


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _quoted(text: str) -> str:
    return quote(text, safe="/:,")


def _query(arch: str) -> str:
    return urlencode({"arch": arch})


def bad_for_push(name: Name) -> str:
    """Return why an image cannot be pushed under a name, "" if it can."""
    if name.path.count("/") != 2:
        return f"malformed image path: {name.path}"
    return ""
