"""`checkpoint` and `restore`, for which CRIU must be installed."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci.snapshot import snapshot_of
from apptainer_py.runtime.containers import ContainerError, StateDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall

_FIRST_EXTRA = 3


def _begin(uid: int) -> None:
    # Descriptors of the caller's are neither CRIU's nor the container's.
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= _FIRST_EXTRA:
            try:
                os.set_inheritable(int(name), False)  # noqa: FBT003 takes it so only
            except OSError:
                continue
    if uid:
        log.warning("runc checkpoint is untested with rootless containers")


def checkpoint(call: OciCall, environment: Mapping[str, str]) -> str:
    """Write a running container to files; it is gone then, unless it shall go on.

    Raises:
        ContainerError: it does not run, or CRIU cannot do it.
    """
    from apptainer_py.engines.oci.checkpoint import Dump
    from apptainer_py.engines.oci.cleanup import delete

    _begin(os.geteuid())
    state = StateDir.open(call.root, call.arguments[0])
    state.lock()
    record = state.read_record()
    status = state.status(record)
    if status in ("created", "creating", "stopped"):
        raise ContainerError(text=f"Container cannot be checkpointed in {status} state")
    Dump(call, environment, snapshot_of(call), state, record).run()
    if not call.flag("leave-running") and not call.flag("pre-dump"):
        try:
            delete(state, record, environment)
        except ApptainerError as error:
            log.error(str(error))
    return ""


def restore(call: OciCall, environment: Mapping[str, str]) -> int:
    """Make a container of such files; returns the exit status.

    Raises:
        ContainerError: the files, the bundle or CRIU do not allow it.
    """
    from apptainer_py.engines.oci.restore import Restoration

    _begin(os.geteuid())
    return Restoration(call, environment, snapshot_of(call)).run()
