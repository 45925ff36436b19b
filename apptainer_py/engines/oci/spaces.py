"""Namespaces and id maps: which are made, which are joined, and what contradicts itself."""

from __future__ import annotations

from apptainer_py.base.record import Record
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.texts import IN_INIT, path_bytes, quoted
from apptainer_py.model.oci_plan import IdMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.oci_plan import HostFacts

NEWTIME = 0x00000080
NEWNS = 0x00020000
NEWCGROUP = 0x02000000
NEWUTS = 0x04000000
NEWIPC = 0x08000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000

_KINDS = {
    "pid": NEWPID,
    "network": NEWNET,
    "mount": NEWNS,
    "ipc": NEWIPC,
    "uts": NEWUTS,
    "user": NEWUSER,
    "cgroup": NEWCGROUP,
    "time": NEWTIME,
}
_BILLION = 1_000_000_000


class Spaces(Record):
    """The namespaces of a container: bits of `present` are in `new` or have a path to join.

    `host_uids` and `host_gids` say what its ids are outside, made or joined; `uid_maps` and
    `gid_maps` are what has to be written.
    """

    present: int
    new: int
    paths: tuple[tuple[int, str], ...]
    uid_maps: tuple[IdMap, ...] = ()
    gid_maps: tuple[IdMap, ...] = ()
    host_uids: tuple[IdMap, ...] = ()
    host_gids: tuple[IdMap, ...] = ()
    time_offsets: tuple[int, int, int, int] | None = None
    warnings: tuple[str, ...] = ()

    def path_of(self, kind: int) -> str:
        """Return the namespace file that is joined for a CLONE_NEW* bit, or ""."""
        for known, path in self.paths:
            if known == kind:
                return path
        return ""


def compile_spaces(linux: dict[str, Any], host: HostFacts) -> Spaces:
    """Compile linux.namespaces, the id maps and timeOffsets.

    Raises:
        ConfigWrong: a namespace is unknown or named twice, or maps and offsets do not fit it.
    """
    present = new = 0
    paths: list[tuple[int, str]] = []
    for item in linux.get("namespaces", ()):
        kind, path = item.get("type", ""), item.get("path", "")
        bit = _KINDS.get(kind)
        if bit is None:
            text = f"namespace {{{quoted(kind)} {quoted(path)}}} does not exist"
            raise ConfigWrong(key="linux.namespaces", text=text)
        if present & bit:
            text = f"malformed spec file: duplicated ns {{{quoted(kind)} {quoted(path)}}}"
            raise ConfigWrong(key="linux.namespaces", text=text)
        present |= bit
        if path and not path.startswith("/"):
            text = f"the path of a namespace must be absolute: {quoted(path)}"
            raise ConfigWrong(key="linux.namespaces", text=text)
        if path:
            path_bytes(path, "linux.namespaces", f"failed to open {quoted(path)}: {{error}}")
            paths.append((bit, path))
        else:
            new |= bit
    spaces = Spaces(present=present, new=new, paths=tuple(paths))
    if present & NEWUSER or linux.get("uidMappings") or linux.get("gidMappings"):
        spaces = _with_maps(spaces, linux, host)
    if linux.get("timeOffsets"):
        spaces = spaces.replace(time_offsets=_time_offsets(spaces, linux["timeOffsets"]))
    return spaces


def id_maps(lines: list[dict[str, Any]] | None) -> tuple[IdMap, ...]:
    """Return uidMappings or gidMappings of config.json as records."""
    return tuple(
        IdMap(
            inside=line.get("containerID", 0),
            outside=line.get("hostID", 0),
            count=line.get("size", 0),
        )
        for line in lines or ()
    )


def outside(maps: tuple[IdMap, ...], number: int) -> int | None:
    """Return the id outside for one inside, or None if it has none."""
    for line in maps:
        if line.inside <= number < line.inside + line.count:
            return line.outside + number - line.inside
    return None


