"""The mount plan: what is bound where, in which order, and what a missing target becomes."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import BindError, LaunchError
from apptainer_py.engines.apptainer import accounts
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.model import protocol
from apptainer_py.model.plan import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.engines.apptainer import binds
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts, PrepareContext

_NO_MOUNT_KEYS = ("proc", "sys", "dev", "devpts", "home", "tmp", "hostfs", "cwd", "bind-paths")
# Where /bin and its like are links, as on most hosts, the directory is the one below /usr.
_SYSTEM_CWD = frozenset(
    "/ /etc /bin /mnt /usr /var /opt /sbin /lib /lib64 "
    "/usr/bin /usr/sbin /usr/lib /usr/lib64".split()
)
_DEVICES = ("tty", "null", "zero", "random", "urandom")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
_HOSTS = b"""\
127.0.0.1   localhost
::1         localhost ip6-localhost ip6-loopback
ff02::1     ip6-allnodes
ff02::2     ip6-allrouters
"""
_FS_OF_HOST = ("/proc", "/sys", "/dev", "/run", "/boot", "/var")
DEV, HOST, SYSTEM, KERNEL, HOME, TMP, SCRATCH, FILES, USER, CWD = (
    "dev", "hostfs", "binds", "kernel", "home", "tmp", "scratch", "files", "userbinds", "cwd",
)  # fmt: skip
_REQUIRED = (SCRATCH, USER)


class User:
    """The payload's account: names are text, `home` is the directory inside the container."""

    __slots__ = ("gid", "home", "home_source", "name", "uid")

    def __init__(self, name: str, home: str, home_source: str, uid: int, gid: int) -> None:
        self.name = name
        self.home = home
        self.home_source = home_source
        self.uid = uid
        self.gid = gid


def find_user(
    facts: Facts, action: ActionRequest, environment: Mapping[str, str], *, as_root: bool = False
) -> User:
    """Return the caller's account as the host knows it, with --home applied.

    `as_root` makes it root's, with the caller's own home directory as /root.

    Raises:
        NotPermitted: the administrator lets no user choose what is bound.
        LaunchError: the account has no entry, or --home is not usable.
    """
    entry = accounts.entry_of(facts.uid)
    if entry is None:
        name, source = str(facts.uid), environment.get("HOME", "/")
    else:
        name, source = entry.pw_name, entry.pw_dir
    target = "/root" if as_root else source
    if action.home:
        if not facts.configuration["user bind control"]:
            raise NotPermitted(
                text="container creation failed: not mounting user requested home: user bind "
                "control is disallowed"
            )
        fields = action.home.split(":")
        if len(fields) > 2 or not fields[0]:
            raise LaunchError(
                text="While setting home directory: home argument has incorrect number of "
                f"elements: {len(fields)}"
            )
        source = fields[0]
        target = fields[-1]
    if not os.path.isabs(target):
        raise LaunchError(
            text=f"container creation failed: failed to add {os.path.abspath(source)} as session "
            f"directory: path {os.path.normpath(target)} is not an absolute path"
        )
    if any(mark in target for mark in "\n:"):
        raise LaunchError(text="home must be an absolute path, without ':' and line breaks")
    uid, gid = (0, 0) if as_root else (facts.uid, facts.gid)
    return User(name, os.path.normpath(target), source, uid, gid)


