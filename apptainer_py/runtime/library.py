"""Containers for library callers: made, started, asked and removed (libcontainer's Container)."""

from __future__ import annotations

import os

from apptainer_py.base import build, held
from apptainer_py.base.files import write_all
from apptainer_py.kernel import _container, _starter
from apptainer_py.model.json_out import dumps
from apptainer_py.model.json_text import loads
from apptainer_py.runtime.containers import CONFIG
from apptainer_py.runtime.process import Process, ProcessError, pid_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.runtime.process import ProcessSettings

_LAUNCHER = f"{build.BINDIR}/apptainer-py-oci"
_PREFIX = "apptainer-py-process-"
_FIRST_EXTRA = 3
_INFO = 4


class Container:
    """A container by its name below a root directory; `bundle` is for one that is to be made."""

    def __init__(self, root: str, name: str, bundle: str = "", launcher: str = _LAUNCHER) -> None:
        self.root = root
        self.name = name
        self.bundle = bundle
        self._launcher = launcher
        self._first: Process | None = None

    def start(self, process: Process) -> None:
        """Make the container for its first process, which then waits for exec(); or start one more.

        Raises:
            ProcessError: it could not be started; the text says why.
        """
        self._begin(process, "create" if process.settings.init else "exec")

    def run(self, process: Process) -> None:
        """Do the same, and have a first process begin at once.

        Raises:
            ProcessError: it could not be started; the text says why.
        """
        self._begin(process, "run" if process.settings.init else "exec")

    def exec(self) -> None:
        """Have the first process begin.

        Raises:
            ProcessError: it has, or there is none.
        """
        self._call("start", self.name)

    def state(self) -> dict[str, Any]:
        """Return the state of runtime.md.

        Raises:
            ProcessError: there is no such container.
        """
        found: dict[str, Any] = loads(self._call("state", self.name))
        return found

    def status(self) -> str:
        """Return "created", "running", "paused" or "stopped".

        Raises:
            ProcessError: there is no such container.
        """
        return str(self.state()["status"])

    def processes(self) -> list[int]:
        """Return the numbers of all processes of the container.

        Raises:
            ProcessError: there is no such container.
        """
        return loads(self._call("ps", "--format", "json", self.name)) or []

    def signal(self, number: int) -> None:
        """Send a signal to the first process.

        Raises:
            ProcessError: it has ended.
        """
        self._call("kill", self.name, str(number))

    def pause(self) -> None:
        """Have all processes stand still.

        Raises:
            ProcessError: the container does not run.
        """
        self._call("pause", self.name)

    def resume(self) -> None:
        """Have them go on.

        Raises:
            ProcessError: the container is not paused.
        """
        self._call("resume", self.name)

    def destroy(self, *, force: bool = False) -> None:
        """Remove the container and all that it has; with `force` end it first.

        Raises:
            ProcessError: it runs.
        """
        self._call("delete", *(["--force"] if force else []), self.name)
        self._first = None

    def _begin(self, process: Process, verb: str) -> None:
        import tempfile

        settings = process.settings
        if process.is_started():
            raise ProcessError(text="the process was started before")
        if settings.init and self._first is not None:
            raise ProcessError(text="container already has init process")
        if settings.init and settings.sub_cgroup_paths:
            raise ProcessError(text="sub-cgroup paths are for a process in a running container")
        with held.Directory(tempfile.gettempdir(), _PREFIX) as folder:
            self._start_in(folder, process, verb)
        if settings.init:
            self._first = process

    def _start_in(self, folder: str, process: Process, verb: str) -> None:
        settings = process.settings
        words = self._words(settings, folder, verb)
        listener = _listen(f"{folder}/pidfd")
        heard, ready = os.pipe()
        try:
            child = _spawn(settings, words, ready)
        except OSError as error:
            listener.close()
            os.close(heard)
            raise ProcessError(text=f"{words[0]}: {(error.strerror or '').lower()}") from None
        finally:
            os.close(ready)
        kind, pidfd = _accept_pidfd(listener, child)
        # At once: a process that has ended and was reaped has no number any more.
        pid = pid_of(pidfd) if pidfd >= 0 else -1
        began = os.read(heard, 1) if pidfd >= 0 else b""
        os.close(heard)
        process.messages = tuple(_messages(f"{folder}/log"))
        if not began:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if pidfd >= 0:
                os.close(pidfd)
            why = [text for level, text in process.messages if level == "error"]
            raise ProcessError(text=why[-1] if why else f"the launcher failed (status {status})")
        process.begin(child, pidfd, pid)
        if settings.pidfd_socket:
            _hand_over(settings.pidfd_socket, kind, pidfd)

    def _words(self, settings: ProcessSettings, folder: str, verb: str) -> list[str]:
        words = [self._launcher, "--root", self.root, "--log", f"{folder}/log"]
        words += ["--log-format", "json"]
        if settings.log_level > _INFO:
            words.append("--debug")
        if settings.init:
            path = os.path.abspath(self.bundle)
            config = self._config(f"{path}/config.json")
            config["process"] = settings.specification(config.get("process") or {})
            _write(f"{folder}/config.json", config)
            words += [verb, "--bundle", path, "--config", f"{folder}/config.json"]
            words += ["--keep"] if verb == "run" else []
        else:
            config = self._config(f"{self.root}/{self.name}/{CONFIG}")
            _write(f"{folder}/process.json", settings.specification(config["process"]))
            words += [verb, "--process", f"{folder}/process.json"]
            words += [f"--cgroup={word}" for word in settings.sub_cgroup_paths]
        words += ["--pidfd-socket", f"{folder}/pidfd"]
        words.append(f"--preserve-fds={len(settings.extra_files)}")
        words.append(f"--stay={_FIRST_EXTRA + len(settings.extra_files)}")
        if settings.console_socket:
            words += ["--console-socket", os.path.abspath(settings.console_socket)]
        return [*words, self.name]

    def _config(self, path: str) -> dict[str, Any]:
        try:
            with open(path, "rb") as file:
                config: dict[str, Any] = loads(file.read())
        except OSError as error:
            text = f"open {path}: {(error.strerror or '').lower()}"
            raise ProcessError(text=text) from None
        return config

    def _call(self, *words: str) -> bytes:
        import subprocess

        argv = [self._launcher, "--root", self.root, "--log-format", "json", *words]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            why = [text for level, text in _read_messages(done.stderr) if level == "error"]
            said = done.stderr.decode("utf-8", "replace").strip()
            raise ProcessError(text=why[-1] if why else said)
        return done.stdout


