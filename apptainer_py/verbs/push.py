"""`push`: a SIF file into a registry, as an artifact."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import artifacts
from apptainer_py.image import detect
from apptainer_py.registry import reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.builds.fetching import Fetching


class BadUri(ApptainerError):
    message = "bad uri {uri}"


class UnknownTransport(ApptainerError):
    message = "Unsupported transport type: {name}"
    hint = "oras:// takes SIF files"


class CannotPush(ApptainerError):
    message = "Unable to push {path}: {reason}"


def push(
    path: str,
    uri: str,
    how: Fetching,
    environ: Mapping[str, str],
    annotations: Sequence[str] = (),
) -> str:
    """Upload a SIF file; return the digest of what the registry now has.

    Raises:
        ApptainerError: the registry does not take it, or it is no SIF file.
    """
    transport, colon, rest = uri.partition("://")
    if not colon:
        raise BadUri(uri=uri)
    if transport != artifacts.ORAS:
        raise UnknownTransport(name=transport)
    named = reference.parse(f"//{rest}", docker=False)
    notes = dict(_pair(path, text) for text in annotations)
    try:
        image = detect.open_image(path)
    except ApptainerError as error:
        raise CannotPush(path=path, reason=str(error.facts.get("reason", error))) from None
    os.close(image.fd)
    if image.kind != "sif":
        raise CannotPush(path=path, reason="only SIF files are pushed")
    try:
        return artifacts.push(path, named, how, environ, notes)
    except OSError as error:
        raise CannotPush(path=path, reason=(error.strerror or "").lower()) from None


def _pair(path: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CannotPush(path=path, reason=f"--annotation {text}: not NAME=VALUE")
    return name, value
