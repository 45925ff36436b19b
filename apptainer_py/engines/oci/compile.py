"""config.json to OciPlan: pure judgement, in the order of runc's own checks; nothing is touched."""

from __future__ import annotations

import posixpath

from apptainer_py.engines.oci import mounts as mount_words
from apptainer_py.engines.oci.devices import compile_devices
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.mounts import MountCompiler
from apptainer_py.engines.oci.process import (
    check_affinity,
    check_mapped,
    compile_process,
    compile_rlimits,
)
from apptainer_py.engines.oci.spaces import (
    NEWCGROUP,
    NEWNET,
    NEWNS,
    NEWUSER,
    compile_spaces,
    outside,
)
from apptainer_py.engines.oci.texts import IN_INIT, STARTING, path_bytes, quoted
from apptainer_py.engines.oci.validate import (
    check_config,
    check_process,
    check_resctrl,
    check_resources,
    check_seccomp,
    check_spaces_rules,
    check_tenant_keys,
    compile_sysctls,
)
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import CgroupWish, Hook, OciPlan, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.engines.oci.mounts import Mounts
    from apptainer_py.engines.oci.spaces import Spaces
    from apptainer_py.model.oci_plan import CreateOptions, ExecOptions, HostFacts

# Flags and numbers of rows (starter/protocol.def).
_PREP_OOM, _PREP_ALL_CPUS, _PREP_CPUS = 1, 2, 4
_MAPPED_BECOME_ROOT, _MAPPED_NO_GROUPS, _MAPPED_CGROUP = 1, 2, 4
_MAPPED_SESSION, _MAPPED_LOOPBACK = 8, 16
_ROOT_PRIVATE_PARENT, _ROOT_UNBOUND = 1, 2
_ENTER_PIVOT, _ENTER_MOVE, _ENTER_CHROOT = 0, 1, 2
_CONSOLE_BIND = 1
_NAME_DOMAIN = 1
_RING_SEARCHABLE = 0x080000  # KEY_USR_SEARCH, which runc adds

_HOOKS = (
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
)
_MASK64 = (1 << 64) - 1


def compile_bundle(
    config: dict[str, Any], bundle: str, host: HostFacts, options: CreateOptions
) -> OciPlan:
    """Compile a whole container.

    `config` is what JSON gave; keys that are null are taken out of it. `bundle` is absolute.

    Raises:
        ConfigWrong: with the key and runc's sentence.
    """
    config = check_config(config)
    linux = config.get("linux", {})
    process = config["process"]
    check_process(process, selinux=host.selinux)
    root = posixpath.normpath(posixpath.join(bundle, config["root"].get("path", "")))
    warnings: list[str] = []
    spaces = compile_spaces(linux, host)
    if host.rootless:
        _check_rootless(spaces)
    wish = _cgroup_wish(config, spaces, options)
    compiler = MountCompiler(bundle, root, linux.get("mountLabel", ""), spaces, host)
    mounts = compiler.compile(config.get("mounts", []), wish)
    if mounts.cgroup_writable and wish.private_namespace:
        wish = wish.replace(owner=_cgroup_owner(process, spaces))
    warnings += [*spaces.warnings, *mounts.warnings, *check_resources(wish.resources, host)]
    devices: tuple[Row, ...] = ()
    if not mounts.dev_is_bound:
        in_user_namespace = bool(spaces.present & NEWUSER) or host.rootless
        devices = compile_devices(linux, bind=in_user_namespace, kcore=host.kcore)
    propagation = _propagation(linux.get("rootfsPropagation", ""), no_pivot=options.no_pivot)
    seccomp = check_seccomp(linux.get("seccomp", {}))
    check_spaces_rules(config, spaces, host)
    sysctls = compile_sysctls(linux.get("sysctl", {}), spaces, host)
    if "intelRdt" in linux:
        check_resctrl(linux["intelRdt"], host)
    spec = compile_process(
        process,
        linux,
        host,
        warnings,
        preserve_fds=options.preserve_fds,
        tenant=False,
    )
    check_mapped(process, spaces.host_uids, spaces.host_gids)
    size = process.get("consoleSize", {})
    return OciPlan(
        join_paths=spaces.paths,
        new_spaces=spaces.new & ~NEWCGROUP,
        time_offsets=spaces.time_offsets,
        uid_maps=spaces.uid_maps,
        gid_maps=spaces.gid_maps,
        prepare=_prepare(process),
        mapped=_mapped(spaces, host),
        setup=_setup(config, spaces, options, root, propagation),
        assemble=mounts.assemble + devices,
        inside=_inside(config, spaces, options, mounts, sysctls, propagation),
        process=spec,
        rlimits=compile_rlimits(process.get("rlimits", ())),
        cgroup=wish,
        hooks=_hooks(config.get("hooks", {})),
        terminal=process.get("terminal", False),
        console_size=(size.get("height", 0), size.get("width", 0)),
        seccomp=seccomp,
        resctrl=linux.get("intelRdt"),
        netdevs=_net_devices(linux.get("netDevices")),
        annotations=config.get("annotations", {}),
        root=root,
        idmaps=mounts.idmaps,
        affinity=check_affinity(process.get("execCPUAffinity", {})),
        warnings=tuple(warnings),
    )


