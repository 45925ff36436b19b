"""What makes a config.json impossible, found before anything is made, in runc's words and order."""

from __future__ import annotations

from apptainer_py.engines.oci.keys import CONFIG, PROCESS, ConfigWrong, check_keys
from apptainer_py.engines.oci.spaces import NEWIPC, NEWNET, NEWNS, NEWUTS
from apptainer_py.engines.oci.texts import IN_INIT, errno_text, quoted

__all__ = ["ConfigWrong", "check_config", "check_process", "check_resources", "check_seccomp"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.engines.oci.spaces import Spaces
    from apptainer_py.model.oci_plan import HostFacts

_SELINUX_OFF = "selinux label is specified in config, but selinux is disabled or not supported"
_NAME_MAX = 64  # __NEW_UTS_LEN

SECCOMP_ACTIONS = (
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
)
SECCOMP_OPERATORS = (
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
)
SECCOMP_FLAGS = (
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
)
SECCOMP_ARCHITECTURES = tuple(
    f"SCMP_ARCH_{name}"
    for name in (
        "AARCH64 ARM LOONGARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64"
        " PPC64LE RISCV64 S390 S390X X32 X86 X86_64"
    ).split()
)

_IPC_SYSCTLS = {
    f"kernel.{name}"
    for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni",
                 "shm_rmid_forced")
}  # fmt: skip


def check_config(config: Any) -> dict[str, Any]:
    """Check types and the rules for `process`, `root` and `ociVersion`; return the configuration.

    Raises:
        ConfigWrong: as runc's decoder and its check of the process say.
    """
    if config is None:
        raise ConfigWrong(key="", text="config cannot be null")
    check_keys(config, CONFIG)
    checked: dict[str, Any] = config
    check_process(checked.get("process"), selinux=None)
    _check_version(checked.get("ociVersion"))
    if "root" not in checked:
        raise ConfigWrong(key="root", text="root must be specified")
    return checked


def check_process(process: dict[str, Any] | None, *, selinux: bool | None) -> None:
    """Check the parts of a process without which there is none; `selinux` None asks later.

    Raises:
        ConfigWrong: one is missing.
    """
    text = ""
    if process is None:
        raise ConfigWrong(key="process", text="process property must not be empty")
    cwd = process.get("cwd", "")
    if not cwd:
        key, text = "cwd", "Cwd property must not be empty"
    elif not cwd.startswith("/"):
        key, text = "cwd", "Cwd must be an absolute path"
    elif not process.get("args"):
        key, text = "args", "args must not be empty"
    elif selinux is False and process.get("selinuxLabel"):
        key, text = "selinuxLabel", _SELINUX_OFF
    else:
        return
    raise ConfigWrong(key=f"process.{key}", text=text)


def check_tenant_keys(process: Any) -> None:
    """Check the types of a process that comes without a configuration (exec --process).

    Raises:
        ConfigWrong: as runc's decoder.
    """
    if process is None:
        raise ConfigWrong(key="", text="process property must not be empty")
    check_keys(process, PROCESS)


def _check_version(version: str | None) -> None:
    """Version 1 in any form of SemVer; a configuration without one is taken, as by runc."""
    if version is None:
        return
    core = version.partition("+")[0].partition("-")[0].split(".")
    if len(core) != 3 or not all(part.isascii() and part.isdigit() for part in core):
        text = f"ociVersion {quoted(version)} is not a semantic version"
    elif int(core[0][:9]) > 1:
        text = f"ociVersion {quoted(version)} is not supported"
    else:
        return
    raise ConfigWrong(key="ociVersion", text=text)


def check_spaces_rules(config: dict[str, Any], spaces: Spaces, host: HostFacts) -> None:
    """Check what needs a namespace that the configuration does not have.

    Raises:
        ConfigWrong: in the order of runc's validator.
    """
    linux = config.get("linux", {})
    process = config["process"]
    key = text = ""
    if config.get("hostname") and not spaces.present & NEWUTS:
        key, text = "hostname", "unable to set hostname without a private UTS namespace"
    elif config.get("domainname") and not spaces.present & NEWUTS:
        key, text = "domainname", "unable to set domainname without a private UTS namespace"
    elif (linux.get("maskedPaths") or linux.get("readonlyPaths")) and not spaces.present & NEWNS:
        key = "linux.maskedPaths" if linux.get("maskedPaths") else "linux.readonlyPaths"
        text = "unable to restrict sys entries without a private MNT namespace"
    elif process.get("selinuxLabel") and not host.selinux:
        key, text = "process.selinuxLabel", _SELINUX_OFF
    elif linux.get("netDevices"):
        key, text = "linux.netDevices", _net_devices_problem(linux["netDevices"], spaces, host)
    if text:
        raise ConfigWrong(key=key, text=text)
    for name, call in (("hostname", "sethostname"), ("domainname", "setdomainname")):
        value = config.get(name, "").encode()
        if len(value) > _NAME_MAX or 0 in value:
            raise ConfigWrong(key=name, text=f"{IN_INIT}{call}: invalid argument")


