"""A registry that misbehaves as it is told, for what a real one cannot be made to do."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Fake:
    """What it has, and how it answers; `asked` is every request that came."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        # By path: called instead of the usual answer, until it returns False.
        self.tricks: dict[str, Callable[[BaseHTTPRequestHandler], bool]] = {}
        self.account: tuple[str, str] | None = None
        self.bearer = False
        self.host = ""

    def add(self, data: bytes) -> dict[str, object]:
        self.blobs[digest(data)] = data
        return {"mediaType": LAYER, "digest": digest(data), "size": len(data)}

    def add_image(self, tag: str, *layers: bytes, machine: str = "amd64") -> dict[str, object]:
        config = self.add(json.dumps({"architecture": machine, "os": "linux"}).encode())
        document = {"schemaVersion": 2, "config": config, "layers": [self.add(x) for x in layers]}
        data = json.dumps(document).encode()
        for name in (tag, digest(data)):
            self.manifests[name] = (MANIFEST, data)
        platform = {"architecture": machine, "os": "linux"}
        return {
            "mediaType": MANIFEST, "digest": digest(data), "size": len(data), "platform": platform
        }  # fmt: skip

    def add_index(self, tag: str, *rows: dict[str, object]) -> None:
        data = json.dumps({"schemaVersion": 2, "manifests": list(rows)}).encode()
        self.manifests[tag] = (INDEX, data)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append((handler.command, handler.path, dict(handler.headers)))
        if path in self.tricks and self.tricks[path](handler):
            return
        if path == "/token":
            send(handler, 200, json.dumps({"token": "tok"}).encode())
        elif self.account and not self._may(handler):
            kind = (
                f'Bearer realm="http://{self.host}/token",service="s"' if self.bearer else "Basic"
            )
            send(handler, 401, b"{}", {"WWW-Authenticate": kind})
        elif "/manifests/" in path and path.rpartition("/")[2] in self.manifests:
            kind, data = self.manifests[path.rpartition("/")[2]]
            send(handler, 200, data, {"Content-Type": kind})
        elif "/blobs/" in path and path.rpartition("/")[2] in self.blobs:
            self._blob(handler, self.blobs[path.rpartition("/")[2]])
        else:
            missing = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            send(handler, 200 if path == "/v2/" else 404, json.dumps(missing).encode())

    def _may(self, handler: BaseHTTPRequestHandler) -> bool:
        given = handler.headers.get("Authorization", "")
        if self.bearer:
            return given == "Bearer tok"
        assert self.account is not None
        return given == "Basic " + base64.b64encode(":".join(self.account).encode()).decode()

    @staticmethod
    def _blob(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        wanted = handler.headers.get("Range", "")
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            send(handler, 206, data[start:])
        else:
            send(handler, 200, data)


def send(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


@contextmanager
def running() -> Iterator[Fake]:
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            fake.answer(self)

        do_GET = do_HEAD = do_POST = do_PUT = _do  # noqa: N815

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
