"""A small library of Sylabs' kind, with its endpoint and a key server; the real client takes it.

`asked` is every request that came, with its headers; `tricks` answer in place of the usual.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from apptainer_py.crypto import packets
from tests.fake_registry import send

TOKEN = "library-token-7f3a-" + "x" * 240
SECRET = "secret-of-the-registry"
HTTP_PORT = 80
_PART = 5 << 20


class Library:
    """What it has: one flat table for each kind of record, images by their hash."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.tricks: dict[str, Callable[[BaseHTTPRequestHandler], bool]] = {}
        self.records: dict[str, dict[str, dict[str, Any]]] = {
            name: {} for name in ("entities", "collections", "containers", "images")
        }
        self.tags: dict[str, dict[str, dict[str, str]]] = {}
        self.files: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.keys: dict[str, str] = {}
        self.token = TOKEN
        self.closed = False
        self.led = False
        self.host = ""

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def paths(self, method: str = "") -> list[str]:
        return [path for kind, path, _ in self.asked if not method or kind == method]

    def give(self, name: str, tag: str, data: bytes) -> None:
        """Have an image."""
        digits = f"sha256.{hashlib.sha256(data).hexdigest()}"
        ident = hashlib.sha256(name.encode()).hexdigest()[:24]
        self.records["containers"][name] = {"id": ident}
        self.tags[ident] = {"amd64": {tag: ident}}
        self.records["images"][f"{name}:{digits}"] = {
            "id": ident, "hash": digits, "size": len(data), "uploaded": True,
        }  # fmt: skip
        self.files[ident] = data

    # -- answers

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        self.asked.append((handler.command, handler.path, dict(handler.headers)))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if path in self.tricks and self.tricks[path](handler):
            return
        allowed = handler.headers.get("Authorization") == f"Bearer {self.token}"
        for start, answer in (
            ("/assets/config/", self._config),
            ("/version", self._version),
            ("/v1/token-status", self._token_status),
            ("/v1/rbac/users/current", self._user),
            ("/pks/", self._keys),
            ("/v1/search", self._search),
            ("/v1/images/", self._image),
            ("/v1/imagefile/", self._file),
            ("/data/", self._data),
            ("/v2/imagefile/", self._upload),
            ("/v2/tags/", self._tag),
            ("/v1/", self._record),
        ):
            if path.startswith(start):
                writes = handler.command not in ("GET", "HEAD") and start != "/pks/"
                signed = start == "/data/"
                if ((writes and not signed) or (self.closed and start == "/v1/images/")) and (
                    not allowed
                ):
                    self._fail(handler, 401, "Unauthorized")
                    return
                answer(handler, path, query, body)
                return
        self._fail(handler, 404, "Not Found")

    @staticmethod
    def _fail(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
        error = {"error": {"code": status, "message": text}}
        send(handler, status, json.dumps(error).encode())

    @staticmethod
    def _give(handler: BaseHTTPRequestHandler, value: object) -> None:
        send(handler, 200, json.dumps({"data": value}).encode())

    def _config(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        names = ("libraryAPI", "keystoreAPI", "tokenAPI")
        send(handler, 200, json.dumps({name: {"uri": self.url} for name in names}).encode())

    def _version(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        self._give(handler, {"version": "v1.2.3", "apiVersion": "2.0.0-alpha.2"})

    def _token_status(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        if handler.headers.get("Authorization") == f"Bearer {self.token}":
            self._give(handler, {})
        else:
            self._fail(handler, 404, "no such token")

    def _user(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            self._fail(handler, 401, "Unauthorized")
            return
        user = {"oidc_user_meta": {"secret": SECRET}}
        send(handler, 200, json.dumps(user).encode())

    # -- keys

    def _keys(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        if path == "/pks/add":
            text = parse_qs(body.decode())["keytext"][0]
            fingerprint = packets.read(packets.dearmored(text.encode()))[0].fingerprint
            self.keys[fingerprint] = text
            send(handler, 200, b"")
            return
        wanted = query["search"][0].lower().removeprefix("0x")
        found = {name: text for name, text in self.keys.items() if name.lower().endswith(wanted)}
        if query["op"] == ["get"] and found:
            send(handler, 200, next(iter(found.values())).encode())
        elif query["op"] == ["index"] and self.keys:
            lines = ["info:1:1"]
            for name in self.keys:
                lines += [f"pub:{name.upper()}:1:2048:1600000000::", "uid:Some One:1600000000::"]
            send(handler, 200, "\n".join(lines).encode())
        else:
            send(handler, 404, b"")

    # -- records

    def _record(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        kind, _, name = path.removeprefix("/v1/").partition("/")
        if kind not in self.records:
            self._fail(handler, 404, "Not Found")
            return
        table = self.records[kind]
        if handler.command == "POST":
            given = json.loads(body)
            above = {"collections": ("entity", "entities"), "containers": (
                "collection", "collections"), "images": ("container", "containers")}  # fmt: skip
            full = given.get("name") or given["hash"]
            if kind in above:
                field, table_above = above[kind]
                names = {row["id"]: key for key, row in self.records[table_above].items()}
                full = f"{names[given[field]]}{':' if kind == 'images' else '/'}{full}"
            table[full] = {**given, "id": hashlib.sha256(full.encode()).hexdigest()[:24]}
            if kind == "images":
                table[full]["uploaded"] = False
            self._give(handler, table[full])
        elif name in table:
            self._give(handler, table[name])
        else:
            self._fail(handler, 404, "Not Found")

    def find(self, name: str, arch: str) -> dict[str, Any] | None:
        container, _, tag = name.partition(":")
        tag = tag or "latest"
        if not tag.startswith("sha256."):
            row = self.records["containers"].get(container)
            ident = self.tags.get(row["id"], {}).get(arch, {}).get(tag) if row else None
            images = self.records["images"].values()
            return next((image for image in images if image["id"] == ident), None)
        return self.records["images"].get(f"{container}:{tag}")

    def _image(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        name = path.removeprefix("/v1/images/")
        found = self.find(name, query.get("arch", [""])[0])
        if found is None:
            self._fail(handler, 404, "Not Found")
        elif handler.command == "DELETE":
            for key in [key for key, row in self.records["images"].items() if row is found]:
                del self.records["images"][key]
            self._give(handler, {})
        else:
            self._give(handler, found)

    def _tag(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        ident = path.removeprefix("/v2/tags/")
        tags = self.tags.setdefault(ident, {})
        if handler.command == "POST":
            given = json.loads(body)
            tags.setdefault(given["Arch"], {})[given["Tag"]] = given["ImageID"]
        self._give(handler, tags)

    def _search(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        words = query["value"][0]
        found: dict[str, list[dict[str, Any]]] = {
            "entity": [], "collection": [], "container": [], "image": []
        }  # fmt: skip
        for full, image in self.records["images"].items():
            if words in full:
                names = full.partition(":")[0].split("/")
                row = self.records["containers"][full.partition(":")[0]]
                tags = [
                    tag
                    for tag, ident in self.tags.get(row["id"], {}).get("amd64", {}).items()
                    if ident == image["id"]
                ]
                found["image"].append({
                    **image, "entityName": names[0], "collectionName": names[1],
                    "containerName": names[2], "tags": tags, "signed": False,
                    "size": image.get("size", 0),
                })  # fmt: skip
        self._give(handler, found)

    # -- content

    def _file(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        found = self.find(path.removeprefix("/v1/imagefile/"), query.get("arch", [""])[0])
        if found is None:
            self._fail(handler, 404, "Not Found")
        elif self.led:
            place = f"{self.url}/data/{found['id']}"
            send(handler, 303, b"", {"Location": place})
        else:
            send(handler, 200, self.files[found["id"]])

    def _data(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        ident = path.removeprefix("/data/")
        if handler.command == "PUT":
            name, _, number = ident.partition("/")
            if number:
                self.parts[name][int(number)] = body
            else:
                self.files[name] = body
            send(handler, 200, b"", {"ETag": _tag_of(body)})
            return
        data = self.files[ident]
        wanted = handler.headers.get("Range", "")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            send(handler, 206, data[int(start) : int(end) + 1 if end else None])
        else:
            send(handler, 200, data)

    def _upload(self, handler: Any, path: str, query: Any, body: bytes) -> None:
        ident, _, step = path.removeprefix("/v2/imagefile/").partition("/")
        given = json.loads(body)
        if step == "":
            self._give(handler, {"uploadURL": f"{self.url}/data/{ident}"})
        elif step == "_multipart" and handler.command == "POST":
            self.parts[ident] = {}
            count = -(-given["filesize"] // _PART)
            self._give(handler, {"uploadID": "u1", "totalParts": count, "partSize": _PART})
        elif step == "_multipart":
            number = given["partNumber"]
            self._give(handler, {"presignedURL": f"{self.url}/data/{ident}/{number}"})
        elif step in ("_complete", "_multipart_complete"):
            if step == "_multipart_complete":
                rows = given["completedParts"]
                parts = self.parts[ident]
                assert [row["token"] for row in rows] == [
                    _tag_of(parts[row["partNumber"]]) for row in rows
                ]
                self.files[ident] = b"".join(parts[row["partNumber"]] for row in rows)
            self._done(ident)
            quota = {"quotaTotal": 0, "quotaUsage": len(self.files[ident])}
            self._give(handler, {"quota": quota, "containerUrl": "some/where"})
        else:
            self._fail(handler, 404, "Not Found")

    def _done(self, ident: str) -> None:
        for row in self.records["images"].values():
            if row["id"] == ident:
                row["uploaded"] = True
                row["size"] = len(self.files[ident])


def _tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def running(address: str = "127.0.0.1", port: int = 0) -> Iterator[Library]:
    """Serve; the real client takes no endpoint with a port, only one at the port of HTTP."""
    library = Library()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            library.answer(self)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _do  # noqa: N815

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    library.host = address if port == HTTP_PORT else f"{address}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield library
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