def compile_tenant(
    config: dict[str, Any], process: dict[str, Any], host: HostFacts, options: ExecOptions
) -> OciPlan:
    """Compile one more process for the container whose configuration is `config`.

    Without capabilities or umask of its own it has those of the container's process.

    Raises:
        ConfigWrong: with the key and runc's sentence.
    """
    try:
        return _compile_tenant(config, process, host, options)
    except ConfigWrong as wrong:
        # It is no container's init that runc would have found it in.
        text = str(wrong).replace(IN_INIT, STARTING)
        raise ConfigWrong(key=wrong.key, text=text) from None


def _compile_tenant(
    config: dict[str, Any], process: dict[str, Any], host: HostFacts, options: ExecOptions
) -> OciPlan:
    check_tenant_keys(process)
    check_process(process, selinux=host.selinux)
    config = check_config(config)
    linux = config.get("linux", {})
    warnings: list[str] = []
    spaces = compile_spaces(linux, host)
    if "capabilities" not in process and "capabilities" in config["process"]:
        process = {**process, "capabilities": config["process"]["capabilities"]}
    user, umask = process.get("user", {}), config["process"].get("user", {}).get("umask")
    if "umask" not in user and umask is not None:
        process = {**process, "user": {**user, "umask": umask}}
    spec = compile_process(
        process,
        linux,
        host,
        warnings,
        preserve_fds=options.preserve_fds,
        tenant=True,
    )
    check_mapped(process, spaces.host_uids, spaces.host_gids)
    size = process.get("consoleSize", {})
    affinity = check_affinity(process.get("execCPUAffinity", {}))
    inside = _console(process, size, flags=0)
    return OciPlan(
        join_paths=(),
        new_spaces=0,
        time_offsets=None,
        uid_maps=spaces.host_uids,
        gid_maps=spaces.host_gids,
        prepare=(_prep_row(None, affinity[0]),),
        mapped=Row(op=protocol.OP_MAPPED, flags=_MAPPED_SESSION, says="{error}"),
        setup=(_keyring(options.container_id), Row(op=protocol.OP_TENANT)),
        assemble=(),
        inside=inside,
        process=spec,
        rlimits=compile_rlimits(process.get("rlimits", ())),
        cgroup=CgroupWish(path=linux.get("cgroupsPath", ""), resources={}),
        hooks=(),
        terminal=process.get("terminal", False),
        console_size=(size.get("height", 0), size.get("width", 0)),
        seccomp=check_seccomp(linux.get("seccomp", {})),
        annotations=config.get("annotations", {}),
        affinity=affinity,
        warnings=tuple(warnings),
    )


def _cgroup_wish(config: dict[str, Any], spaces: Spaces, options: CreateOptions) -> CgroupWish:
    linux = config.get("linux", {})
    path = linux.get("cgroupsPath", "")
    resources = linux.get("resources", {})
    private = bool(spaces.new & NEWCGROUP)
    path_bytes(path, "linux.cgroupsPath", "unable to apply cgroup configuration: {error}")
    if not options.systemd_cgroup:
        return CgroupWish(
            path=_clean_path(path) if path else options.container_id,
            resources=resources,
            private_namespace=private,
        )
    from apptainer_py.engines.oci.units import unit_properties

    properties = unit_properties(config.get("annotations", {}))
    if not path:
        # runc's own prefix: pods of Kubernetes and tools around it look for such scopes.
        return CgroupWish(
            path=options.container_id,
            resources=resources,
            scope_prefix="runc",
            private_namespace=private,
            properties=properties,
        )
    parts = path.split(":")
    if len(parts) != 3:
        text = (
            'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got'
            f" {quoted(path)} instead"
        )
        raise ConfigWrong(key="linux.cgroupsPath", text=text)
    return CgroupWish(
        path=parts[2],
        resources=resources,
        scope_prefix=parts[1],
        slice_parent=parts[0],
        private_namespace=private,
        properties=properties,
    )


def _clean_path(path: str) -> str:
    """Absolute stays so, relative stays relative; neither climbs above where it starts."""
    cleaned = mount_words.clean(path)
    return cleaned if path.startswith("/") else cleaned[1:]


