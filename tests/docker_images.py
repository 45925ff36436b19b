"""Files of `docker save`, and a daemon that has them: written here, without docker."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from apptainer_py.image import arch

NAME = "localhost/busybox:1"


def layer(*files: tuple[str, bytes]) -> bytes:
    """Return a layer with programs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def configuration(*layers: bytes, **settings: object) -> bytes:
    document = {
        "architecture": arch.host_arch(),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], **settings},
        "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in layers]},
    }
    return json.dumps(document).encode()


def image(path: Path, *layers: bytes, packed: bool = False, **changes: Any) -> bytes:
    """Write an archive with one image; return its configuration.

    `packed` compresses the second layer and the whole; `changes` are of its line in manifest.json.
    """
    config = changes.pop("config", configuration(*layers, Cmd=["echo", "from docker"]))
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    row = {"Config": "config.json", "RepoTags": [NAME], "Layers": names, **changes}
    files = {"manifest.json": json.dumps(changes.get("rows", [row])).encode()}
    files["config.json"] = config
    for number, (name, data) in enumerate(zip(names, layers, strict=True)):
        files[name] = gzip.compress(data) if packed and number else data
    with tarfile.open(path, "w:gz" if packed else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("again/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        archive.addfile(link)
    return bytes(config)


@contextmanager
def daemon(path: Path, archive: Path, config: bytes, *, cut: bool = False) -> Iterator[list[str]]:
    """Serve one image at a socket, as dockerd does; yields what was asked for."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    path.chmod(0o666)
    server.listen(4)
    asked: list[str] = []

    def answer(line: str) -> tuple[int, bytes]:
        asked.append(line)
        name, _, what = unquote(line.removeprefix("/images/")).rpartition("/")
        if name not in (NAME, digest(config)):
            return 404, json.dumps({"message": f"No such image: {name}"}).encode()
        if what == "json":
            return 200, json.dumps({"Id": digest(config)}).encode()
        return 200, archive.read_bytes()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65536).decode()
                status, body = answer(request.split(" ")[1])
                head = f"HTTP/1.1 {status} Answer\r\nContent-Length: {len(body)}\r\n\r\n"
                short = (
                    body[: len(body) // 2] if cut and status == 200 and len(body) > 999 else body
                )
                connection.sendall(head.encode() + short)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
