"""An instance: a container with a name, which goes on when its caller has gone."""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, LaunchError
from apptainer_py.base.files import write_all
from apptainer_py.model import protocol
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts, PrepareContext

LABELS = "/.singularity.d/labels.json"
# What the rules for images call the signal that the image's author wants for the end.
_STOP_LABEL = "org.opencontainers.image.stopSignal"


class Exists(LaunchError):
    message = "instance {name} already exists"


class Held(Exists):
    """A process holds the name, and no record tells which."""

    hint = "it is just being started, or its record is lost; `kill -9 {pid}` ends it"


class Hidden(LaunchError):
    message = (
        "hidepid option set on /proc mount, require 'hidepid=0' to start instance with setuid "
        "workflow"
    )
    hint = "start it with -u, or ask your administrator for the mount option gid="


class NoPidSpace(LaunchError):
    message = "an instance needs a PID namespace, and the configuration allows none"
    hint = "ask your administrator for `allow pid ns = yes`"


class NotWritten(ApptainerError):
    message = "could not create pid file: open {path}: {reason}"


class Service:
    """The instance that this launch starts."""

    def __init__(
        self,
        action: ActionRequest,
        context: PrepareContext,
        image: str,
        fakeroot: tuple[str, ...],
        *,
        limited: bool,
    ) -> None:
        facts = context.facts
        where = "while executing starter: while checking instance name: "
        self.name = instances.check_name(action.instance, where)
        if not facts.configuration["allow pid ns"]:
            raise NoPidSpace
        self.owner = instances.owner(facts.uid, context.environment)
        self.image = image
        self.userns = facts.flow == protocol.FLOW_USERNS
        self.pid_file = action.pid_file
        self.ready_fd = context.ready_fd
        self.address = ""
        self.stop_signal = ""
        self.fakeroot = fakeroot
        self.limited = limited
        self.booted = action.boot
        self.guards: tuple[list[bytes], list[bytes]] = ([], [])
        # With a user namespace of its own, the first process is open to its user.
        if facts.flow == protocol.FLOW_SETUID and "namespace" not in fakeroot:
            self._check_sight()
        self.place = self._reserve()
        self.logs = instances.logs_of(self.owner, self.name)
        self.streams = self._open_streams()

    @staticmethod
    def _check_sight() -> None:
        if instances.are_hidden():
            raise Hidden

    def _open_streams(self) -> tuple[int, int, int]:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            error, output = (instances.open_log(self.owner, path) for path in self.logs)
        except instances.NotUsable:
            self.ended()
            raise
        return null, output, error

    def _reserve(self) -> instances.Place:
        place = instances.Place(self.owner, self.name)
        free = place.lock()
        found = place.read()
        if found is not None and instances.runs(found, self.owner):
            raise Exists(name=self.name)
        if not free:
            pid = place.holder()
            raise Held(name=self.name, pid=pid) if pid else Exists(name=self.name)
        return place

    def read_labels(self, read: Callable[[str], bytes | None]) -> None:
        """Take the signal for the end from the image's labels, if they name one."""
        import json

        try:
            labels = json.loads(read(LABELS) or b"{}")
        except (ValueError, RecursionError):
            return
        wanted = labels.get(_STOP_LABEL) if isinstance(labels, dict) else None
        if isinstance(wanted, str) and len(wanted) < 32:
            self.stop_signal = wanted

    def stands(self, pid: int) -> None:
        """Write the record, and let go who waits."""
        folder = instances.process_folder(pid)
        process = instances.look(folder)
        os.close(folder)
        self.place.write(
            instances.Instance(
                pid=pid,
                ppid=process.parent,
                name=self.name,
                user=self.owner.name,
                image=self.image,
                userns=self.userns,
                ip=self.address,
                log_err=self.logs[0],
                log_out=self.logs[1],
                started=process.started,
                boot=instances.boot_id(),
                pid_space=instances.pid_space(),
                stop_signal=self.stop_signal,
                fakeroot=self.fakeroot,
                cgroup=self.limited,
                booted=self.booted,
                label=tuple(self.guards[0]),
                filter=tuple(self.guards[1]),
            )
        )
        log.info("instance started successfully")
        if self.pid_file:
            try:
                write_pid(self.pid_file, pid)
            except NotWritten as error:
                log.warning(f"Failed to write pid file: {error}")
        self._detach()

    def _detach(self) -> None:
        """Keep nothing of the caller's: streams, directory, and the one who waits."""
        null, _, error = self.streams
        os.dup2(null, 0)
        for number in (1, 2):
            os.dup2(error, number)
        os.chdir("/")
        os.write(self.ready_fd, b"R")
        os.close(self.ready_fd)

    def ended(self) -> None:
        """Remove the record; the logs stay."""
        self.place.remove(self.name)
        self.place.close()


def write_pid(path: str, pid: int) -> None:
    """Write a process number to a regular file, not through a link.

    Raises:
        NotWritten: there is no such file, and none can be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if regular:
            os.ftruncate(fd, 0)
            write_all(fd, b"%d\n" % pid)
    except OSError as error:
        reason = (error.strerror or "it cannot be written").lower()
        raise NotWritten(path=path, reason=reason) from None
    if not regular:
        os.close(fd)
        raise NotWritten(path=path, reason="it is no regular file")


def check_flow(facts: Facts, instance: instances.Instance) -> bool:
    """Return whether the plain starter has to join; the setuid one enters no user namespace.

    Raises:
        LaunchError: the other starter is needed, and this launch has it not.
    """
    # Who owns a user namespace enters it without anybody's help.
    if instance.userns or ("namespace" in instance.fakeroot and facts.uid != 0):
        return facts.flow != protocol.FLOW_USERNS
    if facts.flow == protocol.FLOW_USERNS:
        raise LaunchError(text="a setuid installation is required to join this instance")
    return False
