"""A container of `apptainer-py oci`: with a log, sockets to attach and command, and a monitor.

Master makes all that the monitor needs, and becomes it: the container's first process is then the
child of a program without an interpreter (starter/monitor.h).
"""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.kernel import _container
from apptainer_py.model import protocol
from apptainer_py.model.json_out import dumps, quoted
from apptainer_py.model.json_text import loads
from apptainer_py.model.monitor_frame import FORMATS, MonitorData, monitor_frame
from apptainer_py.model.oci_plan import Row
from apptainer_py.model.record_frame import FLAG_MONITOR
from apptainer_py.runtime.containers import ContainerError, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.oci.create import Creation
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.record_frame import RecordData
    from apptainer_py.runtime.containers import StateDir
    from apptainer_py.runtime.nest import Nest

_PROGRAM = f"{build.LIBEXECDIR}/starter-monitor"
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
_LOG_MODE = 0o640
_BACKLOG = 128
_SYNC_MS = 5000
_SETTLE_MS = 10_000
_MONITOR_MS = 2000
_SIGKILL = 9
# Files that the monitor leaves (starter/monitor_state.c).
MONITOR, EXIT = "monitor", "exit"


class Monitored:
    """What a container has more because somebody stays with it."""

    def __init__(self, call: OciCall, ready_fd: int) -> None:
        self.format = call.text("log-format") or "kubernetes"
        if self.format not in FORMATS:
            raise ContainerError(text=f"log format {self.format} is not supported")
        self.log_path = _absolute(call.text("log-path"))
        self.sync_path = _absolute(call.text("sync-socket"))
        # Without anybody's terminal being read: those keys are meant for another program.
        self.reads = (call.command == "run" and not call.flag("detach")) or not os.isatty(0)
        self.ready_fd = ready_fd
        self.following = "c"
        if call.command == "run":
            self.following = "d" if call.flag("detach") else "r"
        self.attach_fd = self.control_fd = self.log_fd = -1
        self.streams = [-1, -1, -1]
        if self.log_path:
            self._open_log()

    def _open_log(self) -> None:
        before = os.umask(0)
        try:
            self.log_fd = os.open(self.log_path, _LOG_FLAGS, _LOG_MODE)
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"open {self.log_path}: {reason}") from None
        finally:
            os.umask(before)

    def begin(self, work: Creation) -> None:
        """Make what lies in the state directory, and say that the container is being created."""
        assert work.state is not None
        if self.log_fd < 0:
            self.log_path = f"{work.state.path}/{work.name}.log"
            self._open_log()
        before = os.umask(0o177)
        try:
            self.attach_fd = self._listen(work.state.fd, "attach.sock")
            self.control_fd = self._listen(work.state.fd, "control.sock")
        finally:
            os.umask(before)
        if self.sync_path:
            self._tell(work)

    def _listen(self, directory: int, name: str) -> int:
        # By the descriptor: the path itself may be longer than a socket's can be.
        path = f"/proc/self/fd/{directory}/{name}".encode()
        try:
            return _container.listen_unix(path, _BACKLOG)
        except OSError as error:
            raise ContainerError(text=f"{name}: {(error.strerror or '').lower()}") from None

    def _tell(self, work: Creation) -> None:
        before, after = _state(work)
        try:
            fd = _container.connect_unix(os.fsencode(self.sync_path), _SYNC_MS)
            try:
                _container.send_fd(fd, before + b"creating" + after + b"}")
            finally:
                os.close(fd)
        except OSError as error:
            reason = (error.strerror or "").lower()
            log.warning(f"dial unix {self.sync_path}: connect: {reason}")

    def give_streams(self, nest: Nest) -> None:
        """Give the first process pipes for its streams, whose other ends the monitor has."""
        for number in range(3):
            read, write = os.pipe()
            theirs = read if number == 0 else write
            self.streams[number] = write if number == 0 else read
            says = "cannot give the container its streams: {error}"
            try:
                nest.row(Row(op=protocol.OP_STREAM, numbers=(number,), says=says), theirs)
            finally:
                os.close(theirs)
        nest.settle()

    def take_over(self, work: Creation, pty: int) -> None:
        """Become the monitor.

        Raises:
            ContainerError: there is no such program.
        """
        assert work.state is not None
        try:
            frame = monitor_frame(self._data(work, pty))
            settings = _container.memfd_seal(frame, "monitor")
        except ValueError as error:
            raise ContainerError(text=f"{error}") from None
        _keep_inherited()
        own = (work.state.fd, self.attach_fd, self.control_fd, self.log_fd, *self.streams, pty)
        for fd in (*own, self.ready_fd, settings):
            if fd >= 0:
                os.set_inheritable(fd, True)  # noqa: FBT003 the function has no names
        title = f"Apptainer OCI {work.name}"
        try:
            os.execve(_PROGRAM, [title, str(settings)], {})
        except OSError as error:
            text = f"{_PROGRAM}: {(error.strerror or '').lower()}"
            raise ContainerError(text=text) from None

    def _data(self, work: Creation, pty: int) -> MonitorData:
        assert work.state is not None
        return MonitorData(
            init_pid=work.pid,
            created_ns=work.created_ns,
            state=_state(work),
            sockets=_sockets(work.state.path),
            log=os.fsencode(self.log_path),
            log_format=self.format,
            pid_file=os.fsencode(work.pid_file),
            sync_socket=os.fsencode(self.sync_path),
            freezer=os.fsencode(work.cgroup.freezer_file()),
            root=os.fsencode(work.state.root),
            name=os.fsencode(work.name),
            dir_fd=work.state.fd,
            attach_fd=self.attach_fd,
            control_fd=self.control_fd,
            log_fd=self.log_fd,
            streams=(self.streams[0], self.streams[1], self.streams[2]),
            pty_fd=pty,
            ready_fd=self.ready_fd,
            own_streams=not work.plan.terminal,
            reads=self.reads and not work.plan.terminal,
            following=self.following,
        )