class Plan:
    """Collects the mounts of one container in the order of facts §6.3."""

    def __init__(self, prepared: Prepared, action: ActionRequest, context: PrepareContext) -> None:
        self.prepared = prepared
        self.action = action
        self.facts = context.facts
        self.configuration = context.facts.configuration
        self.cwd = context.cwd
        self.skipped = _skipped(action)
        self.mounts = prepared.mounts
        self.staged = prepared.staged

    def bind(
        self,
        source: str,
        target: str,
        tag: str,
        *,
        flags: int = 0,
        create: str = "",
        quiet: bool = False,
    ) -> None:
        """Add a bind; `create` is found out from the source where it is not given."""
        if not create:
            create = "directory" if os.path.isdir(source) else "file"
        self.mounts.append(
            Mount(kind="bind", source=source, target=target, tag=tag, area=protocol.AREA_HOST,
                  flags=flags, create=create, required=tag in _REQUIRED, quiet=quiet)
        )  # fmt: skip

    def kernel(self, kind: str, target: str, *, options: int = 0, required: bool = False) -> None:
        """Add a file system of the kernel's own."""
        self.mounts.append(
            Mount(kind=kind, source=kind, target=target, tag=KERNEL, create="directory",
                  options=options, required=required)
        )  # fmt: skip

    def session(
        self,
        name: str,
        target: str,
        tag: str,
        *,
        create: str = "directory",
        required: bool = True,
        flags: int = 0,
    ) -> None:
        """Add a bind of something in the session directory."""
        self.mounts.append(
            Mount(kind="bind", source="/" + name, target=target, tag=tag, create=create,
                  area=protocol.AREA_SESSION, required=required, flags=flags)
        )  # fmt: skip

    def wanted(self, name: str, directive: str) -> bool:
        """Return whether a default mount is configured and not switched off."""
        return bool(self.configuration[directive]) and name not in self.skipped


def _skipped(action: ActionRequest) -> set[str]:
    found = set()
    for name in action.no_mount:
        if name in _NO_MOUNT_KEYS or name.startswith("/"):
            found.add(name)
        elif name:
            log.warning(f"Ignoring unknown mount type '{name}'")
    return found


def plan(prepared: Prepared, action: ActionRequest, context: PrepareContext) -> str:
    """Fill the mount plan; return the targets of the user's binds, as APPTAINER_BIND has them.

    Raises:
        BindError: a bind specification is wrong.
        LaunchError: another option is.
    """
    p = Plan(prepared, action, context)
    user_binds = _user_binds(p)
    shown = [bind.target for bind in user_binds]
    _dev(p)
    if prepared.drivers:
        prepared.drivers.plan_devices(p)
    _hostfs(p)
    _system_binds(p)
    _kernel(p)
    _home(p)
    _tmp(p)
    _scratch(p)
    _files(p)
    if prepared.drivers:
        prepared.drivers.plan_files(p, user_binds)
    if prepared.fakeroot is not None:
        shown = _fakeroot(p) + shown
    for bind in sorted(user_binds, key=lambda bind: bind.target.count("/")):
        if not bind.image_source:
            stage_device(p, bind.source, bind.target)
        flags = protocol.BINDFLAG_READ_ONLY if bind.read_only else 0
        if bind.image_source:
            from apptainer_py.engines.apptainer import layers

            p.mounts.append(layers.image_bind(prepared, bind, p.facts))
            continue
        if _below_dev(bind.source) and _below_dev(bind.target):
            flags |= protocol.BINDFLAG_DEVICES
        p.bind(bind.source, bind.target, USER, flags=flags)
    _cwd(p)
    return ",".join(shown)


def _fakeroot(p: Plan) -> list[str]:
    """Bind what the fakeroot command needs; returns the targets."""
    from apptainer_py.engines.apptainer import fakeroot

    pairs = fakeroot.binds(p.prepared)
    if pairs and not any(name == "libs" for _, name, _, _ in p.staged):
        p.staged.append(("directory", "libs", "", 0o755))
        p.session("libs", fakeroot.LIBS, FILES, flags=protocol.BINDFLAG_READ_ONLY)
    for source, target in pairs:
        p.staged.append(("file", f"libs/{target.rpartition('/')[2]}", b"", 0o755))
        p.bind(source, target, FILES, flags=protocol.BINDFLAG_READ_ONLY, create="file")
    return [target for _, target in pairs]


