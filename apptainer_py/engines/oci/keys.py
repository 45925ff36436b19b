"""The shape of config.json: every key of the runtime specification 1.3 with its type.

A word is a scalar by the name that Go has for it, because runc names it so in its error; a dict is
an object whose type is under "", a list holds the shape of its elements, a tuple that of the values
of a map. Keys that are not here are ignored, as the specification wants (config.md, Extensibility).
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.model.json_text import Number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ConfigWrong(ApptainerError):
    """The configuration cannot be carried out: `key` says where, `text` is runc's sentence."""

    message = "{text}"
    exit_code = 1

    @property
    def key(self) -> str:
        """Return the dotted path of the key that is wrong."""
        return str(self.facts["key"])


_STRINGS = ["string"]
_ID_MAPS: list[Any] = [
    {"": "LinuxIDMapping", "containerID": "uint32", "hostID": "uint32", "size": "uint32"}
]
_THROTTLE = [{"": "LinuxThrottleDevice", "major": "int64", "minor": "int64", "rate": "uint64"}]
_HOOKS = [{"": "Hook", "path": "string", "args": _STRINGS, "env": _STRINGS, "timeout": "int"}]

PROCESS: dict[str, Any] = {
    "": "Process",
    "terminal": "bool",
    "consoleSize": {"": "Box", "height": "uint", "width": "uint"},
    "user": {
        "": "User",
        "uid": "uint32",
        "gid": "uint32",
        "umask": "uint32",
        "additionalGids": ["uint32"],
        "username": "string",
    },
    "args": _STRINGS,
    "commandLine": "string",
    "env": _STRINGS,
    "cwd": "string",
    "capabilities": {
        "": "LinuxCapabilities",
        "bounding": _STRINGS,
        "effective": _STRINGS,
        "inheritable": _STRINGS,
        "permitted": _STRINGS,
        "ambient": _STRINGS,
    },
    "rlimits": [{"": "POSIXRlimit", "type": "string", "hard": "uint64", "soft": "uint64"}],
    "noNewPrivileges": "bool",
    "apparmorProfile": "string",
    "oomScoreAdj": "int",
    "scheduler": {
        "": "Scheduler",
        "policy": "specs.LinuxSchedulerPolicy",
        "nice": "int32",
        "priority": "int32",
        "flags": ["specs.LinuxSchedulerFlag"],
        "runtime": "uint64",
        "deadline": "uint64",
        "period": "uint64",
    },
    "selinuxLabel": "string",
    "ioPriority": {"": "LinuxIOPriority", "class": "specs.IOPriorityClass", "priority": "int"},
    "execCPUAffinity": {"": "CPUAffinity", "initial": "string", "final": "string"},
}

RESOURCES: dict[str, Any] = {
    "": "LinuxResources",
    "devices": [
        {
            "": "LinuxDeviceCgroup",
            "allow": "bool",
            "type": "string",
            "major": "int64",
            "minor": "int64",
            "access": "string",
        }
    ],
    "memory": {
        "": "LinuxMemory",
        "limit": "int64",
        "reservation": "int64",
        "swap": "int64",
        "kernel": "int64",
        "kernelTCP": "int64",
        "swappiness": "uint64",
        "disableOOMKiller": "bool",
        "useHierarchy": "bool",
        "checkBeforeUpdate": "bool",
    },
    "cpu": {
        "": "LinuxCPU",
        "shares": "uint64",
        "quota": "int64",
        "burst": "uint64",
        "period": "uint64",
        "realtimeRuntime": "int64",
        "realtimePeriod": "uint64",
        "cpus": "string",
        "mems": "string",
        "idle": "int64",
    },
    "pids": {"": "LinuxPids", "limit": "int64"},
    "blockIO": {
        "": "LinuxBlockIO",
        "weight": "uint16",
        "leafWeight": "uint16",
        "weightDevice": [
            {
                "": "LinuxWeightDevice",
                "major": "int64",
                "minor": "int64",
                "weight": "uint16",
                "leafWeight": "uint16",
            }
        ],
        "throttleReadBpsDevice": _THROTTLE,
        "throttleWriteBpsDevice": _THROTTLE,
        "throttleReadIOPSDevice": _THROTTLE,
        "throttleWriteIOPSDevice": _THROTTLE,
    },
    "hugepageLimits": [{"": "LinuxHugepageLimit", "pageSize": "string", "limit": "uint64"}],
    "network": {
        "": "LinuxNetwork",
        "classID": "uint32",
        "priorities": [{"": "LinuxInterfacePriority", "name": "string", "priority": "uint32"}],
    },
    "rdma": ({"": "LinuxRdma", "hcaHandles": "uint32", "hcaObjects": "uint32"},),
    "unified": ("string",),
}

