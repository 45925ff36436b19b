"""Debian's docker-registry on a port of its own: plain, or with TLS and accounts."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCOUNT = ("alice", "s3cret")
_DEADLINE_S = 30.0
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def is_here() -> bool:
    return shutil.which("docker-registry") is not None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def running(folder: Path, *, closed: bool = False) -> Iterator[str]:
    """Run one that keeps everything in a folder; give HOST:PORT. `closed`: TLS and an account."""
    port = free_port()
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if closed:
        config |= _closed(folder)
        config["http"]["tls"] = {  # type: ignore[index]
            "certificate": str(folder / "cert.pem"),
            "key": str(folder / "key.pem"),
        }
    (folder / "config.yml").write_text(json.dumps(config))  # YAML contains JSON
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait(process, port, folder)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _closed(folder: Path) -> dict[str, object]:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", _NAMES, "-keyout", folder / "key.pem", "-out",
         folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "cert.pem").chmod(0o644)
    made = subprocess.run(["htpasswd", "-Bbn", *ACCOUNT], check=True, capture_output=True)
    (folder / "htpasswd").write_bytes(made.stdout)
    return {"auth": {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}}


def _wait(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    end = time.monotonic() + _DEADLINE_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            time.sleep(0.02)
    raise AssertionError((folder / "log").read_text()[-2000:])


def push(layout: Path, host: str, name: str, *, folder: Path | None = None) -> None:
    """Upload an OCI layout with skopeo; `folder` is that of a closed registry."""
    options = ["--dest-tls-verify=false"]
    if folder is not None:
        options += ["--dest-creds", ":".join(ACCOUNT)]
    subprocess.run(
        ["skopeo", "copy", "--quiet", *options, f"oci:{layout}:latest", f"docker://{host}/{name}"],
        check=True,
        capture_output=True,
    )
