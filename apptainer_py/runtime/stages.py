"""The stage drivers: in each process of a launch that runs Python, which hooks run, in which order.

The C side (starter/stage.c) has forked and dropped before this module is loaded, and compares the
process's real identity with the stage's before each hook.
"""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, ImageGone, LaunchError, is_gone
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.runtime import engine as engines
from apptainer_py.runtime.contexts import (
    CleanupContext,
    CleanupHostContext,
    CreateContext,
    Facts,
    InitContext,
    MonitorContext,
    PostStartContext,
    PostStartHostContext,
    PrepareContext,
    PrepareHostContext,
    StartContext,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.kernel._starter import StageInfo
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.bearer import Bearer

    Parse = Callable[[list[str], Mapping[str, str], str], ActionRequest | None]
    LoadBuiltin = Callable[[str], None]
    ParseCall = Callable[[list[str], Mapping[str, str]], OciCall]
    Report = Callable[[ApptainerError], int]

_SERVER_ENDS_MS = 2000
# What begins a message for the host pair: of an instance, which lets go of its caller's streams.
_FOR_HOST, _FOR_HOST_OF_INSTANCE = b"m", b"i"
_HOST_MESSAGE_BYTES = 8192
_STAGE_NAMES = {
    protocol.STAGE_MASTER: "master",
    protocol.STAGE_START: "stage2",
    protocol.STAGE_POST_START_HOST: "post_start_host",
    protocol.STAGE_CLEANUP_HOST: "cleanup_host",
    protocol.STAGE_METHODS: "methods",
}


class Request:
    """The launcher's request, decoded: what the caller typed and had around."""

    __slots__ = ("arguments", "cwd", "engine", "engine_file", "environment")

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        arguments, environment, cwd, engine, engine_file = _starter.read_request(
            os.pread(fd, size, 0)
        )
        self.arguments = [os.fsdecode(word) for word in arguments]
        self.environment: dict[str, str] = {}
        for entry in environment:
            name, equals, value = entry.partition(b"=")
            if equals and name:
                self.environment.setdefault(os.fsdecode(name), os.fsdecode(value))
        self.cwd = os.fsdecode(cwd)
        self.engine = os.fsdecode(engine)
        self.engine_file = os.fsdecode(engine_file)


def _load_engine(request: Request, load_builtin: LoadBuiltin) -> engines.Operations:
    if request.engine_file:
        with open(request.engine_file, "rb") as source:
            code = compile(source.read(), request.engine_file, "exec")
        # The caller's own file, with the caller's rights: the setuid flow refuses to get here.
        exec(code, {"__name__": "engine", "__file__": request.engine_file})  # noqa: S102
    else:
        load_builtin(request.engine)
    return engines.find_operations(request.engine)()


def _read_config(facts: Facts, info: StageInfo) -> None:
    if info["config_fd"] >= 0:
        values, lines, problems = _starter.parse_config_fd(info["config_fd"])
    else:
        values, lines, problems = _starter.default_config()
    facts.configuration = values
    facts.config_lines = lines
    facts.config_problems = problems


def run(info: StageInfo, parse: Parse, load_builtin: LoadBuiltin) -> int:
    """Run this process's stage; returns its exit status.

    `parse` turns the caller's words and environment into an ActionRequest; `load_builtin` imports
    the engine of a name, which registers itself.
    """
    stage = info["stage"]
    log.stage = _STAGE_NAMES[stage]
    facts = Facts(info)
    _read_config(facts, info)
    if stage == protocol.STAGE_START:
        return _run_start(info, facts, load_builtin)
    request = Request(info["request_fd"])
    if stage == protocol.STAGE_MASTER:
        return Master(info, facts, request).run(parse, load_builtin)
    operations = _load_engine(request, load_builtin)
    _init(operations, facts, stage)
    if stage == protocol.STAGE_METHODS:
        from apptainer_py.runtime.methods import serve_rpc_requests

        return serve_rpc_requests(info["methods_fd"], engines.find_rpc_methods(request.engine))
    return _run_host_helper(info, operations, request)


def _init(operations: engines.Operations, facts: Facts, stage: int) -> None:
    context = InitContext(facts.configuration, _STAGE_NAMES[stage])
    _starter.run_hook(protocol.HOOK_INIT_CONFIG, operations.init_config, context)


class Master:
    """Stage 1, which stays to create, watch and clean up."""

    def __init__(self, info: StageInfo, facts: Facts, request: Request) -> None:
        self.info = info
        self.facts = facts
        self.request = request
        self.keeper_fd = info["keeper_fd"]
        self.operations = engines.Operations()
        self.container_pid = 0
        self.status: int | None = None
        self.has_helpers = False

    def run(self, parse: Parse, load_builtin: LoadBuiltin) -> int:
        """Do the launch, step by step; returns 0, or the status of what went wrong."""
        try:
            # An engine of a test understands its own words.
            action = (
                None
                if self.request.engine_file
                else parse(
                    self.request.arguments[1:], self.request.environment, self.request.engine
                )
            )
            self.operations = _load_engine(self.request, load_builtin)
            _init(self.operations, self.facts, protocol.STAGE_MASTER)
            context = self.prepare(action)
            self.ask_for_container(context)
            self.start_stage2(context)
            return self.create_and_watch(context)
        except ApptainerError as error:
            self.clean_up()
            return report(error)

    def prepare(self, action: ActionRequest | None) -> PrepareContext:
        """Run `prepare_config`; start the host pair if the engine wants it."""
        context = PrepareContext(
            self.info,
            self.facts,
            tuple(self.request.arguments),
            self.request.environment,
            self.request.cwd,
            action,
        )
        _starter.run_hook(protocol.HOOK_PREPARE_CONFIG, self.operations.prepare_config, context)
        # Who only joins has all that there is on the host.
        if context.helpers_wanted and context.process_fd < 0:
            self._ask_keeper("cannot start the host helpers", protocol.OP_HOST_HELPERS)
            self.has_helpers = True
            if context.host_message:
                self._prepare_host(context)
        return context

    def _prepare_host(self, context: PrepareContext) -> None:
        """Have `prepare_host` run; the device that it hands over is the starter's."""
        prefix = _FOR_HOST_OF_INSTANCE if context.streams else _FOR_HOST
        for fd in self.info["helper_fds"]:
            _tell(fd, prefix + context.host_message)
        try:
            answer, device = _starter.receive_bytes(self.info["helper_fds"][1], 16)
        except OSError:
            answer, device = b"", -1
        if answer == b"f":
            raise StageFailed
        if answer != b"c":
            raise LaunchError(text="the process that prepares the host has ended")
        if device >= 0:
            self._ask_keeper("cannot serve the image", protocol.OP_FUSE_DEVICE, device)
            os.close(device)

    def _ask_keeper(self, what: str, op: int, passed: int = -1) -> None:
        from apptainer_py.runtime.mounting import refused

        try:
            _starter.send_operation(self.keeper_fd, op, 0, (), None, None, passed)
        except OSError:
            raise KeeperGone(what=what) from None
        self._reply(what, refused)

    def _reply(self, what: str, refused: Callable[[str, int, int], LaunchError]) -> int:
        try:
            code, error, value, _ = _starter.receive_answer(self.keeper_fd)
        except (EOFError, OSError):
            raise KeeperGone(what=what) from None
        if code != protocol.ERR_OK:
            raise refused(what, code, error)
        return value

    def ask_for_container(self, context: PrepareContext) -> None:
        """Have keeper judge the plan and clone the container."""
        from apptainer_py.runtime.mounting import refused

        plan = context.planned()
        if plan is None:
            raise LaunchError(text=f"the engine {self.request.engine} planned no container")
        flags = plan.flags
        if self.request.engine_file and engines.find_rpc_methods(self.request.engine):
            flags |= protocol.PLANFLAG_METHODS
        what = "cannot make the container"
        try:
            _starter.send_container(
                self.keeper_fd,
                protocol.OP_CONTAINER,
                os.fsencode(plan.image),
                plan.spaces,
                flags,
                plan.fuse_count,
                plan.uid,
                plan.gid,
                plan.groups,
                plan.caps,
                context.process_fd,
            )
        except OSError:
            raise KeeperGone(what=what) from None
        self.container_pid = self._reply(what, refused)

    def start_stage2(self, context: PrepareContext) -> None:
        """Give stage 2 its message, in a file of its own: it may be longer than a frame."""
        if context.is_lean():
            return
        fd = os.memfd_create("message", os.MFD_CLOEXEC)
        write_all(os.dup(fd), context.message)
        # Where stage 2 has ended, what depends on it fails next, and says so.
        for stream in context.streams:
            _tell(self.info["start_fd"], b"stream", stream)
        if context.process_fd < 0:
            _tell(self.info["start_fd"], b"message", fd)
        os.close(fd)

    def create_and_watch(self, context: PrepareContext) -> int:
        """Run the remaining hooks; the payload's status is keeper's business."""
        from apptainer_py.runtime.mounting import Mounting

        joins = context.process_fd >= 0
        mounting = (
            None if joins else Mounting(self.keeper_fd, self.info["rpc_fd"], self.container_pid)
        )
        create = CreateContext(
            self.facts,
            mounting,
            self.info["methods_fd"],
            first_pid=self.container_pid,
            bearer=self._bearer() if joins or context.is_lean() else None,
            start_fd=self.info["start_fd"],
        )
        try:
            _starter.run_hook(
                protocol.HOOK_CREATE_CONTAINER, self.operations.create_container, create
            )
        except (ApptainerError, OSError) as error:
            if self._server_ended(error):
                raise ImageGone from None
            if isinstance(error, ApptainerError) and self._stage2_said():
                raise StageFailed from None
            raise
        os.close(self.info["rpc_fd"])
        if not self.wait_until_started(instance=bool(context.streams)):
            self.clean_up()
            return 255
        self._trigger_helper(0)
        started = PostStartContext(self.facts, self.container_pid)
        _starter.run_hook(
            protocol.HOOK_POST_START_PROCESS, self.operations.post_start_process, started
        )
        monitor = MonitorContext(self.keeper_fd, self.container_pid)
        if self.status is None:
            self.status = _starter.run_hook(
                protocol.HOOK_MONITOR_CONTAINER, self.operations.monitor_container, monitor
            )
        self.clean_up()
        return 0

    def _bearer(self) -> Bearer:
        from apptainer_py.runtime.bearer import Bearer

        return Bearer(self.info["start_fd"])

    def _server_ended(self, error: ApptainerError | OSError) -> bool:
        """Return whether the image's server has ended: then that is why something went wrong."""
        import select

        number = error.errno if isinstance(error, OSError) else error.facts.get("errno")
        events = select.poll()
        events.register(self.keeper_fd, select.POLLIN)
        # A file system shows its server's end before the server's parent does.
        while events.poll(_SERVER_ENDS_MS if is_gone(number) else 0):
            event = _starter.receive_event(self.keeper_fd)
            if event is None or event[0] == protocol.EVENT_SERVER_ENDED:
                return event is not None
        return False

    def _stage2_said(self) -> bool:
        """Return whether stage 2 has already told the user why it ended."""
        try:
            os.set_blocking(self.info["start_fd"], False)
            return bool(_starter.receive_bytes(self.info["start_fd"], 16)[0])
        except OSError:
            return False

    def wait_until_started(self, *, instance: bool = False) -> bool:
        """Wait until stage 2 has become the payload, which closes its end; False if it failed.

        Raises:
            StarterGone: somebody ended before, and did not say why.
        """
        from apptainer_py.runtime.mounting import StarterGone

        if _heard(self.info["start_fd"]):
            # Our own end would have keeper kill stage 2, whose status is the one that counts; but
            # an instance would go on without it.
            if not instance:
                MonitorContext(self.keeper_fd, 0).wait()
            return False
        try:
            event = _starter.receive_event(self.keeper_fd)
        except OSError:
            event = None
        if event is not None and event[0] == protocol.EVENT_GO:
            self.container_pid = event[1]
            return True
        if event is not None and event[0] == protocol.EVENT_SERVER_ENDED:
            raise ImageGone
        if event is not None and event[0] == protocol.EVENT_PAYLOAD_ENDED:
            self.status = event[2]
        raise StarterGone(what="cannot start the payload")

    def _trigger_helper(self, which: int) -> None:
        fd = self.info["helper_fds"][which]
        if not self.has_helpers:
            return
        _tell(fd, b"c")
        answer = _heard(fd)
        if answer != b"c" and which == 0:
            raise LaunchError(text="the engine's post_start_host hook failed")

    def clean_up(self) -> None:
        """Run `cleanup_container`, then `cleanup_host`; a failure is told and changes no status."""
        context = CleanupContext(self.status)
        try:
            _starter.run_hook(
                protocol.HOOK_CLEANUP_CONTAINER, self.operations.cleanup_container, context
            )
        except ApptainerError as error:
            log.warning(f"cleanup: {error}")
        self._trigger_helper(1)


def _tell(fd: int, data: bytes, passed: int = -1) -> None:
    """Send to another stage, which may have ended: that is seen, and told, where it matters."""
    try:
        _starter.send_bytes(fd, data, passed)
    except OSError:
        return


def _heard(fd: int, size: int = 16) -> bytes:
    """Return what another stage says; nothing if it has ended, with or without our words unread."""
    try:
        return _starter.receive_bytes(fd, size)[0]
    except OSError:
        return b""


class KeeperGone(LaunchError):
    """The first process of the launch ended in the middle."""

    message = "{what}: the starter has ended"


def run_caller(info: StageInfo, parse: ParseCall, load_builtin: LoadBuiltin, report: Report) -> int:
    """Run a launch of the flow CALLER, whose only stage this is; returns the exit status.

    `report` tells the user of a failure in the form of the command line, and returns its status.
    """
    log.stage = "master"
    return Caller(info, Facts(info), Request(info["request_fd"])).run(parse, load_builtin, report)


class Caller:
    """Master of an engine whose process is data: the call's own process."""

    def __init__(self, info: StageInfo, facts: Facts, request: Request) -> None:
        self.info = info
        self.facts = facts
        self.request = request
        self.operations = engines.Operations()
        self.status: int | None = None

    def run(self, parse: ParseCall, load_builtin: LoadBuiltin, report: Report) -> int:
        """Do the launch, step by step; returns the payload's status, or that of a failure."""
        try:
            call = parse(self.request.arguments, self.request.environment)
            self.operations = _load_engine(self.request, load_builtin)
            context = self._prepare(call)
            return self._create_and_watch(context)
        except ApptainerError as error:
            self._end_first()
            self._clean_up()
            return report(error)
        except Exception:
            # A mistake of ours leaves nothing behind either.
            self._end_first()
            self._clean_up()
            raise

    def _prepare(self, call: OciCall) -> PrepareContext:
        _init(self.operations, self.facts, protocol.STAGE_MASTER)
        request = self.request
        words = tuple(request.arguments)
        context = PrepareContext(
            self.info, self.facts, words, request.environment, request.cwd, None, call
        )
        _starter.run_hook(protocol.HOOK_PREPARE_CONFIG, self.operations.prepare_config, context)
        return context

    def _create_and_watch(self, context: PrepareContext) -> int:
        from apptainer_py.runtime.nest import Nest

        operations = self.operations
        nest = Nest(self.info["init_fd"])
        create = CreateContext(self.facts, None, -1, nest, self.info["init_pid"])
        _starter.run_hook(protocol.HOOK_CREATE_CONTAINER, operations.create_container, create)
        pid = operations.let_go(create)
        os.close(self.info["request_fd"])
        self._reap_first()
        started = PostStartContext(self.facts, pid)
        _starter.run_hook(protocol.HOOK_POST_START_PROCESS, operations.post_start_process, started)
        if not operations.stays:
            return 0
        monitor = MonitorContext(-1, pid, self.info["watcher"])
        self.status = _starter.run_hook(
            protocol.HOOK_MONITOR_CONTAINER, operations.monitor_container, monitor
        )
        self._clean_up()
        return (
            os.WEXITSTATUS(self.status)
            if os.WIFEXITED(self.status)
            else (128 + os.WTERMSIG(self.status))
        )

    def _reap_first(self) -> None:
        """Reap the process that has made the container's: it would be our caller's to reap."""
        try:
            os.waitpid(self.info["init_pid"], 0)
        except ChildProcessError:
            return
        self.info["init_pid"] = 0

    def _end_first(self) -> None:
        """End it where it has not come so far: it may be in the control groups that go now."""
        if self.info["init_pid"] > 0:
            os.kill(self.info["init_pid"], 9)
            self._reap_first()

    def _clean_up(self) -> None:
        context = CleanupContext(self.status)
        try:
            _starter.run_hook(
                protocol.HOOK_CLEANUP_CONTAINER, self.operations.cleanup_container, context
            )
        except ApptainerError as error:
            log.warning(f"{error}")


class StageFailed(ApptainerError):
    """Stage 2 ended, and has said why."""

    message = ""


def report(error: ApptainerError) -> int:
    """Say what went wrong and what to do; returns the exit status."""
    text = str(error)
    if text:
        log.fatal(text)
        hint = error.advice()
        if hint:
            log.info(hint)
    return error.exit_code


class _Sealed:
    """Refuses every import: after the root has changed, a module would be the image's."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        raise ImportError(f"{name} is imported after the seal")


def seal() -> None:
    """Make sure that nothing more is loaded from a file system that is about to be replaced."""
    if _starter.is_complete():
        sys.path.clear()
        sys.path_hooks.clear()
        sys.path_importer_cache.clear()
    # A stage's `os` would fetch what it lacks from a file (starter/stage_os.py).
    vars(os).pop("__getattr__", None)
    sys.meta_path[:] = [_Sealed()]


def _run_start(info: StageInfo, facts: Facts, load_builtin: LoadBuiltin) -> int:
    operations = _load_engine(Request(info["request_fd"]), load_builtin)
    _init(operations, facts, protocol.STAGE_START)
    seal()
    streams: list[int] = []
    word, fd = b"stream", -1
    while word == b"stream":
        try:
            word, fd = _starter.receive_bytes(info["start_fd"], 16)
        except OSError:
            fd = -1
        if fd < 0:
            return 255  # master has ended, and keeper tells of that
        streams.append(fd)
    fd = streams.pop()
    os.lseek(fd, 0, 0)
    message = read_at_most(fd, os.fstat(fd).st_size)
    context = StartContext(message, tuple(streams), info["start_fd"])
    if not _starter.tell_sealed():
        return 255
    operations.rehearse(message)
    if not _starter.wait_for_go():
        return 255
    try:
        _starter.run_hook(protocol.HOOK_START_PROCESS, operations.start_process, context)
        status = 255
    except ApptainerError as error:
        status = report(error)
    except Exception as error:  # noqa: BLE001  an engine's mistake must reach the user as a line
        log.fatal(f"internal error: {type(error).__name__}: {error}")
        status = 255
    # Before the exit: master must not see an end that looks like a successful execve.
    _tell(info["start_fd"], b"failed")
    return status


def _run_host_helper(info: StageInfo, operations: engines.Operations, request: Request) -> int:
    fd = info["trigger_fd"]
    cleans_up = info["stage"] == protocol.STAGE_CLEANUP_HOST
    environment, cwd = request.environment, request.cwd
    word = _heard(fd, _HOST_MESSAGE_BYTES)
    message = b""
    if word[:1] in (_FOR_HOST, _FOR_HOST_OF_INSTANCE):
        message = word[1:]
        if cleans_up:
            _make_host_ready(fd, operations, PrepareHostContext(environment, cwd, message))
        if word[:1] == _FOR_HOST_OF_INSTANCE:
            _let_streams_go()
        word = _heard(fd)
    orderly = bool(word)
    answer = b"c"
    try:
        if cleans_up:
            last = CleanupHostContext(environment, cwd, message, orderly=orderly)
            _starter.run_hook(protocol.HOOK_CLEANUP_HOST, operations.cleanup_host, last)
        elif orderly or message:
            first = PostStartHostContext(environment, cwd, message, started=orderly)
            _starter.run_hook(protocol.HOOK_POST_START_HOST, operations.post_start_host, first)
    except ApptainerError as error:
        report(error)
        answer = b"f"
    if orderly:
        _tell(fd, answer)
    return 0


def _make_host_ready(fd: int, operations: engines.Operations, context: PrepareHostContext) -> None:
    answer = b"c"
    try:
        _starter.run_hook(protocol.HOOK_PREPARE_HOST, operations.prepare_host, context)
    except ApptainerError as error:
        if not _has_hung_up(fd):
            report(error)
        answer = b"f"
    _tell(fd, answer, context.device)
    if context.device >= 0:
        os.close(context.device)


def _has_hung_up(fd: int) -> bool:
    """Return whether master has gone: the other of the host pair then undoes what is begun here."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _let_streams_go() -> None:
    """An instance goes on when its command has ended, and who reads what that says must see so."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
