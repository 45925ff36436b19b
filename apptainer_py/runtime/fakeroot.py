"""Programs of the host as root of a user namespace, by the engine fakeroot (engines/fakeroot)."""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import LaunchError
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.kernel import _container, _starter
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

_ENGINE: Final = b"fakeroot"
_NEWNS: Final = 0x00020000
# Says which process it is, and is there until nobody holds the other end of its input.
_HOLDER: Final = ("/bin/sh", "-c", "echo $$; exec cat >/dev/null")
_SAID_BYTES: Final = 1 << 14
_FAILED: Final = 255


class NoNamespace(LaunchError):
    message = "a user namespace could not be made: {reason}"
    hint = (
        "the administrator allows them (user.max_user_namespaces), or installs the setuid starter"
    )


def _flow(*, setuid: bool) -> tuple[str, int, int]:
    """Return the starter to use, its flow and why."""
    if os.geteuid() == 0:
        return build.STARTER, protocol.FLOW_ROOT, protocol.REASON_NONE
    if setuid:
        return build.STARTER_SUID, protocol.FLOW_SETUID, protocol.REASON_NONE
    return build.STARTER, protocol.FLOW_USERNS, protocol.REASON_ASKED


def needs_setuid() -> bool:
    """Return whether the kernel keeps user namespaces from this caller, but we do not."""
    if os.geteuid() == 0 or not (build.SETUID and os.access(build.STARTER_SUID, os.X_OK)):
        return False
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _container.unshare(0x10000000 | _NEWNS)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] != 0


def start(
    words: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[int, int, int],
    *,
    ranges: bool,
    setuid: bool,
) -> int:
    """Start a program, with all of the caller's ids or its own alone; return the starter's pid.

    It has these standard streams, and a session of its own: no terminal sends it signals.
    """
    starter, flow, reason = _flow(setuid=setuid)
    arguments = [b"fakeroot", b"ranges" if ranges else b"one", *map(os.fsencode, words)]
    variables = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
    data, seals = _starter.pack_request(
        arguments, variables, os.fsencode(os.getcwd()), _ENGINE, build.BUILD_ID.encode(), flow,
        reason,
    )  # fmt: skip
    fd = os.memfd_create("apptainer-py request", os.MFD_ALLOW_SEALING)
    try:
        write_all(os.dup(fd), data)
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        actions = [(os.POSIX_SPAWN_DUP2, stream, at) for at, stream in enumerate(streams)]
        title = "Apptainer fakeroot"
        return os.posix_spawn(starter, [title, str(fd)], {}, file_actions=actions, setsid=True)
    finally:
        os.close(fd)


class Namespaces:
    """A user namespace with its mounts, to be entered by children; it ends with `close`.

    `setuid` tells that the setuid starter makes it, for a caller who `needs_setuid`.
    """

    def __init__(self, *, ranges: bool, setuid: bool) -> None:
        self.user_fd = self._mounts_fd = -1
        reading, self._told = os.pipe2(os.O_CLOEXEC)
        said, writing = os.pipe2(os.O_CLOEXEC)
        heard, complaining = os.pipe2(os.O_CLOEXEC)
        try:
            # Out of the way of the numbers that they get.
            streams = (os.dup(reading), os.dup(writing), os.dup(complaining))
            self._pid = start(_HOLDER, {}, streams, ranges=ranges, setuid=setuid)
        finally:
            for fd in (reading, writing, complaining, *streams):
                os.close(fd)
        number = os.read(said, 16)
        os.close(said)
        if not number.strip().isdigit():
            reason = _reason(read_at_most(heard, _SAID_BYTES))
            self.close()
            raise NoNamespace(reason=reason)
        os.close(heard)
        place = f"/proc/{int(number)}/ns"
        self.user_fd = os.open(f"{place}/user", os.O_RDONLY | os.O_CLOEXEC)
        self._mounts_fd = os.open(f"{place}/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Be root there, in a process that was forked for it; its directory stays."""
        from apptainer_py.host import fake_devices

        here = os.getcwd()
        _container.enter_userns(self.user_fd)
        _container.setns(self._mounts_fd, _NEWNS)
        os.chdir(here)
        fake_devices.apply()

    def close(self) -> None:
        """Let it end; who has entered it stays there."""
        os.close(self._told)
        os.waitpid(self._pid, 0)
        for fd in (self.user_fd, self._mounts_fd):
            if fd >= 0:
                os.close(fd)


def _reason(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    fatal = [line for line in lines if line.startswith("FATAL")]
    line = (fatal or lines or ["the starter has ended"])[0]
    return line.partition("FATAL:")[2].strip() or line