_SECCOMP: dict[str, Any] = {
    "": "LinuxSeccomp",
    "defaultAction": "specs.LinuxSeccompAction",
    "defaultErrnoRet": "uint",
    "architectures": ["specs.Arch"],
    "flags": ["specs.LinuxSeccompFlag"],
    "listenerPath": "string",
    "listenerMetadata": "string",
    "syscalls": [
        {
            "": "LinuxSyscall",
            "names": _STRINGS,
            "action": "specs.LinuxSeccompAction",
            "errnoRet": "uint",
            "args": [
                {
                    "": "LinuxSeccompArg",
                    "index": "uint",
                    "value": "uint64",
                    "valueTwo": "uint64",
                    "op": "specs.LinuxSeccompOperator",
                }
            ],
        }
    ],
}

_LINUX: dict[str, Any] = {
    "": "Linux",
    "uidMappings": _ID_MAPS,
    "gidMappings": _ID_MAPS,
    "sysctl": ("string",),
    "resources": RESOURCES,
    "cgroupsPath": "string",
    "namespaces": [{"": "LinuxNamespace", "type": "specs.LinuxNamespaceType", "path": "string"}],
    "devices": [
        {
            "": "LinuxDevice",
            "path": "string",
            "type": "string",
            "major": "int64",
            "minor": "int64",
            "fileMode": "fs.FileMode",
            "uid": "uint32",
            "gid": "uint32",
        }
    ],
    "netDevices": ({"": "LinuxNetDevice", "name": "string"},),
    "seccomp": _SECCOMP,
    "rootfsPropagation": "string",
    "maskedPaths": _STRINGS,
    "readonlyPaths": _STRINGS,
    "mountLabel": "string",
    "intelRdt": {
        "": "LinuxIntelRdt",
        "closID": "string",
        "schemata": _STRINGS,
        "l3CacheSchema": "string",
        "memBwSchema": "string",
        "enableCMT": "bool",
        "enableMBM": "bool",
        "enableMonitoring": "bool",
    },
    "memoryPolicy": {
        "": "LinuxMemoryPolicy",
        "mode": "specs.MemoryPolicyModeType",
        "nodes": "string",
        "flags": ["specs.MemoryPolicyFlagType"],
    },
    "personality": {
        "": "LinuxPersonality",
        "domain": "specs.LinuxPersonalityDomain",
        "flags": ["specs.LinuxPersonalityFlag"],
    },
    "timeOffsets": ({"": "LinuxTimeOffset", "secs": "int64", "nanosecs": "uint32"},),
}

CONFIG: dict[str, Any] = {
    "": "Spec",
    "ociVersion": "string",
    "process": PROCESS,
    "root": {"": "Root", "path": "string", "readonly": "bool"},
    "hostname": "string",
    "domainname": "string",
    "mounts": [
        {
            "": "Mount",
            "destination": "string",
            "type": "string",
            "source": "string",
            "options": _STRINGS,
            "uidMappings": _ID_MAPS,
            "gidMappings": _ID_MAPS,
        }
    ],
    "hooks": {
        "": "Hooks",
        "prestart": _HOOKS,
        "createRuntime": _HOOKS,
        "createContainer": _HOOKS,
        "startContainer": _HOOKS,
        "poststart": _HOOKS,
        "poststop": _HOOKS,
    },
    "annotations": ("string",),
    "linux": _LINUX,
}

