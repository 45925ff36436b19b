"""What each stage may do: one class a stage, and a hook holds no other handle.

The classes are final and share no base, so nothing widens by accident: a hook that reaches for
something of another stage fails under a type checker, and with AttributeError when it runs. Only
the stage drivers make them.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ImageGone
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import final

    from apptainer_py.kernel._starter import StageInfo
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.plan import ContainerPlan
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.bearer import Bearer
    from apptainer_py.runtime.meeting import Meeting
    from apptainer_py.runtime.mounting import Mounting
    from apptainer_py.runtime.nest import Nest
else:

    def final(cls):
        """Stands for typing.final, whose module costs more than this one."""
        return cls


# The module `signal` is too heavy to be imported for a number; a shell adds 128.
_SIGBUS = 7
_BUS_ERRORS = (-_SIGBUS, 128 + _SIGBUS)
# A sleep that is worth giving pages back for, as in starter/wire_client.h.
_LONG_S = 0.1
_SERVERS_END_S = 0.25


class Facts:
    """What the starter says about the caller and the flow; read-only."""

    __slots__ = (
        "caller_pid",
        "config_lines",
        "config_problems",
        "configuration",
        "flow",
        "gid",
        "permitted",
        "reason",
        "uid",
        "umask",
    )

    def __init__(self, info: StageInfo) -> None:
        self.flow = info["flow"]
        self.reason = info["reason"]
        self.uid = info["uid"]
        self.gid = info["gid"]
        self.umask = info["umask"]
        self.caller_pid = info["caller_pid"]
        self.permitted = info["permitted"]
        self.configuration: Mapping[str, object] = {}
        self.config_lines: Mapping[str, int] = {}
        self.config_problems: list[tuple[int, str, str, str]] = []


@final
class InitContext:
    """As the stage: may read the administrator's configuration."""

    __slots__ = ("configuration", "stage")

    def __init__(self, configuration: Mapping[str, object], stage: str) -> None:
        self.configuration = configuration
        self.stage = stage


@final
class PrepareContext:
    """As the caller, before anything exists: may read the host and plan the container."""

    __slots__ = (
        "_info",
        "_plan",
        "action",
        "arguments",
        "call",
        "cwd",
        "environment",
        "facts",
        "helpers_wanted",
        "host_message",
        "message",
        "process_fd",
        "ready_fd",
        "streams",
    )

    def __init__(  # noqa: PLR0913 one thing each
        self,
        info: StageInfo,
        facts: Facts,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        cwd: str,
        action: ActionRequest | None,
        call: OciCall | None = None,
    ) -> None:
        self._info = info
        self._plan: ContainerPlan | None = None
        self.facts = facts
        self.arguments = arguments
        self.environment = environment
        self.cwd = cwd
        self.action = action
        self.call = call
        self.helpers_wanted = False
        self.host_message = b""
        self.message = b""
        # The process of /proc whose instance is joined, the mounts that are shared, or -1.
        self.process_fd = -1
        # What an instance has for its standard streams, in their order.
        self.streams: tuple[int, ...] = ()
        # Of a launcher that waits for the word that all stands, or -1.
        self.ready_fd = info["ready_fd"]

    def image_server(self) -> tuple[int, int]:
        """Return the socket of the image server that waits for an image, and its pid."""
        return self._info["server_fd"], self._info["server_pid"]

    def plan(self, plan: ContainerPlan) -> None:
        """Set the container that the starter will be asked for."""
        self._plan = plan

    def planned(self) -> ContainerPlan | None:
        """Return the plan as it stands."""
        return self._plan

    def is_lean(self) -> bool:
        """Return whether stage 2 has no interpreter, and master says what the payload is."""
        return self._plan is not None and bool(self._plan.flags & protocol.PLANFLAG_LEAN)

    def tell_start(self, message: bytes) -> None:
        """Set what stage 2 will find as its message: any number of bytes."""
        self.message = message

    def want_host_helpers(self) -> None:
        """Ask for the host pair, `post_start_host` and `cleanup_host`."""
        self.helpers_wanted = True

    def tell_host(self, message: bytes) -> None:
        """Ask for the host pair with a message for it, and for `prepare_host` before all else."""
        self.helpers_wanted = True
        self.host_message = message

    def join_network(self, fd: int) -> int:
        """Have the container join an open network namespace; returns an ERR_* of the protocol."""
        keeper_fd = self._info["keeper_fd"]
        try:
            _starter.send_operation(keeper_fd, protocol.OP_NETNS, 0, (), None, None, fd)
            _, code, _, _ = _starter.receive_reply(keeper_fd)
        except (EOFError, OSError):
            os._exit(255)  # keeper has ended, which is all that can be told
        return code

    def record_refusal(self, image: str) -> None:
        """Have the starter record that this image is refused; only the setuid flow has a record.

        A plan without no_new_privs is one that the starter never carries out for a user.
        """
        if self.facts.flow != protocol.FLOW_SETUID:
            return
        fd = self._info["keeper_fd"]
        nothing = (0, 0, 0, 0, 0)
        _starter.send_container(
            fd, protocol.OP_CONTAINER, os.fsencode(image), 0, 0, 0, self.facts.uid, self.facts.gid,
            (), nothing,
        )  # fmt: skip
        try:
            _starter.receive_reply(fd)
        except (EOFError, OSError):
            os._exit(255)

    def use_plain_starter(self) -> None:
        """Give up the setuid flow for this launch: the starter runs again without the bit."""
        fd = self._info["keeper_fd"]
        try:
            _starter.send_operation(fd, protocol.OP_PLAIN_STARTER, 0, (), None, None)
            _starter.receive_reply(fd)
        except (EOFError, OSError):
            os._exit(255)  # keeper has ended, which is all that can be told
        os._exit(0)