def _user_binds(p: Plan) -> list[binds.Bind]:
    if not p.action.bind and not p.action.mount:
        return []
    from apptainer_py.engines.apptainer import binds

    found = binds.parse_all(p.action.bind, p.action.mount, p.cwd)
    if found and not p.configuration["user bind control"]:
        log.warning(
            "Ignoring user bind request: user bind control disabled by system administrator"
        )
        return []
    wanted: dict[str, binds.Bind] = {}
    for bind in found:
        if bind.target in wanted or bind.target == "/":
            log.warning(
                f"While bind mounting '{bind.source}:{bind.target}': destination is already in "
                "the mount point list"
            )
            continue
        wanted[bind.target] = bind
        if not bind.image_source:
            _check_source(bind)
    return list(wanted.values())


def _below_dev(path: str) -> bool:
    return path == "/dev" or path.startswith("/dev/")


def _check_source(bind: binds.Bind) -> None:
    try:
        os.stat(bind.source)
    except OSError as error:
        reason = (error.strerror or "").lower()
        what = f"while getting stat for {bind.source}: stat {bind.source}: {reason}"
        log.warning(f"skipping mount of {bind.source}: stat {bind.source}: {reason}")
        if isinstance(error, FileNotFoundError):
            what = f"mount source {bind.source} doesn't exist"
        raise BindError(
            text="container creation failed: mount hook function failure: mount "
            f"{bind.source}->{bind.target} error: while mounting {bind.source}: {what}"
        ) from None


def stage_device(p: Plan, source: str, target: str) -> bool:
    """Make the target of a bind below a /dev of the container's own; False where there is none."""
    made = _stage_above(p, target)
    name = target[1:]
    if made and name not in made:
        kind = "directory" if os.path.isdir(source) else "file"
        p.staged.append((kind, name, b"", 0o755 if kind == "directory" else 0o644))
    return bool(made)


def stage_link(p: Plan, text: str, target: str) -> None:
    """Make a link below a /dev of the container's own, where nothing else has its name."""
    made = _stage_above(p, target)
    if made and target[1:] not in made:
        p.staged.append(("link", target[1:], text, 0))


def _stage_above(p: Plan, target: str) -> set[str]:
    """Make what is above a target below the container's own /dev; return all names made so far.

    The set is empty where the container has no such /dev, or the target does not lie there.
    """
    made = {name for _, name, _, _ in p.staged}
    if "dev" not in made or not target.startswith("/dev/"):
        return set()
    parts = target[1:].split("/")
    for depth in range(2, len(parts)):
        name = "/".join(parts[:depth])
        if name not in made:
            p.staged.append(("directory", name, "", 0o755))
    return made


def _dev(p: Plan) -> None:
    kind = p.configuration["mount dev"]
    if kind == "no" or "dev" in p.skipped:
        return
    if kind == "minimal" or p.action.contain:
        _minimal_dev(p)
    else:
        p.bind("/dev", "/dev", DEV, flags=protocol.BINDFLAG_DEVICES, create="directory")


def _minimal_dev(p: Plan) -> None:
    stage = p.staged
    stage.append(("directory", "dev", "", 0o755))
    stage.append(("directory", "dev/shm", "", 0o1777))
    for name, target in _DEVICE_LINKS.items():
        stage.append(("link", f"dev/{name}", target, 0))
    present = [name for name in _DEVICES if os.path.exists(f"/dev/{name}")]
    for name in present:
        stage.append(("file", f"dev/{name}", b"", 0o666))
    devpts = p.wanted("devpts", "mount devpts")
    if devpts:
        stage.append(("directory", "dev/pts", "", 0o755))
        stage.append(("link", "dev/ptmx", "/dev/pts/ptmx", 0))
    console = _console()
    if console:
        stage.append(("file", "dev/console", b"", 0o666))
    ipc = p.action.ipc and bool(p.configuration["allow ipc ns"])
    if ipc:
        stage.append(("directory", "dev/mqueue", "", 0o1777))
    p.session("dev", "/dev", DEV)
    for name in present:
        p.bind(f"/dev/{name}", f"/dev/{name}", DEV, flags=protocol.BINDFLAG_DEVICES, create="file")
    p.kernel("tmpfs", "/dev/shm")
    if devpts:
        p.kernel("devpts", "/dev/pts", options=_tty_group())
    if ipc:
        p.kernel("mqueue", "/dev/mqueue")
    if console:
        p.bind(console, "/dev/console", DEV, flags=protocol.BINDFLAG_DEVICES, create="file")


