"""Streams of a container's process: what may be asked for, console sockets, and the foreground."""

from __future__ import annotations

import os

from apptainer_py.kernel import _container, _starter
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.model.oci_call import OciCall
    from apptainer_py.runtime.contexts import MonitorContext

_FIRST_EXTRA = 3
# By which the launcher knows what it is called for (starter/lean.h).
WATCHER_NAME = "apptainer-py-oci: watch"


def listen_fds(environment: Mapping[str, str]) -> int:
    """Return how many descriptors socket activation has passed (sd_listen_fds(3))."""
    number = environment.get("LISTEN_FDS", "")
    return int(number) if number.isdecimal() and len(number) < 5 else 0


def check_streams(call: OciCall, *, terminal: bool, detached: bool) -> None:
    """Refuse what fits not together.

    Raises:
        ContainerError: in runc's words.
    """
    has_socket = bool(call.text("console-socket"))
    if detached and terminal and not has_socket:
        text = "cannot allocate tty if runc will detach without setting console socket"
        raise ContainerError(text=text)
    if has_socket and not (detached and terminal):
        text = "cannot use console socket if runc will not detach or allocate tty"
        raise ContainerError(text=text)


def check_preserved(wanted: int, listening: int) -> None:
    """Refuse --preserve-fds of a descriptor that the caller has not.

    Raises:
        ContainerError: one is not open.
    """
    base = _FIRST_EXTRA + listening
    for number in range(base, base + wanted):
        try:
            os.fstat(number)
        except OSError:
            text = f"unable to stat preserved-fd {number - base} (of {wanted}): "
            text += f"stat /proc/self/fd/{number}: no such file or directory"
            raise ContainerError(text=text) from None


def connect(path: str) -> int:
    """Return a socket connected to the one that wants the terminal, or -1 where none does.

    Raises:
        ContainerError: nobody listens there.
    """
    if not path:
        return -1
    try:
        return _container.connect_unix(os.fsencode(path))
    except OSError as error:
        text = f"dial unix {path}: connect: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None


def send_console(socket: int, pty: int) -> None:
    """Hand the controlling side of a terminal to whoever listens; both are closed.

    Raises:
        ContainerError: the listener is gone.
    """
    try:
        _container.send_fd(socket, b"/dev/ptmx", pty)
    except OSError as error:
        text = f"sending the console: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    finally:
        os.close(socket)
        os.close(pty)


def hand_over(
    context: MonitorContext, pty: int, environment: Mapping[str, str], *command: str
) -> None:
    """Become the program that waits without an interpreter (starter/lean_watch.c).

    It does `command` when the payload has ended. Comes back where there is no such program.
    """
    words = [WATCHER_NAME, str(context.pid), str(pty), "apptainer-py-oci", *command]
    if pty >= 0:
        os.set_inheritable(pty, True)  # noqa: FBT003 the function has no names
    try:
        os.execve(context.watcher, words, environment)
    except OSError:
        return


def watch(context: MonitorContext, pty: int) -> int:
    """Pass signals, and the terminal if there is one, on to a child until it has ended.

    Returns its wait status (waitpid(2)).
    """
    return _starter.relay(context.pid, pty)
