"""`events`: statistics of a container, once or at an interval, and word of memory that ran out."""

from __future__ import annotations

import select
import sys
import time

from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci.groups import groups_of
from apptainer_py.model.duration import seconds_of
from apptainer_py.model.json_out import dumps
from apptainer_py.runtime.containers import ContainerError, StateDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.oci_call import OciCall


def duration_seconds(word: str) -> float:
    """Return a duration as Go writes it: "5s", "1m30s", "250ms".

    Raises:
        ContainerError: it is none.
    """
    try:
        return seconds_of(word)
    except ValueError:
        text = f'invalid value "{word}" for flag -interval: parse error'
        raise ContainerError(text=text) from None


def _line(kind: str, name: str, data: object) -> str:
    shown: dict[str, object] = {"type": kind, "id": name}
    if data is not None:
        shown["data"] = data
    return dumps(shown) + "\n"


def events(call: OciCall, environment: Mapping[str, str]) -> str:
    """Print statistics until the container ends; with --stats once.

    Raises:
        ContainerError: it does not run.
    """
    seconds = duration_seconds(call.text("interval") or "5s")
    if seconds <= 0:
        raise ContainerError(text="duration interval must be greater than 0")
    name = call.arguments[0]
    state = StateDir.open(call.root, name)
    record = state.read_record()
    if state.status(record) == "stopped":
        raise ContainerError(text=f"container with id {name} is not running")
    groups = groups_of(record, environment)
    if call.flag("stats"):
        return _line("stats", name, _stats(groups))
    _watch(state, groups, name, seconds)
    return ""


def _stats(groups: Manager) -> dict[str, object]:
    return {**groups.stats(), "intel_rdt": {}, "network_interfaces": None}


def _watch(state: StateDir, groups: Manager, name: str, seconds: float) -> None:
    poll = select.poll()
    try:
        fd, wanted = groups.oom_watch()
        poll.register(fd, wanted)
    except ApptainerError:
        fd = -1
    killed = groups.oom_kills()
    due = time.monotonic() + seconds
    while state.status(state.read_record()) != "stopped":
        # The end of the container is seen once a second, and at each report.
        left = min(1.0, max(0.0, due - time.monotonic()))
        if poll.poll(left * 1000) and groups.oom_kills() > killed:
            killed = groups.oom_kills()
            sys.stdout.write(_line("oom", name, None))
        if time.monotonic() >= due:
            due += seconds
            sys.stdout.write(_line("stats", name, _stats(groups)))
        sys.stdout.flush()
