"""`spec`: a config.json to begin with, the one that runc writes."""

from __future__ import annotations

import os

from apptainer_py.base.files import write_all
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.model.oci_call import OciCall

_HOSTNAME = "apptainer"
_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def _specification() -> dict[str, Any]:
    return {
        "ociVersion": "1.2.1",
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": _CAPABILITIES,
                "effective": _CAPABILITIES,
                "permitted": _CAPABILITIES,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": _HOSTNAME,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": [
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                    "gid=5",
                ],
            },
            {
                "destination": "/dev/shm",
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            },
            {
                "destination": "/dev/mqueue",
                "type": "mqueue",
                "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
            {
                "destination": "/sys/fs/cgroup",
                "type": "cgroup",
                "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"},
                {"type": "network"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
            ],
            "maskedPaths": [
                "/proc/acpi",
                "/proc/asound",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/timer_stats",
                "/proc/sched_debug",
                "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus",
                "/proc/fs",
                "/proc/irq",
                "/proc/sys",
                "/proc/sysrq-trigger",
            ],
        },
    }


def _rootless(config: dict[str, Any]) -> None:
    """Change it into one that an ordinary user can run: own ids, the host's network."""
    linux = config["linux"]
    kept = [row for row in linux["namespaces"] if row["type"] != "network"]
    linux["namespaces"] = [*kept, {"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    linux.pop("resources", None)
    for mount in config["mounts"]:
        if mount["destination"] == "/sys":
            mount["type"], mount["source"] = "none", "/sys"
            mount["options"] = ["rbind", *mount["options"]]
        # The one group that is mapped is no tty's.
        mount["options"] = [word for word in mount.get("options", ()) if word[:4] != "gid="]


def spec(call: OciCall, environment: Mapping[str, str]) -> str:
    """Write config.json into the bundle.

    Raises:
        ContainerError: there is one, or it cannot be written.
    """
    import json

    config = _specification()
    if call.flag("rootless"):
        _rootless(config)
    if call.text("bundle"):
        os.chdir(call.text("bundle"))
    if os.path.lexists("config.json"):
        raise ContainerError(text="File config.json exists. Remove it first")
    data = json.dumps(config, indent="\t").encode() + b"\n"
    try:
        write_all(os.open("config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), data)
    except OSError as error:
        text = f"open config.json: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    return ""