def _with_maps(spaces: Spaces, linux: dict[str, Any], host: HostFacts) -> Spaces:
    uids = id_maps(linux.get("uidMappings"))
    gids = id_maps(linux.get("gidMappings"))
    if not spaces.present & NEWUSER:
        text = "user namespace mappings specified, but user namespace isn't enabled in the config"
        raise ConfigWrong(key="linux.uidMappings", text=text)
    path = spaces.path_of(NEWUSER)
    if path:
        return _with_joined_maps(spaces, path, uids, gids, host)
    for name, maps, what in (("uid", uids, "uidMappings"), ("gid", gids, "gidMappings")):
        if not maps:
            text = f"user namespaces enabled, but no {name} mappings found"
            raise ConfigWrong(key=f"linux.{what}", text=text)
        if outside(maps, 0) is None:
            text = f"user namespaces enabled, but no mapping found for {name} 0"
            raise ConfigWrong(key=f"linux.{what}", text=text)
        _check_overlap(name, maps)
    return spaces.replace(uid_maps=uids, gid_maps=gids, host_uids=uids, host_gids=gids)


def _check_overlap(name: str, maps: tuple[IdMap, ...]) -> None:
    """What the kernel would answer with EINVAL when the map is written (user_namespaces(7))."""
    for index, line in enumerate(maps):
        beyond = max(line.inside, line.outside) + line.count > 0xFFFFFFFF
        clash = any(
            _meet(line.inside, other.inside, line.count, other.count)
            or _meet(line.outside, other.outside, line.count, other.count)
            for other in maps[:index]
        )
        if not line.count or beyond or clash:
            text = f"{IN_INIT}failed to update {name}_map: invalid argument"
            raise ConfigWrong(key=f"linux.{name}Mappings", text=text)


def _meet(first: int, second: int, first_count: int, second_count: int) -> bool:
    return first < second + second_count and second < first + first_count


def _with_joined_maps(
    spaces: Spaces,
    path: str,
    uids: tuple[IdMap, ...],
    gids: tuple[IdMap, ...],
    host: HostFacts,
) -> Spaces:
    if host.joined_maps is None:
        return spaces.replace(host_uids=uids, host_gids=gids)
    try:
        real_uids, real_gids = host.joined_maps(path)
    except OSError as error:
        text = f"userns spawn: open userns path {path} failed: {error.strerror}"
        text = f"failed to cache mappings for userns: {text}"
        raise ConfigWrong(key="linux.namespaces", text=text) from None
    spaces = spaces.replace(host_uids=real_uids, host_gids=real_gids)
    if not uids and not gids:
        return spaces
    if uids != real_uids or gids != real_gids:
        text = (
            "user namespaces enabled, but both namespace path and non-matching mapping specified"
            " -- you may only provide one"
        )
        raise ConfigWrong(key="linux.uidMappings", text=text)
    warning = (
        "config.json has both a userns path to join and a matching userns mapping specified"
        " -- you may only provide one"
    )
    return spaces.replace(warnings=(warning,))


def _time_offsets(spaces: Spaces, offsets: dict[str, Any]) -> tuple[int, int, int, int]:
    text = ""
    if not spaces.present & NEWTIME:
        text = "time namespace offsets specified, but time namespace isn't enabled in the config"
    elif spaces.path_of(NEWTIME):
        text = (
            "time namespace enabled, but both namespace path and time offsets specified"
            " -- you may only provide one"
        )
    for clock, value in offsets.items():
        if text:
            break
        if clock not in ("monotonic", "boottime"):
            text = f"time offset of unknown clock {quoted(clock)}"
        elif value.get("nanosecs", 0) >= _BILLION:
            text = f"time offset of {clock} has {value['nanosecs']} nanoseconds, a second or more"
    if text:
        raise ConfigWrong(key="linux.timeOffsets", text=text)
    monotonic, boottime = offsets.get("monotonic", {}), offsets.get("boottime", {})
    return (
        monotonic.get("secs", 0),
        monotonic.get("nanosecs", 0),
        boottime.get("secs", 0),
        boottime.get("nanosecs", 0),
    )
