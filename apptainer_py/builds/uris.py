"""From the name of an image that lies elsewhere to a file on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import artifacts, libraries, remote, report
from apptainer_py.cache.store import Cache, CacheError, folder_of
from apptainer_py.image import arch
from apptainer_py.registry import downloads, library, reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from apptainer_py.builds.fetching import Fetching

    # Makes a SIF file, at a path, of an image whose manifest has a digest; with the given cache.
    Convert = Callable[[str, str, "Cache"], None]

_OCI_TMP, _NET = "oci-tmp", "net"
_TMPDIRS = ("APPTAINER_TMPDIR", "SINGULARITY_TMPDIR", "TMPDIR")
_NEEDED = {
    "shub": "Singularity Hub ended in 2021: its images are no longer to be had",
}
TRANSPORTS = ("docker", "oras", "library", "http", "https")


class NoTransport(ApptainerError):
    message = "No transport type URI supplied"
    hint = "a URI begins with one of: docker://, oras://, library://, http://, https://"


class UnknownTransport(ApptainerError):
    message = "Unsupported transport type: {name}"


class NotToBeHad(ApptainerError):
    message = "Unable to get {uri}: {reason}"


def split(uri: str) -> tuple[str, str]:
    """Return the transport of a URI, and the rest.

    Raises:
        NoTransport: it has none.
        UnknownTransport: it is another.
    """
    name, colon, rest = uri.partition(":")
    if not colon or not name or not rest.startswith("//"):
        raise NoTransport
    if name in _NEEDED:
        raise NotToBeHad(uri=uri, reason=_NEEDED[name])
    if name not in TRANSPORTS:
        raise UnknownTransport(name=name)
    return name, rest


def file_stem(uri: str) -> str:
    """Return what a file with the image is called, without its ending."""
    transport, rest = split(uri)
    if transport in ("http", "https"):
        last = rest.partition("?")[0].rstrip("/").rpartition("/")[2]
        return last.removesuffix(".sif") or "image"
    if transport == "library":
        return library.parse(rest).file_stem
    return reference.parse(rest, docker=transport == "docker").file_stem


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Clean up first when this process is told to end."""
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
    ]
    told: list[int] = []

    def end(number: int, _frame: object) -> None:
        told.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if told:
            os.kill(os.getpid(), told[0])


@contextlib.contextmanager
def cache_for(how: Fetching, environ: Mapping[str, str]) -> Iterator[Cache]:
    """Give the caller's cache, or one for this time only where that is not to be used."""
    with _tidy_end(), _cache_for(how, environ) as cache:
        yield cache


@contextlib.contextmanager
def _cache_for(how: Fetching, environ: Mapping[str, str]) -> Iterator[Cache]:
    if not how.disable_cache:
        cache = Cache(folder_of(environ))
        try:
            cache.prepare()
        except CacheError as error:
            log.warning(f"{error}; nothing is kept")
        else:
            yield cache
            return
    import shutil
    import tempfile

    named = (how.tmpdir, *(environ.get(name, "") for name in _TMPDIRS))
    above = next(filter(None, named), "/tmp")
    folder = tempfile.mkdtemp(prefix="apptainer-py-fetch-", dir=above)
    try:
        cache = Cache(folder, passing=True)
        cache.prepare()
        yield cache
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(
    uri: str, how: Fetching, environ: Mapping[str, str], cache: Cache, convert: Convert
) -> str:
    """Return the path of a file in the cache with the image that a URI names.

    Raises:
        ApptainerError: it cannot be had.
    """
    transport, rest = split(uri)
    if transport in ("http", "https"):
        return _of_web(uri, how, environ, cache)
    if transport == "library":
        return libraries.fetch(library.parse(rest), how, environ, cache)
    named = reference.parse(rest, docker=transport == "docker")
    if transport == "oras":
        return artifacts.fetch(named, how, environ, cache)
    return _of_layers(uri, named, how, environ, cache, convert)


def no_layers(path: str, uri: str, cache: Cache) -> None:
    """Make nothing: for transports that fetch files."""
    raise NotToBeHad(uri=uri, reason="it is no file")


def _of_layers(
    uri: str,
    name: reference.Reference,
    how: Fetching,
    environ: Mapping[str, str],
    cache: Cache,
    convert: Convert,
) -> str:
    with remote.registry_of(name, how, environ) as registry:
        found = remote.look_up(registry, name, how)
    digits = found.manifest.digest.partition(":")[2]
    machine = f"{how.arch or arch.host_arch()}{how.arch_variant}"
    key = hashlib.sha256(f"{digits}{machine}".encode()).hexdigest()
    made = False

    def make(path: str) -> None:
        nonlocal made
        made = True
        log.info("Converting OCI blobs to SIF format")
        pinned = name.replace(digest=found.manifest.digest)
        # The file is made beside, and put in place of what an earlier try has left.
        convert(path, f"docker://{pinned}", cache)

    path = cache.get(_OCI_TMP, key, uri, make)
    if not made:
        log.info("Using cached SIF image")
    return path


def _of_web(uri: str, how: Fetching, environ: Mapping[str, str], cache: Cache) -> str:
    with downloads.Source(uri, environ=environ) as source:
        # What has no version is another file each time.  No line end is in either of the two, so
        # that no host can name a version which makes another one's address of its own.
        version = source.version or os.urandom(16).hex()
        key = hashlib.sha256(f"{uri}\n{version}".encode()).hexdigest()

        def make(path: str) -> None:
            log.info("Downloading network image")
            with report.counting("Downloading", source.size_bytes) as told:
                source.write(path, told)

        return cache.get(_NET, key, uri, make)