def _cgroup_owner(process: dict[str, Any], spaces: Spaces) -> tuple[int, int] | None:
    uid = process.get("user", {}).get("uid", 0)
    owner = outside(spaces.host_uids, uid) if spaces.present & NEWUSER else uid
    return None if owner is None else (owner, -1)


def _propagation(word: str, *, no_pivot: bool) -> int:
    if not word:
        return 0
    flags = mount_words.PROPAGATIONS.get(word)
    if flags is None:
        text = f"rootfsPropagation={word} is not supported"
    elif no_pivot and flags & mount_words.PRIVATE:
        text = "rootfsPropagation of [r]private is not safe without pivot_root"
    else:
        return flags
    raise ConfigWrong(key="linux.rootfsPropagation", text=text)


def _check_rootless(spaces: Spaces) -> None:
    if not spaces.present & NEWUSER:
        text = "rootless container requires user namespaces"
        raise ConfigWrong(key="linux.namespaces", text=text)


def _prepare(process: dict[str, Any]) -> tuple[Row, ...]:
    return (_prep_row(process.get("oomScoreAdj"), ""),)


def _prep_row(oom_score: int | None, cpus: str) -> Row:
    """An affinity that the caller happens to have is not the container's."""
    flags = _PREP_CPUS if cpus else _PREP_ALL_CPUS
    numbers: tuple[int, ...] = ()
    if oom_score is not None:
        if not -1000 <= oom_score <= 1000:
            text = f"{STARTING}failed to update /proc/self/oom_score_adj: invalid argument"
            raise ConfigWrong(key="process.oomScoreAdj", text=text)
        flags |= _PREP_OOM
        numbers = (oom_score & _MASK64,)
    return Row(
        op=protocol.OP_PREP,
        flags=flags,
        numbers=numbers,
        first=cpus.encode() if cpus else None,
        says="failed to update /proc/self/oom_score_adj: {error}",
    )


def _mapped(spaces: Spaces, host: HostFacts) -> Row:
    flags = _MAPPED_SESSION
    if spaces.present & NEWUSER:
        flags |= _MAPPED_BECOME_ROOT
    if not host.rootless:
        flags |= _MAPPED_NO_GROUPS
    if spaces.new & NEWCGROUP:
        flags |= _MAPPED_CGROUP
    if spaces.new & NEWNET:
        flags |= _MAPPED_LOOPBACK
    return Row(op=protocol.OP_MAPPED, flags=flags, says="{error}")


def _keyring(container_id: str) -> Row:
    return Row(
        op=protocol.OP_KEYRING,
        numbers=(_RING_SEARCHABLE,),
        first=f"_ses.{container_id}".encode(),
        says="unable to join session keyring: {error}",
    )


def _setup(
    config: dict[str, Any],
    spaces: Spaces,
    options: CreateOptions,
    root: str,
    propagation: int,
) -> tuple[Row, ...]:
    says = "error preparing rootfs: {error}"
    rows = []
    if not options.no_new_keyring:
        rows.append(_keyring(options.container_id))
    for name, device in config.get("linux", {}).get("netDevices", {}).items():
        inside = device.get("name") or name
        text = f"unable to bring up network device {inside}: {{error}}"
        rows.append(Row(op=protocol.OP_NETDEV, first=inside.encode(), says=text))
    own_mounts = bool(spaces.present & NEWNS)
    if own_mounts:
        # Without a mount namespace "/" is the host's; what cannot be bound cannot be the root.
        flags = 0 if propagation & mount_words.UNBINDABLE else propagation
        rows.append(Row(op=protocol.OP_PROPAGATION, numbers=(flags,), says=says))
    rows.append(
        Row(
            op=protocol.OP_ROOT_BUNDLE,
            flags=_ROOT_PRIVATE_PARENT if own_mounts else _ROOT_UNBOUND,
            first=path_bytes(root, "root.path", "invalid rootfs: {error}", where=""),
            says=says,
        )
    )
    return tuple(rows)


