"""Single steps that `create` and `exec` have in common: rows with descriptors, limits, the end."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.engines.oci import texts
from apptainer_py.kernel import _container, _starter
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import Row
from apptainer_py.model.process_frame import failure_text
from apptainer_py.runtime.containers import ContainerError
from apptainer_py.runtime.nest import NestGone, RowFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.base.errors import ApptainerError
    from apptainer_py.model.oci_plan import IdMap, OciPlan, ProcessSpec
    from apptainer_py.runtime.nest import Nest

_NAMES = {
    0x00020000: "mnt", 0x02000000: "cgroup", 0x04000000: "uts", 0x08000000: "ipc",
    0x10000000: "user", 0x20000000: "pid", 0x40000000: "net", 0x00000080: "time",
}  # fmt: skip
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_OPEN_TREE_CLONE = 1
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH, _AT_RECURSIVE = 0x100, 0x1000, 0x8000
_RESOLVE_IN_ROOT = 0x10
_PASSWD_BYTES = 1 << 20
_S_IFMT, _S_IFREG = 0o170000, 0o100000


class StartFailed(ContainerError):
    """The first process could not be started, or failed on its way."""

    message = "unable to start container process: {reason}"


def reason_of(error: OSError) -> str:
    """Return what an errno means, as Go's runtime words it."""
    return (error.strerror or "unknown error").lower()


def log_set_up(pid: int) -> None:
    """Log with --debug, in words that are looked for in runc's log, that a process is inside."""
    log.debug("runc exeseal: using /proc/self/exe clone: starter-init is a sealed memory file")
    log.debug(f"nsexec[{pid}]: nsexec container setup: nsexec started, namespaces are there")
    log.debug(f"child process in init(): {pid}")


def explained(error: ApptainerError, spec: ProcessSpec, where: str) -> ApptainerError:
    """Return the error that the user is shown for what a row or its process has met.

    `where` is what runc's sentence begins with.
    """
    if isinstance(error, RowFailed):
        if error.row.op in (protocol.OP_PROCESS, protocol.OP_GO) and error.errno:
            text = failure_text(spec, error.value, texts.errno_text(error.errno))
        else:
            text = texts.row_failure(error)
        return StartFailed(reason=f"{where}{text}")
    if isinstance(error, NestGone):
        return StartFailed(reason=f"{where}{error}")
    if type(error).__module__.startswith("apptainer_py.host."):
        # What this machine refuses is said there without knowing what it was wanted for.
        return StartFailed(reason=str(error))
    return error


def open_namespace(kind: int, path: str) -> int:
    """Return a descriptor of a namespace that is surely of this kind (CLONE_NEW*).

    Raises:
        StartFailed: there is none.
    """
    name = _NAMES.get(kind, "?")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        text = f"unable to create new parent process: namespace path: lstat {path}: "
        raise ContainerError(text=text + reason_of(error)) from None
    try:
        found = _container.ns_type(fd)
    except OSError:
        found = 0
    if found != kind:
        os.close(fd)
        text = f"failed to setns into {name} namespace: {path} is no {name} namespace"
        raise StartFailed(reason=text)
    return fd


def join_row(kind: int) -> Row:
    """Return the row that joins a namespace; its descriptor goes with it."""
    name = _NAMES.get(kind, "?")
    says = f"failed to setns into {name} namespace: {{error}}"
    return Row(op=protocol.OP_JOIN, numbers=(kind,), says=says)


def send_frame(nest: Nest, row: Row, frame: bytes, name: str) -> tuple[int, int]:
    """Send a row with a sealed file of bytes, and wait for its reply."""
    fd = _container.memfd_seal(frame, name)
    try:
        return nest.ask(row, fd)
    finally:
        os.close(fd)


