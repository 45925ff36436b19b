"""The control groups of a container: which are wanted, who may have them, and its way into them."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.engines.oci.keys import ConfigWrong
    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts
    from apptainer_py.runtime.janitor import Janitor

_RUNNING = "/run/systemd/system"


class NoGroups(LaunchError):
    """This caller, or this machine, cannot have control groups for a container."""

    message = (
        "container creation failed: while applying cgroups config: cannot use cgroups - {reason}"
    )


class NotApplied(LaunchError):
    """The kernel, or systemd, refuses a limit."""

    message = "container creation failed: while applying cgroups config: {reason}"


class Limits:
    """What one container is limited to; `kind` is who makes its groups."""

    __slots__ = ("bus", "kind", "resources", "rootless")

    def __init__(self, resources: dict[str, Any], kind: str, bus: str, *, rootless: bool) -> None:
        self.resources = resources
        self.kind = kind
        self.bus = bus
        self.rootless = rootless


def find(
    action: ActionRequest, facts: Facts, environment: Mapping[str, str], flags: dict[str, Any]
) -> Limits:
    """Return the limits that a command line asks for; `flags` are those that it gave.

    Raises:
        LimitWrong: one of them is none.
        NoGroups: the caller cannot have any.
    """
    from apptainer_py.host.cgroups.limits import with_devices

    resources = resources_of(action, flags)
    if action.apply_cgroups:
        resources = with_devices(resources)
    return _with_manager(resources, facts, environment)


def resources_of(action: ActionRequest, flags: dict[str, Any]) -> dict[str, Any]:
    """Return what flags or a file say, as `linux.resources`.

    Raises:
        LimitWrong: one of them is none, or there are both.
    """
    from apptainer_py.host.cgroups import limits

    if not action.apply_cgroups:
        return limits.from_flags(action.asdict(), os.cpu_count() or 1)
    if flags:
        text = "cannot apply a cgroups TOML file while using limit flags"
        raise limits.LimitWrong(text=text)
    return _checked(action.apply_cgroups, limits.read_file(action.apply_cgroups))


def _checked(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the file's keys that mean something; a wrong type or number is refused."""
    from apptainer_py.engines.oci.keys import RESOURCES, ConfigWrong, check_keys
    from apptainer_py.host.cgroups.limits import LimitWrong

    try:
        check_keys(found, RESOURCES)
    except ConfigWrong as error:
        raise LimitWrong(text=f"{path}: {_in_words(error)}") from None
    for key in _unknown(found, RESOURCES, ""):
        log.warning(f"{path}: {key} is unknown and ignored")
    return found


def _unknown(found: object, shape: object, path: str) -> list[str]:
    """Return the keys that mean nothing, in their own order, each once."""
    if isinstance(found, list) and isinstance(shape, list):
        each = [key for one in found for key in _unknown(one, shape[0], path)]
        return list(dict.fromkeys(each))
    if not isinstance(found, dict) or not isinstance(shape, dict | tuple):
        return []
    unknown: list[str] = []
    for key, value in found.items():
        inner = shape[0] if isinstance(shape, tuple) else shape.get(key)
        name = f"{path}.{key}" if path else key
        unknown += _unknown(value, inner, name) if inner is not None else [name]
    return unknown


_WORDS = {
    "object": "table",
    "int": "whole number",
    "uint": "number from 0 on",
    "bool": "boolean",
    "[]": "array",
    "specs": "table",
    "map": "table",
}


def _in_words(error: ConfigWrong) -> str:
    """Return what is wrong as who writes TOML calls it, where the type is."""
    what, _, wanted = str(error).removeprefix("json: cannot unmarshal ").rpartition(" of type ")
    if not what or not wanted:
        return str(error)
    kind = what.partition(" into ")[0]
    words = next((word for name, word in _WORDS.items() if wanted.startswith(name)), wanted)
    return f"{error.key} is a {_WORDS.get(kind, kind)}, and has to be of type {words}"