def _console() -> str:
    for fd in range(3):
        try:
            name = os.ttyname(fd)
        except OSError:
            continue
        if name.startswith("/dev/pts/"):
            return name
    return ""


def _tty_group() -> int:
    import grp

    try:
        return grp.getgrnam("tty").gr_gid
    except KeyError:
        return 65536


def _hostfs(p: Plan) -> None:
    if not p.wanted("hostfs", "mount hostfs") or p.action.contain:
        return
    with open("/proc/self/mountinfo", "rb") as table:
        points = [os.fsdecode(line.split()[4]) for line in table]
    seen = set()
    for point in points:
        below = any(point == top or point.startswith(top + "/") for top in _FS_OF_HOST)
        if point == "/" or below or "\\" in point or point in seen:
            continue
        seen.add(point)
        p.bind(point, point, HOST)


def _own_network(action: ActionRequest) -> bool:
    return bool(action.net or action.network or action.network_args)


def _system_binds(p: Plan) -> None:
    entries = p.configuration["bind path"]
    assert isinstance(entries, tuple)
    if "bind-paths" in p.skipped:
        return
    for entry in entries:
        source, target, flags = _system_bind(entry)
        if target in p.skipped:
            continue
        standard = source in ("/etc/localtime", "/etc/hosts")
        if p.action.contain and not standard:
            continue
        own = p.action.netns_path or _own_network(p.action)
        if source == "/etc/hosts" and p.action.contain and own:
            # The names of the host's own network say nothing there.
            p.staged.append(("file", "files/hosts", _HOSTS, 0o644))
            p.session("files/hosts", target, FILES, create="file", required=False)
            continue
        if not os.path.exists(source):
            log.verbose(f"skipping mount of {source}: it does not exist")
            continue
        p.bind(source, target, SYSTEM, flags=flags)


def _system_bind(entry: str) -> tuple[str, str, int]:
    """Return source, target and flags of one item of `bind path`."""
    source, *rest = entry.split(":")
    target = (rest[0] if rest else "") or source
    options = [word for word in rest[1:] if word not in ("", "rw")]
    if not target.startswith("/") or options not in ([], ["ro"]):
        raise LaunchError(
            text=f"container creation failed: `bind path = {entry}` in the configuration is not a "
            "path, SOURCE:TARGET or SOURCE:TARGET:ro; tell the administrator"
        )
    return source, target, protocol.BINDFLAG_READ_ONLY if options else 0


def _kernel(p: Plan) -> None:
    if p.wanted("proc", "mount proc"):
        if p.action.pid and p.configuration["allow pid ns"]:
            p.kernel("proc", "/proc")
        else:
            p.bind("/proc", "/proc", KERNEL, create="directory")
    if p.wanted("sys", "mount sys"):
        # The kernel shows a network's devices in sysfs only to who owns the network.
        own = _own_network(p.action)
        if (p.facts.flow == protocol.FLOW_USERNS or p.prepared.inner) and not own:
            p.bind("/sys", "/sys", KERNEL, create="directory")
        else:
            p.kernel("sysfs", "/sys")


def _below(fd: int, name: str) -> int:
    """Make and open a directory in place of `fd`; no link is followed, which may be another's."""
    try:
        os.mkdir(name, dir_fd=fd)
    except FileExistsError:
        pass
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    inner = os.open(name, flags, dir_fd=fd)
    os.close(fd)
    return inner


def _workdir(p: Plan, name: str, mode: int) -> str:
    """Make a directory below --workdir, as the user; returns its path."""
    top = os.path.abspath(p.action.workdir)
    path = os.path.join(top, name)
    try:
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in filter(None, name.split("/")):
                fd = _below(fd, part)
            if os.fstat(fd).st_uid == os.getuid():
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except OSError as error:
        raise LaunchError(
            text=f"container creation failed: failed to create {path}: mkdir {path}: "
            f"{(error.strerror or '').lower()}"
        ) from None
    return path


