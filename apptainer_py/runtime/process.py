"""A process of a container, as library callers start and watch it (libcontainer's Process).

The launcher does the work and stays as the process's stand-in: a child of the caller with its
status. What is signalled is a pidfd that the launcher has sent, so no number can be another's.
"""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import write_all
from apptainer_py.base.record import Record
from apptainer_py.kernel import _container, _starter
from apptainer_py.model.json_out import dumps
from apptainer_py.model.json_text import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_LAUNCHER = f"{build.BINDIR}/apptainer-py-oci"
_FIRST_EXTRA = 3


class ProcessError(ApptainerError):
    """What cannot be done to a process, in libcontainer's words."""

    exit_code = 1


class ProcessSettings(Record):
    """What a process is to be; a field that is None is as the container's configuration says.

    `stdin`, `stdout`, `stderr` and `extra_files` are descriptors, None inherits the caller's. The
    five sets of `capabilities` are lists of names by the set's name; `rlimits`, `scheduler`,
    `io_priority` and `exec_cpu_affinity` are as config.json has them. `console_socket` and
    `pidfd_socket` are paths of sockets that get the terminal and a pidfd. `sub_cgroup_paths` are
    as `exec --cgroup` takes them. `log_level` 5 and more is --debug.
    """

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    uid: int = 0
    gid: int = 0
    additional_groups: tuple[int, ...] = ()
    umask: int | None = None
    cwd: str = "/"
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    extra_files: tuple[int, ...] = ()
    console_width: int = 0
    console_height: int = 0
    console_socket: str = ""
    capabilities: Mapping[str, list[str]] | None = None
    apparmor_profile: str = ""
    label: str = ""
    no_new_privileges: bool = False
    rlimits: tuple[Mapping[str, Any], ...] = ()
    pidfd_socket: str = ""
    init: bool = False
    log_level: int = 4
    sub_cgroup_paths: tuple[str, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    io_priority: Mapping[str, Any] | None = None
    exec_cpu_affinity: Mapping[str, str] | None = None

    def specification(self) -> dict[str, Any]:
        """Return the process as config.json's `process` (config.md, Process)."""
        user: dict[str, Any] = {"uid": self.uid, "gid": self.gid}
        if self.additional_groups:
            user["additionalGids"] = list(self.additional_groups)
        if self.umask is not None:
            user["umask"] = self.umask
        given = {
            "apparmorProfile": self.apparmor_profile,
            "capabilities": self.capabilities,
            "execCPUAffinity": self.exec_cpu_affinity,
            "ioPriority": self.io_priority,
            "noNewPrivileges": self.no_new_privileges,
            "rlimits": list(self.rlimits),
            "scheduler": self.scheduler,
            "selinuxLabel": self.label,
        }
        process: dict[str, Any] = {
            "terminal": bool(self.console_socket),
            "user": user,
            "args": list(self.args),
            "env": list(self.env),
            "cwd": self.cwd,
        }
        if self.console_width and self.console_height:
            size = {"height": self.console_height, "width": self.console_width}
            process["consoleSize"] = size
        return {**process, **{name: value for name, value in given.items() if value}}


class Process:
    """One process: made from settings, started by a Container, then signalled and waited for."""

    def __init__(self, settings: ProcessSettings) -> None:
        self.settings = settings
        self._child = 0
        self._pidfd = -1
        self._pid = 0
        self._status: int | None = None

    def begin(self, child: int, pidfd: int) -> None:
        """Note who stands in for the process, and its pidfd; a Container calls this, once."""
        self._child = child
        self._pidfd = pidfd
        for line in _read(f"/proc/self/fdinfo/{pidfd}").splitlines():
            if line.startswith(b"Pid:"):
                self._pid = int(line.split()[1])

    def pid(self) -> int:
        """Return the process's number on the host, also after its end.

        Raises:
            ProcessError: it was not started.
        """
        if not self._child:
            raise ProcessError(text="invalid process")
        return self._pid

    def signal(self, number: int) -> None:
        """Send a signal.

        Raises:
            ProcessError: it was not started, or has ended.
        """
        if not self._child:
            raise ProcessError(text="invalid process")
        try:
            if self._status is not None:
                raise ProcessLookupError
            _container.pidfd_signal(self._pidfd, number)
        except ProcessLookupError:
            raise ProcessError(text="os: process already finished") from None

    def wait(self) -> int:
        """Return the exit status, 128 and the signal for one that was killed; again and again.

        Raises:
            ProcessError: it was not started.
        """
        if not self._child:
            raise ProcessError(text="invalid process")
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            os.close(self._pidfd)
            self._pidfd = -1
        return self._status


class Container:
    """A container by its name; `bundle` is for one that the first process makes."""

    def __init__(self, root: str, name: str, bundle: str = "", launcher: str = _LAUNCHER) -> None:
        self.root = root
        self.name = name
        self.bundle = bundle
        self._launcher = launcher

    def start(self, process: Process) -> None:
        """Start a process: the container's first one if its settings say `init`, else one more.

        Raises:
            ProcessError: it could not be started; the launcher has said why on stderr.
        """
        import shutil
        import tempfile

        settings = process.settings
        if settings.console_socket or settings.pidfd_socket:
            # Both make somebody else the one who watches the process.
            raise ProcessError(text="a console or pidfd socket needs `exec --detach`")
        folder = tempfile.mkdtemp(prefix="apptainer-py-process-")
        try:
            listener = _listen(f"{folder}/pidfd")
            words = self._words(settings, folder)
            child = self._spawn(settings, words)
            pidfd = _accept_pidfd(listener, child)
            if pidfd < 0:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                raise ProcessError(text=f"the process could not be started (status {status})")
            process.begin(child, pidfd)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _words(self, settings: ProcessSettings, folder: str) -> list[str]:
        words = [self._launcher, "--root", self.root]
        if settings.log_level > 4:
            words.append("--debug")
        data = settings.specification()
        if settings.init:
            path = os.path.abspath(self.bundle)
            config: dict[str, Any] = loads(_read(f"{path}/config.json"))
            config["process"] = {**config.get("process", {}), **data}
            config["root"]["path"] = os.path.join(path, config["root"]["path"])
            _write(f"{folder}/config.json", config)
            words += ["run", "--bundle", folder]
        else:
            _write(f"{folder}/process.json", data)
            words += ["exec", "--process", f"{folder}/process.json"]
            words += [f"--cgroup={word}" for word in settings.sub_cgroup_paths]
        words += ["--pidfd-socket", f"{folder}/pidfd"]
        words.append(f"--preserve-fds={len(settings.extra_files)}")
        return [*words, self.name]

    def _spawn(self, settings: ProcessSettings, words: list[str]) -> int:
        streams = (settings.stdin, settings.stdout, settings.stderr)
        wanted = [(to, fd) for to, fd in enumerate(streams) if fd is not None]
        wanted += list(enumerate(settings.extra_files, _FIRST_EXTRA))
        # First out of the way: one may stand where another belongs.
        high = [(to, _duplicate(fd)) for to, fd in wanted]
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in high]
        environment = {name: value for name, value in os.environb.items()}  # noqa: C416
        try:
            return os.posix_spawn(words[0], words, environment, file_actions=actions)
        finally:
            for _, fd in high:
                os.close(fd)


def _duplicate(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 512)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, value: object) -> None:
    write_all(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), dumps(value).encode())


def _listen(path: str) -> Any:
    import socket

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)
    return listener


def _accept_pidfd(listener: Any, child: int) -> int:
    """Return the pidfd that the launcher sends, or -1 if it ended without one."""
    import select

    end = os.pidfd_open(child)
    try:
        if listener not in select.select([listener, end], [], [])[0]:
            return -1
        connection, _ = listener.accept()
        with connection:
            if connection not in select.select([connection, end], [], [])[0]:
                return -1
            return _starter.receive_bytes(connection.fileno(), 64)[1]
    finally:
        os.close(end)
        listener.close()