@final
class CreateContext:
    """As the caller, beside the container: may ask the process that mounts for its operations.

    That is `mounting`; or, for an engine whose process is data, `nest` with the pid of its first
    process. `bearer` is there where master says what the payload is: for a lean stage 2, or where a
    container is joined, and nothing mounted. Each launch has only what is of its own kind.
    """

    __slots__ = ("_methods_fd", "_start_fd", "bearer", "facts", "first_pid", "mounting", "nest")

    def __init__(  # noqa: PLR0913 one thing each
        self,
        facts: Facts,
        mounting: Mounting | None,
        methods_fd: int,
        nest: Nest | None = None,
        first_pid: int = 0,
        bearer: Bearer | None = None,
        start_fd: int = -1,
    ) -> None:
        self.facts = facts
        self._start_fd = start_fd
        self._methods_fd = methods_fd
        if mounting is not None:
            self.mounting = mounting
        if nest is not None:
            self.nest = nest
        if bearer is not None:
            self.bearer = bearer
        self.first_pid = first_pid

    def hand_over(self, fd: int) -> None:
        """Give stage 2 one more descriptor, which it fetches with `fetch`, in order."""
        try:
            _starter.send_bytes(self._start_fd, b"more", fd)
        except OSError:
            return  # stage 2 has ended, which is seen, and told, at the seal

    def call(self, method: str, data: bytes) -> bytes:
        """Call a method that the engine registered with `register_rpc_methods`."""
        from apptainer_py.runtime.methods import call_method

        return call_method(self._methods_fd, method, data)


@final
class StartContext:
    """As the payload, inside the container, sealed: may become the payload and nothing else."""

    __slots__ = ("_start_fd", "_streams", "message")

    def __init__(self, message: bytes, streams: tuple[int, ...] = (), start_fd: int = -1) -> None:
        self.message = message
        self._streams = streams
        self._start_fd = start_fd

    def fetch(self) -> int:
        """Return the next descriptor that `create_container` has handed over."""
        fd = _starter.receive_bytes(self._start_fd, 16)[1]
        if fd < 0:
            os._exit(255)  # master has ended, and keeper tells of that
        return fd

    def output(self) -> tuple[int, int]:
        """Return what the payload will have for standard output and error."""
        return (self._streams[1], self._streams[2]) if self._streams else (1, 2)

    def filter_calls(self, program: bytes, flags: int) -> None:
        """Have the payload start under this seccomp filter, or not at all."""
        _starter.set_filter(program, flags)

    def label(self, kind: int, text: bytes) -> int:
        """Have the payload start with this security label; returns 0 or errno."""
        return _starter.set_label(kind, text)

    def execve(self, path: bytes, arguments: list[bytes], environment: list[bytes]) -> OSError:
        """Become the payload; returns, with the reason, only if that fails."""
        # What fails here is told to whoever has called, who has these streams still.
        own = [os.dup(number) for number in range(len(self._streams))]
        for number, fd in enumerate(self._streams):
            os.dup2(fd, number)
        error = _starter.exec_payload(path, arguments, environment)
        for number, fd in enumerate(own):
            os.dup2(fd, number)
            os.close(fd)
        return OSError(error, os.strerror(error))


