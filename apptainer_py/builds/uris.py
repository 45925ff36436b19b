"""From the name of an image that lies elsewhere to a file on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, ImageError
from apptainer_py.base.files import temporary_directory
from apptainer_py.builds import agents, artifacts, remote, report
from apptainer_py.cache.store import Cache, CacheError, folder_of
from apptainer_py.image import arch
from apptainer_py.registry import daemon, downloads, library, reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from apptainer_py.builds.fetching import Fetching

    # Makes a SIF file, at a path, of an image whose manifest has a digest; with the given cache.
    Convert = Callable[[str, str, "Cache"], None]

_OCI_TMP, _NET = "oci-tmp", "net"
_NEEDED = {
    "shub": "Singularity Hub ended in 2021: its images are no longer to be had",
}
TRANSPORTS = ("docker", "oras", "library", "http", "https")
# Images of layers on this machine: `oci:PATH`, or with slashes.
_LOCAL = ("docker-archive", "docker-daemon", "oci", "oci-archive")


class NoTransport(ApptainerError):
    message = "No transport type URI supplied"
    hint = "a URI begins with one of: docker://, oras://, library://, http://, https://"


class UnknownTransport(ApptainerError):
    message = "Unsupported transport type: {name}"


class NotToBeHad(ApptainerError):
    message = "Unable to get {uri}: {reason}"

    def advice(self) -> str | None:
        """Return what to do next, if whoever was asked has said so."""
        return str(self.facts.get("advice") or "") or None


def split(uri: str) -> tuple[str, str]:
    """Return the transport of a URI, and the rest.

    Raises:
        NoTransport: it has none.
        UnknownTransport: it is another.
    """
    name, colon, rest = uri.partition(":")
    if colon and name in _LOCAL and rest.removeprefix("//"):
        return name, rest.removeprefix("//")
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
    if transport in _LOCAL:
        return _local_stem(transport, rest)
    return reference.parse(rest, docker=transport == "docker").file_stem


def _local_stem(transport: str, rest: str) -> str:
    """Return `d.tar_latest` for a file, `busybox_1` for an image named busybox:1."""
    name = rest
    if transport != "docker-daemon":
        while name and not os.path.exists(name):
            name = name.rpartition(":")[0]
        tag = rest[len(name) + 1 :].rpartition(":")[2] if name else ""
        return f"{os.path.basename(name.rstrip('/')) or 'image'}_{tag or 'latest'}"
    stem, _, tag = name.rpartition("/")[2].partition(":")
    return f"{stem}_{tag or 'latest'}".replace("@", "_")


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
    from apptainer_py.builds import passing

    above = temporary_directory(environ, how.tmpdir)
    with passing.Folder(os.path.abspath(above)) as folder:
        cache = Cache(folder, passing=True)
        cache.prepare()
        yield cache


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
        from apptainer_py.builds import libraries

        return libraries.fetch(library.parse(rest), how, environ, cache)
    if transport in _LOCAL:
        return _of_machine((transport, rest), how, environ, cache, convert)
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
    with remote.found(name, how, environ) as (_, found):
        pass
    pinned = name.replace(digest=found.manifest.digest)
    digits = found.manifest.digest.partition(":")[2]
    return _converted(f"docker://{pinned}", uri, digits, how, cache, convert)


def _of_machine(
    name: tuple[str, str],
    how: Fetching,
    environ: Mapping[str, str],
    cache: Cache,
    convert: Convert,
) -> str:
    transport, rest = name
    uri = f"{transport}:{rest}"
    try:
        if transport == "docker-daemon":
            server = daemon.Daemon(daemon.address_of(how.docker_host, environ), environ)
            digits = server.identity(rest).partition(":")[2]
            return _converted(f"{transport}:sha256:{digits}", uri, digits, how, cache, convert)
        layout = agents.open_layout(transport, rest, cache.folder)
        layout.take_machine(how.arch, how.arch_variant)
        try:
            image = layout.image()
        finally:
            layout.close()
    except (ImageError, daemon.DaemonError) as error:
        told = NotToBeHad(uri=uri, reason=str(error), advice=error.advice())
        raise told from None
    # docker's configuration names each layer by its digest; a layout's may name what it likes.
    parts = [] if transport == "docker-archive" else [layer.digest for layer in image.layers]
    found = hashlib.sha256(image.config)
    found.update("".join(f"\n{part}" for part in parts).encode())
    return _converted(uri, uri, found.hexdigest(), how, cache, convert)


def _converted(
    pinned: str, uri: str, digits: str, how: Fetching, cache: Cache, convert: Convert
) -> str:
    machine = f"{how.arch or arch.host_arch()}{how.arch_variant}"
    key = hashlib.sha256(f"{digits}{machine}".encode()).hexdigest()
    made = False

    def make(path: str) -> None:
        nonlocal made
        made = True
        log.info("Converting OCI blobs to SIF format")
        # The file is made beside, and put in place of what an earlier try has left.
        convert(path, pinned, cache)

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