def _command(state: StateDir, text: bytes, timeout_ms: int) -> None:
    """Say something to a container's monitor, and wait for its answer, which is the end."""
    import select

    try:
        fd = _container.connect_unix(f"/proc/self/fd/{state.fd}/control.sock".encode(), timeout_ms)
    except OSError:
        return  # it has ended, and left all that it knew
    try:
        _container.send_fd(fd, text)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(timeout_ms)
    except OSError:
        return
    finally:
        os.close(fd)


def settle_start(state: StateDir, record: RecordData) -> None:
    """Wait until the monitor has noted that its container was started."""
    if record.flags & FLAG_MONITOR:
        _command(state, b"{}", _SETTLE_MS)


def settle(state: StateDir) -> None:
    """Wait until the monitor of a container that has ended has written how."""
    if state.has(EXIT):
        return
    # Not a whole command: it is held until the monitor has no more to say.
    _command(state, b"", _SETTLE_MS)


def end_monitor(record: RecordData) -> None:
    """Wait a while for the end of a monitor whose container has ended, then end it."""
    if not record.flags & FLAG_MONITOR:
        return
    try:
        fd = _container.pidfd_open(record.creator_pid)
    except OSError:
        return
    try:
        if start_time(record.creator_pid) != record.creator_start:
            return
        if not _container.wait_pidfd(fd, _MONITOR_MS):
            _container.pidfd_signal(fd, _SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def monitor_facts(state: StateDir) -> dict[str, object]:
    """Return what the monitor knows of its container; nothing where there is none."""
    data = state.read(MONITOR)
    found: object = loads(data) if data else {}
    return found if isinstance(found, dict) else {}


def _keep_inherited() -> None:
    """Have whatever the caller had open closed by the next execve(2): a lock of his, or a pipe."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)  # noqa: FBT003 the function has no names
        except OSError:  # what the list was read by
            continue


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _state(work: Creation) -> tuple[bytes, bytes]:
    """Return the state of runtime.md on one line, around the status."""
    before = dumps({"ociVersion": work.config.get("ociVersion", ""), "id": work.name})
    after: dict[str, object] = {"pid": work.pid} if work.pid else {}
    after["bundle"] = work.bundle
    if work.plan.annotations:
        after["annotations"] = dict(work.plan.annotations)
    first = f'{before[:-1]},"status":"'
    return first.encode("utf-8", "surrogateescape"), f'",{dumps(after)[1:-1]}'.encode(
        "utf-8", "surrogateescape"
    )


def _sockets(directory: str) -> bytes:
    attach, control = quoted(f"{directory}/attach.sock"), quoted(f"{directory}/control.sock")
    text = f'"attachSocket":{attach},"controlSocket":{control}'
    return text.encode("utf-8", "surrogateescape")
