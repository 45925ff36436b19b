"""The cache: blobs by their digests, and images by what they were made of.

The folders are Apptainer's own (`cache/{blob,library,oci-tmp,oras,shub,net}`), so each program
finds what the other one fetched. A file appears by rename, whole, or not at all.
"""

from __future__ import annotations

import json
import os
import time

from apptainer_py.base import held
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import copy_rest
from apptainer_py.base.record import Record
from apptainer_py.cache.lease import Lease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BLOB = "blob"
FILES = ("library", "oci-tmp", "shub", "oras", "net")
KINDS = (*FILES, BLOB)
LIBRARY, _ORAS = "library", "oras"
_LIBRARY_PREFIX = "sha256."
_SOURCES = ".sources"
_PART = ".part"
_LEASE = ".lease"
_HEX = frozenset("0123456789abcdef")
_SOURCE_BYTES = 4096
_ROUNDS = 3
# Nobody goes on with it any more: what it was a part of has changed, or is not wanted.
_ABANDONED_S = 7 * 86400.0


class CacheError(ApptainerError):
    """The cache cannot be used."""

    message = "cache {folder}: {reason}"
    hint = "APPTAINER_CACHEDIR names another directory; --disable-cache does without"


class Entry(Record):
    """A file of the cache: what it is, and what it came from ("" where that is not known)."""

    kind: str
    name: str
    path: str
    size_bytes: int
    made_s: float
    source: str


def folder_of(environ: Mapping[str, str]) -> str:
    """Return where the caller's cache is."""
    for name in ("APPTAINER_CACHEDIR", "SINGULARITY_CACHEDIR"):
        if environ.get(name):
            return f"{os.path.abspath(environ[name])}/cache"
    # Who has no home, and no name either, is not given a directory with the name "~".
    home = environ.get("HOME", "") or os.path.expanduser("~").removeprefix("~")
    own = environ.get("APPTAINER_CONFIGDIR", "") or f"{home}/.apptainer"
    return f"{own}/cache"


