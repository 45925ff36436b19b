"""Hooks that run outside the container: prestart, createRuntime, poststart, poststop (config.md).

A hook gets the container's state on stdin, and exactly the environment that it names;
starter/hook.c starts it and keeps its time.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.kernel import _starter
from apptainer_py.model.hook_frame import hook_frames
from apptainer_py.model.json_out import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.model.oci_plan import Hook


def run_frame(frame: bytes, kind: str, pid: int, environment: Mapping[str, str]) -> str:
    """Run the hooks of a record; returns what failed, "" if nothing did."""
    if not frame:
        return ""
    own = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
    number, reason = _starter.hook_run(frame, pid, own)
    return f"error running {kind} hook #{number - 1}: {reason}" if number else ""


class HookFailed(ApptainerError):
    """A hook could not be run, ended badly, or took too long."""

    message = "error running {kind} hook #{number}: {reason}"
    exit_code = 1


class HookState:
    """The state of one container as hooks read it (runtime.md, State)."""

    __slots__ = ("bundle", "environment", "name", "notes", "version")

    def __init__(
        self,
        version: str,
        name: str,
        bundle: str,
        notes: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        self.version = version
        self.name = name
        self.bundle = bundle
        self.notes = notes
        self.environment = environment

    def around(self, status: str) -> tuple[bytes, bytes]:
        """Return the JSON before and after the pid; a stopped container has none."""
        state: dict[str, object] = {
            "ociVersion": self.version,
            "id": self.name,
            "status": status,
            "bundle": self.bundle,
        }
        if self.notes:
            state["annotations"] = dict(self.notes)
        text = dumps(state).encode()
        if status == "stopped":
            return text, b""
        before, bundle, after = text.rpartition(b',"bundle":')
        if self.notes:
            # An annotation may hold that very text, the status before it never does.
            before, bundle, after = text.partition(b',"bundle":')
        return before + b',"pid":', bundle + after

    def frames(self, hooks: Sequence[Hook], kind: str, status: str) -> bytes:
        """Return the hooks of one kind as bytes; none where there are none."""
        chosen = [hook for hook in hooks if hook.kind == kind]
        return hook_frames(chosen, self.around(status)) if chosen else b""

    def run(self, hooks: Sequence[Hook], kind: str, status: str, pid: int) -> None:
        """Run the hooks of one kind, in order.

        Raises:
            HookFailed: one failed; those after it are not run.
        """
        frame = self.frames(hooks, kind, status)
        if not frame:
            return
        own = [os.fsencode(f"{name}={value}") for name, value in self.environment.items()]
        number, reason = _starter.hook_run(frame, pid, own)
        if number:
            raise HookFailed(kind=kind, number=number - 1, reason=reason)
