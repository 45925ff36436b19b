"""`apptainer-py run --oci` and its like, as a call of the `oci` engine."""

from __future__ import annotations

import os

from apptainer_py.base.errors import UsageError
from apptainer_py.cli import report
from apptainer_py.cli.oci.parse import STATE_ROOT
from apptainer_py.cli.options import Options
from apptainer_py.cli.parse import parse
from apptainer_py.cli.table import ACTIONS
from apptainer_py.model.oci_call import OciCall
from apptainer_py.model.request import ActionRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.base.errors import ApptainerError

EXIT_FAILED = 255


def is_action(words: Sequence[str]) -> bool:
    """Return whether these words start an image; `oci` may stand behind options of the program.

    Raises:
        UsageError: one of those is wrong.
    """
    rest = Options("").read(words[1:])
    return bool(rest) and rest[0] in ACTIONS


def parse_action(words: Sequence[str], environment: Mapping[str, str], *, uid: int) -> OciCall:
    """Return the call; its container has a name that nobody else has.

    Raises:
        ApptainerError: the command line is wrong.
    """
    action = parse(words[1:], environment)
    if not isinstance(action, ActionRequest) or not action.oci:
        raise UsageError(text="launcher and package are of different versions: install both again")
    report.begin(action)
    return OciCall(
        program=words[0],
        command="run",
        options={},
        arguments=(f"apy-{os.getpid()}-{os.urandom(4).hex()}",),
        root=state_root(environment, uid),
        action=action,
    )


def state_root(environment: Mapping[str, str], uid: int) -> str:
    """Return where the state lies: as for runc's commands, or in /tmp for want of a place."""
    if uid == 0:
        return f"/run/{STATE_ROOT}"
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.path.isdir(runtime):
        return f"{runtime}/{STATE_ROOT}"
    return f"/tmp/{STATE_ROOT}-{uid}"


def show(error: ApptainerError) -> int:
    """Say what went wrong; returns the exit status."""
    status = report.show(error, command="run")
    return status if isinstance(error, UsageError) else EXIT_FAILED
