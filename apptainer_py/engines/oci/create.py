"""`create` and `run`: from a bundle to a container, in the order that docs/oci.md shows.

The order is what clients and hooks see of a runtime: it is runc's. Whatever is made is named in the
container's record first, so that `delete --force` undoes a call that was killed at any point.
"""

from __future__ import annotations

import os
import time

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci import facts, steps, terminal
from apptainer_py.engines.oci.compile import compile_bundle
from apptainer_py.engines.oci.hooks import HookFailed, HookState
from apptainer_py.engines.oci.state import describe, libcontainer_state
from apptainer_py.engines.oci.steps import StartFailed, explained
from apptainer_py.host.cgroups import find_manager
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.model.json_text import loads
from apptainer_py.model.oci_plan import CreateOptions, Row
from apptainer_py.model.process_frame import process_frame
from apptainer_py.runtime.containers import ContainerError, StateDir, check_id, start_time
from apptainer_py.runtime.nest import NestGone, RowFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import OciPlan, ProcessSpec
    from apptainer_py.runtime.contexts import MonitorContext, PrepareContext
    from apptainer_py.runtime.nest import Nest

_CONFIG_BYTES = 64 << 20
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
_CAP_SYS_ADMIN = 21
_LIMITS = "error during container init: error setting rlimits for ready process: "
_CLONE_NEWUSER = 0x10000000


