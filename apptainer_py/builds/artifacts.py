"""SIF files as OCI artifacts (`oras://`): one layer, which is the file itself."""

from __future__ import annotations

import io
import json
import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import report
from apptainer_py.builds.remote import Named, download, look_up, registry_of
from apptainer_py.registry.client import OCI_MANIFEST, digest_of
from apptainer_py.registry.library import Part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.builds.digesting import Digesting
    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.cache.store import Cache
    from apptainer_py.image.oci_layout import Object
    from apptainer_py.registry.client import Registry
    from apptainer_py.registry.reference import Reference

ORAS = "oras"
CONFIG_KIND = "application/vnd.sylabs.sif.config.v1+json"
LAYER_KIND = "application/vnd.sylabs.sif.layer.v1.sif"
_LAYER_KINDS = (LAYER_KIND, "appliciation/vnd.sylabs.sif.layer.tar")  # older writers' own spelling
_TITLE = "org.opencontainers.image.title"
_CONFIG = b"{}"


class NoSif(ApptainerError):
    """What the registry has under the name is something else."""

    message = "{reference} is no SIF image: {reason}"
    hint = "an image of layers is fetched as docker://{reference}"


def find(reference: Reference, how: Fetching, environ: Mapping[str, str]) -> tuple[Named, Object]:
    """Return an artifact and its one layer.

    Raises:
        ApptainerError: there is none of that name.
    """
    with registry_of(reference, how, environ) as registry:
        return _found(registry, reference, how)


def _found(registry: Registry, reference: Reference, how: Fetching) -> tuple[Named, Object]:
    named = look_up(registry, reference, how)
    if len(named.layers) != 1:
        reason = f"it has {len(named.layers)} layers, not one"
        raise NoSif(reference=reference, reason=reason)
    (layer,) = named.layers
    if layer.media_type not in _LAYER_KINDS:
        reason = f"its layer is of the kind {layer.media_type}"
        raise NoSif(reference=reference, reason=reason)
    return named, layer


def fetch(
    reference: Reference,
    how: Fetching,
    environ: Mapping[str, str],
    cache: Cache,
) -> str:
    """Return the path of the artifact's file in the cache.

    Raises:
        ApptainerError: it cannot be had.
    """
    with registry_of(reference, how, environ) as registry:
        named, layer = _found(registry, reference, how)

        def make(path: str) -> None:
            log.info("Downloading oras image")
            with report.counting("Downloading", layer.size_bytes) as told:
                download(registry, named.reference, layer, path, told)

        return cache.get(ORAS, layer.digest, f"oras://{reference}", make)


def push(
    path: str,
    digesting: Digesting,
    reference: Reference,
    how: Fetching,
    environ: Mapping[str, str],
    annotations: Mapping[str, str],
) -> str:
    """Upload a SIF file; return the manifest's digest.

    Raises:
        ApptainerError: the registry does not take it.
        OSError: it cannot be read.
    """
    with registry_of(reference, how, environ) as registry:
        # Asked for first, while all of the file is read.
        config = digest_of(_CONFIG)
        if not registry.has_blob(reference, config):
            registry.put_blob(reference, config, len(_CONFIG), io.BytesIO(_CONFIG))
        digest, size = digesting.wait()
        if not registry.has_blob(reference, digest):
            with report.counting("Uploading", size) as told:
                part = Part(digesting.file, 0, size, told)
                try:
                    registry.put_blob(reference, digest, size, part)
                finally:
                    # Then whatever the registry says of the bytes is not the point.
                    digesting.check()
        manifest = _manifest(os.path.basename(path), digest, size, annotations)
        return registry.put_manifest(reference, OCI_MANIFEST, manifest)


def tag(reference: Reference, name: str, how: Fetching, environ: Mapping[str, str]) -> str:
    """Give what a reference means one more tag; return the manifest's digest.

    Raises:
        ApptainerError: there is none of that name, or the registry does not take the tag.
    """
    with registry_of(reference, how, environ) as registry:
        found = registry.manifest(reference)
        tagged = reference.replace(tag=name, digest="")
        return registry.put_manifest(tagged, found.media_type, found.data)


def _manifest(title: str, digest: str, size: int, annotations: Mapping[str, str]) -> bytes:
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": CONFIG_KIND, "digest": digest_of(_CONFIG), "size": len(_CONFIG)},
        "layers": [
            {
                "mediaType": LAYER_KIND,
                "digest": digest,
                "size": size,
                "annotations": {_TITLE: title},
            }
        ],
        **({"annotations": dict(annotations)} if annotations else {}),
    }
    return json.dumps(manifest, separators=(",", ":")).encode()