class Passed:
    """The descriptors that rows name, made when the first row wants one."""

    def __init__(self, plan: OciPlan, pid: int, *, reaches_more: bool = False) -> None:
        self._maps = {name: (uids, gids) for name, uids, gids in plan.idmaps}
        self._pid = pid
        self._open: dict[str, int] = {}
        # A container with ids of its own cannot reach all that its maker can, nor map ids of it:
        # then the sources of binds are opened here.
        spaces = plan.new_spaces
        for kind, _ in plan.join_paths:
            spaces |= kind
        wanted = _NEWUSER | _NEWNS
        self._opens_sources = reaches_more and spaces & wanted == wanted
        self._held: tuple[Row, int] | None = None

    def send(self, nest: Nest, row: Row) -> None:
        """Send a row, with its descriptor if it names one."""
        if self._opens_sources:
            if self._held and row.op == protocol.OP_ATTR and row.fd:
                self._map_held(row)
                return
            self._send_held(nest)
            if row.op == protocol.OP_TREE and row.first is not None:
                # Those before it may have mounted what it is a path through.
                nest.settle()
                self._held = (row, self._source(row))
                return
        nest.row(row, self._descriptor(row.fd) if row.fd else -1)

    def _send_held(self, nest: Nest) -> None:
        if self._held:
            row, fd = self._held
            self._held = None
            try:
                nest.row(row.replace(first=None, flags=0), fd)
            finally:
                os.close(fd)

    def _source(self, row: Row) -> int:
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
        flags |= _AT_RECURSIVE if row.flags & 1 else 0
        flags |= _AT_SYMLINK_NOFOLLOW if row.flags & 2 else 0
        try:
            if "mnt" not in self._open:
                path = f"/proc/{self._pid}/ns/mnt"
                self._open["mnt"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return _container.tree_in(self._open["mnt"], row.first or b"", flags)
        except OSError as error:
            raise _failed_here(row, error) from None

    def _map_held(self, row: Row) -> None:
        assert self._held is not None
        flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if row.flags & 1 else 0)
        try:
            _container.mount_setattr(
                self._held[1],
                b"",
                flags,
                attr_set=row.numbers[0],
                attr_clear=0,
                userns_fd=self._descriptor(row.fd),
            )
        except OSError as error:
            raise _failed_here(row, error) from None

    def close(self) -> None:
        """Close what was made; what is in flight has it already."""
        if self._held:
            os.close(self._held[1])
            self._held = None
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = self._make(name)
        return self._open[name]

    def _make(self, name: str) -> int:
        try:
            uids, gids = self._maps.get(name, ((), ()))
            if uids or gids:
                return _container.make_userns(_lines(uids), _lines(gids))
            # Without maps the name is the path of a user namespace; "" is the container's own.
            name = name if name.startswith("/") else f"/proc/{self._pid}/ns/user"
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StartFailed(reason=f"{name}: {reason_of(error)}") from None


def _failed_here(row: Row, error: OSError) -> StartFailed:
    text = texts.row_failed(row, protocol.ERR_SYSTEM, error.errno or 0)
    return StartFailed(reason=f"error during container init: {text}")


def _lines(maps: Sequence[IdMap]) -> bytes:
    return b"".join(b"%d %d %d\n" % (line.inside, line.outside, line.count) for line in maps)


def set_limits(pid: int, limits: Sequence[tuple[int, int, int]], where: str) -> None:
    """Set resource limits of a process, from outside: it may have no right to.

    Raises:
        StartFailed: the kernel refuses one.
    """
    for number, soft, hard in limits:
        try:
            _container.prlimit(pid, number, soft, hard)
        except OSError as error:
            text = f"{where}error setting rlimit type {number}: {reason_of(error)}"
            raise StartFailed(reason=text) from None


def with_home(spec: ProcessSpec, root: int) -> ProcessSpec:
    """Return a process that has HOME: from the container's own passwd file, else "/".

    `root` is a descriptor of the container's root directory, which no link leads out of.
    """
    if any(entry.startswith(b"HOME=") and len(entry) > 5 for entry in spec.environment):
        return spec
    home = b"/"
    wanted = b"%d" % spec.uid
    for line in _passwd(root).split(b"\n"):
        fields = line.split(b":")
        if len(fields) > 5 and fields[2] == wanted:
            home = fields[5] or b"/"
            break
    rest = tuple(entry for entry in spec.environment if not entry.startswith(b"HOME="))
    return spec.replace(environment=(*rest, b"HOME=" + home))


