"""`--fusemount`: file systems that a program of the user's serves, on the host or inside.

The starter mounts each, with an open device for the program, which gets it as `/dev/fd/3`. Programs
of the host are master's children and end with the mount; programs of the container are started by
stage 2, and end with the PID namespace that they make necessary.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.base.record import Record
from apptainer_py.engines.apptainer import policy
from apptainer_py.model import protocol
from apptainer_py.model.plan import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.engines.apptainer.create import Creation
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts

TAG = "fusemount"
_KINDS = ("host", "host-daemon", "container", "container-daemon")
_NSENTER = "/usr/bin/nsenter"
# SIGINT, SIGQUIT and SIGTSTP of the terminal are the payload's; a password can still be asked for.
BLOCKED = (2, 3, 20)
_ENDS_MS = 5000


class BadSpec(LaunchError):
    """A specification that names no kind, no program or no mount point."""

    message = "While setting FUSE mount configuration: while setting fuse mount: {reason}"
    hint = 'as in --fusemount "host:sshfs server:/data /mnt"; kinds: ' + ", ".join(_KINDS)


class DriverFailed(LaunchError):
    """A program cannot be started."""

    message = (
        "container creation failed: while running FUSE drivers: could not start program "
        "{words}: {reason}"
    )


class FuseMount(Record):
    """One file system: where it is mounted, through which device of the plan, who serves it."""

    words: tuple[str, ...]
    target: str
    inside: bool
    daemon: bool
    device: int = -1


class Fuses:
    """The file systems of one launch, and the programs that serve them from the host."""

    def __init__(self, mounts: list[FuseMount], environment: Mapping[str, str]) -> None:
        self.mounts = mounts
        self.environment = environment
        self._pids: list[int] = []

    @property
    def inside(self) -> bool:
        """Whether a program runs in the container."""
        return any(mount.inside for mount in self.mounts)

    def plan(self, prepared: Prepared) -> None:
        """Give each its device and its place, after all other mounts."""
        for number, mount in enumerate(self.mounts):
            if prepared.fuse_count >= protocol.LIMIT_FUSE_DEVICES:
                raise BadSpec(reason="there are more of them than this launch can have devices")
            self.mounts[number] = mount.replace(device=prepared.fuse_count)
            prepared.mounts.append(
                Mount(kind="fuse", source="fuse", target=mount.target, tag=TAG, create="directory",
                      options=number, required=True)
            )  # fmt: skip
            prepared.fuse_count += 1

    def message(self) -> list[bytes]:
        """Return what stage 2 shall start: for each whether it ends, how many words, the words."""
        found: list[bytes] = []
        for mount in self.mounts:
            if mount.inside:
                words = arguments(mount)
                found += [b"1" if mount.daemon else b"0", b"%d" % len(words)]
                found += [os.fsencode(word) for word in words]
        return found

    def serve(self, creation: Creation, number: int, what: str) -> None:
        """Mount one, and start its program, or hand the device to who starts it."""
        mount = self.mounts[number]
        mounting = creation.mounting
        device = mounting.user_fuse(mount.device, os.fsencode(mount.target), what)
        if mount.inside:
            creation.context.hand_over(device)
        else:
            space = mounting.space(1) if creation.prepared.inner else -1
            service = creation.prepared.service
            streams = service.streams[1:] if service else (1, 2)
            self._start(mount, device, space, streams)
            if space >= 0:
                os.close(space)
        os.close(device)

    def _start(self, mount: FuseMount, device: int, space: int, streams: tuple[int, ...]) -> None:
        words = arguments(mount)
        program = _find(words, self.environment.get("PATH", os.defpath))
        started = [program, *words[1:]]
        if space >= 0:
            started = [_NSENTER, "-F", "--preserve-credentials", "--user=/proc/self/fd/4", *started]
        pid = spawn(started[0], started, self.environment, (device, space), streams)
        if not mount.daemon:
            self._pids.append(pid)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            raise DriverFailed(words=" ".join(words), reason=ending(status))

    def close(self) -> None:
        """Wait until each program has seen the end of its mount, and end what has not."""
        import select

        for pid in self._pids:
            ended = os.pidfd_open(pid)
            events = select.poll()
            events.register(ended, select.POLLIN)
            for number in (15, 9):
                if events.poll(_ENDS_MS):
                    break
                os.kill(pid, number)
            os.close(ended)
            os.waitpid(pid, 0)
        self._pids.clear()


def choose(action: ActionRequest, facts: Facts, environment: Mapping[str, str]) -> Fuses:
    """Judge every `--fusemount`.

    Raises:
        LaunchError: one is no specification, or the administrator allows none.
    """
    if not facts.configuration["enable fusemount"]:
        raise policy.NotPermitted(
            text="fusemount disabled by configuration 'enable fusemount = no'"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise LaunchError(
            text="container creation failed: --fusemount needs /dev/fuse, which is not there or "
            "not yours to open; your administrator gives it with chmod 0666 /dev/fuse"
        )
    fuses = Fuses([_read(spec) for spec in action.fusemount if spec], environment)
    if fuses.inside and (action.no_pid or not facts.configuration["allow pid ns"]):
        why = "--no-pid" if action.no_pid else "`allow pid ns = no` in the configuration"
        raise LaunchError(
            text="container creation failed: --fusemount container: needs a PID namespace, with "
            f"which its program ends, and {why} forbids it; host: needs none"
        )
    return fuses


def _read(spec: str) -> FuseMount:
    kind, colon, rest = spec.partition(":")
    words = (rest if colon else spec).split()
    if len(words) < 2 and len(spec.split()) < 2:
        raise BadSpec(reason=f'no whitespace separators found in command "{spec}"')
    if not colon or kind not in _KINDS:
        raise BadSpec(reason=f"fusemount spec begin with an unknown prefix {spec.split()[0]}")
    if len(words) < 2:
        raise BadSpec(reason=f'no program in "{spec}"')
    target = words.pop()
    if not os.path.isabs(target):
        raise LaunchError(
            text=f"container creation failed: --fusemount {spec}: destination must be an absolute "
            "path"
        )
    target = os.path.normpath(target)
    if target == "/":
        raise LaunchError(text="container creation failed: --fusemount cannot mount over /")
    inside, _, daemon = kind.partition("-")
    return FuseMount(
        words=tuple(words), target=target, inside=inside == "container", daemon=bool(daemon)
    )


def arguments(mount: FuseMount) -> list[str]:
    """Return a program's words: the device in place of a mount point, and whether it stays."""
    return [*mount.words, "/dev/fd/3", *([] if mount.daemon else ["-f"])]


