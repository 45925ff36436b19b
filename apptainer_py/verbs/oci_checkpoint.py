"""`checkpoint` and `restore`: refused, in runc's words where CRIU is not installed."""

from __future__ import annotations

from apptainer_py.runtime.containers import ContainerError, StateDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall


def refuse(call: OciCall, environment: Mapping[str, str]) -> str:
    """Say why not.

    Raises:
        ContainerError: always.
    """
    import shutil

    if call.command == "checkpoint":
        state = StateDir.open(call.root, call.arguments[0])
        if state.status(state.read_record()) in ("created", "stopped"):
            raise ContainerError(text="container cannot be checkpointed in stopped state")
    if shutil.which(call.criu, path=environment.get("PATH")) is None:
        text = f'CRIU version check failed: exec: "{call.criu}": executable file not found in $PATH'
        raise ContainerError(text=text)
    raise ContainerError(text=f"{call.command} is not supported yet")