def _passwd(root: int) -> bytes:
    try:
        named = _starter.openat2(root, b"etc/passwd", os.O_PATH | os.O_CLOEXEC, _RESOLVE_IN_ROOT)
    except OSError:
        return b""
    try:
        # It may be anything that the image's maker has put there: a device would be opened with
        # the rights of the host.
        facts = os.fstat(named)
        if facts.st_mode & _S_IFMT != _S_IFREG:
            return b""
        fd = os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, min(facts.st_size, _PASSWD_BYTES), 0)
        finally:
            os.close(fd)
    except OSError:
        return b""
    finally:
        os.close(named)


def go(nest: Nest, fifo: int) -> int:
    """Have the process become the payload; -1, or the number of its seccomp listener in there.

    Raises:
        RowFailed: it cannot.
    """
    answer = nest.go(Row(op=protocol.OP_GO), fifo)
    return -1 if answer is None else answer[0]


def write_pid_file(path: str, pid: int) -> None:
    """Write a number, so that no reader finds a part of it.

    Raises:
        OSError: it cannot be written.
    """
    directory, name = os.path.split(path)
    fresh = f"{directory}/.{name}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_SYNC | os.O_CLOEXEC
    try:
        fd = os.open(fresh, flags, 0o666)
    except FileExistsError:
        # Of a call that was killed; whatever it is, it is not written to.
        os.unlink(fresh)
        fd = os.open(fresh, flags, 0o666)
    try:
        os.write(fd, b"%d" % pid)
    finally:
        os.close(fd)
    os.rename(fresh, path)


def tell_ready(fd: int) -> None:
    """Tell a library caller that its process stands; 0 is nobody."""
    if not fd:
        return
    try:
        os.write(fd, b"r")
        os.close(fd)
    except OSError as error:
        text = f"nobody waits at descriptor {fd}: {reason_of(error)}"
        raise ContainerError(text=text) from None


def inner_hook_failed(error: RowFailed, kind: str) -> ApptainerError:
    """Return the error for a hook that failed in the container's namespaces."""
    said = ""
    if error.fd >= 0:
        data = os.pread(error.fd, 1 << 16, 0)
        os.close(error.fd)
        said = data.decode("utf-8", "replace")
    number = max(error.value - 1, 0)
    reason = said or (os.strerror(error.errno).lower() if error.errno else "it failed")
    text = f"error during container init: error running {kind} hook #{number}: {reason}"
    return StartFailed(reason=text)


def send_listener(pid: int, number: int, path: str, state: Mapping[str, object]) -> None:
    """Hand a seccomp listener to who waits at a socket (config-linux.md, listenerPath).

    Raises:
        StartFailed: it cannot be had, or nobody takes it.
    """
    from apptainer_py.model.json_out import dumps

    try:
        process = _container.pidfd_open(pid)
        try:
            listener = _container.pidfd_getfd(process, number)
        finally:
            os.close(process)
        socket = _container.connect_unix(os.fsencode(path))
        try:
            _container.send_fd(socket, dumps(dict(state)).encode(), listener)
        finally:
            os.close(socket)
            os.close(listener)
    except OSError as error:
        why = reason_of(error)
        if error.filename:
            text = "failed to connect with seccomp agent specified in the seccomp profile: "
            text += f"dial unix {path}: connect: {why}"
        else:
            text = f"error handing over the seccomp listener to {path}: {why}"
        raise StartFailed(reason=f"error during container init: {text}") from None


def send_pidfd(socket: int, pid: int, kind: bytes) -> None:
    """Hand a pidfd of a process to who waits at the other end of a socket, which is closed.

    Raises:
        StartFailed: nobody takes it.
    """
    try:
        fd = _container.pidfd_open(pid)
        try:
            _container.send_fd(socket, kind, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StartFailed(reason=f"failed to setup pidfd: {reason_of(error)}") from None
    finally:
        os.close(socket)


def seccomp_program(plan: OciPlan, environment: Mapping[str, str], uid: int) -> tuple[bytes, int]:
    """Return the plan's seccomp filter and its flags, from the user's cache if it is there."""
    if plan.seccomp is None:
        return b"", 0
    from apptainer_py.host import seccomp

    above = environment.get("XDG_RUNTIME_DIR", "") if uid else "/run"
    return seccomp.program(plan.seccomp, f"{above}/apptainer-py/seccomp" if above else None)