def _spawn(settings: ProcessSettings, words: list[str], ready: int) -> int:
    streams = (settings.stdin, settings.stdout, settings.stderr)
    wanted = [(to, fd) for to, fd in enumerate(streams) if fd is not None]
    wanted += list(enumerate((*settings.extra_files, ready), _FIRST_EXTRA))
    high: list[tuple[int, int]] = []
    try:
        # First out of the way: one may stand where another belongs.
        for to, fd in wanted:
            high.append((to, _duplicate(fd)))
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in high]
        environment = dict(os.environb.items())
        return os.posix_spawn(words[0], words, environment, file_actions=actions)
    finally:
        for _, fd in high:
            os.close(fd)


def _duplicate(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 512)


def _write(path: str, value: object) -> None:
    text = dumps(value).encode("utf-8", "surrogateescape")
    write_all(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), text)


def _messages(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            return _read_messages(file.read())
    except FileNotFoundError:
        return []


def _read_messages(data: bytes) -> list[tuple[str, str]]:
    found = []
    for line in data.splitlines():
        if line.startswith(b'{"level":'):
            entry = loads(line)
            found.append((str(entry.get("level")), str(entry.get("msg"))))
    return found


def _listen(path: str) -> Any:
    import socket

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)
    return listener


def _accept_pidfd(listener: Any, child: int) -> tuple[bytes, int]:
    """Return what the launcher sends: its word and a pidfd, or -1 if it ended without one."""
    import select

    end = os.pidfd_open(child)
    try:
        if listener not in select.select([listener, end], [], [])[0]:
            return b"", -1
        connection, _ = listener.accept()
        with connection:
            if connection not in select.select([connection, end], [], [])[0]:
                return b"", -1
            return _starter.receive_bytes(connection.fileno(), 64)
    finally:
        os.close(end)
        listener.close()


def _hand_over(path: str, kind: bytes, pidfd: int) -> None:
    """Send a pidfd to who listens at the caller's own socket.

    Raises:
        ProcessError: nobody does; the process runs.
    """
    try:
        fd = _container.connect_unix(os.fsencode(path))
        try:
            _container.send_fd(fd, kind, pidfd)
        finally:
            os.close(fd)
    except OSError as error:
        text = f"dial unix {path}: connect: {(error.strerror or '').lower()}"
        raise ProcessError(text=text) from None
