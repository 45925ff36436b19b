"""Containers on disk: one directory each, a lock, and what is known of the first process.

    ROOT/ID/record       what the launcher reads: processes, control groups, hooks (record_frame)
    ROOT/ID/config.json  the bundle's file as it was
    ROOT/ID/state.json   for tools that read libcontainer's
    ROOT/ID/exec.fifo    while the container waits for `start`

A status is never stored, it is derived: a record says which process is meant, and that process and
its control group say the rest. Whatever a killed call leaves behind is named in a record.
"""

from __future__ import annotations

import errno
import fcntl
import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.record_frame import RecordData

RECORD, CONFIG, STATE, FIFO = "record", "config.json", "state.json", "exec.fifo"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_FILE_BYTES = 16 << 20
PHASE_CREATING = 1


class ContainerError(ApptainerError):
    """What a command cannot do to a container, in runc's words."""

    exit_code = 1


class NoContainer(ContainerError):
    """There is no container of that name, or no longer."""

    message = "container does not exist"


class ForeignState(ContainerError):
    """The directory is another user's, who may have written anything into it."""

    message = "the state of container {name} belongs to another user"


def check_id(name: str) -> str:
    """Return a container's name if it may be one.

    Raises:
        ContainerError: it is empty, or no plain name.
    """
    if not name:
        raise ContainerError(text="container id cannot be empty")
    if name in (".", "..") or not _ID_CHARACTERS.issuperset(name):
        raise ContainerError(text="invalid container ID format")
    return name


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it is gone or a zombie.

    With the number of the process this tells it from any other that had or will have the number.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        fields = read_at_most(fd, 4096).rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if not fields or fields[0] in (b"Z", b"X") else int(fields[19])


def created_text(nanoseconds: int) -> str:
    """Return a moment as Go's RFC3339Nano shows it, in UTC."""
    import time

    seconds, rest = divmod(nanoseconds, 10**9)
    fraction = f".{rest:09}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


