"""Container Device Interface (CDI 1.1): specifications of devices, and what a device asks for.

A specification is a JSON or YAML file; a device is named `vendor.com/class=name`. Of several
directories the last one that knows a device counts; two files of one directory exclude each other.
"""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import LaunchError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

FOLDERS = ("/etc/cdi", "/var/run/cdi")
_FILE_BYTES = 4 << 20
_TIMEOUT_S = 30
_NO_YAML = 3
_VERSIONS = (*(f"0.{minor}." for minor in range(1, 9)), "1.0.", "1.1.")
# What the specification has; a field that it does not have may be one that matters.
_FIELDS = {
    "": "cdiVersion kind annotations devices containerEdits",
    "devices": "name annotations containerEdits",
    "containerEdits": "env deviceNodes hooks mounts intelRdt additionalGids netDevices",
    "deviceNodes": "path hostPath type major minor fileMode permissions uid gid",
    "mounts": "hostPath containerPath options type",
    "hooks": "hookName path args env timeout",
}
_WRONG = (AttributeError, KeyError, TypeError, ValueError)
# PyYAML is a package of others: it runs in a process of its own, not in one that plans a launch.
_AS_JSON = f"""
import json, sys
try:
    import yaml
except ImportError:
    sys.exit({_NO_YAML})
try:
    json.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout, default=str)
except (yaml.YAMLError, ValueError) as error:
    sys.exit(" ".join(str(error).split()))
"""


class CdiError(LaunchError):
    """A specification that cannot be used, or a device that none has."""

    message = "{text}"


class Node(Record):
    """A device of the host and its name in the container."""

    host: str
    path: str


class Bound(Record):
    """A bind mount."""

    source: str
    target: str
    read_only: bool


class Hook(Record):
    """A program that somebody wants to be run while the container is made."""

    name: str
    path: str
    arguments: tuple[str, ...]


class Edits:
    """All that the chosen devices ask for, in order."""

    __slots__ = ("environment", "groups", "hooks", "mounts", "nodes")

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.mounts: list[Bound] = []
        self.hooks: list[Hook] = []
        self.groups: list[int] = []


class _Known:
    """The devices of some folders: those that are clear, and what is wrong with the others."""

    __slots__ = ("broken", "devices", "twice")

    def __init__(self) -> None:
        self.devices: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.twice: dict[str, CdiError] = {}
        self.broken: list[CdiError] = []

    def add_folder(self, folder: str) -> None:
        """Read the specifications of a folder; what is wrong counts if it is needed."""
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return
        here: set[str] = set()
        for name in names:
            if not name.endswith((".json", ".yaml", ".yml")):
                continue
            path = os.path.join(folder, name)
            try:
                self.add_file(path, here)
            except CdiError as error:
                self.broken.append(error)
            except _WRONG as error:
                self.broken.append(CdiError(text=f"{path}: {_reason(error)}"))

    def add_file(self, path: str, here: set[str]) -> None:
        """Read one specification; `here` are the devices of its folder so far."""
        specification = _read(path)
        _check_version(specification["cdiVersion"])
        _check_fields("", specification)
        for device in specification["devices"]:
            _check_fields("devices", device)
            full = f"{specification['kind']}={device['name']}"
            self.twice.pop(full, None)
            if full in here:
                self.twice[full] = CdiError(text=f"{path}: another file has {full} too")
            here.add(full)
            self.devices[full] = specification, device


def find(names: Iterable[str], folders: tuple[str, ...]) -> Edits:
    """Return what the named devices ask for.

    Raises:
        CdiError: a name is none, no specification has it, or it asks for what cannot be read.
    """
    known = _Known()
    for folder in folders:
        known.add_folder(folder)
    edits = Edits()
    used: list[int] = []
    for name in names:
        _check_name(name)
        if name in known.twice:
            raise known.twice[name]
        if name not in known.devices:
            where = ", ".join(folders)
            missing = CdiError(text=f"unresolvable CDI device {name}: nothing in {where} has it")
            raise known.broken[0] if known.broken else missing
        specification, device = known.devices[name]
        try:
            if id(specification) not in used:
                used.append(id(specification))
                _add(edits, specification.get("containerEdits") or {})
            _add(edits, device.get("containerEdits") or {})
        except _WRONG as error:
            raise CdiError(text=f"CDI device {name}: cannot be used: {_reason(error)}") from None
    return edits


