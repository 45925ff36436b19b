"""Where plug-ins are kept: a directory for each below the installation, and a file that lists them.

What the file does not list is not there: a plug-in comes, goes and is replaced with one rename.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import build, files
from apptainer_py.base.record import Record
from apptainer_py.host import plugin_content
from apptainer_py.host.plugin_content import PluginError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from apptainer_py.host.plugin_content import Plugin

FOLDER = f"{build.LIBEXECDIR}/plugins"
_STATE, _LOCK = "state.json", ".lock"
_STATE_MAX = 1 << 20
_FORM = 1


class Row(Record):
    """A line of the file: a plug-in, and the directory with its files."""

    name: str
    folder: str
    enabled: bool = True


class Place:
    """The directory with all plug-ins, in which nobody but its owner may change anything."""

    def __init__(self, folder: str = FOLDER, *, owner: int = 0) -> None:
        self.folder = folder
        self.owner = owner

    def rows(self) -> tuple[Row, ...]:
        """Return what is installed, by name.

        Raises:
            PluginError: the file cannot be used, or somebody else could have written it.
        """
        path = f"{self.folder}/{_STATE}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise PluginError(text=f"{path}: {(error.strerror or '').lower()}") from None
        try:
            self._check(self.folder, os.lstat(self.folder))
            self._check(path, os.fstat(fd))
        except PluginError:
            os.close(fd)
            raise
        return self._parsed(path, files.read_at_most(fd, _STATE_MAX))

    def _parsed(self, path: str, data: bytes) -> tuple[Row, ...]:
        import json

        try:
            found = json.loads(data)
            if found["version"] != _FORM:
                raise ValueError("it is of another version")
            rows = [
                Row(
                    name=str(row["name"]), folder=str(row["folder"]), enabled=row["enabled"] is True
                )
                for row in found["plugins"]
            ]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            advice = "remove it, and install the plug-ins again"
            raise PluginError(text=f"{path} cannot be read: {error}: {advice}") from None
        for row in rows:
            if "/" in row.folder or row.folder.startswith(".") or not row.folder:
                raise PluginError(text=f"{path} leads out of its directory: {row.folder!a}")
        return tuple(sorted(rows, key=lambda row: row.name))

    def _check(self, path: str, facts: os.stat_result) -> None:
        if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
            raise PluginError(text=f"{path} is no plain file or directory")
        if facts.st_uid != self.owner:
            raise PluginError(text=f"{path} belongs to uid {facts.st_uid}, not to {self.owner}")
        if stat.S_IMODE(facts.st_mode) & 0o022:
            raise PluginError(text=f"{path} can be written by others than its owner")

    def path(self, row: Row) -> str:
        """Return the directory with the files of a plug-in."""
        return f"{self.folder}/{row.folder}"

    def plugin(self, row: Row) -> Plugin:
        """Return what an installed plug-in says of itself, once nobody else can have written it.

        Raises:
            PluginError: somebody could have, or the metadata is broken.
        """
        from importlib import metadata

        def fail(error: OSError) -> None:
            raise PluginError(text=f"{error.filename}: {(error.strerror or '').lower()}") from None

        top = self.path(row)
        for above, folders, names, fd in os.fwalk(top, onerror=fail):
            self._check(above, os.fstat(fd))
            for name in [*folders, *names]:
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
                self._check(os.path.join(above, name), facts)
        found = list(metadata.distributions(path=[top]))
        if len(found) != 1:
            raise PluginError(text=f"{top} has the metadata of {len(found)} plug-ins")
        return plugin_content.described(found[0])

    # ---- changing ----

    def changing(self) -> Changing:
        """Return a context in which nobody else changes what is installed."""
        return Changing(self)

    def add(self, plugin: Plugin, content: Mapping[str, bytes]) -> str:
        """Write the files of a plug-in; return the directory's name, which no row has yet."""
        folder = f"{plugin.name}-{os.urandom(6).hex()}"
        top = f"{self.folder}/{folder}"
        os.mkdir(top, 0o700)
        made = {top}
        for name in sorted(content):
            path = f"{top}/{name}"
            for above in _above(path, top):
                if above not in made:
                    os.mkdir(above, 0o700)
                    made.add(above)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            _write(os.open(path, flags, 0o600), content[name])
        for path in made:
            os.chmod(path, 0o755)
        return folder

    def save(self, rows: Sequence[Row]) -> None:
        """Let the file list these, and remove the files of all others."""
        import json

        path = f"{self.folder}/{_STATE}"
        if rows:
            listed = [row.asdict() for row in sorted(rows, key=lambda row: row.name)]
            text = json.dumps({"version": _FORM, "plugins": listed}, indent=4) + "\n"
            fresh = f"{self.folder}/.{_STATE}.{os.urandom(6).hex()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            _write(os.open(fresh, flags, 0o600), text.encode())
            os.rename(fresh, path)
        elif os.path.lexists(path):
            os.unlink(path)
        self.tidy(rows)

    def tidy(self, rows: Sequence[Row]) -> None:
        """Remove what no row names: what was replaced, and what a killed command has left."""
        import shutil

        kept = {_STATE, _LOCK, *(row.folder for row in rows)}
        for entry in os.scandir(self.folder):
            if entry.name in kept:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


class Changing:
    """The lock of those who install and remove; users cannot open it, and so not hold it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._fd = -1

    def __enter__(self) -> None:
        import fcntl

        place = self._place
        if not os.path.lexists(place.folder):
            os.mkdir(place.folder, 0o700)
            os.chmod(place.folder, 0o755)
        place._check(place.folder, os.lstat(place.folder))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(f"{place.folder}/{_LOCK}", flags, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._place.tidy(self._place.rows())
        except (PluginError, OSError):
            pass  # what went wrong first is what to hear of
        finally:
            os.close(self._fd)


def _above(path: str, top: str) -> Iterator[str]:
    parts = path[len(top) + 1 :].split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join([top, *parts[:count]])


def _write(fd: int, data: bytes) -> None:
    # Whatever umask root has: a plug-in is for everybody.
    os.fchmod(fd, 0o644)
    with os.fdopen(fd, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
