"""`inspect`: labels, scripts, environment and definition file of an image.

A SIF file answers from its `inspect-metadata.json` object. Other images answer from their
files below `/.singularity.d` and `/scif/apps`, read without running anything from the image.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError, ImageError, NotSupported
from apptainer_py.base.record import Record
from apptainer_py.image import detect, sandbox, sif, squashfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Protocol

    class _Files(Protocol):
        def read(self, path: str) -> bytes | None: ...
        def names(self, path: str) -> tuple[str, ...]: ...


METADATA_NAME = b"inspect-metadata.json"
METADATA_LIMIT_BYTES = 16 << 20
FILE_LIMIT_BYTES = 4 << 20
APPS_LIMIT = 1024

_DEBUGFS = "/usr/sbin/debugfs"
_META = "/.singularity.d"
_APPS = "/scif/apps"
_NO_DEFFILE = "No SIF metadata partition, searching in container..."
_TEXTS = ("runscript", "test", "helpfile", "deffile", "startscript")
_APP_TEXTS = ("runscript", "startscript", "test", "helpfile")
_FILE_NAMES = {
    "deffile": "Singularity",
    "helpfile": "runscript.help",
    "runscript": "runscript",
    "startscript": "startscript",
    "test": "test",
}


class CannotInspect(ImageError):
    """The image could not be opened."""

    message = "Failed to open image {image}: {reason}"


class NoImage(ImageError):
    """There is no file of that name."""

    message = "container not found: stat {image}: {reason}"


class ReadingFailed(ApptainerError):
    """The files inside of the image could not be read."""

    message = "could not inspect container: {reason}"


class Wanted(Record):
    """Which parts of an image to show; no part at all means its labels."""

    labels: bool = False
    deffile: bool = False
    environment: bool = False
    helpfile: bool = False
    runscript: bool = False
    startscript: bool = False
    test: bool = False
    list_apps: bool = False
    all: bool = False
    json: bool = False
    app: str = ""

    def parts(self) -> frozenset[str]:
        """Return the names of the attributes that were asked for."""
        names = ("deffile", "environment", "helpfile", "runscript", "startscript", "test")
        chosen = {name for name in names if self.all or getattr(self, name)}
        if self.labels or self.all or not (chosen or self.list_apps):
            chosen.add("labels")
        return frozenset(chosen)


class Inspection(Record):
    """What to print on stdout, and warnings for stderr; and the same as data.

    `attributes` are texts by the names of Wanted's fields, and `labels` and `environment`, which
    are mappings; `apps` has such attributes for each SCIF application.
    """

    text: str
    warnings: tuple[str, ...]
    attributes: Mapping[str, Any]
    apps: Mapping[str, Mapping[str, Any]]


class _Found:
    """Attributes while they are collected: texts, `labels`, `environment` and `apps` by name."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.apps: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []

    def place(self, app: str) -> dict[str, Any]:
        return self.apps.setdefault(app, {}) if app else self.attributes


def inspect(path: str, wanted: Wanted) -> Inspection:
    """Return what an image says about itself.

    Raises:
        CannotInspect: no such image, or none that can be read.
        ReadingFailed: reading its files failed.
        NotSupported: it is of a kind whose files cannot be read here.
    """
    if wanted.all:
        wanted = wanted.replace(app="", json=True)
    try:
        image = detect.open_image(path, allow_root=True)
    except ImageError as error:
        raise CannotInspect(image=path, reason=error.facts["reason"]) from None
    found = _Found()
    try:
        _collect(image, wanted, found)
    except sif.SifError as error:
        raise CannotInspect(image=path, reason=error.facts["reason"]) from None
    finally:
        os.close(image.fd)
    if not (wanted.list_apps or wanted.all):
        found.apps = {name: facts for name, facts in found.apps.items() if name == wanted.app}
    text = _as_json(found) if wanted.json else _as_text(found, wanted)
    return Inspection(
        text=text,
        warnings=tuple(found.warnings),
        attributes=found.attributes,
        apps=found.apps,
    )