def _inside(
    config: dict[str, Any],
    spaces: Spaces,
    options: CreateOptions,
    mounts: Mounts,
    sysctls: list[tuple[str, str, str]],
    propagation: int,
) -> tuple[Row, ...]:
    linux, process = config.get("linux", {}), config["process"]
    rows = [
        _enter(process["cwd"], spaces, options, propagation),
        *_console(process, process.get("consoleSize", {}), flags=_CONSOLE_BIND),
        *mounts.read_only_later,
    ]
    if config["root"].get("readonly"):
        text = "error setting rootfs as readonly: {error}"
        rows.append(Row(op=protocol.OP_ROOT_READONLY, says=text))
    for name, flags in (("hostname", 0), ("domainname", _NAME_DOMAIN)):
        if config.get(name):
            text = f"set{name}: {{error}}"
            rows.append(
                Row(op=protocol.OP_NAME, flags=flags, first=config[name].encode(), says=text)
            )
    if process.get("apparmorProfile"):
        rows.append(_apparmor(process["apparmorProfile"]))
    for given, path, value in sysctls:
        text = f"failed to write sysctl {given} = {quoted(value)}: {{error}}"
        rows.append(
            Row(op=protocol.OP_SYSCTL, first=path.encode(), second=value.encode(), says=text)
        )
    rows += _hidden_paths(linux)
    return tuple(rows)


def _hidden_paths(linux: dict[str, Any]) -> list[Row]:
    rows = []
    for key in ("readonlyPaths", "maskedPaths"):
        for path in linux.get(key, ()):
            if not path.startswith("/") and "\0" not in path:
                text = f"the path must be absolute: {quoted(path)}"
                raise ConfigWrong(key=f"linux.{key}", text=text)
    for path in linux.get("readonlyPaths", ()):
        text = f"can't make {quoted(path)} read-only: {{error}}"
        data = path_bytes(mount_words.clean(path), "linux.readonlyPaths", text)
        rows.append(Row(op=protocol.OP_READONLY_PATH, first=data, says=text))
    label = linux.get("mountLabel", "").encode() or None
    for path in linux.get("maskedPaths", ()):
        text = f"can't mask path {quoted(path)}: {{error}}"
        data = path_bytes(mount_words.clean(path), "linux.maskedPaths", text)
        rows.append(Row(op=protocol.OP_MASK_PATH, first=data, second=label, says=text))
    return rows


def _apparmor(profile: str) -> Row:
    text = "unable to apply apparmor profile: apparmor failed to apply profile: {error}"
    data = path_bytes(profile, "process.apparmorProfile", text)
    return Row(op=protocol.OP_APPARMOR, first=data, says=text)


def _enter(cwd: str, spaces: Spaces, options: CreateOptions, propagation: int) -> Row:
    if options.no_pivot:
        how = _ENTER_MOVE
    else:
        how = _ENTER_PIVOT if spaces.present & NEWNS else _ENTER_CHROOT
    # pivot_root(2) wants a private root: what others shall see of it comes after.
    after = propagation & (mount_words.SHARED | mount_words.UNBINDABLE)
    return Row(
        op=protocol.OP_ENTER,
        numbers=(how, propagation if after else 0),
        first=path_bytes(cwd, "process.cwd", f"mkdir {cwd}: {{error}}"),
        says="error jailing process inside rootfs: {error}",
    )


def _console(process: dict[str, Any], size: dict[str, Any], *, flags: int) -> tuple[Row, ...]:
    if not process.get("terminal"):
        return ()
    rows, columns = size.get("height", 0), size.get("width", 0)
    if rows > 0xFFFF or columns > 0xFFFF or not (rows and columns):
        rows = columns = 0
    text = "failed to set up the console: {error}"
    return (Row(op=protocol.OP_CONSOLE, flags=flags, numbers=(rows, columns), says=text),)


def _net_devices(devices: dict[str, Any] | None) -> dict[str, str] | None:
    if not devices:
        return None
    return {name: device.get("name") or name for name, device in devices.items()}


def _hooks(hooks: dict[str, Any]) -> tuple[Hook, ...]:
    return tuple(
        [
            _hook(kind, index, hook)
            for kind in _HOOKS
            for index, hook in enumerate(hooks.get(kind, ()))
        ]
    )


def _hook(kind: str, index: int, hook: dict[str, Any]) -> Hook:
    path, timeout = hook.get("path", ""), hook.get("timeout")
    why = ""
    if not path:
        why = "exec: no command"
    elif not path.startswith("/"):
        why = f"fork/exec {path}: no such file or directory"
    elif timeout is not None and timeout <= 0:
        why = f"hook ran past specified timeout of {timeout}.0s"
    elif "\0" in path or any(
        "\0" in word for word in (*hook.get("args", ()), *hook.get("env", ()))
    ):
        why = f"fork/exec {quoted(path)}: invalid argument"
    if why:
        text = f"{IN_INIT}error running {kind} hook #{index}: {why}"
        raise ConfigWrong(key=f"hooks.{kind}[{index}]", text=text)
    environment = hook.get("env")
    return Hook(
        kind=kind,
        path=path,
        arguments=tuple(hook.get("args", ())),
        environment=None if environment is None else tuple(environment),
        timeout_seconds=timeout or 0,
    )
