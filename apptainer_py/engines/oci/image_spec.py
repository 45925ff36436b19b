"""config.json for an image: what Docker gives a container, and what the command line adds to it."""

from __future__ import annotations

import posixpath

from apptainer_py.base.errors import LaunchError
from apptainer_py.base.record import Record
from apptainer_py.engines.oci.process import CAPABILITIES
from apptainer_py.image.oci_config import DEFAULT_PATH
from apptainer_py.model.request import limits_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from apptainer_py.engines.apptainer.binds import Bind
    from apptainer_py.image.oci_config import ImageConfig
    from apptainer_py.model.oci_plan import IdMap
    from apptainer_py.model.request import ActionRequest

_CAPABILITIES = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_LOCKED = ("rnosuid", "rnoexec", "rnodev", "rro")
_TTY_GROUP = 5
_UMASK = 0o022
# What has no meaning here, or is not built: field of the request → option.
_REFUSED = (
    "allow_setuid", "app", "boot", "cdi_dirs",
    "compat32", "containlibs", "device", "fakeroot", "fusemount", "home",
    "ignore_fakeroot_command", "ignore_subuid", "ignore_userns",
    "intel_hpu", "keep_privs", "netns_path",
    "network_args", "no_mount", "no_pid", "nv", "nvccli", "overlay", "passphrase", "pem_path",
    "rocm", "runscript_timeout", "security", "sharens", "underlay", "unsquash", "workdir",
    "writable",
)  # fmt: skip
_ACTIONS = "/.singularity.d/actions"


class Host(Record):
    """What this machine and caller give; maps are empty where no user namespace is made."""

    rootless: bool
    cgroup2: bool
    hostname: str
    terminal: bool
    uid_maps: tuple[IdMap, ...] = ()
    gid_maps: tuple[IdMap, ...] = ()


class NotWithOci(LaunchError):
    """An option that the other engine has."""

    message = "`{option}` is not supported with --oci"
    hint = "leave `{option}` or `--oci` out"


def check_action(action: ActionRequest, *, rootless: bool) -> None:
    """Refuse what would be left out silently.

    Raises:
        NotWithOci: an option that means nothing here.
        LaunchError: a network of a kind that is not supported, or limits for a user.
    """
    for name in _REFUSED:
        if getattr(action, name):
            raise NotWithOci(option="--" + name.replace("_", "-"))
    for option, value in (
        ("--trace", action.trace_file),
        ("--config", action.config_file),
        ("--build-config", action.build_config),
    ):
        if value:
            raise NotWithOci(option=option)
    if rootless and (action.apply_cgroups or limits_of(action)):
        raise LaunchError(
            text="limits of resources with --oci are root's to set: control groups of your own "
            "are not supported yet"
        )
    if action.network and not action.net:
        raise LaunchError(text="--network requires --net")
    if action.net and action.network != "none":
        given = f"the network `{action.network}`" if action.network else "a bridge network"
        raise LaunchError(text=f"{given} is not supported with --oci: --net needs --network none")


def arguments_of(action: ActionRequest, image: ImageConfig | None) -> tuple[str, ...]:
    """Return what is started; without OCI configuration the image's own scripts decide.

    Raises:
        LaunchError: there is nothing that the command could start.
    """
    if image is None:
        return (f"{_ACTIONS}/{action.command}", *action.arguments)
    if action.command == "exec":
        return action.arguments
    if action.command == "shell":
        return (action.shell or "/bin/sh", *action.arguments)
    if action.command == "test":
        raise LaunchError(text="an OCI image has no test script")
    found = (*image.entrypoint, *(action.arguments or image.command))
    if not found:
        raise LaunchError(text="the image has neither entry point nor command: name a command")
    return found


def plain_arguments(action: ActionRequest) -> tuple[str, ...]:
    """Return what is started in an image that has no scripts either.

    Raises:
        LaunchError: the command needs one.
    """
    if action.command == "exec":
        return action.arguments
    if action.command == "shell":
        return (action.shell or "/bin/sh", *action.arguments)
    raise LaunchError(text=f"the image has no {action.command} script; use `exec`")


def environment_of(
    image: ImageConfig | None, added: dict[str, str], edits: dict[str, str]
) -> list[str]:
    """Return the variables: the image's, then those that were added; PATH is always there."""
    entries = [DEFAULT_PATH, *(image.environment if image else ())]
    found: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        found[name] = value
    found.update(added)
    path = edits.get("PATH") or found["PATH"]
    parts = (edits.get("PREPEND_PATH", ""), path, edits.get("APPEND_PATH", ""))
    found["PATH"] = ":".join(part for part in parts if part)
    return [f"{name}={value}" for name, value in found.items()]


