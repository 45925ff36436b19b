"""Images of registries: into the cache, several layers at once, each checked by its digest."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import contextmanager

from apptainer_py.base import log
from apptainer_py.base.record import Record
from apptainer_py.cache.store import BLOB, Cache
from apptainer_py.image import arch
from apptainer_py.image.blobs import Blob, Digest
from apptainer_py.image.oci_layout import Fetched, Object
from apptainer_py.registry import accounts, mirrors
from apptainer_py.registry.client import (
    INDEXES,
    Interrupted,
    Manifest,
    NotThere,
    Registry,
    RegistryError,
    ask_with_patience,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.registry.reference import Reference

    Told = Callable[[int], None]

_AT_ONCE = 4
_LAYERS_MOST = 512
_NESTED_MOST = 4
_CHUNK = 1 << 20
_LOOK_S = 0.1
# Who reads along waits for so many bytes: the first of them say how a layer is compressed.
_ENOUGH = 4096
_ENV_PREFIXES = ("APPTAINER_DOCKER_", "SINGULARITY_DOCKER_", "DOCKER_")


class Named(Record):
    """An image that a registry has: its manifest, by what it lists.

    `name` is what was asked for, `reference` where it is: in a mirror that may be another one.
    """

    name: Reference
    reference: Reference
    manifest: Manifest
    config: Object
    layers: tuple[Object, ...]


def registry_of(reference: Reference, how: Fetching, environ: Mapping[str, str]) -> Registry:
    """Return the registry of an image, with the account that the caller has there.

    Raises:
        ApptainerError: a file with accounts cannot be used.
    """
    account = account_of(reference.host, how, environ)
    return Registry(reference.server, account=account, https=not how.no_https, environ=environ)


@contextmanager
def found(
    wanted: Reference, how: Fetching, environ: Mapping[str, str]
) -> Iterator[tuple[Registry, Named]]:
    """Give an image and who has it: the first of its mirrors, or else its registry.

    Raises:
        ApptainerError: nobody has it, or a file with accounts or mirrors cannot be used.
    """
    ways = [
        (place.reference, https, checked)
        for place in mirrors.places(wanted, environ)
        for https, checked in _manners(how, place)
    ]
    for left, (reference, https, checked) in enumerate(ways, 1 - len(ways)):
        if reference.host == wanted.host:
            account = account_of(reference.host, how, environ)
        else:
            # An account of the command line is for the host that this names.
            account = accounts.find(reference.host, environ, how.authfile)
        registry = Registry(
            reference.server, account=account, https=https, checked=checked, environ=environ
        )
        with registry:
            if left:
                registry.tries = 1
            try:
                named = look_up(registry, reference, how)
            except RegistryError as error:
                if not left:
                    raise
                log.verbose(f"{error}; asking elsewhere")
                continue
            registry.tries = Registry.tries
            yield registry, named.replace(name=wanted)
            return


def _manners(how: Fetching, place: mirrors.Place) -> tuple[tuple[bool, bool], ...]:
    """Return how a place is spoken to: whether by HTTPS, whether its certificate is looked at."""
    if how.no_https:
        return ((False, True),)
    return ((True, False), (False, True)) if place.insecure else ((True, True),)


def account_of(host: str, how: Fetching, environ: Mapping[str, str]) -> accounts.Account | None:
    """Return an account: the command line's, the environment's, that of a file."""
    for name, password in (
        (how.docker_username, how.docker_password),
        *(
            (environ.get(f"{p}USERNAME", ""), environ.get(f"{p}PASSWORD", ""))
            for p in _ENV_PREFIXES
        ),
    ):
        if name and password:
            return accounts.Account(username=name, password=password)
    return accounts.find(host, environ, how.authfile)


# -- which image


def look_up(registry: Registry, reference: Reference, how: Fetching) -> Named:
    """Return the image that a name means, for the wanted machine where there are several.

    Raises:
        RegistryError: there is none, or the registry does not give it.
    """
    manifest = registry.manifest(reference)
    for _ in range(_NESTED_MOST):
        document = _document(manifest, reference)
        if manifest.media_type not in INDEXES and "manifests" not in document:
            return _named(reference, manifest, document)
        chosen = _for_machine(document, reference, how)
        manifest = registry.manifest(reference.replace(digest=chosen))
    raise _wrong(reference, "its index names an index, and so on")


def _document(manifest: Manifest, reference: Reference) -> dict[str, Any]:
    import json

    try:
        value = json.loads(manifest.data)
    except (ValueError, RecursionError):
        raise _wrong(reference, "its manifest is no JSON") from None
    if not isinstance(value, dict) or ("manifests" in value and "layers" in value):
        raise _wrong(reference, "its manifest is none")
    if value.get("schemaVersion") != 2:
        raise _wrong(reference, "its manifest is of a version that is not supported, not 2")
    return value


def _for_machine(index: dict[str, Any], reference: Reference, how: Fetching) -> str:
    rows = index.get("manifests")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    wanted = how.arch or arch.host_arch()
    fitting = [row for row in rows if _fits(row, wanted, how.arch_variant)]
    if not fitting and not how.arch:
        fitting = [row for row in rows if arch.can_run(_machine(row), wanted)]
    if not fitting:
        has = ", ".join(sorted({_machine(row) for row in rows} - {"", "unknown"})) or "none"
        raise _wrong(reference, f"there is no image for {wanted}; there is one for: {has}")
    return _object(fitting[0], reference).digest


def _machine(row: dict[str, Any]) -> str:
    platform = row.get("platform")
    value = platform.get("architecture", "") if isinstance(platform, dict) else ""
    return value if isinstance(value, str) else ""


def _fits(row: dict[str, Any], wanted: str, variant: str) -> bool:
    platform = row.get("platform")
    if not isinstance(platform, dict):
        return True
    if not arch.is_variant(platform.get("variant", ""), variant):
        return False
    return platform.get("os", "linux") == "linux" and _machine(row) == wanted


def _named(reference: Reference, manifest: Manifest, document: dict[str, Any]) -> Named:
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > _LAYERS_MOST:
        raise _wrong(reference, f"its manifest has no layers, or more than {_LAYERS_MOST}")
    return Named(
        name=reference,
        reference=reference,
        manifest=manifest,
        config=_object(document.get("config"), reference),
        layers=tuple(_object(layer, reference) for layer in layers),
    )


def _object(value: object, reference: Reference) -> Object:
    from apptainer_py.base.errors import ImageError

    if isinstance(value, dict):
        digest, size = value.get("digest"), value.get("size")
        kind = value.get("mediaType", "")
        if isinstance(digest, str) and isinstance(size, int) and size >= 0:
            try:
                Digest(digest)
            except ImageError as error:
                raise _wrong(reference, str(error.facts["reason"])) from None
            return Object(digest=digest, size_bytes=size, media_type=str(kind))
    raise _wrong(reference, "its manifest has what is no descriptor")


def _wrong(reference: Reference, reason: str) -> RegistryError:
    return RegistryError(host=reference.server, reason=f"{reference}: {reason}")


# -- its content


class _Arrival:
    """How far a blob is: where it is written, and how much of it; `done` is the end."""

    def __init__(self) -> None:
        self.path = ""
        self.size_bytes = 0
        self.done = False


class Arriving:
    """The blobs of an image on their way into the cache, the newest layer first."""

    def __init__(self, registry: Registry, named: Named, cache: Cache, told: Told) -> None:
        self._registry = registry
        self._named = named
        self._cache = cache
        self._told = told
        self._changed = threading.Condition()
        blobs = _each_once((named.config, *reversed(named.layers)))
        self._arrivals = {blob.digest: _Arrival() for blob in blobs}
        self._left = iter(blobs)
        self._error: BaseException | None = None
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True)
            for _ in range(min(_AT_ONCE, len(named.layers) + 1))
        ]

    def __enter__(self) -> Arriving:
        self._keep_manifest()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True

    def fetch(self) -> None:
        """Fetch all that is not there.

        Raises:
            ApptainerError: a blob cannot be had, or is not what its digest says.
        """
        with self:
            self.wait()

    def wait(self) -> None:
        """Wait for all of them.

        Raises:
            ApptainerError: a blob cannot be had, or is not what its digest says.
        """
        # The first failure counts: another blob may take for ever.
        self._until(lambda: all(one.done for one in self._arrivals.values()))

    def wait_for(self, blob: Object) -> None:
        """Wait for one of them.

        Raises:
            ApptainerError: as `wait`.
        """
        self._until(lambda: self._arrivals[blob.digest].done)

    def open(self, blob: Object) -> Blob:
        """Return a blob that is read as it arrives; its reader waits for what is not there.

        Raises:
            ApptainerError: as `wait`.
        """
        arrival = self._arrivals[blob.digest]
        while True:
            self._until(lambda: arrival.done or bool(arrival.path))
            path = self._cache.path(BLOB, _key(blob.digest)) if arrival.done else arrival.path
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if not arrival.done:
                    time.sleep(_LOOK_S)  # on its way to the place that it has in the end
                    continue
                raise
            return _Growing(fd, blob, lambda place: self._there(arrival, place))

    def _there(self, arrival: _Arrival, place: int) -> int:
        self._until(lambda: arrival.done or arrival.size_bytes >= place + _ENOUGH)
        return _CHUNK if arrival.done else arrival.size_bytes - place

    def _until(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            while not ready():
                if self._error is not None:
                    raise self._error
                self._changed.wait(_LOOK_S)

    def _keep_manifest(self) -> None:
        manifest = self._named.manifest

        def make(path: str) -> None:
            with open(path, "wb") as file:
                file.write(manifest.data)

        self._cache.get(BLOB, _key(manifest.digest), str(self._named.name), make)

    def _work(self) -> None:
        while not self._stopped:
            with self._changed:
                blob = next(self._left, None)
            if blob is None:
                return
            try:
                self._one(blob, self._arrivals[blob.digest])
            except BaseException as error:  # noqa: BLE001 told by the thread that waits
                with self._changed:
                    self._error = self._error or error
                    self._stopped = True
                    self._changed.notify_all()

    def _one(self, blob: Object, arrival: _Arrival) -> None:
        path = self._cache.path(BLOB, _key(blob.digest))
        if os.path.isfile(path):
            self._told(blob.size_bytes)
        else:
            self._fetch(blob, arrival)
        with self._changed:
            arrival.done = True
            self._changed.notify_all()

    def _fetch(self, blob: Object, arrival: _Arrival) -> None:
        def told(size: int) -> None:
            if self._stopped:
                raise _Stopped
            with self._changed:
                arrival.size_bytes += size
                self._changed.notify_all()
            self._told(size)

        def make(path: str) -> None:
            arrival.size_bytes, arrival.path = 0, path
            download(self._registry, self._named.reference, blob, path, told)

        self._cache.get(BLOB, _key(blob.digest), str(self._named.name), make)


class _Growing(Blob):
    """A blob that is still written to by somebody else."""

    def __init__(self, fd: int, blob: Object, there: Callable[[int], int]) -> None:
        super().__init__(fd, 0, blob.size_bytes, Digest(blob.digest))
        self._there = there

    def _ready(self, place: int) -> int:
        return self._there(place)


def _each_once(blobs: tuple[Object, ...]) -> list[Object]:
    return list({blob.digest: blob for blob in blobs}.values())


def _key(digest: str) -> str:
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256":
        raise RegistryError(host="registry", reason=f"digests of {algorithm} are not supported yet")
    return digits


def download(registry: Registry, reference: Reference, blob: Object, path: str, told: Told) -> None:
    """Write a blob to a file, from where an earlier try has ended.

    Raises:
        RegistryError: it cannot be had, or is another one.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _Download(registry, reference, blob, fd, told).run()
    except _Damaged:
        os.ftruncate(fd, 0)
        try:
            _Download(registry, reference, blob, fd, lambda size: None).run()
        except _Damaged as error:
            _remove(path)
            raise RegistryError(host=reference.server, reason=str(error)) from None
    except NotThere:
        _remove(path)
        raise
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # who waited too long for us goes on with a copy