def ending(status: int) -> str:
    """Say how a process ended, of its exit code (below 0: the signal)."""
    return f"exit status {status}" if status >= 0 else f"signal {-status}"


def _find(words: list[str], path: str) -> str:
    name = words[0]
    if "/" in name:
        return name
    for directory in path.split(":"):
        found = os.path.join(directory or ".", name)
        if os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    reason = f'exec: "{name}": executable file not found in $PATH'
    raise DriverFailed(words=" ".join(words), reason=reason)


def spawn(
    program: str,
    words: list[str],
    environment: Mapping[str, str],
    given: tuple[int, int],
    streams: tuple[int, ...],
) -> int:
    """Start a program with the device at 3, and nothing to read; returns its process number."""
    empty, end = os.pipe2(os.O_CLOEXEC)
    pairs = [(empty, 0), (streams[0], 1), (streams[1], 2)]
    apart = [_apart(fd) for fd in given if fd >= 0]
    pairs += [(fd, 3 + number) for number, fd in enumerate(apart)]
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in pairs]
    try:
        return os.posix_spawn(program, words, environment, file_actions=actions, setsigmask=BLOCKED)
    except OSError as error:
        reason = f"fork/exec {program}: {(error.strerror or '').lower()}"
        raise DriverFailed(words=" ".join(words), reason=reason) from None
    finally:
        for fd in (empty, end, *apart):
            os.close(fd)


def _apart(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
