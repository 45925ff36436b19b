"""`features`: what this runtime knows (features.md of the runtime specification)."""

from __future__ import annotations

from apptainer_py import __version__
from apptainer_py.engines.oci.mounts import MOUNT_OPTIONS
from apptainer_py.engines.oci.process import CAPABILITIES
from apptainer_py.engines.oci.validate import (
    SECCOMP_ACTIONS,
    SECCOMP_ARCHITECTURES,
    SECCOMP_OPERATORS,
)
from apptainer_py.kernel import _container
from apptainer_py.model.json_out import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall

_SPACES = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"]
_HOOKS = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
_KNOWN_FLAGS = [
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_LOG",
]


def features(call: OciCall, environment: Mapping[str, str]) -> str:
    """Return the features as JSON."""
    major, minor, micro, _ = _container.seccomp_version()
    known = {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": _HOOKS,
        "mountOptions": list(MOUNT_OPTIONS),
        "linux": {
            "namespaces": _SPACES,
            "capabilities": list(CAPABILITIES),
            "cgroup": {
                "v1": True,
                "v2": True,
                "systemd": True,
                "systemdUser": True,
                "rdma": True,
            },
            "seccomp": {
                "enabled": True,
                "actions": list(SECCOMP_ACTIONS),
                "operators": list(SECCOMP_OPERATORS),
                "archs": list(SECCOMP_ARCHITECTURES),
                "knownFlags": _KNOWN_FLAGS,
                "supportedFlags": _KNOWN_FLAGS,
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True},
            "mountExtensions": {"idmap": {"enabled": True}},
        },
        "annotations": {
            "io.github.seccomp.libseccomp.version": f"{major}.{minor}.{micro}",
            "org.apptainer-py.version": __version__,
        },
        "potentiallyUnsafeConfigAnnotations": [
            "bundle",
            "org.systemd.property.",
            "org.criu.config",
        ],
    }
    return dumps(known, "    ") + "\n"
