"""Which hierarchies this machine has, where they are mounted, and where we are in them."""

from __future__ import annotations

from apptainer_py.base.record import Record
from apptainer_py.host.cgroups.driver import CgroupError, read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USUAL_PLACE = "/sys/fs/cgroup"


class Hierarchy(Record):
    """One mounted hierarchy; the controllers of cgroup2 are "" here, as in /proc/PID/cgroup.

    `target` is where it is mounted, `root` which of its directories that shows, `own` the calling
    process's group in it.
    """

    controllers: tuple[str, ...]
    target: str
    root: str
    own: str

    def own_directory(self) -> str:
        """Return the directory of the calling process's group, as far as the mount shows it."""
        root = self.root.rstrip("/")
        if self.own == self.root or not self.own.startswith(f"{root}/"):
            return self.target
        return f"{self.target}{self.own[len(root) :]}".rstrip("/")


class Tree(Record):
    """All hierarchies of a machine: those of v1 in the order of their mounts, then cgroup2."""

    hierarchies: tuple[Hierarchy, ...]
    unified: str
    unified_only: bool

    def new_paths(self, path: str) -> dict[str, str]:
        """Return by controller the directory that `path` names in each hierarchy.

        An absolute path begins where the hierarchy is mounted, a relative one at our own group; no
        path leads above (T-C04). With cgroup2 alone it begins beside our own group: one that has
        processes cannot hand controllers down.
        """
        inner = clean_path(path)
        found = {}
        for one in self.hierarchies:
            above = one.target if path.startswith("/") else one.own_directory()
            if self.unified_only and above != one.target:
                above = above.rpartition("/")[0]
            for controller in one.controllers:
                found[controller] = f"{above}{inner}" if inner != "/" else above
        return found

    def known_paths(self, directories: Sequence[str]) -> dict[str, str]:
        """Return by controller those of these directories that lie in its hierarchy."""
        found = {}
        for one in self.hierarchies:
            inside = [path for path in directories if f"{path}/".startswith(f"{one.target}/")]
            if inside:
                for controller in one.controllers:
                    found[controller] = max(inside, key=len)
        return found


def clean_path(path: str) -> str:
    """Return an absolute path without empty, `.` and `..` parts; `..` of the root is the root."""
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return "/" + "/".join(kept)


def own_groups(text: str) -> list[tuple[tuple[str, ...], str]]:
    """Return (controllers, path) for each line of /proc/PID/cgroup (cgroups(7))."""
    found = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        found.append((tuple(names.split(",")), path))
    return found


def parse_tree(mountinfo: str, own: str) -> Tree:
    """Return the tree that these two files of /proc/self describe.

    Raises:
        CgroupError: no hierarchy is mounted.
    """
    mounts = _mounts(mountinfo)
    places = [target for _, target, _, _ in mounts]
    found = []
    unified = None
    for controllers, path in own_groups(own):
        kind = "cgroup2" if controllers == ("",) else "cgroup"
        fitting = [
            (target, root)
            for fs_type, target, root, words in mounts
            if fs_type == kind and (kind == "cgroup2" or controllers[0] in words)
        ]
        if not fitting:
            continue
        # A hierarchy may be mounted in many places, in containers that share theirs for one.
        target, root = next((one for one in fitting if one[0].startswith(USUAL_PLACE)), fitting[0])
        one = Hierarchy(controllers=controllers, target=target, root=root, own=path)
        if kind == "cgroup2":
            unified = one
        else:
            found.append(one)
    if not found and unified is None:
        raise CgroupError(text="no cgroup mount found in mountinfo")
    found.sort(key=lambda one: places.index(one.target))
    unified_only = unified is not None and (not found or unified.target == USUAL_PLACE)
    if unified is not None:
        found = [unified] if unified_only else [*found, unified]
    return Tree(
        hierarchies=tuple(found),
        unified=unified.target if unified is not None else "",
        unified_only=unified_only,
    )


def _mounts(mountinfo: str) -> list[tuple[str, str, str, list[str]]]:
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if not after.startswith("cgroup"):
            continue
        fields = before.split(" ")
        fs_type, _, options = after.split(" ", 2)
        found.append((fs_type, _plain(fields[4]), _plain(fields[3]), options.split(",")))
    return found


def _plain(text: str) -> str:
    # proc(5): space, tab, newline and backslash are three octal digits.
    first, *rest = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


# A call asks more than once, and the files are long where many containers run.
_found: list[Tree] = []


def find_tree() -> Tree:
    """Return this machine's tree, as the calling process saw it when it first asked.

    Raises:
        CgroupError: no hierarchy is mounted.
    """
    if not _found:
        own = read_file("/proc/self", "cgroup")
        _found.append(parse_tree(read_file("/proc/self", "mountinfo"), own))
    return _found[0]
