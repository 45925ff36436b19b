"""Drivers of accelerators: which files and devices of the host a container gets for them.

All of it becomes binds of the mount plan and variables: nothing here needs a right that the caller
has not, and what a list of the administrator's names is looked for with the caller's own rights.
"""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.base.errors import BindError, LaunchError
from apptainer_py.engines.apptainer.mounts import stage_device, stage_link
from apptainer_py.host import libraries, programs
from apptainer_py.model import protocol
from apptainer_py.model.plan import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.engines.apptainer.binds import Bind
    from apptainer_py.engines.apptainer.mounts import Plan
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext

LIBS = "/.singularity.d/libs"
LIBS32 = "/.singularity.d/libs32"
_PERSISTENCED = "/var/run/nvidia-persistenced/socket"
_MPS_PIPE = "/tmp/nvidia-mps"
_CLI = "nvidia-container-cli"
_TIMEOUT_S = 60


class NotInSetuid(LaunchError):
    """nvidia-container-cli is not for the setuid flow."""

    message = "nvidia-container-cli not allowed in setuid mode"
    hint = "add `-u`, or use `--nv` without `--nvccli`"


class CliFailed(LaunchError):
    """nvidia-container-cli is missing, or says no."""

    message = "container creation failed: {reason}"


class Drivers:
    """What is brought in: sources and targets, devices, variables, and 32-bit libraries."""

    __slots__ = (
        "aliases", "devices", "environment", "files", "fixed", "folders", "libraries",
        "libraries32", "links", "mounts", "nodes", "shell", "written",
    )  # fmt: skip

    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.libraries32: list[str] = []
        self.files: list[tuple[str, str]] = []
        self.devices: list[str] = []
        # Variables as the host's own, and those that win over the image's.
        self.environment: dict[str, str] = {}
        self.fixed: dict[str, str] = {}
        # What CDI adds: nodes under another name, binds, links (to, at), folders of libraries.
        self.nodes: list[tuple[str, str]] = []
        self.mounts: list[tuple[str, str, bool]] = []
        self.links: list[tuple[str, str]] = []
        self.folders: list[str] = []
        # Links in a folder of libraries, by (folder, name): where the file of that name is inside.
        self.aliases: dict[tuple[str, str], str] = {}
        # Files with content of ours, and lines for the payload's shell.
        self.written: list[tuple[str, bytes]] = []
        self.shell: list[str] = []

    def alias(self, host: str, inside: str) -> None:
        """Let the loader find a library that lies `inside` under the name which it gives itself.

        That name, libcuda.so.1 of libcuda.so.550.54.15, is a link that ldconfig makes on a host.
        """
        kind, ours = libraries.machine(host), libraries.machine(build.LIBPYTHON)
        name = libraries.soname(host) if kind[0] in (1, ours[0]) else ""
        file = os.path.basename(inside)
        if name != file and name.startswith(file.partition(".so")[0] + ".so"):
            self.aliases.setdefault((LIBS if kind == ours else LIBS32, name), inside)

    def add(self, found: libraries.Found) -> None:
        """Take what a list led to; what came before hides libraries of the same name."""
        for mine, new in (
            (self.libraries, found.libraries), (self.libraries32, found.libraries32)
        ):  # fmt: skip
            names = {os.path.basename(path) for path in mine}
            mine += [path for path in new if os.path.basename(path) not in names]
        self.files += [(path, f"/usr/bin/{os.path.basename(path)}") for path in found.programs]
        self.files += [(path, path) for path in found.files]

    def plan_devices(self, p: Plan) -> None:
        """Show the devices in a /dev of the container's own; the host's /dev has them all."""
        if not (self.devices or self.nodes) or not _may_bind(p):
            return
        for path in self.devices:
            if stage_device(p, path, path):
                p.bind(path, path, "dev", flags=protocol.BINDFLAG_DEVICES)
        for text, target in self.links:
            stage_link(p, text, target)
        for source, target in self.nodes:
            if stage_device(p, source, target) or not target.startswith("/dev/"):
                p.bind(source, target, "dev", flags=protocol.BINDFLAG_DEVICES)
            elif source != target:
                raise LaunchError(
                    text=f"CDI: {target} would have to be in the host's own /dev: add --contain"
                )

    def plan_files(self, p: Plan, binds: list[Bind]) -> None:
        """Show programs, files and libraries; `binds` of the user's may lie beside the latter."""
        p.prepared.links += [link for link in self.links if not link[1].startswith("/dev/")]
        for number, (target, content) in enumerate(self.written):
            p.staged.append(("file", f"driver-{number}", content, 0o444))
            p.session(f"driver-{number}", target, "files", create="file", required=False,
                      flags=protocol.BINDFLAG_READ_ONLY)  # fmt: skip
        some = self.files or self.libraries or self.libraries32 or self.mounts
        if not some or not _may_bind(p):
            return
        for source, target, read_only in self.mounts:
            p.bind(source, target, "userbinds",
                   flags=protocol.BINDFLAG_READ_ONLY if read_only else 0)  # fmt: skip
        for source, target in self.files:
            _stage_below_tmp(p, source, target)
            p.bind(source, target, "files")
        for folder, paths in ((LIBS, self.libraries), (LIBS32, self.libraries32)):
            links = {name: path for (where, name), path in self.aliases.items() if where == folder}
            if paths or links:
                _plan_libraries(p, folder, paths, links, binds)


