"""`instance stop`: a signal, some patience, and SIGKILL for who does not heed it.

A signal goes to a process that has been looked at, by descriptor, and to no number: a record may
say anything.
"""

from __future__ import annotations

import os
import select
import time

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, UsageError
from apptainer_py.runtime import instances

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LAST_WORDS_S = 5.0
# What the init programs themselves say ends all that they have started.
_OF_INITS = {"systemd": "SIGRTMIN+3", "busybox": "SIGUSR2", "openrc-init": "SIGPWR"}


class StopForRoot(ApptainerError):
    message = "Only root user can stop user's instances"


class BadSignal(ApptainerError):
    message = "Could not convert stop signal: {text} is not a number"
    hint = "a signal is a name such as SIGTERM, or a number from 1 to 64"


class StillThere(ApptainerError):
    message = "instance {name} (PID={pid}) has not ended"


class KeeperStays(ApptainerError):
    message = "what keeps instance {name} (PID={pid}) has not ended, and holds the name"
    hint = "`kill -9 {pid}` ends it"


class _Target:
    """An instance that is being stopped, held by descriptors of its process and of the keeper."""

    def __init__(self, instance: instances.Instance, process: int, keeper: int) -> None:
        self.instance = instance
        self.process = process
        self.keeper = keeper

    def send(self, number: int) -> None:
        import signal

        try:
            signal.pidfd_send_signal(self.process, number)
        except ProcessLookupError:
            return

    def wake(self) -> None:
        """Let go on what has been stopped (SIGSTOP), and would heed nothing but SIGKILL."""
        import signal

        for pid, descriptor in (
            (self.instance.pid, self.process),
            (self.instance.ppid, self.keeper),
        ):
            if not instances.is_stopped(pid):
                continue
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            except OSError:
                continue  # it has ended since

    def describe(self) -> str:
        one = self.instance
        return f"{one.name} instance of {one.image} (PID={one.pid})"


def instance_stop(  # noqa: PLR0913 an option each
    pattern: str,
    environ: Mapping[str, str],
    *,
    everything: bool,
    user: str,
    uid: int,
    number: str,
    force: bool,
    timeout_s: int,
) -> None:
    """Stop the instances whose names match; returns when they have ended.

    Raises:
        ApptainerError: it cannot be done, or not by this caller.
    """
    import signal

    if not pattern and not everything:
        raise UsageError(text="invalid command")
    if user and uid != 0:
        raise StopForRoot
    wanted = signal.SIGKILL if force else signal_number(number) if number else 0
    owner = instances.owner_asked(user, uid, environ)
    fits = _test_of(pattern or "*")  # a name is what is meant, also beside --all
    taken = [_take(instance, owner) for instance in instances.every(owner) if fits(instance.name)]
    targets = [target for target in taken if target is not None]
    if not targets:
        raise UsageError(text="no instance found")
    _stop(targets, wanted, timeout_s)
    if uid == owner.uid:
        for target in targets:
            instances.forget(owner, target.instance.name)


def _test_of(pattern: str) -> Callable[[str], object]:
    from apptainer_py.base.glob import BadPattern, name_test

    try:
        return name_test(pattern)
    except BadPattern:
        text = "could not retrieve instance list: syntax error in pattern"
        raise UsageError(text=text) from None


def signal_number(text: str) -> int:
    """Return the number of a signal that is given by name, with or without SIG, or by number.

    Raises:
        BadSignal: there is no such signal.
    """
    import signal

    if text.isascii() and text.isdigit() and 1 <= int(text) <= 64:
        return int(text)
    name, _, more = text.upper().partition("+")
    name = name if name.startswith("SIG") else f"SIG{name}"
    found = signal.Signals.__members__.get(name)
    if found is None or not (more or "0").isascii() or not (more or "0").isdigit():
        raise BadSignal(text=text)
    number = found + int(more or 0)
    if more and (found != signal.SIGRTMIN or number > signal.SIGRTMAX):
        raise BadSignal(text=text)
    return number


def _take(instance: instances.Instance, owner: instances.Owner) -> _Target | None:
    """Return a hold on the processes of an instance, if it still is the one of the record."""
    try:
        folder = instances.process_folder(instance.pid)
    except OSError:
        return None
    try:
        process = os.pidfd_open(instance.pid)
        keeper = os.pidfd_open(instance.ppid)
    except OSError:
        return None
    finally:
        # Judged after the descriptors are there: what is in our hands is what was looked at.
        good = instances.is_running(instance, folder, owner)
        os.close(folder)
    if not good:
        os.close(process)
        os.close(keeper)
        return None
    return _Target(instance, process, keeper)


def _stop(targets: list[_Target], wanted: int, timeout_s: int) -> None:
    import signal

    for target in targets:
        log.info(f"Stopping {target.describe()}")
        target.send(wanted or _own_signal(target.instance))
        target.wake()
    left = _wait(targets, timeout_s)
    for target in left:
        log.info(f"Killing {target.describe()} (Timeout)")
        target.send(signal.SIGKILL)
    for target in _wait(left, _LAST_WORDS_S):
        raise StillThere(name=target.instance.name, pid=target.instance.pid)
    # The name is free when the last of the instance's processes has gone.
    for target in _wait(targets, _LAST_WORDS_S, keepers=True):
        raise KeeperStays(name=target.instance.name, pid=target.instance.ppid)


def _own_signal(instance: instances.Instance) -> int:
    """Return what the image's author wants for the end, what its init heeds, or SIGINT."""
    import signal

    wanted = instance.stop_signal or _OF_INITS.get(_init_of(instance), "SIGINT")
    try:
        return signal_number(wanted)
    except BadSignal:
        log.warning(f"{instance.image}: its stop signal is unknown; sending SIGINT")
        return signal.SIGINT


def _init_of(instance: instances.Instance) -> str:
    """Return the name of the program that the image has as its init, if that is the first."""
    if not instance.booted:
        return ""
    try:
        program = os.path.basename(os.readlink(f"/proc/{instance.pid}/exe"))
        with open(f"/proc/{instance.pid}/cmdline", "rb") as file:
            name = file.read(4096).partition(b"\0")[0]
    except OSError:
        return ""
    # A script's interpreter is named otherwise, and heeds what the script says.
    return program if os.path.basename(name) in (b"init", os.fsencode(program)) else ""


def _wait(targets: list[_Target], patience_s: float, *, keepers: bool = False) -> list[_Target]:
    """Return those that have not ended in that time."""
    end = time.monotonic() + patience_s
    poll = select.poll()
    waiting = {target.keeper if keepers else target.process: target for target in targets}
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            break
        for fd, _ in ready:
            poll.unregister(fd)
            del waiting[fd]
    return list(waiting.values())
