"""`start_process`: inside the container, sealed; what only stage 2 can do, then the payload."""

from __future__ import annotations

import os
import time  # noqa: F401  views.py wants it after the seal; a master without that does not

from apptainer_py.base import log
from apptainer_py.engines.apptainer import payload
from apptainer_py.engines.apptainer.message import refused_label, unpack
from apptainer_py.engines.apptainer.payload import NotStarted
from apptainer_py.engines.apptainer.views import Inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.runtime.contexts import StartContext

_INIT = b"/sbin/init"
# SIGINT, SIGQUIT and SIGTSTP, which the terminal sends, are for the payload.
_BLOCKED = (2, 3, 20)


def rehearse(raw: bytes) -> None:
    """Evaluate an example with what this launch is told; nothing comes of it."""
    payload.rehearse(unpack(raw))


def start(context: StartContext) -> None:
    """Become the payload.

    Raises:
        LaunchError: the directory or the program cannot be used.
    """
    message = unpack(context.message)
    log.set_level(int(message[b"level"][0]))
    view = Inside(context)
    if message[b"fuses"]:
        _serve_fuses(context, message, view)
    wanted = payload.Payload(message, view)
    wanted.enter()
    if message[b"console"]:
        _take_console()
    if message[b"label"]:
        _take_label(context, *message[b"label"])
    if message[b"filter"]:
        code, number = message[b"filter"]
        context.filter_calls(bytes.fromhex(code.decode()), int(number))
    os.umask(int(message[b"umask"][0]))
    if message[b"action"][0] == b"boot":
        _boot(view, message, os.fsencode(os.getcwd()))
    wanted.start()


def _take_label(context: StartContext, kind: bytes, text: bytes) -> None:
    number = context.label(int(kind), text)
    if number:
        raise NotStarted(text=refused_label(int(kind), os.fsdecode(text), number))


def _serve_fuses(context: StartContext, message: dict[bytes, list[bytes]], view: Inside) -> None:
    """Start the programs of --fusemount that run here, each with its device."""
    left = message[b"fuses"]
    while left:
        ends, count = left[0] == b"1", int(left[1])
        words, left = left[2 : 2 + count], left[2 + count :]
        device = context.fetch()
        _serve_fuse(context, message, (words, device), view, ends=ends)
        os.close(device)


def _serve_fuse(
    context: StartContext,
    message: dict[bytes, list[bytes]],
    served: tuple[list[bytes], int],
    view: Inside,
    *,
    ends: bool,
) -> None:
    words, device = served
    path = next(entry[5:] for entry in message[b"plain"] if entry.startswith(b"PATH="))
    failed = f"could not start program {os.fsdecode(b' '.join(words))}"
    try:
        program = words[0] if b"/" in words[0] else payload.find(view, words[0], path, b"/")
    except NotStarted as error:
        raise NotStarted(text=f"{failed}: exec: {error}") from None
    environment = dict(entry.split(b"=", 1) for entry in message[b"plain"])
    empty, end = os.pipe2(os.O_CLOEXEC)
    # The device last: 3 may be any of the others until then.
    pairs = zip((empty, *context.output(), device), (0, 1, 2, 3), strict=True)
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in pairs]
    try:
        pid = os.posix_spawn(
            program, [program, *words[1:]], environment, file_actions=actions, setsigmask=_BLOCKED
        )
    except OSError as error:
        reason = f"fork/exec {os.fsdecode(program)}: {payload.reason(error)}"
        raise NotStarted(text=f"{failed}: {reason}") from None
    finally:
        os.close(empty)
        os.close(end)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ends else 0
    if status != 0:
        reason = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise NotStarted(text=f"{failed}: {reason}")


def _take_console() -> None:
    """Make the terminal /dev/console, the only name that it has in the container's own /dev."""
    terminals = [fd for fd in range(3) if os.isatty(fd)]
    try:
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return
    for fd in terminals:
        os.dup2(console, fd)
    os.close(console)


def _boot(view: Inside, message: dict[bytes, list[bytes]], directory: bytes) -> None:
    """Become the image's init, which reads no environment of the image's, nor arguments."""
    if not payload.is_program(view, _INIT):
        raise NotStarted(text="--boot: /sbin/init does not exist in container, or is no program")
    # By this variable an init knows that it has no machine to start (container(7) of systemd).
    environment = [*message[b"plain"], b"container=apptainer", b"PWD=" + directory]
    problem = view.execute(_INIT, [_INIT], environment)
    if problem is not None:
        raise NotStarted(text=payload.explain(view, _INIT, problem))