def find(action: ActionRequest, context: PrepareContext) -> tuple[ActionRequest, Drivers]:
    """Look for all that is wanted; return it, and the request with what follows from it.

    Raises:
        LaunchError: it cannot be had.
    """
    configuration = context.facts.configuration
    drivers = Drivers()
    nv = action.nv or action.nvccli or (_is_default("nv", configuration) and not action.no_nv)
    rocm = action.rocm or (_is_default("rocm", configuration) and not action.no_rocm)
    if nv and (action.nvccli or configuration["use nvidia-container-cli"]):
        action = _ask_cli(drivers, action, context)
    elif nv:
        _nvidia(drivers, action, context)
    if rocm:
        _rocm(drivers, action, context)
    if action.intel_hpu:
        _intel_hpu(drivers, context)
    if action.device:
        from apptainer_py.engines.apptainer import cdi_devices

        cdi_devices.add(drivers, action, context.facts)
    _contain_libraries(drivers, action, context)
    return action, drivers


def _is_default(name: str, configuration: Mapping[str, object]) -> bool:
    found = bool(configuration[f"always use {name}"])
    if found:
        log.verbose(f"`always use {name} = yes` is in the configuration")
    return found


# ---- NVIDIA and ROCm by their lists ----


def _nvidia(drivers: Drivers, action: ActionRequest, context: PrepareContext) -> None:
    found = _by_list("nvliblist.conf", action, context)
    mps = context.environment.get("CUDA_MPS_PIPE_DIRECTORY", "") or _MPS_PIPE
    # Without --contain the host's /tmp is there as a whole.
    pipes = [mps] if action.contain or not mps.startswith("/tmp/") else []
    found.files += [path for path in (_PERSISTENCED, *pipes) if _is_there(path)]
    _take(drivers, found, "nv", action)
    drivers.devices += _named("/dev", "nvidia")


def _is_there(path: str) -> bool:
    return path.startswith("/") and os.path.normpath(path) == path and os.path.exists(path)


def _rocm(drivers: Drivers, action: ActionRequest, context: PrepareContext) -> None:
    _take(drivers, _by_list("rocmliblist.conf", action, context), "rocm", action)
    drivers.devices += [path for path in ("/dev/dri", "/dev/kfd") if os.path.exists(path)]


def _by_list(name: str, action: ActionRequest, context: PrepareContext) -> libraries.Found:
    path = os.path.join(build.SYSCONFDIR, name)
    search = context.environment.get("PATH", "")
    known: list[tuple[str, str]] = []
    entries: list[str] = []
    try:
        entries = libraries.read_list(path)
        ldconfig = _program("ldconfig", context)
        if ldconfig:
            known = libraries.cache(ldconfig)
        else:
            log.warning("no libraries of the loader's cache: `binary path` has no ldconfig")
    except OSError as error:
        log.warning(f"While finding bind points of {name}: {error}")
    return libraries.resolve(entries, known, search, compat32=action.compat32)


def _program(name: str, context: PrepareContext) -> str:
    setuid = context.facts.flow == protocol.FLOW_SETUID
    path = "" if setuid else context.environment.get("PATH", "")
    return programs.find(name, context.facts.configuration, path)


