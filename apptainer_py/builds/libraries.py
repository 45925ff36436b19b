"""Images of libraries (`library://`): into the cache, and from a file into a library."""

from __future__ import annotations

import hashlib
import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import report
from apptainer_py.cache.store import LIBRARY
from apptainer_py.image import arch
from apptainer_py.registry import active
from apptainer_py.registry.library import Content
from apptainer_py.registry.server import Interrupted, RegistryError, ask_with_patience

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.cache.store import Cache
    from apptainer_py.registry.library import Image, Library, Name

_CHUNK = 4 << 20


class NoRoom(ApptainerError):
    message = "{name} has {size} bytes, and there is room for {room} in {folder}"


class NotWhole(ApptainerError):
    message = "{name}: what the library gives is another image: {found}, not {wanted}"


def fetch(name: Name, how: Fetching, environ: Mapping[str, str], cache: Cache) -> str:
    """Return the path of an image's file in the cache.

    Raises:
        ApptainerError: it cannot be had.
    """
    machine = how.arch or arch.host_arch()
    with active.library(
        environ, given=how.library, host=name.host, https=not how.no_https
    ) as library:
        image = library.image(name, machine)
        made = False

        def make(path: str) -> None:
            nonlocal made
            made = True
            log.info("Downloading library image")
            _check_room(name, image, path)
            with report.counting("Downloading", image.size_bytes) as told:
                _Download(library, name, machine, image, path, told).run()

        path = cache.get(LIBRARY, image.hash, f"library://{name}", make)
    if not made:
        log.info("Using cached image")
    return path


def _check_room(name: Name, image: Image, path: str) -> None:
    folder = os.path.dirname(path)
    facts = os.statvfs(folder)
    room = facts.f_bavail * facts.f_frsize
    if image.size_bytes > room:
        raise NoRoom(name=name, size=image.size_bytes, room=room, folder=folder)


class _Download:
    """One file; what is there of it is kept when a connection breaks."""

    def __init__(
        self,
        library: Library,
        name: Name,
        machine: str,
        image: Image,
        path: str,
        told: Callable[[int], None],
    ) -> None:
        self._library, self._name, self._machine = library, name, machine
        self._image, self._path, self._told = image, path, told
        self._place, self._hash = 0, hashlib.sha256()
        self._fd = -1

    def run(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        try:
            ask_with_patience(self._rest, lambda error: None)
        finally:
            os.close(self._fd)
        found = f"sha256.{self._hash.hexdigest()}"
        if found != self._image.hash:
            os.unlink(self._path)
            raise NotWhole(name=self._name, found=found, wanted=self._image.hash)

    def _rest(self) -> None:
        size = self._image.size_bytes
        if size and self._place >= size:
            return
        begins, pieces = self._library.content(self._name, self._machine, self._place)
        passed = self._place - begins
        for piece in pieces:
            data, passed = piece[passed:], max(0, passed - len(piece))
            if size and self._place + len(data) > size:
                raise RegistryError(
                    host=str(self._name), reason=f"it has more than the {size} bytes that are named"
                )
            os.pwrite(self._fd, data, self._place)
            self._hash.update(data)
            self._place += len(data)
            self._told(len(data))
        if self._place < size:
            reason = f"the image ended after {self._place} bytes"
            raise Interrupted(host=str(self._name), reason=reason)


def push(
    path: str,
    name: Name,
    machine: str,
    how: Fetching,
    environ: Mapping[str, str],
    description: str,
) -> bool:
    """Give a file to a library; return whether it had to be sent.

    Raises:
        ApptainerError: the library does not take it.
        OSError: it cannot be read.
    """
    library = active.library(environ, given=how.library, host=name.host, https=not how.no_https)
    with library, open(path, "rb") as file:
        hashed, checked, place = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        while data := os.pread(file.fileno(), _CHUNK, place):
            hashed.update(data)
            checked.update(data)
            place += len(data)
        content = Content(
            opened=file, size_bytes=place, sha256=hashed.hexdigest(), md5=checked.hexdigest()
        )
        with report.counting("Uploading", place) as told:
            return library.push(name, machine, content, description, told)
