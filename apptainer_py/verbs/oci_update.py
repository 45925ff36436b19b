"""`update`: other limits for a container that is there."""

from __future__ import annotations

import os
import sys

from apptainer_py.base.files import read_at_most
from apptainer_py.engines.oci.groups import groups_of
from apptainer_py.model.json_out import dumps
from apptainer_py.model.json_text import loads
from apptainer_py.model.record_frame import FLAG_SYSTEMD
from apptainer_py.runtime.containers import STATE, ContainerError, StateDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.model.oci_call import OciCall

_BYTES = 1 << 20
# Flag → section and key of `linux.resources`.
_NUMBERS = {
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-share": ("cpu", "shares"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "cpu-idle": ("cpu", "idle"),
    "blkio-weight": ("blockIO", "weight"),
}
# Go's name for what reads a number that may be negative; the others are not.
_PARSERS = dict.fromkeys(("cpu-quota", "cpu-rt-runtime", "cpu-idle"), "ParseInt")
_SIZES = {
    "memory": "limit",
    "memory-reservation": "reservation",
    "memory-swap": "swap",
    "kernel-memory": "kernel",
    "kernel-memory-tcp": "kernelTCP",
}
_WORDS = {"cpuset-cpus": "cpus", "cpuset-mems": "mems"}
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def size_bytes(word: str) -> int:
    """Return a size as Docker's units say it: "64m", "1.5g", "2 KiB".

    Raises:
        ValueError: it is none.
    """
    text = word.strip().lower()
    number = text.rstrip("kmgtpib ")
    unit = text[len(number) :].strip().removesuffix("b").removesuffix("i")
    if not number or unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise ValueError(word)
    return int(float(number) * _UNITS[unit])


def _of_flags(call: OciCall) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for flag, (section, key) in _NUMBERS.items():
        word = call.text(flag)
        if word:
            try:
                found.setdefault(section, {})[key] = int(word)
            except ValueError:
                parser = f"strconv.{_PARSERS.get(flag, 'ParseUint')}"
                text = f'invalid value for {flag}: {parser}: parsing "{word}": '
                raise ContainerError(text=f"{text}invalid syntax") from None
    for flag, key in _SIZES.items():
        word = call.text(flag)
        if word:
            try:
                size = -1 if word == "-1" else size_bytes(word)
            except ValueError:
                text = f"invalid value for {flag}: invalid size: '{word}'"
                raise ContainerError(text=text) from None
            found.setdefault("memory", {})[key] = size
    for flag, key in _WORDS.items():
        if call.text(flag):
            found.setdefault("cpu", {})[key] = call.text(flag)
    if call.number("pids-limit"):
        found["pids"] = {"limit": call.number("pids-limit")}
    return found


def _of_file(path: str) -> Any:
    if path == "-":
        return loads(sys.stdin.buffer.read(_BYTES))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ContainerError(text=f"open {path}: {(error.strerror or '').lower()}") from None
    return loads(read_at_most(fd, _BYTES))


def update(call: OciCall, environment: Mapping[str, str]) -> str:
    """Set the limits that flags or a file name; the others stay as they are.

    Raises:
        ContainerError: the container does not run, or a value is none.
    """
    state = StateDir.open(call.root, call.arguments[0])
    for flag in ("l3-cache-schema", "mem-bw-schema"):
        if call.text(flag):
            raise ContainerError(text="Intel RDT: not supported by update yet")
    resources = _resources(call)
    state.lock()
    record = state.read_record()
    if state.status(record) == "stopped":
        raise ContainerError(text="container not running")
    known = loads(state.read(STATE) or b"{}")
    groups = (known.get("config") or {}).get("cgroups") or {}
    if not record.cgroups:
        raise ContainerError(text="the container has no control groups")
    # What a file does not name, or names as 0, is meant to stay.
    wanted = {name: value for name, value in resources.items() if name != "devices" and value}
    merged = _merged(groups.get("Resources") or {}, wanted)
    if record.flags & FLAG_SYSTEMD:
        # A property of systemd's may stand for two values: a quota is one in relation to a period.
        wanted = {name: merged[name] for name in wanted}
    manager = groups_of(record, environment, groups.get("path", ""), wanted)
    manager.apply(wanted, devices=False)
    groups["Resources"] = merged
    known.setdefault("config", {})["cgroups"] = groups
    state.write(STATE, dumps(known).encode())
    return ""


def _resources(call: OciCall) -> dict[str, Any]:
    path = call.text("resources") or call.text("from-file")
    if call.apptainer and not path and not call.options:
        raise ContainerError(text="you must specify --from-file")
    resources = _of_file(path) if path else _of_flags(call)
    if not isinstance(resources, dict):
        raise ContainerError(text="the resources are no JSON object")
    return resources


def _merged(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits that are known, with the wanted ones in their place, key by key."""
    merged = dict(known)
    for name, value in wanted.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = {**(before or {}), **value} if both else value
    return merged