def _take(drivers: Drivers, found: libraries.Found, name: str, action: ActionRequest) -> None:
    if not found:
        log.warning(f"Could not find any {name} files on this host!")
    elif action.writable:
        log.warning(f"{name} files may not be bound with --writable")
    if not found.libraries:
        log.warning(f"Could not find any {name} libraries on this host!")
    drivers.add(found)


def _named(folder: str, start: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith(start))
    except OSError:
        return []
    return [f"{folder}/{name}" for name in names]


# ---- Intel Gaudi ----


def _intel_hpu(drivers: Drivers, context: PrepareContext) -> None:
    """Take the accelerators that HABANA_VISIBLE_DEVICES names, and their InfiniBand devices."""
    visible = context.environment.get("HABANA_VISIBLE_DEVICES", "all").lower()
    wanted = None if visible == "all" else {word.strip() for word in visible.split(",")}
    cards = [path for path in _named("/dev/accel", "accel") if path[-1].isdigit()]
    found = [path for path in cards if _is_one_of(path, wanted)]
    infiniband = "/sys/class/infiniband"
    for card in _named(infiniband, "hbl_") or _named(infiniband, "hlib_"):
        if not _is_one_of(card, wanted):
            continue
        for verbs in _named(f"{card}/device/infiniband_verbs", "uverbs")[:1]:
            device = f"/dev/infiniband/{os.path.basename(verbs)}"
            if os.path.exists(device):
                found.append(device)
    if not found:
        log.warning("Could not find any intel-hpu devices on this host!")
    drivers.devices += found


def _is_one_of(path: str, wanted: set[str] | None) -> bool:
    digits = len(path) - len(path.rstrip("0123456789"))
    return wanted is None or (digits > 0 and path[-digits:] in wanted)


# ---- nvidia-container-cli ----


def _ask_cli(drivers: Drivers, action: ActionRequest, context: PrepareContext) -> ActionRequest:
    """Take what nvidia-container-cli lists for the devices of NVIDIA_VISIBLE_DEVICES."""
    visible = context.environment.get("NVIDIA_VISIBLE_DEVICES", "")
    if not visible and action.contain:
        log.warning(
            "When using nvidia-container-cli with --contain NVIDIA_VISIBLE_DEVICES must be set or "
            "no GPUs will be available in container."
        )
    elif not visible:
        log.info("Setting 'NVIDIA_VISIBLE_DEVICES=all' to emulate legacy GPU binding.")
        visible = "all"
        if not action.cleanenv:
            drivers.environment["NVIDIA_VISIBLE_DEVICES"] = visible
    if not action.writable and not action.writable_tmpfs:
        log.info("Setting --writable-tmpfs (required by nvidia-container-cli)")
        action = action.replace(writable_tmpfs=True)
    if context.facts.flow == protocol.FLOW_SETUID:
        raise NotInSetuid
    program = _program(_CLI, context)
    if not program:
        raise CliFailed(reason=f'exec: "{_CLI}": executable file not found in $PATH')
    listed = _list_of_cli(program, visible, context.environment, compat32=action.compat32)
    _sort_listed(drivers, listed)
    return action


def _list_of_cli(
    program: str, visible: str, environment: Mapping[str, str], *, compat32: bool
) -> list[str]:
    import subprocess

    wanted = visible if visible.lower() not in ("", "none", "void") else ""
    words = [program, "list", "--libraries", "--binaries", "--ipcs"]
    words += ["--compat32"] if compat32 else []
    words += [f"--device={wanted}"] if wanted else []
    kept = {name: value for name, value in environment.items() if name.startswith("NVIDIA_")}
    kept["PATH"] = environment.get("PATH", "")
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, env=kept, check=False,
            timeout=_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise CliFailed(reason=f"{_CLI}: {error}") from None
    if done.returncode != 0:
        said = os.fsdecode(done.stderr).strip().splitlines() or [f"status {done.returncode}"]
        raise CliFailed(reason=f"{_CLI}: {said[-1]}")
    return [line.strip() for line in os.fsdecode(done.stdout).splitlines()]