def help_text(path: str, app: str) -> str:
    """Return the help text of an image, or of one application; "" where it has none.

    Raises:
        NoImage: there is no such file.
        CannotInspect, ReadingFailed, NotSupported: as `inspect`.
    """
    try:
        os.stat(path)
    except OSError as error:
        raise NoImage(image=path, reason=(error.strerror or "").lower()) from None
    text = inspect(path, Wanted(helpfile=True, app=app)).text
    return text.rstrip("\n") + "\n" if text.strip() else ""


def _collect(image: detect.OpenImage, wanted: Wanted, found: _Found) -> None:
    if image.kind == "sandbox":
        _from_files(_SandboxFiles(image.fd), wanted, found)
    elif image.kind == "squashfs":
        _from_files(_SquashfsFiles(image.fd, image.offset), wanted, found)
    elif image.kind == "ext3":
        _from_files(_ExtFiles(image.fd, image.offset), wanted, found)
    elif image.kind == "sif":
        _from_sif(image.fd, wanted, found)
    else:
        raise NotSupported(what=f"inspect of an {image.kind} image")


def _from_sif(fd: int, wanted: Wanted, found: _Found) -> None:
    objects = sif.read_descriptors(fd)
    deffile = next((entry for entry in objects if entry.data_type == sif.DEFFILE), None)
    entry = next((entry for entry in objects if entry.name == METADATA_NAME), None)
    if entry is not None:
        try:
            stored = _decode(sif.read_object(fd, entry, limit_bytes=METADATA_LIMIT_BYTES))
        except ValueError as error:
            found.warnings.append(
                f"Unable to read {METADATA_NAME.decode()} SIF descriptor: "
                f"while decoding inspect metadata: {error}"
            )
        else:
            _from_stored(stored, wanted, found, has_deffile=deffile is not None)
            return
    if deffile is None and "deffile" in wanted.parts():
        found.warnings.append(_NO_DEFFILE)
    if deffile is not None and "deffile" in wanted.parts():
        content = sif.read_object(fd, deffile, limit_bytes=METADATA_LIMIT_BYTES)
        found.attributes["deffile"] = content.decode("utf-8", "replace")
    part = sif.primary_partition(fd)
    if part.fs == "ext3":
        _from_files(_ExtFiles(fd, part.offset), wanted, found)
        return
    if part.fs != "squashfs":
        raise NotSupported(what=f"inspect of a {part.fs} partition")
    _from_files(_SquashfsFiles(fd, part.offset), wanted, found)


def _decode(content: bytes) -> dict[str, Any]:
    import json

    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for key in ("data", "attributes"):
        if not isinstance(value, dict):
            raise ValueError("an object was expected")
        value = value.get(key, {})
    if not isinstance(value, dict):
        raise ValueError("an object was expected")
    return value


def _from_stored(
    stored: dict[str, Any], wanted: Wanted, found: _Found, *, has_deffile: bool
) -> None:
    parts = wanted.parts()
    listed = stored.get("apps")
    listed = listed if isinstance(listed, dict) else {}
    apps = {name: facts for name, facts in listed.items() if isinstance(facts, dict)}
    if wanted.list_apps or wanted.all:
        for name, facts in apps.items():
            found.apps[name] = _clean(facts, frozenset((*_APP_TEXTS, "labels", "environment")))
    if "deffile" in parts:
        if has_deffile:
            found.attributes.update(_clean(stored, frozenset(("deffile",))))
        else:
            found.warnings.append(_NO_DEFFILE)
    if not wanted.app:
        found.attributes.update(_clean(stored, parts - {"deffile"}))
    elif wanted.app in apps:
        mine = frozenset((*_APP_TEXTS, "labels", "environment")) & parts
        found.place(wanted.app).update(_clean(apps[wanted.app], mine))


