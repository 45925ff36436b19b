"""Hooks that run outside the container: prestart, createRuntime, poststart, poststop (config.md).

A hook gets the container's state on stdin, and exactly the environment that it names. What it
prints is read whole, and shown only if it fails.
"""

from __future__ import annotations

import os
import select
import time

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import write_all
from apptainer_py.model.json_out import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.model.oci_plan import Hook

_OUTPUT_BYTES = 1 << 16
_SIGKILL = 9


class HookFailed(ApptainerError):
    """A hook could not be run, ended badly, or took too long."""

    message = "error running {kind} hook #{number}: {reason}"
    exit_code = 1


def hook_state(
    version: str, name: str, status: str, pid: int, bundle: str, notes: Mapping[str, str]
) -> bytes:
    """Return the state of a container as hooks read it (runtime.md, State)."""
    state: dict[str, object] = {"ociVersion": version, "id": name, "status": status}
    if pid:
        state["pid"] = pid
    state["bundle"] = bundle
    if notes:
        state["annotations"] = dict(notes)
    return dumps(state).encode()


def run_hooks(hooks: Sequence[Hook], kind: str, state: bytes) -> None:
    """Run the hooks of one kind, in order.

    Raises:
        HookFailed: one failed; those after it are not run.
    """
    number = 0
    for hook in hooks:
        if hook.kind == kind:
            reason = _run(hook, state)
            if reason:
                raise HookFailed(kind=kind, number=number, reason=reason)
            number += 1


def _spawn(hook: Hook, state: bytes) -> tuple[int, int, int]:
    """Start a hook; returns its pid and the reading ends of its two streams."""
    given = os.memfd_create("state", os.MFD_CLOEXEC)
    write_all(os.dup(given), state)
    os.lseek(given, 0, 0)
    out, out_end = os.pipe2(os.O_CLOEXEC)
    err, err_end = os.pipe2(os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, end, to) for to, end in enumerate((given, out_end, err_end))]
    arguments = list(hook.arguments) or [hook.path]
    pairs = (entry.partition("=") for entry in hook.environment or ())
    environment = {name: value for name, _, value in pairs}
    try:
        pid = os.posix_spawn(hook.path, arguments, environment, file_actions=actions)
    except OSError:
        os.close(out)
        os.close(err)
        raise
    finally:
        for fd in (given, out_end, err_end):
            os.close(fd)
    return pid, out, err


def _run(hook: Hook, state: bytes) -> str:
    """Run a hook to its end; returns what went wrong, or ""."""
    try:
        pid, out, err = _spawn(hook, state)
    except OSError as error:
        return f"fork/exec {hook.path}: {(error.strerror or '').lower()}"
    end = os.pidfd_open(pid)
    said = {out: b"", err: b""}
    if not _collect(said, end, hook.timeout_seconds):
        os.kill(pid, _SIGKILL)
        os.waitpid(pid, 0)
        return f"hook ran past specified timeout of {hook.timeout_seconds:.1f}s"
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return ""
    if os.WIFSIGNALED(status):
        reason = f"signal: {_signal_text(os.WTERMSIG(status))}"
    else:
        reason = f"exit status {os.WEXITSTATUS(status)}"
    shown = [said[fd].decode("utf-8", "replace") for fd in (out, err)]
    return f"{reason}, stdout: {shown[0]}, stderr: {shown[1]}"


def _collect(said: dict[int, bytes], end: int, timeout_seconds: int) -> bool:
    """Read both streams until the hook has ended; False if that took too long."""
    last = time.monotonic() + timeout_seconds if timeout_seconds else None
    poll = select.poll()
    for fd in (*said, end):
        poll.register(fd, select.POLLIN)
    try:
        while True:
            left = None if last is None else max(0.0, last - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(left)]
            if not ready:
                return False
            for fd in ready:
                if fd != end and not _read(said, fd):
                    poll.unregister(fd)
            if end in ready:
                # What it wrote before it ended is there; a child of its own may go on writing.
                for fd in said:
                    os.set_blocking(fd, False)
                    while _read(said, fd):
                        pass
                return True
    finally:
        for fd in (*said, end):
            os.close(fd)


def _read(said: dict[int, bytes], fd: int) -> bool:
    try:
        part = os.read(fd, _OUTPUT_BYTES)
    except BlockingIOError:
        return False
    said[fd] = (said[fd] + part)[:_OUTPUT_BYTES]
    return bool(part)


def _signal_text(number: int) -> str:
    from _signal import strsignal

    return (strsignal(number) or f"signal {number}").lower()