def _sort_listed(drivers: Drivers, listed: list[str]) -> None:
    ours = libraries.machine(build.LIBPYTHON)
    found = libraries.Found()
    for path in listed:
        if not path.startswith("/"):
            continue
        if path.startswith("/dev/"):
            drivers.devices.append(path)
        elif ".so" in os.path.basename(path):
            small = libraries.machine(path)[0] == 1 and ours[0] == 2
            (found.libraries32 if small else found.libraries).append(path)
            drivers.alias(path, os.path.basename(path))
        elif os.path.basename(os.path.dirname(path)) in ("bin", "sbin"):
            found.programs.append(path)
        else:
            found.files.append(path)
    drivers.add(found)


# ---- --containlibs ----


def _contain_libraries(drivers: Drivers, action: ActionRequest, context: PrepareContext) -> None:
    for given in action.containlibs:
        if not given:
            continue
        path = os.path.join(context.cwd, given)
        if not os.path.exists(path):
            raise BindError(
                text="container creation failed: mount hook function failure: mount "
                f"{given}->{LIBS}/{os.path.basename(given)} error: while mounting {given}: mount "
                f"source {given} doesn't exist"
            )
        if not os.path.isfile(path):
            raise BindError(text=f"--containlibs {given}: a library is a file, this is not")
        found = libraries.Found()
        found.libraries.append(path)
        drivers.add(found)


# ---- to the plan ----


def _may_bind(p: Plan) -> bool:
    """Return whether the starter will let this flow have what no directive names."""
    if p.facts.flow != protocol.FLOW_SETUID or p.configuration["user bind control"]:
        return True
    log.warning("Not binding driver files: user bind control disabled by system administrator")
    return False


def _stage_below_tmp(p: Plan, source: str, target: str) -> None:
    """Make the target of a file or directory in a /tmp of the container's own."""
    folder, name = os.path.split(target)
    made = {staged for _, staged, _, _ in p.staged}
    if folder == "/tmp" and "tmp" in made and f"tmp/{name}" not in made:
        kind, mode = ("directory", 0o755) if os.path.isdir(source) else ("file", 0o644)
        p.staged.append((kind, f"tmp/{name}", b"", mode))


def _plan_libraries(
    p: Plan, folder: str, paths: list[str], links: dict[str, str], binds: list[Bind]
) -> None:
    """Fill a directory of the session with the libraries, and cover the image's with it."""
    staged = os.path.basename(folder)
    p.staged.append(("directory", staged, "", 0o755))
    beside = [bind for bind in binds if os.path.dirname(bind.target) == folder]
    names = {os.path.basename(path) for path in paths}
    directories = {os.path.basename(bind.target) for bind in beside if os.path.isdir(bind.source)}
    files = names | {os.path.basename(bind.target) for bind in beside}
    p.staged += [
        ("link", f"{staged}/{name}", links[name], 0) for name in sorted(set(links) - files)
    ]
    for name in sorted(files):
        kind = "directory" if name in directories - names else "file"
        p.staged.append((kind, f"{staged}/{name}", b"", 0o755 if kind == "directory" else 0o644))
    p.mounts.append(
        Mount(kind="bind", source=f"/{staged}", target=folder, tag="libs", create="directory",
              area=protocol.AREA_SESSION, flags=protocol.BINDFLAG_READ_ONLY)
    )  # fmt: skip
    for path in paths:
        p.mounts.append(
            Mount(kind="bind", source=path, target=f"{folder}/{os.path.basename(path)}",
                  tag="libs", area=protocol.AREA_HOST, flags=protocol.BINDFLAG_READ_ONLY)
        )  # fmt: skip


def library_path(drivers: Drivers) -> list[str]:
    """Return shell lines that let the loader find the libraries, behind the image's own."""
    aliased = {folder for folder, _ in drivers.aliases}
    folders = [LIBS] if drivers.libraries or LIBS in aliased else []
    if drivers.libraries32 or LIBS32 in aliased:
        folders.append(LIBS32)
    folders += [folder for folder in drivers.folders if _is_plain(folder)]
    return drivers.shell + [
        f'case ":${{LD_LIBRARY_PATH-}}:" in *":{folder}:"*) ;; *) export LD_LIBRARY_PATH='
        f'"${{LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}}{folder}" ;; esac'
        for folder in folders
    ]


def _is_plain(path: str) -> bool:
    """Return whether a path can stand in a shell's pattern as it is."""
    return (
        path.startswith("/")
        and path.replace("/", "a")
        .replace(".", "a")
        .replace("-", "a")
        .replace("_", "a")
        .replace("+", "a")
        .isalnum()
    )