def _with_manager(
    resources: dict[str, Any], facts: Facts, environment: Mapping[str, str]
) -> Limits:
    running = os.path.isdir(_RUNNING)
    wanted = bool(facts.configuration["systemd cgroups"])
    if facts.flow == protocol.FLOW_ROOT:
        kind = "systemd" if wanted and running else "cgroupfs"
        return Limits(resources, kind, "", rootless=False)
    if not wanted:
        raise NoGroups(
            reason="rootless cgroups require 'systemd cgroups' to be enabled in apptainer-py.conf"
        )
    if not running:
        raise NoGroups(
            reason="cannot use systemd cgroups manager, systemd not running as init on this host"
        )
    from apptainer_py.host.cgroups.tree import find_tree

    if not find_tree().unified_only:
        raise NoGroups(reason="rootless cgroups require cgroups v2")
    for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"):
        if not environment.get(name):
            raise NoGroups(reason=f"{name} is not set: log in as this user, or set it")
    bus = environment["DBUS_SESSION_BUS_ADDRESS"]
    return Limits(resources, "systemd", bus, rootless=True)


def apply(limits: Limits, pid: int, janitor: Janitor | None, *, shim: bool) -> None:
    """Make the groups and put the container's processes in; the one that mounts stays outside.

    Raises:
        NotApplied: a limit cannot be set.
    """
    from apptainer_py.host.cgroups import find_manager
    from apptainer_py.host.cgroups.driver import CgroupError
    from apptainer_py.model.oci_plan import CgroupWish

    if not limits.rootless:
        # Rules for devices are a program on cgroup2, and that module has the calls for it.
        from apptainer_py.runtime.interpreter import load_container_module

        load_container_module()
    systemd = limits.kind == "systemd"
    # Below the caller's own groups: whatever limits those still limits the container.
    wish = CgroupWish(
        path=f"{pid}" if systemd else f"apptainer-py-{pid}",
        resources=limits.resources,
        scope_prefix="apptainer-py" if systemd else "",
        slice_parent=("user.slice" if limits.rootless else "system.slice") if systemd else "",
    )
    try:
        manager = find_manager(limits.kind, wish, rootless=limits.rootless, bus=limits.bus)
        for directory in manager.directories() if janitor else ():
            janitor.group(directory)  # type: ignore[union-attr]
        _enter(manager, pid, shim=shim)
        manager.apply(limits.resources, devices=not limits.rootless)
    except CgroupError as error:
        raise NotApplied(reason=str(error)) from None


def join(own: str, pid: int, bus: str) -> None:
    """Move a process into the groups of an instance; `own` is /proc/PID/cgroup of its first.

    Raises:
        NotApplied: it would escape what limits the instance.
    """
    from apptainer_py.host.cgroups.driver import CgroupError, read_file, write_file
    from apptainer_py.host.cgroups.tree import parse_tree

    mounts = read_file("/proc/self", "mountinfo")
    here = read_file("/proc/self", "cgroup").splitlines()
    # Where both are already there is nothing to do, nor a right to do it.
    others = "\n".join(line for line in own.splitlines() if line not in here)
    try:
        tree = parse_tree(mounts, others) if others else None
        for one in tree.hierarchies if tree else ():
            directory = one.own_directory()
            try:
                write_file(directory, "cgroup.procs", str(pid))
            except CgroupError:
                if not _attach(directory, pid, bus):
                    raise
    except CgroupError as error:
        raise NotApplied(reason=str(error)) from None


def _attach(directory: str, pid: int, bus: str) -> bool:
    """Have the user's manager do it, which asks who may; return whether it could."""
    from apptainer_py.host.dbus import DbusError, Systemd

    unit = directory.rpartition("/")[2]
    if not bus or not unit.endswith(".scope"):
        return False
    try:
        systemd = Systemd(bus)
        try:
            systemd.attach(unit, [pid])
        finally:
            systemd.close()
    except DbusError as error:
        raise NotApplied(reason=str(error)) from None
    return True


def _enter(manager: Manager, pid: int, *, shim: bool) -> None:
    """Move the first process, then stage 2: what the first one forks from then on is inside too.

    With a shim, stage 2 is its second child; the first is the process that mounts.
    """
    others = _second_children(pid) if shim else []
    manager.create(pid, *others)
    inside = set(manager.pids())
    for one in (pid, *(_second_children(pid) if shim else ())):
        if one not in inside:
            manager.add(one)


def _second_children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
        return [int(child) for child in children.read().split()[1:]]