def read_bundle(bundle: str) -> tuple[str, bytes]:
    """Make a bundle the current directory; returns its path and its config.json.

    Raises:
        ContainerError: there is none, in runc's words.
    """
    if bundle:
        try:
            os.chdir(bundle)
        except OSError as error:
            raise ContainerError(text=f"chdir {bundle}: {(error.strerror or '').lower()}") from None
    try:
        fd = os.open("config.json", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ContainerError(text="JSON specification file config.json not found") from None
    except OSError as error:
        text = f"open config.json: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    from apptainer_py.base.files import read_at_most

    return os.getcwd(), read_at_most(fd, _CONFIG_BYTES)


class Creation:
    """One container on its way; each method is a hook of the engine."""

    def __init__(self, context: PrepareContext, call: OciCall) -> None:
        self.call = call
        self.name = call.arguments[0]
        self.detached = call.command == "create" or call.flag("detach")
        self.environment = context.environment
        # Paths of the command line are the caller's; the bundle is the directory from here on.
        self.pid_file = os.path.abspath(call.text("pid-file")) if call.text("pid-file") else ""
        self.bundle, self.config_bytes = self.read_bundle()
        check_id(self.name)
        self.config: dict[str, Any] = loads(self.config_bytes)
        self.host = facts.host_facts(call, context.environment)
        listen_fds = terminal.listen_fds(context.environment)
        self.options = CreateOptions(
            container_id=self.name,
            no_pivot=call.flag("no-pivot"),
            no_new_keyring=call.flag("no-new-keyring"),
            preserve_fds=call.number("preserve-fds") + listen_fds,
            systemd_cgroup=call.cgroup_manager == "systemd",
            rootless=self.host.rootless,
        )
        plan = compile_bundle(self.config, self.bundle, self.host, self.options)
        self.plan: OciPlan = self.shape(plan)
        for warning in self.plan.warnings:
            log.warning(warning)
        terminal.check_streams(call, terminal=self.plan.terminal, detached=self.detached)
        terminal.check_preserved(call.number("preserve-fds"), listen_fds)
        self.console = terminal.connect(call.text("console-socket"))
        self.pidfd_socket = terminal.connect(call.text("pidfd-socket"))
        self.program = steps.seccomp_program(self.plan, self.environment, self.host.uid)
        self.hook_state = HookState(
            self.config.get("ociVersion", ""),
            self.name,
            self.bundle,
            self.plan.annotations,
            context.environment,
        )
        self.created_ns = 0
        self.pid = 0
        self.started_at = 0
        self.state: StateDir | None = None
        self.fifo = -1
        self.pty = -1
        if not self.detached:
            _starter.relay_begin()
        self.failed = True
        self.has_cgroup = False
        self.cgroup = find_manager(
            call.cgroup_manager, self.plan.cgroup, rootless=self.host.rootless
        )

    def read_bundle(self) -> tuple[str, bytes]:
        """Return the bundle's directory and its configuration."""
        return read_bundle(self.call.text("bundle"))

    def shape(self, plan: OciPlan) -> OciPlan:
        """Return the plan with what no config.json can say."""
        return plan

    # -- create_container

    def build(self, nest: Nest) -> None:
        """Make everything, up to the moment where the process can only become the payload."""
        try:
            self.make_state()
            self._make_spaces(nest)
            self.assemble(nest)
            self._run_outer_hooks()
            self._enter(nest)
            self._send_process(nest)
            self._record_created()
        except ApptainerError as error:
            raise explained(error, self.plan.process, "error during container init: ") from None

    def make_state(self) -> None:
        """Write down what will be made, then make the control groups."""
        sticky = self.host.rootless and "XDG_RUNTIME_DIR" in self.environment
        self.state = StateDir.make(self.call.root, self.name, sticky=sticky)
        self.created_ns = time.time_ns()
        try:
            # Before the record names it: `delete --force` would end who is in there.
            self.cgroup.check_unused()
            self.state.write_record(describe(self, creating=True))
            self.state.write("config.json", self.config_bytes)
            if self.call.command == "create":
                self.fifo = self.state.make_fifo(*self._container_root())
            self.cgroup.create()
            self.has_cgroup = True
        except ApptainerError as error:
            text = f"unable to apply cgroup configuration: {error}"
            raise StartFailed(reason=text) from None

    def _container_root(self) -> tuple[int, int]:
        """Return which ids of ours are 0 in the container."""
        ids = []
        for maps, own in ((self.plan.uid_maps, self.host.uid), (self.plan.gid_maps, self.host.gid)):
            ids.append(next((line.outside for line in maps if line.inside == 0), own))
        return ids[0], ids[1]

    def _make_spaces(self, nest: Nest) -> None:
        plan = self.plan
        nest.rows(plan.prepare)
        nest.rows(tuple(self.cgroup.join_rows()))
        for kind, path in plan.join_paths:
            fd = steps.open_namespace(kind, path)
            nest.row(steps.join_row(kind), fd)
            os.close(fd)
        offsets = plan.time_offsets
        spaces = Row(
            op=protocol.OP_SPACES,
            flags=1 if offsets else 0,
            numbers=(plan.new_spaces, *(offsets or ())),
            says="unable to clone the container's namespaces: {error}",
        )
        group = self.cgroup.enter_fd()
        self.pid, _ = nest.ask(spaces, group)
        if group >= 0:
            os.close(group)
        self.started_at = start_time(self.pid)
        # From here on `delete --force` finds the process too.
        assert self.state is not None
        self.state.write_record(describe(self, creating=True))
        if plan.new_spaces & _CLONE_NEWUSER:
            from apptainer_py.host.subid import write_maps

            write_maps(self.pid, plan.uid_maps, plan.gid_maps, rootless=self.host.rootless)
        if plan.resctrl:
            from apptainer_py.host import resctrl

            resctrl.join(plan.resctrl, self.name, self.pid)
        if plan.netdevs:
            from apptainer_py.host import netlink

            netlink.move_devices(plan.netdevs, self.pid)
        self.mapped()
        nest.row(plan.mapped)

    def mapped(self) -> None:
        """Do what needs the container's ids: they are there, and nothing else of it is."""

    def assemble(self, nest: Nest) -> None:
        """Put the root together: mounts, devices and links."""
        reaches_more = not self.host.rootless and bool(self.host.permitted >> _CAP_SYS_ADMIN & 1)
        self.passed = steps.Passed(self.plan, self.pid, reaches_more=reaches_more)
        for row in (*self.plan.setup, *self.plan.assemble):
            self.send(nest, row)
        nest.settle()

    def send(self, nest: Nest, row: Row) -> None:
        """Send a row with the descriptor that it names."""
        self.passed.send(nest, row)

    def process(self, root: int) -> ProcessSpec:
        """Return the process, with what only the container's root can tell."""
        return steps.with_home(self.plan.process, root)

    def _run_outer_hooks(self) -> None:
        try:
            self.cgroup.apply(self.plan.cgroup.resources)
        except ApptainerError as error:
            text = "error during container init: error setting cgroup config for procHooks process"
            text = f"{text}: {error}"
            raise StartFailed(reason=text) from None
        if self.plan.hooks:
            try:
                for kind in ("prestart", "createRuntime"):
                    self.hook_state.run(self.plan.hooks, kind, "creating", self.pid)
            except HookFailed as error:
                text = f"error during container init: {error}"
                raise StartFailed(reason=text) from None

    def _enter(self, nest: Nest) -> None:
        frames = self.hook_state.frames(self.plan.hooks, "createContainer", "creating")
        if frames:
            self._run_inner_hooks(nest, frames)
        for row in self.plan.inside:
            if row.op == protocol.OP_CONSOLE:
                _, self.pty = nest.ask(row)
                if self.console >= 0:
                    terminal.send_console(self.console, self.pty)
                    self.console = self.pty = -1
            else:
                self.passed.send(nest, row)
        nest.settle()

    def _run_inner_hooks(self, nest: Nest, frames: bytes) -> None:
        try:
            steps.send_frame(nest, Row(op=protocol.OP_RUN_HOOKS), frames, "hooks")
        except RowFailed as error:
            raise steps.inner_hook_failed(error, "createContainer") from None

    def _send_process(self, nest: Nest) -> None:
        if self.pidfd_socket >= 0:
            steps.send_pidfd(self.pidfd_socket, self.pid, b"standard")
        spec = self.process(nest.root_fd)
        frames = self.hook_state.frames(self.plan.hooks, "startContainer", "created")
        data = process_frame(spec, self.program[0], frames, program_flags=self.program[1])
        steps.send_frame(nest, Row(op=protocol.OP_PROCESS), data, "process")
        steps.set_limits(self.pid, self.plan.rlimits, _LIMITS)

    def _record_created(self) -> None:
        assert self.state is not None
        self.state.write("state.json", libcontainer_state(self))
        self.state.write_record(describe(self, creating=False))

    # -- let_go, post_start_process

    def let_go(self, nest: Nest) -> int:
        """Have the first process become the payload, or wait for `start`; returns its pid."""
        try:
            listener = steps.go(nest, self.fifo)
            if self.fifo >= 0 and os.waitid(os.P_PID, self.pid, _ENDED):
                raise NestGone  # an end in the middle looks like the end of the channel
            if listener >= 0:
                self._send_listener(nest, listener)
        except ApptainerError as error:
            raise explained(error, self.plan.process, "error during container init: ") from None
        self.failed = False
        return self.pid

    def _send_listener(self, nest: Nest, number: int) -> None:
        assert self.plan.seccomp is not None
        before, after = self.hook_state.around("creating")
        told = {
            "ociVersion": self.config.get("ociVersion", ""),
            "fds": ["seccompFd"],
            "pid": self.pid,
            "metadata": self.plan.seccomp.get("listenerMetadata", ""),
            "state": loads(before + b"%d" % self.pid + after),
        }
        steps.send_listener(self.pid, number, self.plan.seccomp.get("listenerPath", ""), told)
        nest.acknowledge()

    def started(self) -> None:
        """Write the pid file; run the poststart hooks if `start` will not."""
        assert self.state is not None
        if self.call.command == "run":
            try:
                self.hook_state.run(self.plan.hooks, "poststart", "running", self.pid)
            except HookFailed:
                self.failed = True
                raise
        self.state.unlock()
        if self.pid_file:
            try:
                steps.write_pid_file(self.pid_file, self.pid)
            except OSError as error:
                self.failed = True
                reason = (error.strerror or "").lower()
                raise ContainerError(text=f"open {error.filename}: {reason}") from None

    # -- monitor_container, cleanup_container

    def watch(self, context: MonitorContext) -> int:
        """Pass signals and the terminal on until the payload has ended."""
        return terminal.watch(context, self.pty)

    def clean_up(self, status: int | None) -> None:
        """Undo a container that failed, or that has ended in the foreground."""
        if self.state is None or (not self.failed and (status is None or self.call.flag("keep"))):
            return
        from apptainer_py.engines.oci.cleanup import destroy

        self.state.lock()
        if not self.has_cgroup:
            # What is in a group that was refused to us is another container.
            self.state.remove()
            return
        destroy(self.state, self.cgroup, self.pid, self.started_at, self.plan)
        if not self.failed:
            try:
                self.hook_state.run(self.plan.hooks, "poststop", "stopped", 0)
            except HookFailed as error:
                log.warning(f"{error}")