def _net_devices_problem(devices: dict[str, Any], spaces: Spaces, host: HostFacts) -> str:
    if not spaces.present & NEWNET:
        return "unable to move network devices without a NET namespace"
    if host.rootless:
        return "network devices are not supported for rootless containers"
    for name, device in devices.items():
        for word in (name, device.get("name") or name):
            if not _is_interface_name(word):
                return f"invalid network device name {quoted(word)}"
    return ""


def _is_interface_name(word: str) -> bool:
    """dev_valid_name() of the kernel."""
    if not 0 < len(word.encode()) < 16 or word in (".", ".."):
        return False
    return not any(char in "/:\0" or char.isspace() for char in word)


def compile_sysctls(
    sysctls: dict[str, str], spaces: Spaces, host: HostFacts
) -> list[tuple[str, str, str]]:
    """Return (key as given, path below /proc/sys, value) of each; only what is namespaced passes.

    Raises:
        ConfigWrong: the host would see a change.
    """
    found = []
    for given, value in sysctls.items():
        dotted, path = _sysctl_forms(given)
        text = _sysctl_problem(dotted, spaces, host)
        parts = path.split("/")
        if not text and ("" in parts or "." in parts or ".." in parts or "\0" in path):
            text = f"sysctl {quoted(dotted)} is not in a separate kernel namespace"
        if not text and "\0" in value:
            text = f"{IN_INIT}failed to write sysctl {given} = {quoted(value)}: invalid argument"
        if text:
            raise ConfigWrong(key=f"linux.sysctl.{given}", text=text)
        found.append((given, path, value))
    return found


_SWAP = str.maketrans("./", "/.")


def _sysctl_forms(given: str) -> tuple[str, str]:
    """sysctl.d(5): the first separator tells which form it is; the other stands for itself."""
    dot, slash = given.find("."), given.find("/")
    if slash < 0 or 0 <= dot < slash:
        return given, given.translate(_SWAP)
    return given.translate(_SWAP), given


def _sysctl_problem(name: str, spaces: Spaces, host: HostFacts) -> str:
    if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
        if spaces.present & NEWIPC:
            return ""
        return f"sysctl {quoted(name)} is not allowed in the hosts ipc namespace"
    if name.startswith("net."):
        return _net_sysctl_problem(name, spaces, host)
    if spaces.present & NEWUTS and name == "kernel.domainname":
        return ""
    if spaces.present & NEWUTS and name == "kernel.hostname":
        return f'sysctl {quoted(name)} is not allowed as it conflicts with the OCI "hostname" field'
    return f"sysctl {quoted(name)} is not in a separate kernel namespace"


def _net_sysctl_problem(name: str, spaces: Spaces, host: HostFacts) -> str:
    own = not spaces.present & NEWNET
    path = spaces.path_of(NEWNET)
    if path and host.inode_of is not None:
        try:
            own = host.inode_of(path) == host.own_spaces.get("net")
        except OSError as error:
            return f"invalid netns path: stat {path}: {errno_text(error.errno or 0)}"
    return f"sysctl {quoted(name)} not allowed in host network namespace" if own else ""


def check_resctrl(rdt: dict[str, Any], host: HostFacts) -> None:
    """Check linux.intelRdt.

    Raises:
        ConfigWrong: the machine cannot divide what is asked for.
    """
    group = rdt.get("closID", "")
    text = ""
    if group in (".", "..") or "/" in group or "\0" in group:
        text = f"invalid intelRdt.ClosID {quoted(group)}"
    elif rdt.get("l3CacheSchema") and "L3" not in host.resctrl:
        text = "intelRdt.l3CacheSchema is specified in config, but Intel RDT/CAT is not enabled"
    elif rdt.get("memBwSchema") and "MB" not in host.resctrl:
        text = "intelRdt.memBwSchema is specified in config, but Intel RDT/MBA is not enabled"
    elif not host.resctrl and any(
        rdt.get(name)
        for name in ("closID", "schemata", "enableCMT", "enableMBM", "enableMonitoring")
    ):
        text = "intelRdt is specified in config, but Intel RDT is not enabled"
    if text:
        raise ConfigWrong(key="linux.intelRdt", text=text)