def _home(p: Plan) -> None:
    user, action = p.prepared.user, p.action
    # What --home asks for is no default mount.
    directive = "user bind control" if action.home else "mount home"
    if action.no_home or not p.wanted("home", directive):
        return
    if user.home == "/":
        log.warning("Not mounting home directory: it is /")
        return
    if not action.contain or action.home:
        missing = not os.path.isdir(user.home_source)
        if action.home and missing and os.path.exists(user.home_source):
            raise LaunchError(
                text=f"container creation failed: home {user.home_source} is a file, not a "
                "directory"
            )
        if missing:
            log.warning(f"Not mounting home directory {user.home_source}: it does not exist")
            # $HOME is a directory all the same: in memory, as with --contain.
            p.staged.append(("directory", "home", "", 0o755))
            p.session("home", user.home, HOME, required=False)
            return
        p.bind(os.path.abspath(user.home_source), user.home, HOME, create="directory")
    elif action.workdir and p.configuration["user bind control"]:
        p.bind(_workdir(p, "home", 0o700), user.home, HOME, create="directory")
    else:
        p.staged.append(("directory", "home", "", 0o755))
        p.session("home", user.home, HOME)


def _tmp(p: Plan) -> None:
    if not p.wanted("tmp", "mount tmp"):
        return
    if p.action.contain and p.action.workdir and not p.configuration["user bind control"]:
        log.warning("User bind control is disabled by system administrator")
        return
    for source, name, below in (("/tmp", "tmp", "tmp"), ("/var/tmp", "var_tmp", "var_tmp")):
        if not p.action.contain:
            p.bind(source, source, TMP, create="directory")
        elif p.action.home and source == p.prepared.user.home:
            continue
        elif p.action.workdir:
            p.bind(_workdir(p, below, 0o1777), source, TMP, create="directory")
        else:
            p.staged.append(("directory", name, "", 0o1777))
            p.session(name, source, TMP)


def _scratch(p: Plan) -> None:
    wanted = [path for path in p.action.scratch if path]
    if wanted and not p.configuration["user bind control"]:
        log.warning("Ignoring scratch request: user bind control disabled by system administrator")
        return
    for number, path in enumerate(wanted):
        target = os.path.normpath(path if path.startswith("/") else "/" + path)
        if p.action.workdir:
            source = _workdir(p, os.path.join("scratch", target.lstrip("/")), 0o750)
            p.bind(source, target, SCRATCH, create="directory")
        else:
            p.staged.append(("directory", f"scratch{number}", "", 0o755))
            p.session(f"scratch{number}", target, SCRATCH)


def _files(p: Plan) -> None:
    if p.action.dns:
        from apptainer_py.engines.apptainer import network

        p.staged.append(("file", "files/resolv.conf", network.resolv_conf(p.action.dns), 0o644))
        p.session("files/resolv.conf", "/etc/resolv.conf", FILES, create="file", required=False)
    elif p.configuration["config resolv_conf"] and os.path.exists("/etc/resolv.conf"):
        p.bind("/etc/resolv.conf", "/etc/resolv.conf", FILES, create="file")
    if p.prepared.hostname:
        p.staged.append(("file", "files/hostname", (p.prepared.hostname + "\n").encode(), 0o644))
        p.session("files/hostname", "/etc/hostname", FILES, create="file", required=False)


def _cwd(p: Plan) -> None:
    cwd = p.cwd
    if (
        p.action.contain
        or not cwd
        or "cwd" in p.skipped
        or not p.configuration["user bind control"]
        or cwd in _SYSTEM_CWD
        or any(cwd == top or cwd.startswith(top + "/") for top in ("/sys", "/proc", "/dev"))
        # What was asked for there is not covered.
        or any(mount.target == cwd for mount in p.mounts)
    ):
        return
    p.bind(cwd, cwd, CWD, create="directory")
