"""`restore`: a container from the files of a checkpoint, by CRIU.

CRIU makes the processes as children of ours, with the names and numbers that they had; all around
them is made as `create` does it: directory, record, control groups, hooks, console.
"""

from __future__ import annotations

import os
import time

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci import facts, snapshot, steps, terminal
from apptainer_py.engines.oci.cleanup import destroy
from apptainer_py.engines.oci.compile import compile_bundle
from apptainer_py.engines.oci.create import read_bundle
from apptainer_py.engines.oci.hooks import HookFailed, HookState
from apptainer_py.engines.oci.mounts import clean
from apptainer_py.engines.oci.state import describe, libcontainer_state
from apptainer_py.host import criu
from apptainer_py.host.cgroups import find_manager
from apptainer_py.host.cgroups.driver import read_file
from apptainer_py.host.cgroups.tree import own_groups
from apptainer_py.kernel import _container, _starter
from apptainer_py.model.json_text import loads
from apptainer_py.model.oci_plan import CreateOptions
from apptainer_py.runtime.containers import ContainerError, StateDir, check_id, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.engines.oci.monitored import Monitored
    from apptainer_py.engines.oci.snapshot import Snapshot
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import OciPlan

_LOG = "restore.log"
_LOG_LEVEL = 4
_ROOT = "criu-root"
_DESCRIPTORS_BYTES = 1 << 16
_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_MNT_DETACH = 2
_RESOLVE_IN_ROOT = 0x10
# What is left behind in a mount namespace, and taken up again.
_PLACES = ("/proc/self/ns/mnt", "/", ".")
_SPACE_NAMES = {"ipc": "ipc", "mount": "mnt", "time": "time", "user": "user", "uts": "uts"}
_EXTERNAL = {"network": "net", "pid": "pid"}


