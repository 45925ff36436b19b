"""What a plug-in brings, a wheel or its directory: all of it in memory before any is believed."""

from __future__ import annotations

import os
import stat
import sys

from apptainer_py.base import files
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.metadata import Distribution
    from typing import IO

    Content = dict[str, bytes]

GROUP = "apptainer_py.plugins"
METADATA, ENTRIES = "METADATA", "entry_points.txt"
_INFO = ".dist-info"
_PACKED_MAX, _BYTES_MAX, _FILES_MAX = 16 << 20, 64 << 20, 2000
_DEPTH_MAX, _PART_MAX, _TEXT_MAX = 16, 200, 1 << 20
_NAME = "[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?"
_VERSION = "[0-9A-Za-z][0-9A-Za-z.!+_-]{0,63}"
_COMMAND = "[a-z][a-z0-9]*(?:-[a-z0-9]+)*"
_TARGET = r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
_COMMAND_MAX, _LINE_MAX = 40, 100


class PluginError(ApptainerError):
    """Something about plug-ins that an administrator, or a plug-in's author, has to change."""


class Plugin(Record):
    """What the metadata of a plug-in says."""

    name: str
    version: str
    summary: str = ""
    author: str = ""
    commands: tuple[tuple[str, str], ...]  # the command, and `module:function`


# ---- names ----


def check_name(name: str) -> str:
    """Return the name of a plug-in in the form that is compared and kept.

    Raises:
        PluginError: Python's packages are not called that.
    """
    import re

    if not re.fullmatch(_NAME, name, re.ASCII):
        raise PluginError(text=f"{name!a} is no name of a plug-in: letters, digits, `-`, `.`, `_`")
    return re.sub("[-_.]+", "-", name).lower()


def _checked_path(name: str) -> str:
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode()) > _PART_MAX for part in parts)
        or "\\" in name
        or len(parts) > _DEPTH_MAX
    ):
        raise PluginError(text=f"it has a file of the name {name!a}")
    return name


# ---- reading ----


def read(path: str) -> Content:
    """Return the files of a wheel, or of a directory like an unpacked one, by their paths.

    Raises:
        PluginError: it is neither, or has what does not belong into a plug-in.
    """
    try:
        # Not to wait for the other end of a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PluginError(text=_reason(error)) from None
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind):
        os.close(fd)
        return _collected(_of_directory(path))
    if not stat.S_ISREG(kind):
        os.close(fd)
        raise PluginError(text="it is neither a file nor a directory")
    data = files.read_at_most(fd, _PACKED_MAX + 1)
    if len(data) > _PACKED_MAX:
        raise PluginError(text=f"it has more than {_PACKED_MAX >> 20} MiB")
    return _of_archive(data)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _collected(found: Iterator[tuple[str, bytes]]) -> Content:
    content: Content = {}
    left = _BYTES_MAX
    for name, data in found:
        if _checked_path(name) in content:
            raise PluginError(text=f"it has {name} twice")
        content[name] = data
        left -= len(data)
        if left < 0 or len(content) > _FILES_MAX:
            limits = f"{_FILES_MAX} files or {_BYTES_MAX >> 20} MiB"
            raise PluginError(text=f"it has more than {limits}")
    for name in content:
        parts = name.split("/")
        for count in range(1, len(parts)):
            if (above := "/".join(parts[:count])) in content:
                raise PluginError(text=f"{above} is a file and a directory")
    return content


def _of_archive(data: bytes) -> Content:
    import io
    import zipfile
    import zlib

    wrong = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _collected(_members(archive))
    except (*wrong, ValueError, OverflowError, LookupError) as error:
        raise PluginError(text=f"it is no wheel: {error}") from None


