"""`search` and `delete`: images of a library."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry import active
from apptainer_py.registry import library as names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.registry.library import Found


class CannotSearch(ApptainerError):
    message = "Couldn't search library: {reason}"


class CannotDelete(ApptainerError):
    message = "Unable to delete image from library: {reason}"


class WrongScheme(ApptainerError):
    message = "unsupported protocol scheme {scheme!r} for delete"


def search(
    words: str,
    environ: Mapping[str, str],
    *,
    arch: str,
    given: str,
    signed: bool,
    as_json: bool,
) -> str:
    """Return the images of a library that words lead to.

    Raises:
        ApptainerError: it does not answer.
    """
    with active.library(environ, given=given) as library:
        try:
            found = library.search(words, arch, signed=signed)
        except ApptainerError as error:
            raise CannotSearch(reason=error) from None
    if as_json:
        return _json(found)
    kind = "signed container images" if signed else "container images"
    if not found:
        return f'No {kind} found for {arch} matching "{words}".\n\n'
    return f'Found {len(found)} {kind} for {arch} matching "{words}":\n\n' + "".join(
        _row(one) for one in found
    )


def _row(one: Found) -> str:
    lines = [f"\tlibrary://{one.path}:{','.join(one.tags)}"]
    if one.description:
        lines.append(f"\t\t{one.description}")
    if one.fingerprints:
        lines.append(f"\t\tSigned by: {','.join(one.fingerprints)}")
    return "\n".join(lines) + "\n\n"


def _json(found: list[Found]) -> str:
    import json

    rows = [
        {
            "image": f"library://{one.path}",
            "tags": list(one.tags),
            "description": one.description,
            "fingerprints": list(one.fingerprints),
            "size": one.size_bytes,
        }
        for one in found
    ]
    return json.dumps({"images": rows}, indent=4) + "\n"


def parsed(reference: str) -> names.Name:
    """Return what `delete` is asked to delete.

    Raises:
        ApptainerError: it is in no library.
    """
    scheme, colon, rest = reference.partition(":")
    if not colon or scheme != names.SCHEME:
        raise WrongScheme(scheme=scheme[:100] if colon else "")
    return names.parse(rest)


def delete(
    name: names.Name, environ: Mapping[str, str], *, arch: str, given: str, https: bool
) -> None:
    """Take an image out of a library.

    Raises:
        ApptainerError: it cannot be.
    """
    with active.library(environ, given=given, host=name.host, https=https) as library:
        try:
            library.delete(name, arch)
        except ApptainerError as error:
            raise CannotDelete(reason=f"couldn't delete requested image: {error}") from None
