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
from apptainer_py.model.record_frame import PHASE_CREATED, PHASE_CREATING
from apptainer_py.runtime.containers import ContainerError, StateDir, check_id, start_time
from apptainer_py.runtime.nest import NestGone, RowFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.engines.oci.monitored import Monitored
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import OciPlan, ProcessSpec
    from apptainer_py.runtime.contexts import MonitorContext, PrepareContext
    from apptainer_py.runtime.nest import Nest

_CONFIG_BYTES = 64 << 20
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
_CAP_SYS_ADMIN = 21
_LIMITS = "error during container init: error setting rlimits for ready process: "
_CLONE_NEWUSER = 0x10000000
# Rows that are under way while the process is noted, which takes about as long.
_AHEAD = 24


def _new_state(root: str, name: str, sticky: bool) -> StateDir:  # noqa: FBT001  by position
    return StateDir.make(root, name, sticky=sticky)


def read_bundle(bundle: str, config: str = "") -> tuple[str, bytes]:
    """Make a bundle the current directory; returns its path and its config.json.

    `config` is another file to be read for it.

    Raises:
        ContainerError: there is none, in runc's words.
    """
    file = os.path.abspath(config) if config else "config.json"
    if bundle:
        try:
            os.chdir(bundle)
        except OSError as error:
            raise ContainerError(text=f"chdir {bundle}: {(error.strerror or '').lower()}") from None
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ContainerError(text=f"JSON specification file {file} not found") from None
    except OSError as error:
        text = f"open {file}: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    from apptainer_py.base.files import read_at_most

    return os.getcwd(), read_at_most(fd, _CONFIG_BYTES)


def _with_monitor(call: OciCall, ready_fd: int) -> Monitored:
    from apptainer_py.engines.oci.monitored import Monitored

    return Monitored(call, ready_fd)