@final
class PostStartContext:
    """As the caller: may know which process the payload is, and let go who waits for it."""

    __slots__ = ("facts", "pid")

    def __init__(self, facts: Facts, pid: int) -> None:
        self.facts = facts
        self.pid = pid


@final
class MonitorContext:
    """As the caller, while the payload runs: may wait for its end."""

    __slots__ = ("_keeper_fd", "pid", "watcher")

    def __init__(self, keeper_fd: int, pid: int, watcher: bytes = b"") -> None:
        self._keeper_fd = keeper_fd
        self.pid = pid
        # The program that can wait in this process's place, or nothing.
        self.watcher = watcher

    def ends_within(self, seconds: float, meeting: Meeting | None = None) -> bool:
        """Return whether there is news of the payload, or of who serves it, within a time."""
        if meeting is not None:
            return meeting.until(self._keeper_fd, seconds)
        import select

        events = select.poll()
        events.register(self._keeper_fd, select.POLLIN)
        return bool(events.poll(seconds * 1000))

    def wait(self, meeting: Meeting | None = None) -> int:
        """Return the payload's wait status (waitpid(2)); 255 << 8 if the starter is gone.

        Until then who comes to a meeting has its answer.
        """
        if self._keeper_fd < 0:
            ended = os.pidfd_open(self.pid)
            _starter.release_code(ended)
            os.close(ended)
            return os.waitpid(self.pid, 0)[1]
        if meeting is None:
            _starter.release_code(self._keeper_fd)
        elif not meeting.until(self._keeper_fd, _LONG_S):
            _starter.release_code(-1)
        served = True
        while True:
            if meeting is not None:
                meeting.until(self._keeper_fd)
            event = _starter.receive_event(self._keeper_fd)
            if event is None:
                return 255 << 8
            if event[0] == protocol.EVENT_SERVER_ENDED:
                # One that exits knows from the kernel that the mount has gone with the payload.
                served = not os.WIFSIGNALED(event[2])
            elif event[0] == protocol.EVENT_PAYLOAD_ENDED:
                # The server ends with every container; the starter kills those that need it still.
                if self.pid and event[2] and not (served and self._is_served_after(event[2])):
                    log.fatal(str(ImageGone()))
                return event[2]

    def _is_served_after(self, status: int) -> bool:
        """Return whether an end was the payload's own.

        A page that its server did not bring is a bus error, and the starter may find the payload's
        end before the server's.
        """
        if os.waitstatus_to_exitcode(status) not in _BUS_ERRORS:
            return True
        while self.ends_within(_SERVERS_END_S):
            event = _starter.receive_event(self._keeper_fd)
            if event is None:
                return True
            if event[0] == protocol.EVENT_SERVER_ENDED and os.WIFSIGNALED(event[2]):
                return False
        return True


@final
class CleanupContext:
    """As the caller, at the end: may know how it ended (None: no payload ever ran)."""

    __slots__ = ("status",)

    def __init__(self, status: int | None) -> None:
        self.status = status


@final
class PrepareHostContext:
    """As the caller in the host's namespaces, before the container: may mount, as a user may."""

    __slots__ = ("cwd", "device", "environment", "message")

    def __init__(self, environment: Mapping[str, str], cwd: str, message: bytes) -> None:
        self.environment = environment
        self.cwd = cwd
        self.message = message
        self.device = -1

    def hand_over(self, fd: int) -> None:
        """Give the starter the FUSE device of what was mounted: its device 0, to be served."""
        self.device = fd


@final
class PostStartHostContext:
    """As the caller in the host's namespaces, once the payload runs.

    Where the host pair has a message, this is also told of a launch that ends before (`started`).
    """

    __slots__ = ("cwd", "environment", "message", "started")

    def __init__(
        self,
        environment: Mapping[str, str],
        cwd: str,
        message: bytes = b"",
        *,
        started: bool = True,
    ) -> None:
        self.environment = environment
        self.cwd = cwd
        self.message = message
        self.started = started


@final
class CleanupHostContext:
    """As the caller in the host's namespaces, when everything else has ended."""

    __slots__ = ("cwd", "environment", "message", "orderly")

    def __init__(
        self, environment: Mapping[str, str], cwd: str, message: bytes = b"", *, orderly: bool
    ) -> None:
        self.environment = environment
        self.cwd = cwd
        self.message = message
        self.orderly = orderly