class Restoration:
    """One container on its way back."""

    def __init__(self, call: OciCall, environment: Mapping[str, str], wish: Snapshot) -> None:
        self.call = call
        self.environment = environment
        self.wish = wish
        self.name = call.arguments[0]
        self.detached = call.flag("detach")
        self.pid_file = os.path.abspath(call.text("pid-file")) if call.text("pid-file") else ""
        self.bundle, self.config_bytes = read_bundle(call.text("bundle"))
        check_id(self.name)
        self.config: dict[str, Any] = loads(self.config_bytes)
        self.host = facts.host_facts(call, environment)
        self.plan: OciPlan = compile_bundle(
            self.config,
            self.bundle,
            self.host,
            CreateOptions(
                container_id=self.name,
                no_pivot=call.flag("no-pivot"),
                systemd_cgroup=call.cgroup_manager == "systemd",
                rootless=self.host.rootless,
            ),
        )
        for warning in self.plan.warnings:
            log.warning(warning)
        terminal.check_streams(call, terminal=self.plan.terminal, detached=self.detached)
        self.console = terminal.connect(call.text("console-socket"))
        self.hook_state = HookState(
            self.config.get("ociVersion", ""),
            self.name,
            self.bundle,
            self.plan.annotations,
            environment,
        )
        self.created_ns = time.time_ns()
        self.pid = 0
        self.started_at = 0
        self.pty = -1
        self.monitored: Monitored | None = None
        self.logs = wish.work or wish.images
        self.cgroup = find_manager(
            call.cgroup_manager,
            self.plan.cgroup,
            rootless=self.host.rootless,
            bus=environment.get(facts.USER_BUS, ""),
        )

    def run(self) -> int:
        """Make the container; returns the exit status: 0 if detached, else that of the payload.

        Raises:
            ApptainerError: it cannot be; nothing is left of it.
        """
        version = criu.version(self.call.criu, self.environment)
        if version < snapshot.VERSION_LEAST:
            text = f"CRIU version {version} must be {snapshot.VERSION_LEAST} or higher"
            raise ContainerError(text=text)
        sticky = self.host.rootless and "XDG_RUNTIME_DIR" in self.environment
        self.state = StateDir.make(self.call.root, self.name, sticky=sticky)
        self.has_cgroup = False
        try:
            self._make()
            self._write_pid_file()
        except BaseException:
            self._clean_up()
            raise
        self.state.unlock()
        if self.detached:
            return 0
        status = os.waitstatus_to_exitcode(_starter.relay(self.pid, self.pty))
        self.state.lock()
        self._clean_up()
        try:
            self.hook_state.run(self.plan.hooks, "poststop", "stopped", 0)
        except HookFailed as error:
            log.warning(f"{error}")
        return status if status >= 0 else 128 - status

    def _make(self) -> None:
        pipes = self._pipes()
        self.state.write("config.json", self.config_bytes)
        try:
            self.cgroup.check_unused()
        except ApptainerError as error:
            text = f"unable to apply cgroup configuration: {error}"
            raise ContainerError(text=text) from None
        self.state.write_record(describe(self, creating=True))
        root = f"{self.state.path}/{_ROOT}"
        os.mkdir(root, 0o755)
        options = self._options(root)
        joined, spaces = self._spaces()
        options.update(joined)
        options["inherit_fd"] = [*pipes, *options["inherit_fd"]]
        one = self._start_criu(root, options, spaces)
        try:
            options["cg_root"] = self._join_groups(one.pid)
            one.ask(criu.RESTORE, criu.options(options), notified=self._notified)
            status = one.finish()
        except ApptainerError:
            snapshot.quote_log(self.logs, _LOG)
            raise
        finally:
            one.close()
            os.rmdir(root)
            for fd in spaces:
                os.close(fd)
        if status:
            text = f"exit status {os.waitstatus_to_exitcode(status)}"
            raise ContainerError(text=f"criu failed: {text}")
        if not self.pid:
            raise ContainerError(text="criu has restored no process")
        if not self.detached:
            # CRIU would have inherited that; what comes from here on is for the container.
            _starter.relay_begin()

    def _pipes(self) -> list[bytes]:
        """Return what takes the place of the pipes that the standard streams were."""
        path = f"{self.wish.images}/{snapshot.DESCRIPTORS}"
        try:
            with open(path, "rb") as stream:
                links = loads(stream.read(_DESCRIPTORS_BYTES))
        except OSError as error:
            raise snapshot.reason("open", path, error) from None
        if not isinstance(links, list):
            raise ContainerError(text=f"{path}: it is no list")
        return [
            criu.pair(link, number)
            for number, link in enumerate(links[:3])
            if isinstance(link, str) and "pipe:" in link
        ]

    def _options(self, root: str) -> dict[str, Any]:
        wish, call = self.wish, self.call
        options: dict[str, Any] = {
            "evasive_devices": 1,
            "log_level": _LOG_LEVEL,
            "log_file": _LOG,
            "rst_sibling": 1,
            "root": os.path.realpath(root),
            "manage_cgroups": 1,
            "manage_cgroups_mode": wish.cgroup_mode,
            "notify_scripts": 1,
            "empty_ns": wish.empty_spaces,
            "orphan_pts_master": 1,
            **snapshot.flags_of(call),
            **snapshot.settings_file(self.plan.annotations),
            "ext_mnt": self._external_mounts(),
        }
        for name in ("lsm-profile", "lsm-mount-context"):
            if call.text(name):
                options[name.replace("-", "_")] = call.text(name)
        return options

    def _start_criu(self, root: str, options: dict[str, Any], passed: list[int]) -> criu.Criu:
        """Start CRIU in a mount namespace of its own, in which its root directory is a mount.

        It works in the directories of these descriptors, so they must be of that namespace too.
        """
        wish = self.wish
        if wish.work:
            snapshot.make_directory(wish.work)
        before = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in _PLACES]
        _container.unshare(_CLONE_NEWNS)
        try:
            self._prepare(root)
            options["images_dir_fd"] = snapshot.open_directory(wish.images)
            if wish.work:
                options["work_dir_fd"] = snapshot.open_directory(wish.work)
            return criu.Criu(self.call.criu, self.environment, passed=passed)
        finally:
            # Hooks, and what is opened from here on, belong where the caller is.
            space, top, here = before
            _container.setns(space, _CLONE_NEWNS)
            os.fchdir(top)
            os.chroot(".")
            os.fchdir(here)
            for fd in before:
                os.close(fd)

    def _external_mounts(self) -> list[bytes]:
        found = snapshot.binds_of(self.config, self.bundle)
        found += snapshot.cgroup_binds(self.config, self.cgroup.paths)
        if (self.config.get("linux") or {}).get("maskedPaths"):
            found.append(("/dev/null", "/dev/null"))
        found += [(path, path) for path in snapshot.device_nodes(self.config)]
        inside = snapshot.Inside(self.plan.root)
        real = [(inside.real(target), source) for target, source in found]
        inside.close()
        return snapshot.external_mounts(real)

    def _spaces(self) -> tuple[dict[str, Any], list[int]]:
        """Return the options for namespaces that are there already, and their descriptors."""
        inherited: list[bytes] = []
        joined: list[bytes] = []
        passed: list[int] = []
        for kind, path in snapshot.namespace_paths(self.config):
            if not path:
                continue
            if kind in _EXTERNAL:
                name = _EXTERNAL[kind]
                try:
                    passed.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError:
                    text = f"Requested network namespace {path} does not exist"
                    raise ContainerError(text=text) from None
                number = criu.FIRST_PASSED_FD + len(passed) - 1
                inherited.append(criu.pair(f"extRoot{name.title()}NS", number))
            elif kind == "cgroup":
                raise ContainerError(text="Do not know how to handle namespace NEWCGROUP")
            else:
                joined.append(criu.pair(_SPACE_NAMES.get(kind, kind), path))
        return {"inherit_fd": inherited, "join_ns": joined}, passed

    def _join_groups(self, pid: int) -> list[bytes]:
        """Move CRIU itself into the container's groups, so that all it makes begins there."""
        try:
            self.cgroup.create(pid)
            self.has_cgroup = True
            self.cgroup.add(pid)
            self.cgroup.apply(self.plan.cgroup.resources)
        except ApptainerError as error:
            text = f"unable to apply cgroup configuration: {error}"
            raise ContainerError(text=text) from None
        groups = own_groups(read_file(f"/proc/{pid}", "cgroup"))
        return [criu.pair(name, path) for names, path in groups for name in names]

    def _notified(self, step: str, pid: int, fd: int) -> None:
        if step == "setup-namespaces":
            for kind in ("prestart", "createRuntime"):
                self.hook_state.run(self.plan.hooks, kind, "creating", pid)
        elif step == "orphan-pts-master" and fd >= 0:
            self._take_console(fd)
        elif step == "post-restore":
            self.pid = pid
            self.started_at = start_time(pid)
            self.state.write("state.json", libcontainer_state(self))
            self.state.write_record(describe(self, creating=False))

    def _take_console(self, fd: int) -> None:
        if self.console >= 0:
            terminal.send_console(self.console, fd)
            self.console = -1
        else:
            self.pty = fd

    def _write_pid_file(self) -> None:
        if self.pid_file:
            try:
                steps.write_pid_file(self.pid_file, self.pid)
            except OSError as error:
                raise snapshot.reason("open", str(error.filename), error) from None

    def _clean_up(self) -> None:
        if not self.has_cgroup:
            self.state.remove()
            return
        destroy(self.state, self.cgroup, self.pid, self.started_at, self.plan)

    # -- in CRIU's mount namespace

    def _prepare(self, root: str) -> None:
        """Mount the root directory where CRIU wants it."""
        try:
            _container.mount(None, b"/", None, _MS_SLAVE | _MS_REC)
            _container.mount(
                os.fsencode(self.plan.root), os.fsencode(root), None, _MS_BIND | _MS_REC
            )
            fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            reason = (error.strerror or "").lower()
            text = f"mount {self.plan.root} at {root}: {reason}"
            raise ContainerError(text=text) from None
        try:
            self._make_mountpoints(fd)
        finally:
            os.close(fd)

    def _make_mountpoints(self, root: int) -> None:
        """Make what mounts need to lie on; what binds show is looked at for those below them."""
        mounts = self.config.get("mounts") or ()
        sources = dict(snapshot.binds_of(self.config, self.bundle))
        memory = [f"{clean(m['destination'])}/" for m in mounts if m.get("type") == "tmpfs"]
        bound: list[str] = []
        for mount in mounts:
            written = mount["destination"]
            source = sources.get(written)
            place = clean(written)
            if source is None and mount.get("type") == "cgroup":
                continue
            if any(place.startswith(above) for above in memory):
                continue
            try:
                target = _make_target(root, place, is_file=_is_file(source))
                if source is not None:
                    _container.mount(os.fsencode(source), _shown(target), None, _MS_BIND | _MS_REC)
                    bound.append(place)
                os.close(target)
            except OSError as error:
                reason = (error.strerror or "").lower()
                text = f"create criu restore mountpoint for {written} mount: {reason}"
                raise ContainerError(text=text) from None
        for place in reversed(bound):
            flags = os.O_PATH | os.O_CLOEXEC
            target = _starter.openat2(root, os.fsencode(place), flags, _RESOLVE_IN_ROOT)
            _container.umount2(_shown(target), _MNT_DETACH)
            os.close(target)


def _is_file(source: str | None) -> bool:
    return source is not None and os.path.exists(source) and not os.path.isdir(source)


def _shown(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def _make_target(root: int, place: str, *, is_file: bool) -> int:
    """Return a descriptor of a path beneath a root, made if it lacks; no link leads out of it."""
    parts = [part for part in place.split("/") if part]
    flags = os.O_PATH | os.O_CLOEXEC
    above = os.dup(root)
    for number, part in enumerate(parts, 1):
        path = os.fsencode("/".join(parts[:number]))
        try:
            found = _starter.openat2(root, path, flags, _RESOLVE_IN_ROOT)
        except FileNotFoundError:
            if is_file and number == len(parts):
                made = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(part, made, 0o644, dir_fd=above))
            else:
                os.mkdir(part, 0o755, dir_fd=above)
            found = _starter.openat2(root, path, flags, _RESOLVE_IN_ROOT)
        os.close(above)
        above = found
    return above
