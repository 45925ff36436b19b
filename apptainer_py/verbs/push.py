"""`push`: a SIF file into a registry, as an artifact, or into a library; `tag`: its other names."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds.digesting import Digesting
from apptainer_py.image import detect, sif
from apptainer_py.registry import reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from apptainer_py.builds.fetching import Fetching


_ORAS = "oras"


class BadUri(ApptainerError):
    message = "bad uri {uri}"


class UnknownTransport(ApptainerError):
    message = "Unsupported transport type: {name}"
    hint = "oras:// and library:// take SIF files"


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
    if transport != _ORAS:
        raise UnknownTransport(name=transport)
    named = reference.parse(f"//{rest}", docker=False)
    notes = dict(_pair(path, text) for text in annotations)
    _check_sif(path)
    try:
        with open(path, "rb") as file, Digesting(file) as digesting:
            # Loaded while the file is read.
            from apptainer_py.builds import artifacts

            return artifacts.push(path, digesting, named, how, environ, notes)
    except OSError as error:
        raise CannotPush(path=path, reason=(error.strerror or "").lower()) from None


class CannotTag(ApptainerError):
    message = "Unable to tag image in oci registry: {reason}"


def tag(image: str, name: str, how: Fetching, environ: Mapping[str, str]) -> str:
    """Give an image that a registry has one more tag; return the digest of its manifest.

    Raises:
        ApptainerError: there is no such image, or the registry does not take the tag.
    """
    from apptainer_py.builds import artifacts

    transport, colon, rest = image.partition("://")
    if not colon:
        raise BadUri(uri=image)
    if transport != _ORAS:
        raise UnknownTransport(name=transport)
    if not reference.is_tag(name):
        raise CannotTag(reason=f"{name[:100]!a} is no tag")
    named = reference.parse(f"//{rest}", docker=False)
    try:
        return artifacts.tag(named, name, how, environ)
    except ApptainerError as error:
        raise CannotTag(reason=error) from None


class Unsigned(ApptainerError):
    message = "Unable to upload container: unable to verify signature: {reason}"
    hint = "`sign` signs it; --allow-unsigned pushes it as it is"


def push_to_library(
    path: str,
    uri: str,
    how: Fetching,
    environ: Mapping[str, str],
    *,
    description: str,
    check: Callable[[], None],
) -> bool:
    """Upload a SIF file that `check` finds signed; return whether its bytes had to be sent.

    Raises:
        ApptainerError: the library does not take it, or it is no signed SIF file.
    """
    from apptainer_py.registry import library

    name = library.parse(uri.partition(":")[2])
    if wrong := library.bad_for_push(name):
        raise CannotPush(path=path, reason=wrong)
    _check_sif(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            machine = _machine(fd)
        finally:
            os.close(fd)
        try:
            check()
        except ApptainerError as error:
            raise Unsigned(reason=error) from None
        from apptainer_py.builds import libraries

        return libraries.push(path, name, machine, how, environ, description)
    except OSError as error:
        raise CannotPush(path=path, reason=(error.strerror or "").lower()) from None


def _machine(fd: int) -> str:
    objects = sif.read_descriptors(fd, sif.read_header(fd))
    rows = [sif.partition_facts(one) for one in objects if one.data_type == sif.PARTITION]
    found = [machine for _, kind, machine in rows if kind == sif.PRIMARY_SYSTEM]
    if len(found) != 1 or found[0] == "unknown":
        raise CannotPush(path="it", reason="unknown architecture in SIF file")
    return found[0]


def _check_sif(path: str) -> None:
    try:
        image = detect.open_image(path)
    except ApptainerError as error:
        raise CannotPush(path=path, reason=str(error.facts.get("reason", error))) from None
    os.close(image.fd)
    if image.kind != "sif":
        raise CannotPush(path=path, reason="only SIF files are pushed")


def _pair(path: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CannotPush(path=path, reason=f"--annotation {text}: not NAME=VALUE")
    return name, value
