"""What every driver of control groups can do, and what each does in its own way."""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from apptainer_py.model.oci_plan import CgroupWish

# Other users may look at groups, whatever umask we were called with.
GROUP_UMASK = 0o022
# A group is busy until the last process in it has been taken off its lists, and v1 tells nobody.
_REMOVE_DELAYS_MS = (1, 2, 4, 8, 16, 32, 64, 64, 64, 64, 64, 64)
_FILE_BYTES_MAX = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class CgroupError(ApptainerError):
    """`errno`, where the kernel refused, is among the facts."""

    message = "{text}"


def why(error: OSError) -> str:
    """Return what an errno means, in the form that clients of runc know."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def failure(verb: str, path: str, error: OSError) -> CgroupError:
    """Return the error for one file or directory."""
    return CgroupError(text=f"{verb} {path}: {why(error)}", errno=error.errno)


def read_file(directory: str, name: str) -> str:
    """Return the text of a file of a group.

    Raises:
        CgroupError: it cannot be read.
    """
    path = f"{directory}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise failure("openat2", path, error) from None
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
            if len(parts) * 65536 > _FILE_BYTES_MAX:
                break
        return b"".join(parts).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise failure("read", path, error) from None
    finally:
        os.close(fd)


def read_maybe(directory: str, name: str) -> str | None:
    """Return the text of a file that a kernel may lack, None then."""
    try:
        return read_file(directory, name)
    except CgroupError as error:
        if error.facts.get("errno") in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
            return None
        raise


def write_file(directory: str, name: str, value: str) -> None:
    """Write a file of a group, in one call.

    Raises:
        CgroupError: there is no such file, or the kernel refuses the value.
    """
    path = f"{directory}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_TRUNC)
    except OSError as error:
        raise failure("openat2", path, error) from None
    try:
        os.write(fd, value.encode("utf-8", "surrogateescape"))
    except OSError as error:
        text = f'failed to write "{value}": write {path}: {why(error)}'
        raise CgroupError(text=text, errno=error.errno) from None
    finally:
        os.close(fd)


def make_directory(path: str) -> bool:
    """Make a group and those above it; return whether it is new.

    Raises:
        CgroupError: it cannot be made.
    """
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return False
    except FileNotFoundError:
        above = path.rpartition("/")[0]
        if not above:
            raise CgroupError(text=f"mkdir {path}: no such file or directory") from None
        make_directory(above)
        return make_directory(path)
    except OSError as error:
        raise failure("mkdir", path, error) from None
    return True


def walk_groups(directory: str, *, remove: bool = False) -> Iterator[int]:
    """Yield a descriptor of a group and of all below it, each before those above it.

    `remove` removes those below, as far as they are empty, once they have been yielded. A payload
    may nest as deep as it likes: a level needs neither a descriptor nor a longer path.
    """
    try:
        fd = os.open(directory, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        levels = [("", _names(fd))]
        while levels:
            name, below = levels[-1]
            if below:
                step = below.pop()
                try:
                    inner = os.open(step, _DIRECTORY, dir_fd=fd)
                except FileNotFoundError:
                    continue
                os.close(fd)
                fd = inner
                levels.append((step, _names(fd)))
                continue
            yield fd
            levels.pop()
            if levels:
                above = os.open("..", _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = above
            if levels and remove:
                _remove_one(name, fd)
    finally:
        os.close(fd)


def _names(fd: int) -> list[str]:
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _remove_one(name: str, fd: int) -> None:
    try:
        os.rmdir(name, dir_fd=fd)
    except OSError:
        return  # then the one above cannot be removed either, and that is told


def processes_below(directory: str) -> list[int]:
    """Return the processes of a group and of all below it."""
    found: list[int] = []
    for fd in walk_groups(directory):
        text = read_maybe(f"/proc/self/fd/{fd}", "cgroup.procs") or ""
        found += map(int, text.split())
    return found


def remove_directory(path: str) -> None:
    """Remove a group and those below it; a missing one is fine.

    Raises:
        CgroupError: processes stay in it.
    """
    last = _try_remove(path)
    if last is None:
        return
    import time

    for delay in _REMOVE_DELAYS_MS:
        for _ in walk_groups(path, remove=True):
            pass
        last = _try_remove(path)
        if last is None:
            return
        time.sleep(delay / 1000)
    raise CgroupError(text=f"failed to remove paths: rmdir {path}: {why(last)}", errno=last.errno)


def _try_remove(path: str) -> OSError | None:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _can_be_made(path: str) -> bool:
    while not os.path.isdir(path):
        path = path.rpartition("/")[0]
    return os.access(path, os.W_OK)


class Manager:
    """The control groups of one container.

    `paths` has the directory for each controller; what could not be made is missing in it. The
    order of a first use is create(), join_rows() and enter_fd(), apply().
    """

    def __init__(self, wish: CgroupWish, paths: dict[str, str], *, rootless: bool) -> None:
        self.wish = wish
        self.paths = paths
        self.rootless = rootless
        self.made: list[str] = []

    def directories(self) -> list[str]:
        """Return the directories to be removed with the container, deepest first."""
        return sorted(set(self.paths.values()), key=lambda path: (-path.count("/"), path))

    def unit(self) -> str:
        """Return the name of the systemd unit that holds the container, "" if there is none."""
        return ""

    def create(self, pid: int = 0, *others: int) -> None:
        """Make the groups; `pid` and `others` are who systemd, if that makes them, begins with.

        Raises:
            CgroupError: one cannot be made, or is in use already; none of ours is left then.
        """
        raise NotImplementedError

    def check_unused(self) -> None:
        """Refuse a group that others are in; changes nothing.

        Raises:
            CgroupError: it has processes or is frozen, or cannot do what is wanted at all.
        """

    def join_rows(self) -> list[Row]:
        """Return the rows by which the process that will clone the container's init joins."""
        return []

    def enter_fd(self) -> int:
        """Return a new descriptor of a cgroup2 directory for CLONE_INTO_CGROUP, -1 for none."""
        return -1

    def add(self, pid: int) -> None:
        """Move a process into the groups."""
        for path in self._own_paths():
            write_file(path, "cgroup.procs", str(pid))

    def apply(self, resources: dict[str, Any], *, devices: bool = True) -> None:
        """Set the limits that `linux.resources` of config.json names, in runc's order.

        Without `devices`, as for `update`, the rules for devices stay as they are.

        Raises:
            CgroupError: the kernel refuses one, or its controller is not there.
        """
        raise NotImplementedError

    def pids(self) -> list[int]:
        """Return all processes in the groups and in those below."""
        return []

    def stats(self) -> dict[str, Any]:
        """Return what `events --stats` prints as `data`."""
        return {}

    def freeze(self, on: bool) -> None:  # noqa: FBT001
        """Stop all processes, or let them go on.

        Raises:
            CgroupError: there is no freezer, or it does not come to rest.
        """
        text = "cannot toggle freezer: cgroups not configured for container"
        raise CgroupError(text=text)

    def frozen(self) -> bool:
        """Return whether this very container is frozen."""
        return False

    def freezer_file(self) -> str:
        """Return the file that tells whether the container is frozen, "" if none does."""
        return ""

    def oom_watch(self) -> tuple[int, int]:
        """Return (descriptor, poll(2) events): it is ready when memory has run out.

        Raises:
            CgroupError: there is no memory controller.
        """
        raise CgroupError(text="there is no memory controller to watch")

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed for want of memory."""
        return 0

    def kill(self, number: int) -> None:
        """Send a signal to all processes of the groups, none of which can fork away meanwhile."""
        stopped = True
        try:
            self.freeze(on=True)
        except CgroupError:
            stopped = False
        try:
            for pid in self.pids():
                if pid <= 1:  # cgroup2 calls those of other namespaces so
                    continue
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        finally:
            if stopped:
                self.freeze(on=False)

    def remove(self) -> None:
        """Remove the groups; what is gone already is fine.

        Raises:
            CgroupError: processes stay in one.
        """
        for path in self.directories():
            remove_directory(path)

    def mount_rows(
        self,
        target: str,
        options: Sequence[str],
        private_ns: bool,  # noqa: FBT001
    ) -> list[Row]:
        """Return the rows for a mount of type cgroup at `target` in the container."""
        from apptainer_py.host.cgroups.mounting import rows_for

        paths = self.paths
        if self.rootless:
            # This is asked before create() finds out; who may make none stays where he is.
            paths = {name: path for name, path in paths.items() if _can_be_made(path)}
            if not private_ns:
                # What the user may write on the host is not the container's to write (T-R09).
                options = [*options, "ro"]
        return rows_for(paths, target, options, private_namespace=private_ns)

    def _own_paths(self) -> list[str]:
        # Co-mounted controllers share a directory.
        return list(dict.fromkeys(self.paths.values()))

    def _undo(self) -> None:
        for path in reversed(self.made):
            try:
                os.rmdir(path)
            except OSError:
                continue
        self.made.clear()

    def _make(self, path: str) -> bool:
        # Those above it stay, as runc leaves them: others may be about to use them.
        new = make_directory(path)
        if new:
            self.made.append(path)
        return new

    def _forgivable(self, error: CgroupError) -> bool:
        """Return whether a caller without rights goes on without this group."""
        denied = error.facts.get("errno") in _DENIED
        return denied and self.rootless and not self.wish.path.startswith("/")


class Directories(Manager):
    """Groups whose directories are made here, rather than by systemd."""

    def create(self, pid: int = 0, *others: int) -> None:
        """Make the directories, and what must be set before a process joins."""
        self.check_unused()
        self.make_groups()

    def make_groups(self) -> None:
        """Do so, whoever is in one already.

        Raises:
            CgroupError: one cannot be made; none of ours is left then.
        """
        before = os.umask(GROUP_UMASK)
        try:
            self._make_all(self.wish.resources or {})
        except BaseException:
            self._undo()
            raise
        finally:
            os.umask(before)

    def _make_all(self, resources: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_thawed(self) -> None:
        if self.frozen():
            raise CgroupError(text="container's cgroup unexpectedly frozen")

    def _check_empty(self, path: str) -> None:
        found = len(processes_below(path))
        if found:
            text = f"container's cgroup is not empty: {found} process(es) found"
            raise CgroupError(text=text)


class Disabled(Manager):
    """No control groups at all: the container stays in its caller's."""

    def create(self, pid: int = 0, *others: int) -> None:
        """Make nothing."""

    def apply(self, resources: dict[str, Any], *, devices: bool = True) -> None:
        """Set nothing: who disables control groups has no limits."""


def group_row(path: str, name: str) -> Row:
    """Return the row that writes 0, the process itself, to a file of a group."""
    file = f"{path}/{name}"
    return Row(
        op=protocol.OP_CGROUP,
        first=file.encode("utf-8", "surrogateescape"),
        says=f"unable to apply cgroup configuration: failed to write 0: write {file}: {{error}}",
    )
