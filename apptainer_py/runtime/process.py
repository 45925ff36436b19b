"""A process of a container, as library callers describe and watch it (libcontainer's Process).

    settings = ProcessSettings(args=("sh", "-c", "exit 3"), init=True, stdout=file.fileno())
    container = Container("/run/mine", "one", bundle="/path/to/bundle")
    process = Process(settings)
    container.run(process)
    assert process.wait() == 3
    container.destroy()

The launcher does the work and stays as the process's stand-in: a child of the caller with its
status. What is signalled is a pidfd that the launcher has sent, so no number can be another's.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_INFO = 4


class ProcessError(ApptainerError):
    """What cannot be done to a process, in libcontainer's words, or why it was not started."""

    exit_code = 1


class ProcessSettings(Record):
    """What a process is to be; a field that is None is as the container's configuration says.

    `stdin`, `stdout`, `stderr` are descriptors of files, pipes or anything else; None inherits the
    caller's. The process has `extra_files` as 3, 4, and so on, and no other. The five sets of
    `capabilities` are lists of names by the set's name; `rlimits`, `scheduler`, `io_priority` and
    `exec_cpu_affinity` are as config.json has them (config.md, Process). `console_socket` and
    `pidfd_socket` are paths where somebody listens, who is sent the terminal, and a pidfd; a
    console's width and height count together. `init` tells the first process of a container from
    one more in it; `sub_cgroup_paths` are for the latter, as `exec --cgroup` takes them.
    `log_level` 5 and more has the launcher tell more (Process.messages).
    """

    args: tuple[str, ...]
    env: tuple[str, ...] | None = None
    uid: int | None = None
    gid: int | None = None
    additional_groups: tuple[int, ...] | None = None
    umask: int | None = None
    cwd: str | None = None
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    extra_files: tuple[int, ...] = ()
    console_width: int = 0
    console_height: int = 0
    console_socket: str = ""
    capabilities: Mapping[str, list[str]] | None = None
    apparmor_profile: str | None = None
    label: str | None = None
    no_new_privileges: bool | None = None
    rlimits: tuple[Mapping[str, Any], ...] | None = None
    pidfd_socket: str = ""
    init: bool = False
    log_level: int = _INFO
    sub_cgroup_paths: tuple[str, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    io_priority: Mapping[str, Any] | None = None
    exec_cpu_affinity: Mapping[str, str] | None = None

    def specification(self, configured: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process as config.json's `process`; `configured` is the container's own."""
        user = dict(configured.get("user") or {"uid": 0, "gid": 0})
        groups = self.additional_groups
        user |= _given(
            uid=self.uid,
            gid=self.gid,
            umask=self.umask,
            additionalGids=None if groups is None else list(groups),
        )
        process = {**configured, "args": list(self.args), "user": user}
        process |= _given(
            apparmorProfile=self.apparmor_profile,
            capabilities=self.capabilities,
            cwd=self.cwd,
            env=None if self.env is None else list(self.env),
            execCPUAffinity=self.exec_cpu_affinity,
            ioPriority=self.io_priority,
            noNewPrivileges=self.no_new_privileges,
            rlimits=None if self.rlimits is None else list(self.rlimits),
            scheduler=self.scheduler,
            selinuxLabel=self.label,
        )
        process["terminal"] = bool(self.console_socket)
        if self.console_width and self.console_height:
            size = {"height": self.console_height, "width": self.console_width}
            process["consoleSize"] = size
        return process


def _given(**values: object) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class Process:
    """One process: made from settings, started by a Container, then signalled and waited for.

    `messages` are what the launcher had to say of it: (level, text), level "warning" or "debug".
    """

    def __init__(self, settings: ProcessSettings) -> None:
        self.settings = settings
        self.messages: tuple[tuple[str, str], ...] = ()
        self._child = 0
        self._pidfd = -1
        self._pid = 0
        self._status: int | None = None

    def begin(self, child: int, pidfd: int, pid: int) -> None:
        """Note who stands in for the process, and which it is; a Container calls this, once."""
        self._child = child
        self._pidfd = pidfd
        self._pid = pid

    def is_started(self) -> bool:
        """Return whether a container has started it, whatever became of it since."""
        return self._child != 0

    def pid(self) -> int:
        """Return the process's number on the host, also after its end.

        Raises:
            ProcessError: it was not started.
        """
        self._check()
        return self._pid

    def signal(self, number: int) -> None:
        """Send a signal.

        Raises:
            ProcessError: it was not started, or has ended.
        """
        self._check()
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
        self._check()
        if self._status is None:
            status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            self._status = status if status >= 0 else 128 - status
            os.close(self._pidfd)
            self._pidfd = -1
        return self._status

    def _check(self) -> None:
        if not self._child:
            raise ProcessError(text="invalid process")


def pid_of(pidfd: int) -> int:
    """Return the number of the process that a pidfd stands for; -1 if it was reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                return int(line.split()[1])
    return -1
