"""`start`, `kill`, `delete`, `pause` and `resume`, for what the launcher does not do by itself."""

from __future__ import annotations

import errno
import os
import select

from apptainer_py.engines.oci import cleanup
from apptainer_py.engines.oci.groups import groups_of
from apptainer_py.engines.oci.hooks import run_frame
from apptainer_py.engines.oci.monitored import end_monitor, settle, settle_start
from apptainer_py.kernel import _container
from apptainer_py.model.record_frame import FLAG_PIDNS
from apptainer_py.runtime.containers import (
    FIFO,
    PHASE_CREATING,
    RECORD,
    ContainerError,
    NoContainer,
    StateDir,
    start_time,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.record_frame import RecordData

_SIGKILL, _SIGTERM = 9, 15
_END_MS = 10_000


def start(call: OciCall, environment: Mapping[str, str]) -> str:
    """Have a created container run what its configuration names.

    Raises:
        ContainerError: it is not created, or a poststart hook failed, which ends it.
    """
    state = StateDir.open(call.root, call.arguments[0])
    state.lock()
    record = state.read_record()
    status = state.status(record)
    if call.apptainer and status != "created":
        text = f"cannot start '{state.name}', the state of the container must be created"
        raise ContainerError(text=text)
    if status == "stopped":
        raise ContainerError(text="cannot start a container that has stopped")
    if status == "running":
        raise ContainerError(text="cannot start an already running container")
    if status != "created":
        raise ContainerError(text=f"cannot start a container in the {status} state")
    _release(state, record)
    state.unlock()
    settle_start(state, record)
    failed = run_frame(record.poststart, "poststart", record.init_pid, environment)
    if failed:
        cleanup.end_process(record.init_pid, record.init_start)
        raise ContainerError(text=failed)
    return ""


def _release(state: StateDir, record: RecordData) -> None:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    fifo = os.open(FIFO, flags, dir_fd=state.fd)
    first = _container.pidfd_open(record.init_pid)
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    poll.register(first, select.POLLIN)
    ready = [fd for fd, _ in poll.poll()]
    said = os.read(fifo, 1) if fifo in ready else b""
    os.close(fifo)
    os.close(first)
    if not said:
        raise ContainerError(text="container process is already dead")
    os.unlink(FIFO, dir_fd=state.fd)


def signal_number(word: str) -> int:
    """Return the number of a signal: "9", "KILL" or "SIGKILL".

    Raises:
        ContainerError: there is no such signal.
    """
    import signal

    if word.lstrip("+-").isdecimal():
        return int(word)
    name = word.upper().removeprefix("SIG")
    found = {entry.name.removeprefix("SIG"): entry.value for entry in signal.Signals}
    found["IO"] = found.get("IO", found.get("POLL", 29))
    if name not in found:
        raise ContainerError(text=f'unknown signal "{word}"')
    return found[name]


def kill(call: OciCall, environment: Mapping[str, str]) -> str:
    """Send a signal to a container's first process.

    Raises:
        ContainerError: it does not run.
    """
    state = StateDir.open(call.root, call.arguments[0])
    record = state.read_record()
    if call.apptainer and state.status(record) not in ("created", "running"):
        text = f"cannot kill '{state.name}', the state of the container must be created or running"
        raise ContainerError(text=text)
    word = call.arguments[1] if len(call.arguments) > 1 else call.text("signal")
    number = _SIGKILL if call.flag("force") else signal_number(word or "SIGTERM")
    groups = groups_of(record, environment)
    if call.flag("all"):
        groups.kill(number)
        return ""
    try:
        first = _container.pidfd_open(record.init_pid)
        if start_time(record.init_pid) != record.init_start:
            raise ProcessLookupError
        _container.pidfd_signal(first, number)
    except OSError as error:
        text = "container not running"
        if error.errno == errno.EINVAL:
            text = "unable to signal init: invalid argument"
        raise ContainerError(text=text) from None
    if number == _SIGKILL:
        _let_die(record, groups)
    timeout = call.number("timeout")
    if timeout > 0:
        if not _container.wait_pidfd(first, timeout * 1000):
            _container.pidfd_signal(first, _SIGKILL)
            _let_die(record, groups)
            _container.wait_pidfd(first, _END_MS)
        settle(state)
    return ""


def _let_die(record: RecordData, groups: Manager) -> None:
    """Have a SIGKILL mean the whole container, and reach what is frozen."""
    if not record.flags & FLAG_PIDNS:
        groups.kill(_SIGKILL)
    if groups.frozen():
        groups.freeze(on=False)


def delete(call: OciCall, environment: Mapping[str, str]) -> str:
    """Remove a container that has stopped; with --force end it first.

    Raises:
        NoContainer: there is none.
        ContainerError: it runs.
    """
    _delete(call, call.arguments[0], environment)
    return ""


def _delete(call: OciCall, name: str, environment: Mapping[str, str]) -> None:
    force = call.flag("force")
    try:
        state = StateDir.open(call.root, name)
    except NoContainer:
        if force:
            return
        raise
    if not state.lock(wait=False):
        _end_creator(state, name, force=force)
        state.lock()
    if not state.has(RECORD):
        if not force:
            raise NoContainer
        state.remove()
        return
    record = state.read_record()
    status = state.status(record)
    if status not in ("stopped", "created") and not force:
        text = f"cannot delete container {name} that is not stopped: {status}"
        if call.apptainer:
            text = f"cannot delete '{name}', the state of the container must be created or stopped"
        raise ContainerError(text=text)
    cleanup.end_process(record.init_pid, record.init_start)
    end_monitor(record)
    cleanup.delete(state, record, environment)


def _end_creator(state: StateDir, name: str, *, force: bool) -> None:
    """End who makes the container at this moment, if that is who has the lock."""
    record = state.read_record()
    if record.phase != PHASE_CREATING:
        return
    if not force:
        text = f"cannot delete container {name} that is not stopped: creating"
        raise ContainerError(text=text)
    cleanup.end_process(record.creator_pid, record.creator_start)


def pause(call: OciCall, environment: Mapping[str, str]) -> str:
    """Stop all processes of a container.

    Raises:
        ContainerError: it does not run, or has no control groups.
    """
    state = StateDir.open(call.root, call.arguments[0])
    record = state.read_record()
    if state.status(record) not in ("running", "created"):
        raise ContainerError(text="container not running")
    groups_of(record, environment).freeze(on=True)
    return ""


def resume(call: OciCall, environment: Mapping[str, str]) -> str:
    """Have the processes of a paused container go on.

    Raises:
        ContainerError: it is not paused.
    """
    state = StateDir.open(call.root, call.arguments[0])
    record = state.read_record()
    if state.status(record) != "paused":
        raise ContainerError(text="container not paused")
    groups_of(record, environment).freeze(on=False)
    return ""
