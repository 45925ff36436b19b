"""`exec`: one more process in a container that is there.

The first process of the container is named by a pidfd, so that no number can be another's by the
time it is used; the namespaces that are joined are those in which it differs from the caller.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most
from apptainer_py.engines.oci import facts, steps, terminal
from apptainer_py.engines.oci.compile import compile_tenant
from apptainer_py.engines.oci.steps import StartFailed, explained
from apptainer_py.engines.oci.subgroups import group_rows, parse_subgroups, subgroup_directories
from apptainer_py.kernel import _container, _starter
from apptainer_py.model import protocol
from apptainer_py.model.json_text import loads
from apptainer_py.model.oci_plan import ExecOptions, Row
from apptainer_py.model.process_frame import process_frame
from apptainer_py.runtime.containers import (
    CONFIG,
    STATE,
    ContainerError,
    NoContainer,
    StateDir,
    start_time,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import OciPlan
    from apptainer_py.runtime.contexts import MonitorContext, PrepareContext
    from apptainer_py.runtime.nest import Nest

_FILE_BYTES = 16 << 20
_SPACES = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "mnt": 0x00020000, "net": 0x40000000,
    "pid": 0x20000000, "time": 0x00000080, "user": 0x10000000, "uts": 0x04000000,
}  # fmt: skip


def _read_process(path: str) -> Any:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        text = f"open {path}: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    return loads(read_at_most(fd, _FILE_BYTES))


def _id(word: str, kind: str) -> int:
    if not word.isascii() or not word.isdigit():
        text = f'bad {kind}: strconv.Atoi: parsing "{word}": invalid syntax'
        raise ContainerError(text=text)
    return int(word, 10)


def _user(process: dict[str, Any], call: OciCall) -> None:
    user = call.text("user")
    if user:
        uid, colon, gid = user.partition(":")
        if colon:
            process["user"]["gid"] = _id(gid, "gid")
        process["user"]["uid"] = _id(uid, "uid")
    more = call.words("additional-gids")
    if more:
        had = process["user"].get("additionalGids") or []
        for word in more:
            if word.startswith("-"):
                raise ContainerError(text=f"additional-gids must be a positive number {word}")
        process["user"]["additionalGids"] = [*had, *(_id(word, "gid") for word in more)]


def _capabilities(process: dict[str, Any], added: Sequence[str]) -> None:
    if not added:
        return
    sets = {name: list(words or ()) for name, words in (process.get("capabilities") or {}).items()}
    wanted = ["bounding", "effective", "permitted"]
    if sets.get("inheritable"):
        wanted.append("ambient")
    for name in wanted:
        sets[name] = [*sets.get(name, ()), *added]
    process["capabilities"] = sets


def process_of(call: OciCall, config: dict[str, Any]) -> dict[str, Any]:
    """Return the process that the command line asks for.

    Raises:
        ContainerError: it cannot be read, or a number is none.
    """
    path = call.text("process")
    if path:
        process: dict[str, Any] = _read_process(path)
        return process
    process = dict(config["process"])
    process["args"] = list(call.arguments[1:])
    if not process["args"]:
        raise ContainerError(text="exec args cannot be empty")
    process["user"] = dict(process.get("user") or {})
    if call.text("cwd"):
        process["cwd"] = call.text("cwd")
    if call.text("apparmor"):
        process["apparmorProfile"] = call.text("apparmor")
    if call.text("process-label"):
        process["selinuxLabel"] = call.text("process-label")
    _capabilities(process, call.words("cap"))
    if call.words("env"):
        process["env"] = [*(process.get("env") or ()), *call.words("env")]
    process["terminal"] = call.flag("tty")
    if "no-new-privs" in call.options:
        process["noNewPrivileges"] = call.flag("no-new-privs")
    _user(process, call)
    return process


def open_fifo(path: str) -> int:
    """Return a descriptor of the fifo whose reader the process waits for; -1 for none.

    Raises:
        ContainerError: it is none.
    """
    if not path:
        return -1
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        text = f"failed to open exec wait fifo: open {path}: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise ContainerError(text=f"exec wait fifo {path} is not a fifo")
    return fd


class Tenancy:
    """One more process on its way; each method is a hook of the engine."""

    def __init__(self, context: PrepareContext, call: OciCall) -> None:
        self.call = call
        self.environment = context.environment
        self.detached = call.flag("detach")
        self.stand_in = call.number("stay")
        self.stays = bool(self.stand_in) or not self.detached
        self.pid_file = os.path.abspath(call.text("pid-file")) if call.text("pid-file") else ""
        state = StateDir.open(call.root, call.arguments[0])
        self.record = state.read_record()
        self._check_status(state.status(self.record))
        self.config: dict[str, Any] = loads(self._file(state, CONFIG))
        known = loads(self._file(state, STATE))
        host = facts.host_facts(call, context.environment)
        listen_fds = terminal.listen_fds(context.environment)
        options = ExecOptions(
            container_id=state.name,
            preserve_fds=call.number("preserve-fds") + listen_fds,
            cgroups=call.words("cgroup"),
            ignore_paused=call.flag("ignore-paused"),
        )
        process = process_of(call, self.config)
        self.plan: OciPlan = compile_tenant(self.config, process, host, options)
        for warning in self.plan.warnings:
            log.warning(warning)
        detached = self.detached or bool(self.stand_in)
        terminal.check_streams(call, terminal=self.plan.terminal, detached=detached)
        terminal.check_preserved(call.number("preserve-fds"), listen_fds)
        self.groups = subgroup_directories(
            known.get("cgroup_paths") or {}, parse_subgroups(call.words("cgroup"))
        )
        self.unified = host.cgroup2
        self.own_spaces = host.own_spaces
        self.console = terminal.connect(call.text("console-socket"))
        self.pidfd_socket = terminal.connect(call.text("pidfd-socket"))
        self.fifo = open_fifo(call.text("exec-wait-fifo"))
        self.program = steps.seccomp_program(self.plan, context.environment, host.uid)
        self.pid = 0
        self.pty = -1
        self.failed = True
        if not self.detached:
            _starter.relay_begin()

    def _check_status(self, status: str) -> None:
        if status in ("stopped", "creating"):
            raise ContainerError(text="cannot exec in a stopped container")
        ignored = self.call.flag("ignore-paused") or self.call.apptainer
        if status == "paused" and not ignored:
            text = "cannot exec in a paused container (use --ignore-paused to override)"
            raise ContainerError(text=text)

    def _file(self, state: StateDir, name: str) -> bytes:
        data = state.read(name)
        if data is None:
            raise NoContainer
        return data

    def build(self, nest: Nest) -> None:
        """Make the process, up to the moment where it can only become the payload."""
        try:
            self._make_spaces(nest)
            for row in (*self.plan.setup, *self.plan.inside):
                if row.op == protocol.OP_CONSOLE:
                    self._console(nest, row)
                else:
                    nest.row(row)
            self._send_process(nest)
        except ApptainerError as error:
            raise explained(error, self.plan.process, "") from None

    def _make_spaces(self, nest: Nest) -> None:
        nest.rows(self.plan.prepare)
        nest.rows(tuple(group_rows(self.groups, unified=self.unified)))
        first = self.record.init_pid
        try:
            fd = _container.pidfd_open(first)
        except OSError:
            raise ContainerError(text="cannot exec in a stopped container") from None
        try:
            if start_time(first) != self.record.init_start:
                raise ContainerError(text="cannot exec in a stopped container")
            kinds = self._other_spaces(first)
            if kinds:
                says = "failed to setns into the container's namespaces: {error}"
                nest.row(Row(op=protocol.OP_JOIN, numbers=(kinds,), says=says), fd)
            spaces = Row(op=protocol.OP_SPACES, numbers=(0,), says="unable to clone: {error}")
            self.pid, _ = nest.ask(spaces)
        finally:
            os.close(fd)
        self._final_affinity()
        nest.row(self.plan.mapped)

    def _other_spaces(self, pid: int) -> int:
        kinds = 0
        for name, kind in _SPACES.items():
            try:
                inode = os.stat(f"/proc/{pid}/ns/{name}").st_ino
            except FileNotFoundError:
                continue
            if inode != self.own_spaces.get(name):
                kinds |= kind
        return kinds

    def _final_affinity(self) -> None:
        final = self.plan.affinity[1]
        if not final:
            return
        cpus: set[int] = set()
        for part in final.split(","):
            first, _, last = part.strip().partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
        try:
            os.sched_setaffinity(self.pid, cpus)
        except OSError as error:
            text = f"error setting final CPU affinity: {(error.strerror or '').lower()}"
            raise StartFailed(reason=text) from None

    def _console(self, nest: Nest, row: Row) -> None:
        _, self.pty = nest.ask(row)
        if self.console >= 0:
            terminal.send_console(self.console, self.pty)
            self.console = self.pty = -1

    def _send_process(self, nest: Nest) -> None:
        if self.pidfd_socket >= 0:
            steps.send_pidfd(self.pidfd_socket, self.pid, b"setns")
        root = os.open(f"/proc/{self.record.init_pid}/root", os.O_PATH | os.O_CLOEXEC)
        spec = steps.with_home(self.plan.process, root)
        os.close(root)
        data = process_frame(spec, self.program[0], b"", program_flags=self.program[1])
        steps.send_frame(nest, Row(op=protocol.OP_PROCESS), data, "process")
        steps.set_limits(self.pid, self.plan.rlimits, "")
        if self.plan.process.apparmor_profile:
            says = "unable to apply apparmor profile: apparmor failed to apply profile: {error}"
            profile = self.plan.process.apparmor_profile.encode()
            nest.ask(Row(op=protocol.OP_APPARMOR, first=profile, says=says))

    def let_go(self, nest: Nest) -> int:
        """Have the process become the payload; returns its pid."""
        try:
            listener = steps.go(nest, self.fifo)
            if listener >= 0:
                self._send_listener(nest, listener)
        except ApptainerError as error:
            raise explained(error, self.plan.process, "") from None
        steps.log_set_up(self.pid)
        log.debug("setns_init: about to exec")
        self.failed = False
        return self.pid

    def _send_listener(self, nest: Nest, number: int) -> None:
        assert self.plan.seccomp is not None
        before, middle, after = self.record.state
        state = loads(before + b"%d" % self.record.init_pid + middle + b"running" + after)
        for name in ("rootfs", "created", "owner"):
            state.pop(name, None)
        told = {
            "ociVersion": self.config.get("ociVersion", ""),
            "fds": ["seccompFd"],
            "pid": self.pid,
            "metadata": self.plan.seccomp.get("listenerMetadata", ""),
            "state": state,
        }
        steps.send_listener(self.pid, number, self.plan.seccomp.get("listenerPath", ""), told)
        nest.acknowledge()

    def started(self) -> None:
        """Write the pid file."""
        self._write_pid()
        steps.tell_ready(self.stand_in)

    def _write_pid(self) -> None:
        if not self.pid_file:
            return
        try:
            _starter.run_step(protocol.STEP_TOLD_PID, steps.write_pid_file, self.pid_file, self.pid)
        except OSError as error:
            self.failed = True
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"open {error.filename}: {reason}") from None

    def watch(self, context: MonitorContext) -> int:
        """Pass signals and the terminal on until the payload has ended."""
        terminal.hand_over(context, self.pty, self.environment)
        return _starter.run_step(protocol.STEP_WATCHED, terminal.watch, context, self.pty)

    def clean_up(self, status: int | None) -> None:
        """End a process that failed on its way; the container goes on."""
        if self.failed and status is None and self.pid:
            try:
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
            except OSError:
                return
