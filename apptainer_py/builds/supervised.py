"""Work in a process of its own, under one that cleans up after it whatever happens.

caller ── sweeper ── worker: the caller may be killed at any instruction; the sweeper sees the end
of a pipe, ends every process below itself and removes the build's folders. What a killed sweeper
leaves is not held any more (`base/held.py`), and goes with the next build there.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.builds import identity as identities
from apptainer_py.builds import report
from apptainer_py.image.oci_layers import remove_tree
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Final, NoReturn

    from apptainer_py.builds.identity import Identity
    from apptainer_py.runtime.fakeroot import Namespaces

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_FAILED: Final = 255
_INTERRUPTED: Final = 130
_SAID_BYTES: Final = 1 << 20
_LOOK_MS: Final = 100


class BuildFailed(ApptainerError):
    """What went wrong in the worker."""

    def advice(self) -> str | None:
        """Return the hint that the worker's error had."""
        return str(self.facts["advice"]) or None


class BuildMisused(BuildFailed, UsageError):
    """The worker found the command line wrong."""


class Interrupted(ApptainerError):
    message = "the build was interrupted; nothing of it is left"
    exit_code = _INTERRUPTED


class InterruptedByUser(Interrupted):
    """The caller got a SIGINT while the build was going on, or does not want it any more."""


class Launches:
    """The worker's way to programs that start containers: they are run by the sweeper, which is
    outside of the worker's user namespace, so that they can map ids for themselves.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def __call__(
        self, argv: Sequence[str], environ: Mapping[str, str], umask: int, streams: tuple[int, int]
    ) -> int:
        """Run a program; return its status, 128 and more for a signal."""
        import json
        import socket

        data = json.dumps([list(argv), dict(environ), umask, streams[0] == streams[1]]).encode()
        head = len(data).to_bytes(4, "little")
        socket.send_fds(self._end, [head], [streams[1]])
        self._end.sendall(data)
        answer = self._end.recv(4)
        if len(answer) < 4:
            raise Interrupted
        return int.from_bytes(answer, "little")


def run(  # noqa: PLR0913 each is another matter
    work: Callable[[Launches], None],
    identity: Identity,
    folders: Sequence[str],
    *,
    left: Sequence[str] = (),
    keep: bool,
    output: int = -1,
    is_unwanted: Callable[[], bool] | None = None,
) -> None:
    """Do work as somebody else, and remove folders when it is done, or undone.

    What others have left is removed before. Folders that are to be kept are not removed.
    What it and the programs that it starts print goes to the descriptor `output`, if there is one.
    Where `is_unwanted` is given, it is asked now and then whether the work may end.

    Raises:
        ApptainerError: what the work raised, or that it was interrupted.
    """
    alive_read, alive_write = os.pipe()
    said_read, said_write = os.pipe()
    sweeper = os.fork()
    if sweeper == 0:
        os.close(alive_write)
        os.close(said_read)
        if output >= 0:
            _print_to(output)
        _Sweeper(work, identity, alive_read, said_write).run(() if keep else folders, left)
    os.close(alive_read)
    os.close(said_write)
    try:
        said = _read_all(said_read, is_unwanted)
        _, status = os.waitpid(sweeper, 0)
    except BaseException as error:
        os.close(alive_write)
        os.waitpid(sweeper, 0)
        report.after_a_kill()
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedByUser from None
        raise
    os.close(alive_write)
    if said:
        _raise(said)
    if status:
        report.after_a_kill()
        raise Interrupted


def _print_to(output: int) -> None:
    import sys

    for stream in (1, 2):
        os.dup2(output, stream)
    # The caller's may be anything by now; the programs that are started have the descriptors.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 they are for the rest of the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    log.forget_listeners()


def _read_all(fd: int, is_unwanted: Callable[[], bool] | None) -> bytes:
    import select

    parts: list[bytes] = []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        while True:
            while is_unwanted is not None and not poll.poll(_LOOK_MS):
                if is_unwanted():
                    raise InterruptedByUser
            data = os.read(fd, 65536)
            if not data:
                return b"".join(parts)
            parts.append(data)
    finally:
        os.close(fd)


def _raise(said: bytes) -> None:
    import json

    facts: dict[str, Any] = json.loads(said)
    kind = BuildMisused if facts["status"] == 1 else BuildFailed
    raise kind(text=facts["text"], advice=facts["advice"])


def _say(fd: int, error: BaseException) -> None:
    import json

    if isinstance(error, ApptainerError):
        facts = {"text": str(error), "advice": error.advice(), "status": error.exit_code}
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        words = (error.strerror or str(error)).lower()
        facts = {"text": f"While performing build: {place}{words}", "advice": "", "status": 255}
    else:
        words = f"{type(error).__name__}: {error}"
        if log.level >= log.DEBUG:
            import traceback

            traceback.print_exception(error)
        facts = {"text": f"While performing build: internal error: {words}", "status": 255}
    facts["advice"] = facts.get("advice") or ""
    data = json.dumps(facts).encode()[:_SAID_BYTES]
    while data:
        data = data[os.write(fd, data) :]


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Sweeper:
    """The process in the middle: it starts containers for the worker, and cleans up after it."""

    def __init__(
        self, work: Callable[[Launches], None], identity: Identity, alive: int, said: int
    ) -> None:
        self._work = work
        self._identity = identity
        self._alive = alive
        self._said = said
        self._namespaces: Namespaces | None = None

    def run(self, folders: Sequence[str], left: Sequence[str]) -> NoReturn:
        """Be that process, to its end."""
        import signal

        status = _FAILED
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                # A handler, as what is ignored would be ignored by the programs started here.
                signal.signal(number, _pass)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            status = self._guard(left)
            _end_children()
        except BaseException as error:  # noqa: BLE001 it has to reach the user as a line
            _say(self._said, error)
        finally:
            _end_children()
            self._clean(folders)
            os._exit(status)

    def _guard(self, left: Sequence[str]) -> int:
        import socket

        if not self._identity.is_root:
            self._namespaces = identities.namespaces(self._identity)
        if left:
            self._clean(left)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        worker = os.fork()
        if worker == 0:
            os.close(self._alive)
            ours.close()
            _be_worker(self._work, self._namespaces, Launches(theirs), self._said)
        theirs.close()
        return self._watch(worker, ours)

    def _watch(self, worker: int, end: socket.socket) -> int:
        """Wait for the worker's end, or the caller's; return the worker's status."""
        import select

        handle = os.pidfd_open(worker)
        poll = select.poll()
        for fd in (handle, self._alive, end.fileno()):
            poll.register(fd, select.POLLIN)
        launched: dict[int, int] = {}
        while True:
            ended = {fd for fd, _ in poll.poll()}
            if self._alive in ended:
                return _FAILED
            for fd in ended & set(launched):
                poll.unregister(fd)
                end.sendall(_status(launched.pop(fd)).to_bytes(4, "little"))
                os.close(fd)
            if handle in ended:
                _, status = os.waitpid(worker, 0)
                return 0 if status == 0 else _FAILED
            if end.fileno() in ended:
                pid = _launch(end)
                if pid < 0:
                    poll.unregister(end.fileno())
                    continue
                fd = os.pidfd_open(pid)
                launched[fd] = pid
                poll.register(fd, select.POLLIN)

    def _clean(self, folders: Sequence[str]) -> None:
        """Remove the folders as whoever owns what is in them."""
        if self._namespaces is None:
            _remove(folders)
            return
        child = os.fork()
        if child == 0:
            try:
                _container.enter_userns(self._namespaces.user_fd)
                _remove(folders)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def _pass(number: int, frame: object) -> None:
    """Take a signal that is meant for the worker, which gets it too."""


