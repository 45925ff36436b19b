"""`state`, `list` and `ps`: what is known of containers."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.engines.oci.groups import groups_of
from apptainer_py.engines.oci.monitored import monitor_facts, settle
from apptainer_py.kernel import _container
from apptainer_py.model.json_out import dumps
from apptainer_py.model.json_text import loads
from apptainer_py.model.record_frame import FLAG_MONITOR, BadRecord
from apptainer_py.runtime.containers import ContainerError, NoContainer, StateDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.model.record_frame import RecordData

_PAD, _LEAST = 3, 12
_SOCKET_MS = 5000
_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")


def state_bytes(state: StateDir, record: RecordData) -> bytes:
    """Return the JSON that `state` prints."""
    status = state.status(record)
    pid = 0 if status == "stopped" else record.init_pid
    before, middle, after = record.state
    return before + b"%d" % pid + middle + status.encode() + after


def state(call: OciCall, environment: Mapping[str, str]) -> str:
    """Return the state of a container."""
    found = StateDir.open(call.root, call.arguments[0])
    if call.apptainer:
        return _state_of_apptainer(call, found)
    return state_bytes(found, found.read_record()).decode("utf-8", "surrogateescape")


def _state_of_apptainer(call: OciCall, found: StateDir) -> str:
    """Return the state as Apptainer shows it, or give it to a socket."""
    record = found.read_record()
    if found.status(record) == "stopped" and record.flags & FLAG_MONITOR:
        settle(found)
    known = loads(state_bytes(found, record))
    shown = {name: known[name] for name in ("ociVersion", "id", "status")}
    if known["pid"]:
        shown["pid"] = known["pid"]
    shown["bundle"] = known["bundle"]
    if known.get("annotations"):
        shown["annotations"] = known["annotations"]
    shown |= monitor_facts(found) or {"createdAt": record.created_ns}
    socket = call.text("sync-socket")
    if not socket:
        return dumps(shown, "\t") + "\n"
    try:
        fd = _container.connect_unix(os.fsencode(socket), _SOCKET_MS)
        try:
            _container.send_fd(fd, dumps(shown).encode("utf-8", "surrogateescape"))
        finally:
            os.close(fd)
    except OSError as error:
        text = f"dial unix {socket}: connect: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    return ""


def _owner(directory: str) -> str:
    import pwd

    uid = os.stat(directory).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _all(call: OciCall) -> list[dict[str, Any]]:
    found = []
    root = call.root
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        # As long as there was no container there is no default directory; a chosen one is meant.
        if call.root_given:
            raise ContainerError(text=f"open {root}: no such file or directory") from None
        return []
    for name in names:
        try:
            one = StateDir.open(root, name)
            shown = loads(state_bytes(one, one.read_record()))
        except (ApptainerError, BadRecord):
            # Made or removed at this moment, or nothing of ours.
            continue
        shown["owner"] = _owner(one.path)
        os.close(one.fd)
        found.append(shown)
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, as Go's tabwriter sets them."""
    widths = [max(_LEAST, *(len(row[i]) + _PAD for row in rows)) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("".join(cells) + row[-1] + "\n")
    return "".join(lines)


def listing(call: OciCall, environment: Mapping[str, str]) -> str:
    """Return all containers below the root directory.

    Raises:
        ContainerError: there is no such format, or no directory that was chosen.
    """
    form = call.text("format") or "table"
    if call.flag("quiet"):
        return "".join(f"{one['id']}\n" for one in _all(call))
    if form == "json":
        found = _all(call)
        return (dumps(found) if found else "null") + "\n"
    if form != "table":
        raise ContainerError(text="invalid format option")
    names = ("id", "pid", "status", "bundle", "created", "owner")
    rows = [[str(one[name]) for name in names] for one in _all(call)]
    return table([_COLUMNS, *rows])


def pids_of(record: RecordData, environment: Mapping[str, str]) -> list[int]:
    """Return the processes of a container: those of its groups, or the first one alone."""
    if not record.cgroups:
        return [record.init_pid]
    return sorted(set(groups_of(record, environment).pids()))


def ps(call: OciCall, environment: Mapping[str, str]) -> str:
    """Return the processes of a container, as numbers or as ps(1) shows them.

    Raises:
        ContainerError: it does not run, or there is no such format.
    """
    form = call.text("format") or "table"
    found = StateDir.open(call.root, call.arguments[0])
    record = found.read_record()
    if found.status(record) in ("stopped", "creating"):
        pids: list[int] = []
    else:
        pids = pids_of(record, environment)
    if form == "json":
        return (dumps(pids) if pids else "null") + "\n"
    if form != "table":
        raise ContainerError(text="invalid format option")
    return _ps_lines(list(call.arguments[1:]) or ["-ef"], set(pids))


def _ps_lines(options: list[str], pids: set[int]) -> str:
    import subprocess

    program = next((f for f in ("/usr/bin/ps", "/bin/ps") if os.path.exists(f)), "ps")
    try:
        done = subprocess.run([program, *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ContainerError(text='exec: "ps": executable file not found in $PATH') from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ContainerError(text=f"exit status {done.returncode}: {said}")
    lines = done.stdout.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise ContainerError(text="couldn't find PID field in ps output")
    place = titles.index("PID")
    shown = [lines[0]]
    for line in lines[1:]:
        fields = line.split()
        if len(fields) > place and fields[place].isdecimal() and int(fields[place]) in pids:
            shown.append(line)
    return "\n".join(shown) + "\n"


def missing(root: str, name: str) -> bool:
    """Return whether there is no container of that name."""
    try:
        os.close(StateDir.open(root, name).fd)
    except NoContainer:
        return True
    return False