class _Stopped(Exception):
    """Nobody wants the rest."""


class _Damaged(Exception):
    pass


class _Download:
    def __init__(
        self, registry: Registry, reference: Reference, blob: Object, fd: int, told: Told
    ) -> None:
        self._registry = registry
        self._reference = reference
        self._blob = blob
        self._fd = fd
        self._told = told
        self._hash = hashlib.new(blob.digest.partition(":")[0])
        self._place = 0

    def run(self) -> None:
        self._take_what_is_there()
        ask_with_patience(self._rest, lambda error: log.verbose(f"{error}; going on"))
        if self._place != self._blob.size_bytes or self._digest() != self._blob.digest:
            raise _Damaged(
                f"{self._blob.digest} is damaged: {self._place} bytes have the digest "
                f"{self._digest()[:19]}"
            )

    def _digest(self) -> str:
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def _take_what_is_there(self) -> None:
        while self._place < self._blob.size_bytes:
            data = os.pread(self._fd, _CHUNK, self._place)
            if not data:
                return
            self._hash.update(data)
            self._place += len(data)
            self._told(len(data))

    def _rest(self) -> None:
        size = self._blob.size_bytes
        if self._place >= size > 0:
            return
        begins, pieces = self._registry.blob(self._reference, self._blob.digest, self._place)
        passed = self._place - begins
        for piece in pieces:
            if passed >= len(piece):
                passed -= len(piece)
                continue
            data = piece[passed:] if passed else piece
            passed = 0
            if self._place + len(data) > size:
                raise _Damaged(f"{self._blob.digest} has more than the {size} bytes that are named")
            os.pwrite(self._fd, data, self._place)
            self._hash.update(data)
            self._place += len(data)
            self._told(len(data))
        if self._place < size:
            raise Interrupted(
                host=self._reference.server, reason=f"a layer ended after {self._place} bytes"
            )


def layout_of(named: Named, cache: Cache, *, any_machine: bool) -> Fetched:
    """Return the cache as a layout with the image that was fetched."""
    manifest = Object(digest=named.manifest.digest, size_bytes=len(named.manifest.data))
    return Fetched(cache.layout, manifest, name=str(named.name), any_machine=any_machine)