def check_seccomp(profile: dict[str, Any]) -> dict[str, Any] | None:
    """Check the words of linux.seccomp; None if it asks for nothing.

    Raises:
        ConfigWrong: a word is unknown, or notifications have nowhere to go.
    """
    rules = profile.get("syscalls", ())
    default = profile.get("defaultAction", "")
    if not default and not rules:
        return None
    for flag in profile.get("flags", ()):
        if flag not in SECCOMP_FLAGS:
            raise _seccomp_wrong("flags", f"seccomp flag {flag} is not known to runc")
    for name in profile.get("architectures", ()):
        if name not in SECCOMP_ARCHITECTURES:
            raise _seccomp_wrong("architectures", f"string {name} is not a valid arch for seccomp")
    if default not in SECCOMP_ACTIONS:
        raise _bad_action("defaultAction", default)
    actions = [_check_seccomp_rule(rule) for rule in rules]
    if default == "SCMP_ACT_NOTIFY":
        raise _seccomp_init_wrong("SCMP_ACT_NOTIFY cannot be used as default action")
    if "SCMP_ACT_NOTIFY" in actions and not profile.get("listenerPath"):
        raise _seccomp_wrong("listenerPath", f"{IN_INIT}seccomp listenerPath is not set")
    return profile


def _check_seccomp_rule(rule: dict[str, Any]) -> str:
    action: str = rule.get("action", "")
    names = rule.get("names", ())
    if action not in SECCOMP_ACTIONS:
        raise _bad_action("syscalls", action)
    if "args" in rule:
        _check_seccomp_arguments(rule)
    if action == "SCMP_ACT_NOTIFY" and "write" in names:
        raise _seccomp_init_wrong("SCMP_ACT_NOTIFY cannot be used for the write syscall")
    if "" in names:
        raise _seccomp_init_wrong("empty string is not a valid syscall")
    return action


def _check_seccomp_arguments(rule: dict[str, Any]) -> None:
    for argument in rule["args"]:
        if argument.get("op", "") not in SECCOMP_OPERATORS:
            text = f"string {argument.get('op', '')} is not a valid operator for seccomp"
            raise _seccomp_wrong("syscalls.args", text)
        if argument.get("index", 0) > 5:
            name = (rule.get("names") or [""])[0]
            raise _seccomp_init_wrong(
                f"error creating seccomp syscall condition for syscall {name}: syscalls only have"
                f" up to 6 arguments ({argument['index']} given)"
            )


def _seccomp_wrong(key: str, text: str) -> ConfigWrong:
    return ConfigWrong(key=f"linux.seccomp.{key}", text=text)


def _seccomp_init_wrong(text: str) -> ConfigWrong:
    return _seccomp_wrong("syscalls", f"{IN_INIT}unable to init seccomp: {text}")


def _bad_action(key: str, word: str) -> ConfigWrong:
    return _seccomp_wrong(key, f"string {word} is not a valid action for seccomp")


def check_resources(resources: dict[str, Any], host: HostFacts) -> list[str]:
    """Check linux.resources beyond its types; return warnings.

    Raises:
        ConfigWrong: a rule or value that no cgroup takes.
    """
    for index, rule in enumerate(resources.get("devices", ())):
        _check_device_rule(index, rule)
    memory = resources.get("memory", {})
    swappiness = memory.get("swappiness", 0)
    if swappiness > 100 and not host.cgroup2:
        text = (
            f"{IN_INIT}error setting cgroup config for procHooks process: invalid memory"
            f" swappiness value: {swappiness} (valid range is 0-100)"
        )
        raise ConfigWrong(key="linux.resources.memory.swappiness", text=text)
    if resources.get("unified") and not host.cgroup2:
        text = "invalid configuration: cannot use unified on cgroup v1"
        raise ConfigWrong(key="linux.resources.unified", text=text)
    for name in resources.get("unified", ()):
        if "/" in name or "\0" in name:
            text = f"unified resource {quoted(name)} must be a file name (no slashes)"
            raise ConfigWrong(key="linux.resources.unified", text=text)
    if "kernel" in memory or "kernelTCP" in memory:
        return ["Kernel memory settings are ignored and will be removed"]
    return []


def _check_device_rule(index: int, rule: dict[str, Any]) -> None:
    access, kind = rule.get("access", ""), rule.get("type", "") or "a"
    if not access:
        text = f"device access at {index} field cannot be empty"
    elif kind not in ("a", "b", "c"):
        text = f"invalid cgroup device type {quoted(kind)}"
    elif access.strip("rwm"):
        text = f"invalid device access {quoted(access)}"
    elif min(rule.get("major", 0), rule.get("minor", 0)) < -1:
        text = f"invalid device number {rule.get('major', 0)}:{rule.get('minor', 0)}"
    else:
        return
    raise ConfigWrong(key=f"linux.resources.devices[{index}]", text=text)
