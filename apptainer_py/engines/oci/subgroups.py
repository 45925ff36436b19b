"""`exec --cgroup`: which group below a container's own one more process belongs to."""

from __future__ import annotations

import posixpath

from apptainer_py.host.cgroups.driver import group_row
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.model.oci_plan import Row


def parse_subgroups(words: Sequence[str]) -> dict[str, str]:
    """Return path by controller; "" stands for all of them.

    Raises:
        ContainerError: in runc's words.
    """
    paths: dict[str, str] = {}
    for word in words:
        names, colon, path = word.partition(":")
        if not colon:
            if len(words) != 1:
                text = f"invalid --cgroup argument: {word} (missing <controller>: prefix)"
                raise ContainerError(text=text)
            return {"": word}
        for name in names.split(","):
            if not name:
                text = f"invalid --cgroup argument: {word} (empty <controller> prefix)"
                raise ContainerError(text=text)
            if name in paths:
                text = "invalid --cgroup argument(s): controller "
                raise ContainerError(text=f"{text}{name} specified multiple times")
            paths[name] = path
    return paths


def subgroup_directories(own: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    """Return the directory for each controller of a container whose own groups are `own`.

    Raises:
        ContainerError: a path leads out of them, or there is no such controller.
    """
    chosen = dict(own)
    if "" in wanted and "" not in own:
        wanted = dict.fromkeys(own, wanted[""])
    elif "" in wanted:
        wanted = {**dict.fromkeys(own, wanted[""]), **wanted}
    for name, below in wanted.items():
        base = own.get(name)
        if base is None:
            text = f"unknown controller {name} in SubCgroupPaths"
            raise ContainerError(text=f"unable to create new parent process: {text}")
        path = posixpath.normpath(f"{base}/{below}")
        if path != base and not path.startswith(f"{base}/"):
            text = f"bad sub cgroup path: {below} is not a sub cgroup path"
            raise ContainerError(text=f"unable to create new parent process: {text}")
        chosen[name] = path
    return chosen


def group_rows(directories: dict[str, str], *, unified: bool) -> list[Row]:
    """Return the rows by which the process joins them; one for each directory."""
    rows = []
    for path in dict.fromkeys(directories.values()):
        # `tasks` is v1's; it moves one thread and needs no lock of all others.
        row = group_row(path, "cgroup.procs" if unified or directories.get("") == path else "tasks")
        says = "error adding pid 0 to cgroups: failed to write 0: openat2 "
        rows.append(row.replace(says=f"{says}{path}/cgroup.procs: {{error}}"))
    return rows
