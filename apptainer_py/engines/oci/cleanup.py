"""The end of a container: its processes, control groups and directory.

The launcher does the same in C (starter/lean_delete.c) where nothing but files is involved.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci.groups import groups_of
from apptainer_py.engines.oci.hooks import run_frame
from apptainer_py.kernel import _container
from apptainer_py.model.json_text import loads
from apptainer_py.runtime.containers import CONFIG, ContainerError, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.oci_plan import OciPlan
    from apptainer_py.model.record_frame import RecordData
    from apptainer_py.runtime.containers import StateDir

_SIGKILL = 9
_END_MS = 10_000


def end_process(pid: int, started_at: int) -> None:
    """Kill a process and wait for its end; nothing happens if the number is another's by now.

    Raises:
        ContainerError: it does not end.
    """
    if not pid:
        return
    try:
        fd = _container.pidfd_open(pid)
    except OSError:
        return
    try:
        if start_time(pid) != started_at:
            return
        try:
            _container.pidfd_signal(fd, _SIGKILL)
        except ProcessLookupError:
            return
        if not _container.wait_pidfd(fd, _END_MS):
            raise ContainerError(text="container init still running")
    finally:
        os.close(fd)
        _reap(pid)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def delete(state: StateDir, record: RecordData, environment: Mapping[str, str]) -> None:
    """Remove a container by its record, and run its poststop hooks: a failing one is warned of.

    Raises:
        ApptainerError: something could not be removed; all else is.
    """
    groups = groups_of(record, environment)
    wish = _resctrl_of(state)
    destroy(state, groups, record.init_pid, record.init_start, None)
    if wish:
        from apptainer_py.host import resctrl

        resctrl.remove(wish, state.name)
    failed = run_frame(record.poststop, "poststop", 0, environment)
    if failed:
        log.warning(failed)


def _resctrl_of(state: StateDir) -> dict[str, Any]:
    config = loads(state.read(CONFIG) or b"{}")
    linux = config.get("linux") if isinstance(config, dict) else None
    wish = linux.get("intelRdt") if isinstance(linux, dict) else None
    return wish if isinstance(wish, dict) else {}


def destroy(
    state: StateDir, cgroup: Manager, pid: int, started_at: int, plan: OciPlan | None
) -> None:
    """End what runs, and remove all that the record names; the record goes last.

    Raises:
        ApptainerError: something could not be removed; all else is.
    """
    problem: ApptainerError | None = None
    try:
        end_process(pid, started_at)
        # Where there is no pid namespace of its own, others may outlive the first process.
        if cgroup.pids():
            cgroup.kill(_SIGKILL)
    except ApptainerError as error:
        problem = error
    try:
        cgroup.remove()
    except ApptainerError as error:
        problem = problem or error
    if plan is not None and plan.resctrl:
        from apptainer_py.host import resctrl

        resctrl.remove(plan.resctrl, state.name)
    state.remove()
    if problem is not None:
        raise problem
