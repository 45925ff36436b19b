"""`features`: what this runtime knows (features.md of the runtime specification)."""

from __future__ import annotations

from apptainer_py import __version__
from apptainer_py.engines.oci.mounts import MOUNT_OPTIONS
from apptainer_py.engines.oci.process import CAPABILITIES
from apptainer_py.kernel import _container
from apptainer_py.model.json_out import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall

_SPACES = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"]
_HOOKS = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
_ACTIONS = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
]
_OPERATORS = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
]
_ARCHS = [
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
]
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
                "actions": _ACTIONS,
                "operators": _OPERATORS,
                "archs": _ARCHS,
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