def _status(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _launch(end: socket.socket) -> int:
    """Start what the worker asks for; return its number, -1 when there is nobody to ask."""
    import json
    import socket
    import subprocess

    head, fds, _, _ = socket.recv_fds(end, 4, 1)
    if len(head) < 4 or not fds:
        return -1
    data = b""
    size = int.from_bytes(head, "little")
    while len(data) < size:
        data += end.recv(size - len(data))
    argv, environ, umask, both = json.loads(data)
    try:
        # Waited for by its number: the object must not do that.
        out = fds[0] if both else None
        child = subprocess.Popen(argv, env=environ, stdout=out, stderr=fds[0], umask=umask)
        child.returncode = 0
        return child.pid
    finally:
        os.close(fds[0])


def _be_worker(
    work: Callable[[Launches], None],
    namespaces: Namespaces | None,
    launches: Launches,
    said: int,
) -> NoReturn:
    import signal

    status = _FAILED
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        if namespaces is None:
            identities.hide_mounts()
        else:
            namespaces.enter()
        # Set last: a change of credentials would clear it.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        work(launches)
        status = 0
    except BaseException as error:  # noqa: BLE001 it has to reach the user as a line
        _say(said, error)
    finally:
        os._exit(status)


def _end_children() -> None:
    """End every process below this one: its subreaper is the parent of those that lost theirs."""
    import signal

    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _remove(folders: Sequence[str]) -> None:
    for folder in folders:
        above, name = os.path.split(folder)
        try:
            parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            remove_tree(parent, os.fsencode(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning(f"{folder} could not be removed: {(error.strerror or '').lower()}")
        finally:
            os.close(parent)