def _check_name(name: str) -> None:
    kind, equals, device = name.partition("=")
    vendor, slash, class_ = kind.partition("/")
    if not (equals and slash and vendor and class_ and device):
        raise CdiError(
            text=f'invalid CDI device name "{name}": it must be vendor/class=name, such as '
            "nvidia.com/gpu=0"
        )


def _read(path: str) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            text = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise CdiError(text=f"{path}: {(error.strerror or '').lower()}") from None
    if len(text) > _FILE_BYTES:
        raise CdiError(text=f"{path}: larger than {_FILE_BYTES >> 20} MiB")
    import json

    try:
        value = json.loads(text if path.endswith(".json") else _converted(path, text))
    except (ValueError, RecursionError) as error:
        raise CdiError(text=f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise CdiError(text=f"{path}: no CDI specification")
    return value


def _converted(path: str, text: bytes) -> bytes:
    import subprocess

    try:
        done = subprocess.run(
            [build.PYTHON, "-I", "-c", _AS_JSON], input=text, capture_output=True, env={},
            check=False, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise CdiError(text=f"{path}: {error}") from None
    if done.returncode == _NO_YAML:
        raise CdiError(text=f"{path}: install python3-yaml to read it, or write it as JSON")
    if done.returncode != 0:
        said = os.fsdecode(done.stderr).strip().splitlines() or ["it cannot be read"]
        raise CdiError(text=f"{path}: {said[-1]}")
    return done.stdout


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _check_version(version: object) -> None:
    plain = str(version).removeprefix("v")
    if not plain.startswith(_VERSIONS) or not plain.rpartition(".")[2].isdigit():
        raise ValueError(f"cdiVersion {version!r} is not supported: 0.1.0 to 1.1.x are")


def _check_fields(what: str, value: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"what stands in {what} must be an object")
    unknown = sorted(set(value) - set(_FIELDS[what].split()))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}{what and ' in '}{what}")


def _add(edits: Edits, asked: dict[str, Any]) -> None:
    _check_fields("containerEdits", asked)
    for name in ("deviceNodes", "mounts", "hooks"):
        for entry in asked.get(name) or ():
            _check_fields(name, entry)
    for key in ("intelRdt", "netDevices"):
        if asked.get(key):
            raise ValueError(f"{key} is not supported")
    edits.environment.update(_variable(entry) for entry in asked.get("env") or ())
    edits.nodes += [_node(entry) for entry in asked.get("deviceNodes") or ()]
    edits.mounts += [_bound(entry) for entry in asked.get("mounts") or ()]
    edits.hooks += [_hook(entry) for entry in asked.get("hooks") or ()]
    edits.groups += [int(number) for number in asked.get("additionalGids") or ()]


def _variable(entry: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals or not name:
        raise ValueError(f"{entry!r} is no variable")
    return name, value


def _node(entry: dict[str, Any]) -> Node:
    path = _absolute(entry["path"])
    return Node(host=_absolute(entry.get("hostPath") or path), path=path)


def _bound(entry: dict[str, Any]) -> Bound:
    if (entry.get("type") or "bind") not in ("bind", "none"):
        raise ValueError(f"a mount of type {entry['type']} is not supported")
    return Bound(
        source=_absolute(entry["hostPath"]),
        target=_absolute(entry["containerPath"]),
        read_only="ro" in (entry.get("options") or ()),
    )


def _hook(entry: dict[str, Any]) -> Hook:
    arguments = tuple(str(word) for word in entry.get("args") or ())
    return Hook(name=str(entry["hookName"]), path=_absolute(entry["path"]), arguments=arguments)


def _absolute(path: object) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise ValueError(f"{path!r} is no absolute path")
    return os.path.normpath(path)