_RANGES = {
    "int": (-(1 << 63), (1 << 63) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint": (0, (1 << 64) - 1),
    "uint16": (0, (1 << 16) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, (1 << 64) - 1),
    "fs.FileMode": (0, (1 << 32) - 1),
}
_ONLY_STRINGS = {str}
_KINDS = {str: "string", dict: "object", list: "array", bool: "bool", int: "number"}


def check_keys(value: object, shape: dict[str, Any]) -> None:
    """Check the type and range of every known key below `value`, and take those out that are null.

    Raises:
        ConfigWrong: with the text of Go's decoder.
    """
    if type(value) is not dict:
        text = f"json: cannot unmarshal {_kind(value)} into Go value of type {_type(shape)}"
        raise ConfigWrong(key="", text=text)
    _check_struct(value, shape, "")


def _fold(node: dict[str, Any], shape: dict[str, Any]) -> bool:
    """Give known keys that are written in another case their own names; whether there were any.

    Go's decoder takes them so; of two spellings the last one counts.
    """
    names = {name.lower(): name for name in shape if name}
    if not any(key not in shape and key.lower() in names for key in node):
        return False
    written = list(node.items())
    node.clear()
    for key, value in written:
        node[names.get(key.lower(), key)] = value
    return True


def _check_struct(node: dict[str, Any], shape: dict[str, Any], path: str) -> None:
    nulls: list[str] | None = None
    for key, value in node.items():
        inner = shape.get(key)
        if inner is None or key == "":
            if _fold(node, shape):
                _check_struct(node, shape, path)
                return
            continue
        if value is None:
            nulls = [*(nulls or ()), key]
        elif type(value) is not str or type(inner) is not str or inner in _NO_STRINGS:
            _check(value, inner, shape[""], f"{path}.{key}" if path else key)
    if nulls:
        for key in nulls:
            del node[key]


_NO_STRINGS = {*_RANGES, "bool"}


def _check(value: Any, shape: Any, owner: str, path: str) -> None:
    kind = type(shape)
    if kind is str:
        _check_scalar(value, shape, owner, path)
    elif kind is dict:
        if type(value) is not dict:
            raise _wrong_type(value, shape, owner, path)
        _check_struct(value, shape, path)
    elif kind is list:
        if type(value) is not list:
            raise _wrong_type(value, shape, owner, path)
        _check_list(value, shape[0], owner, path)
    else:
        if type(value) is not dict:
            raise _wrong_type(value, shape, owner, path)
        for key, item in value.items():
            if item is None:
                value[key] = _zero(shape[0])
            else:
                _check(item, shape[0], owner, path)


def _check_list(value: list[Any], inner: Any, owner: str, path: str) -> None:
    if inner is _STRINGS[0] and set(map(type, value)) <= _ONLY_STRINGS:
        return
    for index, item in enumerate(value):
        if item is None:
            value[index] = _zero(inner)
        elif type(item) is dict and type(inner) is dict:
            _check_struct(item, inner, path)
        else:
            _check(item, inner, owner, path)


def _check_scalar(value: object, name: str, owner: str, path: str) -> None:
    limits = _RANGES.get(name)
    if limits is None:
        if type(value) is not (bool if name == "bool" else str):
            raise _wrong_type(value, name, owner, path)
    elif type(value) is int:
        if not limits[0] <= value <= limits[1]:
            raise _wrong_number(str(value), name, owner, path)
    elif type(value) is Number:
        raise _wrong_number(value, name, owner, path)
    else:
        raise _wrong_type(value, name, owner, path)


def _zero(shape: Any) -> Any:
    """What Go leaves in an element of a list or map that is null."""
    if type(shape) is str:
        return 0 if shape in _RANGES else shape != "bool" and ""
    return {} if type(shape) is not list else []


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "number")


def _type(shape: Any) -> str:
    kind = type(shape)
    if kind is str:
        return str(shape)
    if kind is dict:
        return f"specs.{shape['']}"
    return f"{'[]' if kind is list else 'map[string]'}{_type(shape[0])}"


def _wrong_type(value: object, shape: Any, owner: str, path: str) -> ConfigWrong:
    text = f"json: cannot unmarshal {_kind(value)} into Go struct field {owner}.{path} of type "
    return ConfigWrong(key=path, text=text + _type(shape))


def _wrong_number(number: str, name: str, owner: str, path: str) -> ConfigWrong:
    text = f"json: cannot unmarshal number {number} into Go struct field {owner}.{path} of type "
    return ConfigWrong(key=path, text=text + name)