class StateDir:
    """The directory of one container; the descriptor in it is the lock."""

    __slots__ = ("_frame", "fd", "name", "path", "root")

    def __init__(self, root: str, name: str, fd: int) -> None:
        self.root = root
        self.name = name
        self.path = f"{root}/{name}"
        self.fd = fd
        self._frame = b""

    @classmethod
    def make(cls, root: str, name: str, *, sticky: bool) -> StateDir:
        """Make the directory of a new container, and lock it.

        Raises:
            ContainerError: the name is taken, or the directory cannot be made.
        """
        check_id(name)
        root = os.path.abspath(root)
        path = f"{root}/{name}"
        try:
            _make_private(root)
            if sticky:
                # So that nobody who tidies XDG_RUNTIME_DIR takes it for an old file.
                _make_sticky(root)
            os.mkdir(path, 0o711)
        except FileExistsError:
            raise ContainerError(text="container with given ID already exists") from None
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"mkdir {error.filename}: {reason}") from None
        # Where others may rename what lies in the root, only the descriptor tells what it is.
        state = cls.open(root, name)
        os.chmod(state.fd, 0o711)
        state.lock()
        return state

    @classmethod
    def open(cls, root: str, name: str) -> StateDir:
        """Open the directory of a container that is there.

        Raises:
            NoContainer: there is none.
            ForeignState: it is not the caller's own.
        """
        check_id(name)
        root = os.path.abspath(root)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(f"{root}/{name}", flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise NoContainer from None
            raise ContainerError(
                text=f"{error.filename}: {(error.strerror or '').lower()}"
            ) from None
        if not _is_own(fd):
            os.close(fd)
            raise ForeignState(name=name)
        return cls(root, name, fd)

    def lock(self, *, wait: bool = True) -> bool:
        """Keep others from changing the container until this process ends; False if one does.

        Raises:
            NoContainer: it was deleted meanwhile.
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if os.fstat(self.fd).st_nlink == 0:
            raise NoContainer
        return True

    def unlock(self) -> None:
        """Let others change the container."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def write(self, file: str, data: bytes) -> None:
        """Replace a file, so that a reader finds the old one or the new one and no part of either.

        Raises:
            ContainerError: it cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            write_all(os.open(f".{file}", flags, 0o600, dir_fd=self.fd), data)
            os.rename(f".{file}", file, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"write {self.path}/{file}: {reason}") from None

    def read(self, file: str) -> bytes | None:
        """Return a file's content, or None if it is not there."""
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        return read_at_most(fd, _FILE_BYTES)

    def has(self, file: str) -> bool:
        """Return whether a file is there."""
        try:
            os.stat(file, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def write_record(self, record: RecordData) -> None:
        """Replace the record."""
        from apptainer_py.model.record_frame import record_frame

        self._frame = record_frame(record)
        self.write(RECORD, self._frame)

    def advance_record(self, phase: int, init_pid: int, init_start: int) -> None:
        """Note how far the container has come whose record this very object has written.

        The file stays: a new one is the dearest part. Whoever reads meanwhile may find a process
        without its start, which is none, and asks again once the lock is free.

        Raises:
            ContainerError: it cannot be written.
        """
        from apptainer_py.model.record_frame import PROGRESS_AT, progress

        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(RECORD, flags, dir_fd=self.fd)
            try:
                data = progress(self._frame, phase, init_pid, init_start)
                os.pwrite(fd, data, PROGRESS_AT)
            finally:
                os.close(fd)
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"write {self.path}/{RECORD}: {reason}") from None

    def read_record(self) -> RecordData:
        """Return the record.

        Raises:
            NoContainer: there is none: what made the directory was killed at once.
        """
        from apptainer_py.model.record_frame import read_record

        data = self.read(RECORD)
        if data is None:
            raise NoContainer
        return read_record(data)

    def make_fifo(self, uid: int, gid: int) -> int:
        """Make what the container waits at for `start`; returns a descriptor that only names it."""
        flags = os.O_PATH | os.O_CLOEXEC  # type: ignore[attr-defined,unused-ignore]
        try:
            os.mkfifo(FIFO, 0o622, dir_fd=self.fd)
            os.chmod(FIFO, 0o622, dir_fd=self.fd)
            if (uid, gid) != (os.geteuid(), os.getegid()):
                self._give_fifo(uid, gid)
            return os.open(FIFO, flags, dir_fd=self.fd)
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise ContainerError(text=f"mkfifo {self.path}/{FIFO}: {reason}") from None

    def _give_fifo(self, uid: int, gid: int) -> None:
        try:
            os.chown(FIFO, uid, gid, dir_fd=self.fd)
        except PermissionError:
            # An ordinary user cannot, and need not: whoever has the descriptor may write to it.
            return

    def status(self, record: RecordData) -> str:
        """Return what the container is: creating, created, running, paused or stopped."""
        if record.phase == PHASE_CREATING:
            alive = start_time(record.creator_pid) == record.creator_start != 0
            return "creating" if alive else "stopped"
        if not record.init_pid or start_time(record.init_pid) != record.init_start:
            return "stopped"
        if _is_frozen(record):
            return "paused"
        return "created" if self.has(FIFO) else "running"

    def remove(self) -> None:
        """Remove the directory; the record last, for as long as it is there all can be found."""
        for file in os.listdir(self.fd):
            if file != RECORD:
                _remove_entry(self.fd, file)
        _remove_entry(self.fd, RECORD)
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            pass


def _make_private(path: str) -> None:
    """Make a directory and those above it, whatever the umask is, for their owner alone."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_private(os.path.dirname(path))
        os.mkdir(path, 0o700)


def _make_sticky(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _is_own(fd):
            os.chmod(fd, 0o1700)
    finally:
        os.close(fd)


def _is_own(fd: int) -> bool:
    """Return whether only the caller can have written what a directory holds.

    A record names processes to be killed, directories to be removed and hooks to be run.
    """
    facts = os.fstat(fd)
    return facts.st_uid == os.geteuid() and not facts.st_mode & 0o022


def _remove_entry(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, dir_fd=directory)
        try:
            for inner in os.listdir(fd):
                _remove_entry(fd, inner)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=directory)


def _is_frozen(record: RecordData) -> bool:
    if not record.freezer:
        return False
    try:
        said = read_at_most(os.open(record.freezer, os.O_RDONLY | os.O_CLOEXEC), 64).strip()
    except OSError:
        return False
    return said in (b"1", b"FROZEN", b"FREEZING")