class Creation:
    """One container on its way; each method is a hook of the engine."""

    created_ns = 0
    pid = 0
    started_at = 0
    noted = False
    named_groups: tuple[str, list[str]] = ("", [])
    state: StateDir | None = None
    fifo = -1
    pty = -1
    failed = True
    has_cgroup = False

    def __init__(self, context: PrepareContext, call: OciCall) -> None:
        self.call = call
        self.name = call.arguments[0]
        self.environment = context.environment
        self.cwd = context.cwd
        self._choose_who_stays(context.ready_fd)
        # Paths of the command line are the caller's; the bundle is the directory from here on.
        self.pid_file = os.path.abspath(call.text("pid-file")) if call.text("pid-file") else ""
        self.bundle, self.config_bytes = self.read_bundle()
        check_id(self.name)
        self.config = self._decode()
        self.host = facts.host_facts(call, context.environment)
        listen_fds = terminal.listen_fds(context.environment)
        self.options = self._options(listen_fds)
        plan = compile_bundle(self.config, self.bundle, self.host, self.options)
        self.plan: OciPlan = self.shape(plan)
        for warning in self.plan.warnings:
            log.warning(warning)
        self._connect(listen_fds)
        self.program = steps.seccomp_program(self.plan, self.environment, self.host.uid)
        self.hook_state = HookState(
            self.config.get("ociVersion", ""),
            self.name,
            self.bundle,
            self.plan.annotations,
            context.environment,
        )
        if self.stays and not self.monitored:
            _starter.relay_begin()
        self.cgroup = find_manager(
            call.cgroup_manager,
            self.plan.cgroup,
            rootless=self.host.rootless,
            bus=context.environment.get(facts.USER_BUS, ""),
        )

    def _choose_who_stays(self, ready_fd: int) -> None:
        call = self.call
        # On Apptainer's command line somebody stays with each container, and `run` is what the
        # launcher does with that one.
        self.monitored = _with_monitor(call, ready_fd) if call.apptainer else None
        self.waits = call.command == "create" or call.apptainer
        self.detached = self.waits or call.flag("detach")
        self.stand_in = call.number("stay")
        self.stays = bool(self.monitored or self.stand_in) or not self.detached

    def _decode(self) -> dict[str, Any]:
        config: dict[str, Any] = loads(self.config_bytes)
        if self.call.flag("empty-process") and isinstance(config.get("process"), dict):
            # No program is looked for; but a bundle for a pod has a process all the same.
            config["process"]["args"] = ["/"]
        return config

    def _options(self, listen_fds: int) -> CreateOptions:
        call = self.call
        return CreateOptions(
            container_id=self.name,
            no_pivot=call.flag("no-pivot"),
            no_new_keyring=call.flag("no-new-keyring"),
            preserve_fds=call.number("preserve-fds") + listen_fds,
            systemd_cgroup=call.cgroup_manager == "systemd",
            rootless=self.host.rootless,
        )

    def _connect(self, listen_fds: int) -> None:
        """Refuse streams that do not fit the process, then reach who is to have its terminal."""
        call = self.call
        if self.monitored is None or call.text("console-socket"):
            detached = self.detached or bool(self.stand_in)
            terminal.check_streams(call, terminal=self.plan.terminal, detached=detached)
        terminal.check_preserved(call.number("preserve-fds"), listen_fds)
        self.console = terminal.connect(call.text("console-socket"))
        self.pidfd_socket = terminal.connect(call.text("pidfd-socket"))

    def read_bundle(self) -> tuple[str, bytes]:
        """Return the bundle's directory and its configuration."""
        return read_bundle(self.call.text("bundle"), self.call.text("config"))

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
            self.note_process()
            self._run_outer_hooks()
            self._enter(nest)
            self._send_process(nest)
            _starter.run_step(protocol.STEP_STATE_DONE, self._record_created)
        except ApptainerError as error:
            raise explained(error, self.plan.process, "error during container init: ") from None

    def make_state(self) -> None:
        """Write down what will be made, then make the control groups."""
        sticky = self.host.rootless and "XDG_RUNTIME_DIR" in self.environment
        self.state = _starter.run_step(
            protocol.STEP_STATE_MADE, _new_state, self.call.root, self.name, sticky
        )
        self.created_ns = time.time_ns()
        try:
            # Before the record names it: `delete --force` would end who is in there.
            self.cgroup.check_unused()
            _starter.run_step(protocol.STEP_STATE_NAMED, self._name_state)
            self.state.write("config.json", self.config_bytes)
            if self.monitored:
                self.monitored.begin(self)
            if self.waits:
                self.fifo = self.state.make_fifo(*self._container_root())
            _starter.run_step(protocol.STEP_GROUPS_MADE, self.cgroup.create)
            self.has_cgroup = True
        except ApptainerError as error:
            text = f"unable to apply cgroup configuration: {error}"
            raise StartFailed(reason=text) from None

    def _name_state(self) -> None:
        assert self.state is not None
        self.state.write_record(describe(self, creating=True))
        self.named_groups = self._groups()

    def _groups(self) -> tuple[str, list[str]]:
        return self.cgroup.freezer_file(), list(self.cgroup.directories())

    def _advance_state(self, phase: int) -> None:
        assert self.state is not None
        if self._groups() == self.named_groups:
            self.state.advance_record(phase, self.pid, self.started_at)
        else:
            # Some hierarchy could not be had: then it is no longer named.
            self.state.write_record(describe(self, creating=phase == PHASE_CREATING))

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
        if plan.new_spaces & _CLONE_NEWUSER or plan.resctrl or plan.netdevs:
            self.note_process()
        if plan.new_spaces & _CLONE_NEWUSER:
            _starter.run_step(protocol.STEP_MAPS_WRITTEN, self._write_maps)
        if plan.resctrl:
            from apptainer_py.host import resctrl

            resctrl.join(plan.resctrl, self.name, self.pid)
        if plan.netdevs:
            from apptainer_py.host import netlink

            netlink.move_devices(plan.netdevs, self.pid)
        self.mapped()
        nest.row(plan.mapped)

    def note_process(self) -> None:
        """Have `delete --force` find the first process too; before, it ends with this one."""
        if not self.noted:
            self.noted = True
            _starter.run_step(protocol.STEP_PID_NAMED, self._note_process)

    def _note_process(self) -> None:
        assert self.state is not None
        self._advance_state(PHASE_CREATING)
        self.state.write("state.json", libcontainer_state(self))

    def mapped(self) -> None:
        """Do what needs the container's ids: they are there, and nothing else of it is."""

    def _write_maps(self) -> None:
        from apptainer_py.host.subid import write_maps

        plan = self.plan
        write_maps(self.pid, plan.uid_maps, plan.gid_maps, rootless=self.host.rootless)

    def assemble(self, nest: Nest) -> None:
        """Put the root together: mounts, devices and links."""
        reaches_more = not self.host.rootless and bool(self.host.permitted >> _CAP_SYS_ADMIN & 1)
        self.passed = steps.Passed(self.plan, self.pid, reaches_more=reaches_more)
        rows = (*self.plan.setup, *self.plan.assemble)
        for row in rows[:_AHEAD]:
            self.send(nest, row)
        nest.flush()
        # While the other side is busy with these.
        self.note_process()
        for row in rows[_AHEAD:]:
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
            _starter.run_step(
                protocol.STEP_LIMITS_SET, self.cgroup.apply, self.plan.cgroup.resources
            )
        except ApptainerError as error:
            text = "error during container init: error setting cgroup config for procHooks process"
            text = f"{text}: {error}"
            raise StartFailed(reason=text) from None
        if self.plan.hooks:
            try:
                _starter.run_step(protocol.STEP_OUTER_HOOKS, self._hooks_while_creating)
            except HookFailed as error:
                text = f"error during container init: {error}"
                raise StartFailed(reason=text) from None

    def _hooks_while_creating(self) -> None:
        for kind in ("prestart", "createRuntime"):
            self.hook_state.run(self.plan.hooks, kind, "creating", self.pid)

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
        if self.monitored and not self.plan.terminal:
            self.monitored.give_streams(nest)
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
        if self.call.flag("empty-process"):
            spec = spec.replace(empty=True)
        frames = self.hook_state.frames(self.plan.hooks, "startContainer", "created")
        data = process_frame(spec, self.program[0], frames, program_flags=self.program[1])
        steps.send_frame(nest, Row(op=protocol.OP_PROCESS), data, "process")
        steps.set_limits(self.pid, self.plan.rlimits, _LIMITS)

    def _record_created(self) -> None:
        self._advance_state(PHASE_CREATED)

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
        steps.log_set_up(self.pid)
        log.debug("init: closing the pipe to signal completion")
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
        if not self.waits:
            try:
                self.hook_state.run(self.plan.hooks, "poststart", "running", self.pid)
            except HookFailed:
                self.failed = True
                raise
        self.state.unlock()
        if self.pid_file:
            try:
                _starter.run_step(
                    protocol.STEP_TOLD_PID, steps.write_pid_file, self.pid_file, self.pid
                )
            except OSError as error:
                self.failed = True
                reason = (error.strerror or "").lower()
                raise ContainerError(text=f"open {error.filename}: {reason}") from None
        steps.tell_ready(self.stand_in)

    # -- monitor_container, cleanup_container

    def watch(self, context: MonitorContext) -> int:
        """Pass signals and the terminal on until the payload has ended."""
        if self.monitored:
            self.failed = True  # unless nothing comes back from here
            self.monitored.take_over(self, self.pty)
        if self.successor_can_end():
            terminal.hand_over(context, self.pty, self.environment, *self._last_command())
        return _starter.run_step(protocol.STEP_WATCHED, terminal.watch, context, self.pty)

    def successor_can_end(self) -> bool:
        """Return whether all that is to be undone in the end is known to the record."""
        return not self.plan.resctrl and not self.cgroup.unit()

    def _last_command(self) -> list[str]:
        if self.waits or self.call.flag("keep"):
            return []
        assert self.state is not None
        words = ["--root", self.state.root, "--log-format", self.call.log_format or "text"]
        if self.call.log:
            words += ["--log", os.path.join(self.cwd, self.call.log)]
        return [*words, "delete", self.name]

    def clean_up(self, status: int | None) -> None:
        """Undo a container that failed, or that has ended in the foreground."""
        kept = self.waits or self.call.flag("keep")
        if self.state is None or (not self.failed and (status is None or kept)):
            return
        from apptainer_py.engines.oci.cleanup import destroy

        self.state.lock()
        if not self.has_cgroup:
            # What is in a group that was refused to us is another container.
            self.state.remove()
            return
        owned = (self.state, self.cgroup, self.pid, self.started_at, self.plan)
        _starter.run_step(protocol.STEP_UNDONE, destroy, *owned)
        if not self.failed:
            try:
                self.hook_state.run(self.plan.hooks, "poststop", "stopped", 0)
            except HookFailed as error:
                log.warning(f"{error}")
