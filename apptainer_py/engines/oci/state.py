"""What is kept of a container: the record that C reads, and libcontainer's state.json for tools."""

from __future__ import annotations

import os

from apptainer_py.model.json_out import dumps
from apptainer_py.model.record_frame import (
    FLAG_CGROUP2,
    FLAG_MONITOR,
    FLAG_PIDNS,
    FLAG_PYTHON,
    FLAG_ROOTLESS,
    FLAG_SYSTEMD,
    FLAG_TERMINAL,
    PHASE_CREATED,
    PHASE_CREATING,
    RecordData,
)
from apptainer_py.runtime.containers import created_text, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from apptainer_py.engines.oci.hooks import HookState
    from apptainer_py.engines.oci.monitored import Monitored
    from apptainer_py.host.cgroups import Manager
    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.oci_plan import HostFacts, OciPlan

    class Work(Protocol):
        """A container on its way: made new, or restored."""

        call: OciCall
        name: str
        bundle: str
        config: dict[str, Any]
        host: HostFacts
        plan: OciPlan
        cgroup: Manager
        hook_state: HookState
        created_ns: int
        pid: int
        started_at: int
        monitored: Monitored | None


_CLONE_NEWPID = 0x20000000
# Name in /proc/PID/ns by libcontainer's name of the namespace.
_SPACES = {
    "NEWNS": "mnt", "NEWUTS": "uts", "NEWIPC": "ipc", "NEWUSER": "user", "NEWPID": "pid",
    "NEWNET": "net", "NEWCGROUP": "cgroup", "NEWTIME": "time",
}  # fmt: skip
_SPACE_TYPES = {
    "mount": "NEWNS", "uts": "NEWUTS", "ipc": "NEWIPC", "user": "NEWUSER", "pid": "NEWPID",
    "network": "NEWNET", "cgroup": "NEWCGROUP", "time": "NEWTIME",
}  # fmt: skip
_STATUS, _PID = "\x01", 77000077


def state_text(work: Work, owner: str = "") -> dict[str, Any]:
    """Return what `state` shows, with stand-ins for pid and status."""
    shown: dict[str, Any] = {
        "ociVersion": work.config.get("ociVersion", ""),
        "id": work.name,
        "pid": _PID,
        "status": _STATUS,
        "bundle": work.bundle,
        "rootfs": work.plan.root,
        "created": created_text(work.created_ns),
    }
    if work.plan.annotations:
        shown["annotations"] = dict(work.plan.annotations)
    shown["owner"] = owner
    return shown


def describe(work: Work, *, creating: bool) -> RecordData:
    """Return the record of a container as it stands."""
    text = dumps(state_text(work), "  ").encode()
    before, _, rest = text.partition(str(_PID).encode())
    middle, _, after = rest.partition(dumps(_STATUS)[1:-1].encode())
    plan = work.plan
    flags = 0
    if (plan.new_spaces | sum({kind for kind, _ in plan.join_paths})) & _CLONE_NEWPID:
        flags |= FLAG_PIDNS
    if work.host.cgroup2:
        flags |= FLAG_CGROUP2
    if work.cgroup.unit():
        flags |= FLAG_SYSTEMD
    if work.cgroup.unit() or plan.resctrl:
        flags |= FLAG_PYTHON
    if work.host.rootless:
        flags |= FLAG_ROOTLESS
    if work.monitored:
        flags |= FLAG_MONITOR
        has_terminal = plan.terminal and not work.call.text("console-socket")
        flags |= FLAG_TERMINAL if has_terminal else 0
    own = os.getpid()
    return RecordData(
        container_id=work.name,
        phase=PHASE_CREATING if creating else PHASE_CREATED,
        flags=flags,
        creator_pid=own,
        creator_start=start_time(own),
        init_pid=work.pid,
        init_start=work.started_at,
        created_ns=work.created_ns,
        state=(before, middle, after),
        freezer=work.cgroup.freezer_file(),
        cgroups=tuple(work.cgroup.directories()),
        poststart=work.hook_state.frames(plan.hooks, "poststart", "running"),
        poststop=work.hook_state.frames(plan.hooks, "poststop", "stopped"),
    )


def libcontainer_state(work: Work) -> bytes:
    """Return state.json, as far as tools are known to read it."""
    linux = work.config.get("linux") or {}
    links = []
    for number in range(3):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            links.append("/dev/null")
    labels = [f"{name}={value}" for name, value in work.plan.annotations.items()]
    spaces = {name: f"/proc/{work.pid}/ns/{file}" for name, file in _SPACES.items()}
    state = {
        "id": work.name,
        "init_process_pid": work.pid,
        "init_process_start": work.started_at,
        "created": created_text(work.created_ns),
        "config": {
            "rootfs": work.plan.root,
            "readonlyfs": bool((work.config.get("root") or {}).get("readonly")),
            "hostname": work.config.get("hostname", ""),
            "namespaces": [
                {"type": _SPACE_TYPES.get(row.get("type"), ""), "path": row.get("path", "")}
                for row in linux.get("namespaces") or ()
            ],
            "mounts": work.config.get("mounts") or [],
            "cgroups": {
                "path": work.plan.cgroup.path,
                "name": work.plan.cgroup.path,
                "parent": work.plan.cgroup.slice_parent,
                "scope_prefix": work.plan.cgroup.scope_prefix,
                "Resources": work.plan.cgroup.resources,
                "Systemd": work.call.cgroup_manager == "systemd",
            },
            "labels": [f"bundle={work.bundle}", *labels],
            "rootless_euid": work.host.uid != 0,
            "rootless_cgroups": work.host.rootless,
        },
        "rootless": work.host.rootless,
        "cgroup_paths": dict(work.cgroup.paths),
        "namespace_paths": spaces,
        "external_descriptors": links,
        "intel_rdt_path": "",
    }
    return dumps(state).encode()
