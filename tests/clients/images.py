"""A busybox image as an OCI layout, written here: no registry, no image tool."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

from tests.oci import bed

NAME = "localhost/busybox:latest"
IMAGE = "application/vnd.oci.image"


def _layer() -> bytes:
    """Return the tree of the tests as a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(bed.tree(), arcname=".", filter=_owned_by_root)
    return out.getvalue()


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = 1_700_000_000
    return entry


def _blob(folder: Path, data: bytes, kind: str) -> dict[str, object]:
    """Store a blob; return its descriptor."""
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": f"{IMAGE}.{kind}", "digest": f"sha256:{digest}", "size": len(data)}


def write_layout(folder: Path, name: str = NAME, **settings: object) -> Path:
    """Write an OCI layout with one image; `settings` go into `config` of its configuration."""
    (folder / "blobs/sha256").mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    raw = _layer()
    layer = _blob(folder, gzip.compress(raw, 1, mtime=0), "layer.v1.tar+gzip")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"], **settings},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(raw).hexdigest()}"]},
        "history": [{"created_by": "tests"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{IMAGE}.manifest.v1+json",
        "config": _blob(folder, json.dumps(config).encode(), "config.v1+json"),
        "layers": [layer],
    }
    entry = _blob(folder, json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
        "io.containerd.image.name": name,
    }
    entry["platform"] = {"architecture": "amd64", "os": "linux"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


@functools.cache
def layout() -> Path:
    """Return the layout of the plain busybox image."""
    return write_layout(bed.shared_folder() / "layout")


@functools.cache
def layer_file() -> Path:
    """Return the same tree as a plain tar file."""
    made = bed.shared_folder() / "layer.tar"
    made.write_bytes(_layer())
    return made


@functools.cache
def archive() -> Path:
    """Return the same as one tar file."""
    made = bed.shared_folder() / "layout.tar"
    with tarfile.open(made, "w") as out:
        out.add(layout(), arcname=".")
    return made