def _clean(stored: dict[str, Any], parts: frozenset[str]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for name in parts:
        value = stored.get(name)
        if isinstance(value, str) and name in _TEXTS:
            clean[name] = value
        elif isinstance(value, dict) and name not in _TEXTS:
            clean[name] = {k: v for k, v in value.items() if isinstance(v, str)}
    return clean


class _SandboxFiles:
    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd

    def read(self, path: str) -> bytes | None:
        return sandbox.read_file(self._root_fd, path, limit_bytes=FILE_LIMIT_BYTES)

    def names(self, path: str) -> tuple[str, ...]:
        return sandbox.list_directory(self._root_fd, path)


class _SquashfsFiles:
    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self._offset = offset
        self._listed: frozenset[str] | None = None

    def read(self, path: str) -> bytes | None:
        if path not in self._paths():
            return None
        return squashfs.read_file(self._fd, self._offset, path, limit_bytes=FILE_LIMIT_BYTES)

    def names(self, path: str) -> tuple[str, ...]:
        start = path + "/"
        inside = {p[len(start) :].split("/")[0] for p in self._paths() if p.startswith(start)}
        return tuple(sorted(inside))

    def _paths(self) -> frozenset[str]:
        if self._listed is None:
            self._listed = squashfs.list_paths(self._fd, self._offset, (_META, _APPS), depth=6)
        return self._listed


class _ExtFiles:
    """Files of an ext3 file system, as the debugger of e2fsprogs shows them: nothing is mounted."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self._offset = offset

    def read(self, path: str) -> bytes | None:
        content, said = self._ask(f'cat "{path}"')
        return None if b"not found by ext2_lookup" in said else content

    def names(self, path: str) -> tuple[str, ...]:
        listed, _ = self._ask(f'ls -p "{path}"')
        fields = [line.split(b"/") for line in listed.splitlines()]
        names = [os.fsdecode(row[5]) for row in fields if len(row) > 6 and row[1] != b"0"]
        # What would end a word of the debugger's language has no business in such a place.
        good = [name for name in names if name.isprintable() and '"' not in name]
        return tuple(sorted(name for name in good if name not in (".", "..")))

    def _ask(self, request: str) -> tuple[bytes, bytes]:
        import signal
        import subprocess

        image = f"/proc/self/fd/{self._fd}"
        argv = [_DEBUGFS, "-R", request, f"{image}?offset={self._offset}"]
        said = os.memfd_create("said", os.MFD_CLOEXEC)
        try:
            # Cut short: a file may claim any size.
            with subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
                pass_fds=(self._fd,), cwd="/", env={"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"},
            ) as child:  # fmt: skip
                squashfs.limit(child.pid)
                assert child.stdout is not None
                content = child.stdout.read(FILE_LIMIT_BYTES + 1)
                child.kill()
            words = os.pread(said, 1 << 12, 0)
        except OSError:
            reason = f"{_DEBUGFS} cannot be run: install the package e2fsprogs"
            raise ReadingFailed(reason=reason) from None
        finally:
            os.close(said)
        if len(content) > FILE_LIMIT_BYTES:
            raise ReadingFailed(reason=f"a file is larger than {FILE_LIMIT_BYTES} bytes")
        # Signals of who goes beyond a limit.
        if -child.returncode in (signal.SIGXCPU, signal.SIGXFSZ):
            raise ReadingFailed(reason=f"{_DEBUGFS} says too much, or too slowly")
        if b"Filesystem not open" in words:
            raise ReadingFailed(reason="its ext3 file system is damaged")
        return content, words


def _from_files(files: _Files, wanted: Wanted, found: _Found) -> None:
    try:
        apps = [name for name in files.names(_APPS) if "scif" in files.names(f"{_APPS}/{name}")]
        if len(apps) > APPS_LIMIT:
            raise ReadingFailed(reason=f"more than {APPS_LIMIT} apps")
        for name in apps:
            found.place(name)
        if wanted.app:
            if wanted.app in apps:
                _from_folder(files, f"{_APPS}/{wanted.app}/scif", wanted.app, wanted, found)
            return
        _from_folder(files, _META, "", wanted, found)
        if wanted.all:
            for name in apps:
                _from_folder(files, f"{_APPS}/{name}/scif", name, wanted, found)
    except (ImageError, squashfs.ReadFailed) as error:
        raise ReadingFailed(reason=str(error)) from None


def _from_folder(files: _Files, folder: str, app: str, wanted: Wanted, found: _Found) -> None:
    parts = wanted.parts()
    place = found.place(app)
    for part in _APP_TEXTS if app else _TEXTS:
        content = files.read(f"{folder}/{_FILE_NAMES[part]}") if part in parts else None
        if content is not None and not place.get(part):
            place[part] = _text(content)
    if "labels" in parts:
        content = files.read(f"{folder}/labels.json")
        if content is not None:
            place["labels"] = _labels(content, found)
    if "environment" in parts:
        environment = {}
        for path in _environment_paths(files, folder, app):
            content = files.read(path)
            if content is not None:
                environment[path] = _text(content)
        place["environment"] = environment


def _environment_paths(files: _Files, folder: str, app: str) -> Iterator[str]:
    from fnmatch import fnmatchcase

    for name in files.names(f"{folder}/env"):
        docker = not app and fnmatchcase(name, "10-docker*.sh")
        if docker or fnmatchcase(name, "9*-environment.sh"):
            yield f"{folder}/env/{name}"


def _text(content: bytes) -> str:
    return content.replace(b"\0", b"").decode("utf-8", "replace").rstrip("\n")


def _labels(content: bytes, found: _Found) -> dict[str, str]:
    import json

    try:
        labels = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        found.warnings.append(f"Unable to parse labels: {error}")
        return {}
    if not isinstance(labels, dict):
        found.warnings.append("Unable to parse labels: an object was expected")
        return {}
    strange = [key for key, value in labels.items() if not isinstance(value, str)]
    if strange:
        found.warnings.append(f"Unable to parse labels: {strange[0]} is not a string")
    return {key: value for key, value in labels.items() if isinstance(value, str)}


def _as_json(found: _Found) -> str:
    import json

    attributes: dict[str, Any] = {}
    if found.apps:
        attributes["apps"] = {
            name: _ordered(found.apps[name], _APP_TEXTS) for name in sorted(found.apps)
        }
    attributes.update(_ordered(found.attributes, _TEXTS))
    document = {"data": {"attributes": attributes}, "type": "container"}
    # A lone surrogate ("\ud800" in JSON) has no UTF-8 form and could not be printed.
    text = json.dumps(document, indent="\t", ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode()
    # As Go writes JSON: these letters stand inside strings only, escaped for HTML.
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text + "\n"


def _ordered(facts: dict[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
    ordered: dict[str, Any] = {}
    for name in ("environment", "labels"):
        if facts.get(name):
            ordered[name] = dict(sorted(facts[name].items()))
    for name in texts:
        if facts.get(name):
            ordered[name] = facts[name]
    return ordered


def _as_text(found: _Found, wanted: Wanted) -> str:
    lines: list[str] = []
    app = found.apps.get(wanted.app, {})
    if wanted.list_apps:
        lines += sorted(found.apps)
    for name in ("deffile", "runscript", "startscript", "test", "helpfile"):
        value = found.attributes.get(name) or (app.get(name) if name in _APP_TEXTS else None)
        if value:
            lines.append(value)
    environment = found.attributes.get("environment") or app.get("environment") or {}
    lines += [f"=== {key} ===\n{environment[key]}\n" for key in sorted(environment)]
    labels = found.attributes.get("labels") or app.get("labels") or {}
    lines += [f"{key}: {labels[key]}" for key in sorted(labels)]
    text = "".join(line + "\n" for line in lines)
    return text.encode("utf-8", "replace").decode()