def _members(archive: object) -> Iterator[tuple[str, bytes]]:
    import zipfile

    assert isinstance(archive, zipfile.ZipFile)
    for member in archive.infolist():
        name = member.orig_filename
        if member.is_dir():
            _checked_path(name.rstrip("/"))
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise PluginError(text=f"{name!a} is no plain file")
        if not name.isprintable() or name != member.filename:
            raise PluginError(text=f"it has a file of the name {name!a}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PluginError(text=f"{name} is compressed in another way than wheels are")
        with archive.open(member) as stream:
            yield name, _limited(stream)


def _limited(stream: IO[bytes]) -> bytes:
    # The size that the table gives may be a lie.
    return stream.read(_BYTES_MAX + 1)


def _of_directory(path: str) -> Iterator[tuple[str, bytes]]:
    def fail(error: OSError) -> None:
        raise PluginError(text=f"{error.filename!a}: {_reason(error)}") from None

    for above, folders, names, fd in os.fwalk(path, onerror=fail):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        start = os.path.relpath(above, path)
        for name in sorted([*names, *folders]):
            shown = name if start == "." else f"{start}/{name}"
            if not shown.isprintable():
                raise PluginError(text=f"it has a file of the name {shown!a}")
            kind = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if stat.S_ISREG(kind):
                yield shown, _file_at(fd, name, shown)
            elif not stat.S_ISDIR(kind):
                raise PluginError(text=f"{shown} is no plain file")


def _file_at(folder: int, name: str, shown: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return files.read_at_most(os.open(name, flags, dir_fd=folder), _BYTES_MAX + 1)
    except OSError as error:
        raise PluginError(text=f"{shown}: {_reason(error)}") from None


# ---- judging ----


def judged(content: Mapping[str, bytes]) -> Plugin:
    """Return what the metadata says, once all that is brought may be installed.

    Raises:
        PluginError: the metadata is broken, or the files are not those of a pure Python package.
    """
    info = _info(content)
    _check_kind(content.get(f"{info}/WHEEL"))
    if f"{info}/RECORD" in content:
        _check_record(content, info)
    _check_places(content, info)
    plugin = described(_packed(content, info))
    for command, target in plugin.commands:
        start = target.partition(":")[0].replace(".", "/")
        if not {f"{start}.py", f"{start}/__init__.py"} & content.keys():
            raise PluginError(text=f"its command {command} is in a module that it does not have")
    return plugin


def _info(content: Mapping[str, bytes]) -> str:
    """Return the name of the directory with the metadata."""
    folders = {name.partition("/")[0] for name in content if "/" in name}
    infos = [folder for folder in folders if folder.endswith(_INFO)]
    if not infos and "pyproject.toml" in content:
        raise PluginError(text="it is a plug-in's source; `plugin compile` makes a wheel of it")
    if len(infos) != 1:
        raise PluginError(text=f"it has {len(infos)} directories *{_INFO}; a wheel has one")
    info = infos[0]
    for name in (METADATA, ENTRIES):
        if f"{info}/{name}" not in content:
            raise PluginError(text=f"it has no {name}")
        if len(content[f"{info}/{name}"]) > _TEXT_MAX:
            raise PluginError(text=f"its {name} is too large")
    return info


def _check_places(content: Mapping[str, bytes], info: str) -> None:
    code = [name for name in content if not name.startswith(f"{info}/")]
    tops = {name.partition("/")[0].partition(".")[0] for name in code}
    if taken := tops & ({"apptainer_py"} | sys.stdlib_module_names):
        raise PluginError(text=f"its module {min(taken)} has the name of one that is there")
    if any(name.partition("/")[0].endswith(".data") for name in content):
        raise PluginError(text="it has files for places other than its own")


def _check_kind(wheel: bytes | None) -> None:
    lines = (wheel or b"").decode("ascii", "replace").splitlines()
    if wheel is not None and "root-is-purelib: true" not in [line.lower() for line in lines]:
        raise PluginError(text="it is not pure Python")


def _check_record(content: Mapping[str, bytes], info: str) -> None:
    import base64
    import csv
    import hashlib

    unlisted = {f"{info}/RECORD", f"{info}/RECORD.jws", f"{info}/RECORD.p7s"}
    try:
        lines = content[f"{info}/RECORD"].decode().splitlines()
        listed = {row[0]: row[1] for row in csv.reader(lines) if len(row) > 1}
    except (ValueError, csv.Error) as error:
        raise PluginError(text=f"its RECORD cannot be read: {error}") from None
    for name in sorted(content.keys() - unlisted):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest())
        if listed.get(name) != f"sha256={digest.decode().rstrip('=')}":
            raise PluginError(text=f"{name} is not what its RECORD says")


def _packed(content: Mapping[str, bytes], info: str) -> Distribution:
    from importlib import metadata
    from pathlib import Path

    class Packed(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            data = content.get(f"{info}/{filename}")
            return None if data is None else data.decode()

        def locate_file(self, path: object) -> Path:
            return Path(info, str(path))

    return Packed()


def described(distribution: Distribution) -> Plugin:
    """Return what the metadata of a distribution says.

    Raises:
        PluginError: it is not that of a plug-in.
    """
    try:
        fields = distribution.metadata
        facts = {field.lower(): str(fields[field]) for field in fields}
        entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        commands = tuple(sorted((entry.name, entry.value) for entry in entries))
    except (ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        raise PluginError(text=f"its metadata cannot be read: {error}") from None
    name, version = facts.get("name", ""), facts.get("version", "")
    _check_words(name, version, commands)
    return Plugin(
        name=check_name(name),
        version=version,
        summary=_line(facts.get("summary", "")),
        author=_line(facts.get("author") or facts.get("author-email", "")),
        commands=commands,
    )


def _check_words(name: str, version: str, commands: tuple[tuple[str, str], ...]) -> None:
    import re

    if not name or not re.fullmatch(_VERSION, version, re.ASCII):
        raise PluginError(text=f"its {METADATA} has no Name, or no Version")
    if not commands:
        raise PluginError(text=f"its {ENTRIES} has nothing in the group {GROUP}")
    for command, target in commands:
        if not re.fullmatch(_COMMAND, command, re.ASCII) or len(command) > _COMMAND_MAX:
            raise PluginError(text=f"its command {command!a} is not of small letters and digits")
        if not re.fullmatch(_TARGET, target, re.ASCII):
            raise PluginError(
                text=f"its command {command} leads to {target!a}, not MODULE:FUNCTION"
            )
    if len({command for command, _ in commands}) != len(commands):
        raise PluginError(text="it has a command twice")


def _line(text: str) -> str:
    """Return the first line, without what would move the cursor."""
    first = text.strip().partition("\n")[0]
    return "".join(c if c.isprintable() else " " for c in first)[:_LINE_MAX].strip()