class Cache:
    """A directory with a folder for each kind of entry."""

    def __init__(self, folder: str, *, passing: bool = False) -> None:
        self.folder = folder
        # For one command only: nothing in it outlives that.
        self.passing = passing

    def prepare(self) -> None:
        """Make what is missing of it.

        Raises:
            CacheError: it cannot be written.
        """
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._check_owner()
            for kind in KINDS:
                os.makedirs(f"{self.folder}/{kind}", mode=0o700, exist_ok=True)
            os.makedirs(self.blobs, mode=0o700, exist_ok=True)
            os.makedirs(f"{self.folder}/{_SOURCES}", mode=0o700, exist_ok=True)
            self._layout()
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise CacheError(folder=self.folder, reason="permission denied")
        except OSError as error:
            raise CacheError(folder=self.folder, reason=(error.strerror or "").lower()) from None

    def _check_owner(self) -> None:
        """What lies here is started as it is: nobody else may have put it there."""
        facts = os.stat(self.folder)
        if facts.st_uid not in (os.geteuid(), 0):
            raise CacheError(folder=self.folder, reason="it belongs to another user")
        if facts.st_mode & 0o002:
            raise CacheError(folder=self.folder, reason="every user may write to it")

    def _layout(self) -> None:
        for name, value in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "manifests": []}),
        ):
            path = f"{self.layout}/{name}"
            if not os.path.exists(path):
                _write(path, json.dumps(value).encode())

    # -- where things are

    @property
    def layout(self) -> str:
        """The layout of the image specification with all blobs."""
        return f"{self.folder}/{BLOB}"

    @property
    def blobs(self) -> str:
        """Where that layout has them."""
        return f"{self.layout}/blobs/sha256"

    def path(self, kind: str, key: str) -> str:
        """Return where an entry is, or would be."""
        if kind == LIBRARY:
            digits = key.removeprefix(_LIBRARY_PREFIX)
            if not _HEX.issuperset(digits) or len(digits) + len(_LIBRARY_PREFIX) != len(key):
                raise ValueError(f"{key!r} is no key")
            return f"{self.folder}/{kind}/{key}"
        digits = key.removeprefix("sha256:") if kind == _ORAS else key
        if not digits or not _HEX.issuperset(digits):
            raise ValueError(f"{key!r} is no key")
        return f"{self.blobs}/{key}" if kind == BLOB else f"{self.folder}/{kind}/{key}"

    # -- what is in it

    def get(self, kind: str, key: str, source: str, make: Callable[[str], None]) -> str:
        """Return an entry's path; make it, or wait for the process that makes it.

        `make` writes the file that it is given, which takes its place afterwards. A file that an
        earlier maker has left unfinished is given to it again.

        Raises:
            CacheError: it cannot be written; whatever `make` raises.
        """
        path = self.path(kind, key)
        try:
            for _ in range(_ROUNDS):
                with Lease(f"{path}{_LEASE}", lambda: os.path.isfile(path)) as lease:
                    if lease.held and self._make(path, make):
                        self._note(kind, os.path.basename(path), source)
                if os.path.isfile(path):
                    return path
        except OSError as error:
            raise CacheError(folder=self.folder, reason=(error.strerror or "").lower()) from None
        raise CacheError(folder=self.folder, reason="others take away what is made in it")

    def _make(self, path: str, make: Callable[[str], None]) -> bool:
        """Put a file in its place; False if somebody has taken the work over meanwhile."""
        self.sweep(_ABANDONED_S)
        mine = f"{path}{_PART}.{os.urandom(8).hex()}"
        self._adopt(path, mine)
        try:
            make(mine)
            fd = os.open(mine, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(mine, path)
        except FileNotFoundError:
            if os.path.lexists(mine):
                raise
            return False
        except OSError:
            # For want of space: what is there of it would be in everybody's way.
            _remove(mine)
            raise
        return True

    def _adopt(self, path: str, mine: str) -> None:
        """Go on with a copy of what was left: its maker may only be slow, and write to it yet."""
        for left in self._parts(path):
            try:
                reading = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                writing = os.open(mine, flags, 0o600)
                try:
                    copy_rest(reading, writing)
                finally:
                    os.close(writing)
                return
            except OSError:
                _remove(mine)
            finally:
                os.close(reading)
                _remove(left)

    @staticmethod
    def _parts(path: str) -> list[str]:
        folder, name = os.path.split(path)
        found = [one for one in os.listdir(folder) if one.startswith(f"{name}{_PART}.")]
        return [f"{folder}/{one}" for one in found]

    def _note(self, kind: str, key: str, source: str) -> None:
        try:
            _write(
                f"{self.folder}/{_SOURCES}/{kind}-{key}",
                json.dumps({"source": source, "time_s": int(time.time())}).encode(),
            )
        except OSError:
            pass  # a name that is missing harms nobody

    def entries(self, kinds: tuple[str, ...] = KINDS) -> Iterator[Entry]:
        """Yield what is there, sorted by kind and name."""
        for kind in kinds:
            folder = self.blobs if kind == BLOB else f"{self.folder}/{kind}"
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                continue
            for name in names:
                entry = self._entry(kind, name, f"{folder}/{name}")
                if entry is not None and _PART not in name and _LEASE not in name:
                    yield entry

    def _entry(self, kind: str, name: str, path: str) -> Entry | None:
        try:
            facts = os.stat(path, follow_symlinks=False)
        except OSError:
            return None
        return Entry(
            kind=kind,
            name=name,
            path=path,
            size_bytes=facts.st_size,
            made_s=facts.st_mtime,
            source=self._source(kind, name),
        )

    def _source(self, kind: str, name: str) -> str:
        try:
            with open(f"{self.folder}/{_SOURCES}/{kind}-{name}", encoding="utf-8") as file:
                value = json.loads(file.read(_SOURCE_BYTES)).get("source", "")
        except (OSError, ValueError, AttributeError):
            return ""
        return value if isinstance(value, str) else ""

    def remove(self, entry: Entry) -> None:
        """Remove an entry; nothing of it being gone already is an error."""
        for path in (entry.path, f"{self.folder}/{_SOURCES}/{entry.kind}-{entry.name}"):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                reason = f"{path}: {(error.strerror or '').lower()}"
                raise CacheError(folder=self.folder, reason=reason) from None

    def sweep(self, older_s: float) -> None:
        """Remove what is unfinished, and nobody has written to for so many seconds.

        A conversion that was killed leaves a folder.
        """
        import shutil

        for path in self._leftovers(older_s):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                _remove(path)

    def _leftovers(self, older_s: float) -> Iterator[str]:
        for folder in (self.blobs, *(f"{self.folder}/{kind}" for kind in FILES)):
            try:
                names = os.listdir(folder)
            except OSError:
                continue
            for name in names:
                path = f"{folder}/{name}"
                if _PART not in name and _LEASE not in name:
                    continue
                try:
                    # A conversion may write deep below, for hours.
                    if time.time() - _written_s(path) > older_s and not held.is_held(path):
                        yield path
                except OSError:
                    continue


def _written_s(path: str) -> float:
    """Return when a file was written to, or a folder or what lies in it."""
    last = os.lstat(path).st_mtime
    if os.path.isdir(path) and not os.path.islink(path):
        inside = (one.stat(follow_symlinks=False).st_mtime for one in os.scandir(path))
        last = max(last, *inside, 0.0)
    return last


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _write(path: str, data: bytes) -> None:
    made = f"{path}.{os.urandom(8).hex()}{_PART}"
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.rename(made, path)
