"""Which library and which key servers a command asks: by its options, else by remote.yaml."""

from __future__ import annotations

from apptainer_py.registry import keyserver, remotes, services
from apptainer_py.registry.keyserver import Place
from apptainer_py.registry.library import Library
from apptainer_py.registry.remotes import NoLibrary, RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.registry.remotes import Endpoint, Keyserver, Remotes

_PROGRAM = "apptainer-py"
_EXCLUSIVE = "endpoint is set as exclusive by the system administrator: only {uri!r} can be used"


def library(
    environ: Mapping[str, str], *, given: str = "", host: str = "", https: bool = True
) -> Library:
    """Return the library that an option names, or an image's name, or the active endpoint.

    A token is for the library that its endpoint names, and for no other.

    Raises:
        ApptainerError: there is none, or the administrator wants another one.
    """
    found = remotes.load(remotes.user_file(environ))
    wanted = given or (f"{'https' if https else 'http'}://{host}" if host else "")
    endpoint = found.endpoint() if found.active else None
    if wanted and (endpoint is None or not endpoint.exclusive):
        return Library(wanted, token="", environ=environ)
    if endpoint is None:
        raise NoLibrary(name="DefaultRemote", program=_PROGRAM)
    uri = services.of_endpoint(endpoint, environ).get(services.LIBRARY)
    if not uri:
        raise NoLibrary(name=found.active, program=_PROGRAM)
    if wanted and not services.same(wanted, uri):
        raise RemoteError(text=_EXCLUSIVE.format(uri=uri))
    return Library(uri, token=endpoint.token, environ=environ)


def keyservers(environ: Mapping[str, str], *, given: str = "", every: bool = False) -> list[Place]:
    """Return the key server that an option names, or the active endpoint's; with `every`, all.

    Raises:
        ApptainerError: there is none, or the administrator wants another one.
    """
    found = remotes.load(remotes.user_file(environ))
    if not found.active:
        return [Place(uri=given or remotes.DEFAULT_KEYSERVER, environ=environ)]
    endpoint = found.endpoint()
    if given and not endpoint.exclusive:
        return [Place(uri=given, environ=environ)]
    used = [one for one in with_own(endpoint, environ).keyservers if not one.skip]
    if given:
        fitting = [one for one in used if keyserver.same(given, one.uri)]
        if not fitting:
            raise RemoteError(text=_EXCLUSIVE.format(uri=", ".join(one.uri for one in used)))
        used = fitting
    if not used:
        raise RemoteError(text="no primary keyserver configured")
    return [_place(one, endpoint, found, environ) for one in (used if every else used[:1])]


def with_own(endpoint: Endpoint, environ: Mapping[str, str]) -> Endpoint:
    """Return an endpoint with the key server that it names, where none is configured.

    Raises:
        RegistryError: it does not say.
    """
    if endpoint.keyservers:
        return endpoint
    uri = services.of_endpoint(endpoint, environ).get(services.KEYSERVER)
    if not uri:
        raise RemoteError(text=f"keyserver is not a service at endpoint {endpoint.uri}")
    return endpoint.replace(keyservers=(remotes.Keyserver(uri=uri),))


def _place(one: Keyserver, endpoint: Endpoint, found: Remotes, environ: Mapping[str, str]) -> Place:
    authorization = services.bearer(endpoint.token)
    if one.external:
        authorization = credential(found, one.uri)
    return Place(
        uri=one.uri, authorization=authorization, checked=not one.insecure, environ=environ
    )


def credential(found: Remotes, uri: str) -> str:
    """Return what a key server is told of its user, "" for nothing."""
    kept: Sequence[str] = [one.auth for one in found.credentials if keyserver.same(one.uri, uri)]
    return kept[0] if kept else ""