def capabilities_of(action: ActionRequest) -> list[str]:
    """Return the names of the capabilities that a container's root has.

    Raises:
        LaunchError: there is no capability of a name.
    """
    kept = set() if action.no_privs else {f"CAP_{name}" for name in _CAPABILITIES}
    kept |= _named(action.add_caps)
    return sorted(kept - _named(action.drop_caps))


def _named(text: str) -> set[str]:
    found: set[str] = set()
    for word in filter(None, (part.strip().upper() for part in text.split(","))):
        name = word if word.startswith("CAP_") else f"CAP_{word}"
        if name == "CAP_ALL":
            found |= set(CAPABILITIES)
        elif name in CAPABILITIES:
            found.add(name)
        else:
            raise LaunchError(text=f"{word} is no capability")
    return found


def config_of(
    action: ActionRequest,
    image: ImageConfig | None,
    environment: list[str],
    mounts: Iterable[dict[str, Any]],
    host: Host,
    root: str,
) -> dict[str, Any]:
    """Return config.json; the user is looked up later, in the image.

    Raises:
        LaunchError: there is nothing that could be started, or a capability is none.
    """
    capabilities = capabilities_of(action)
    directory = action.cwd or (image.directory if image else "") or "/"
    process: dict[str, Any] = {
        "terminal": host.terminal,
        "user": {"uid": 0, "gid": 0, "umask": _UMASK},
        "args": list(arguments_of(action, image)),
        "env": environment,
        "cwd": posixpath.normpath(posixpath.join("/", directory)),
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "noNewPrivileges": False,
    }
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in _namespaces(action, host)],
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READ_ONLY),
    }
    if host.uid_maps:
        linux["uidMappings"] = _lines(host.uid_maps)
        linux["gidMappings"] = _lines(host.gid_maps)
    if not host.rootless:
        linux["resources"] = _resources(action)
    return {
        "ociVersion": "1.2.1",
        "process": process,
        "root": {"path": root, "readonly": False},
        "hostname": host.hostname,
        "mounts": [*_system_mounts(action, host), *mounts],
        "linux": linux,
    }


def _resources(action: ActionRequest) -> dict[str, Any]:
    devices = [{"allow": False, "access": "rwm"}]
    flags = limits_of(action)
    if not flags and not action.apply_cgroups:
        return {"devices": devices}
    from apptainer_py.engines.apptainer.limits import resources_of

    found = resources_of(action, flags)
    # Of the devices a file has the last word; flags say nothing of them.
    return {**found, "devices": devices + (found.get("devices", []) if not flags else [])}


def bind_mount(bind: Bind) -> dict[str, Any]:
    """Return the entry of `mounts` for a bind of the command line."""
    options = ["rbind", "rprivate", "nosuid", "nodev", "ro" if bind.read_only else "rw"]
    return {
        "destination": bind.target,
        "type": "bind",
        "source": bind.source,
        "options": options,
    }


def scratch_mount(target: str) -> dict[str, Any]:
    """Return the entry of `mounts` for a directory in memory (--scratch)."""
    return {
        "destination": posixpath.normpath(posixpath.join("/", target)),
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", "mode=1777"],
    }


def _namespaces(action: ActionRequest, host: Host) -> list[str]:
    kinds = ["pid", "ipc", "uts", "mount", "cgroup"]
    if action.net:
        kinds.append("network")
    if host.uid_maps:
        kinds.append("user")
    return kinds


def _lines(maps: Iterable[IdMap]) -> list[dict[str, int]]:
    return [
        {"containerID": line.inside, "hostID": line.outside, "size": line.count} for line in maps
    ]


def _mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {
        "destination": target,
        "type": kind,
        "source": source or kind,
        "options": ["nosuid", *options],
    }


def _system_mounts(action: ActionRequest, host: Host) -> list[dict[str, Any]]:
    pts = ["noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if not host.gid_maps or any(
        line.inside <= _TTY_GROUP < line.inside + line.count for line in host.gid_maps
    ):
        pts.append(f"gid={_TTY_GROUP}")
    found = [
        _mount("/proc", "proc", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", *pts),
        _mount("/dev/shm", "tmpfs", "noexec", "nodev", "mode=1777", "size=65536k", source="shm"),
        _mount("/dev/mqueue", "mqueue", "noexec", "nodev"),
    ]
    if host.uid_maps and not action.net:
        # The kernel shows a network's devices in sysfs only to who owns the network.
        found.append(_mount("/sys", "none", "rbind", *_LOCKED, source="/sys"))
    else:
        found.append(_mount("/sys", "sysfs", "noexec", "nodev", "ro"))
    if not host.rootless or host.cgroup2:
        found.append(_mount("/sys/fs/cgroup", "cgroup", "noexec", "nodev", "relatime", "ro"))
    return found
