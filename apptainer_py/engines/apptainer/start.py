"""`start_process`: inside the container, sealed; directory, shell or program, and execve."""

from __future__ import annotations

import errno
import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer.message import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.runtime.contexts import StartContext

_SHELL = b"/bin/sh"


class BadDirectory(LaunchError):
    """--cwd names a directory that the container has not."""

    message = "failed to set working directory: chdir {path}: {reason}"


class NotStarted(LaunchError):
    """The program cannot be executed."""

    message = "{text}"


def start(context: StartContext) -> None:
    """Become the payload.

    Raises:
        LaunchError: the directory or the program cannot be used.
    """
    message = unpack(context.message)
    log.set_level(int(message[b"level"][0]))
    _enter_directory(message[b"cwd"], required=bool(message[b"cwd_required"]))
    os.umask(int(message[b"umask"][0]))
    directory = os.fsencode(os.getcwd())
    arguments = message[b"arguments"]
    if _is_program(_SHELL):
        forwarded = message[b"forwarded"]
        words = [_SHELL, b"-c", message[b"script"][0], b"apptainer-py", b"%d" % len(forwarded)]
        environment = [*message[b"environment"], b"PWD=" + directory]
        problem = context.execve(_SHELL, [*words, *forwarded, *arguments], environment)
        raise NotStarted(text=f"cannot run {_SHELL.decode()}: {_reason(problem)}")
    _start_without_shell(context, message, directory)


def _enter_directory(candidates: list[bytes], *, required: bool) -> None:
    for path in candidates:
        try:
            os.chdir(path)
        except OSError as error:
            if required:
                raise BadDirectory(path=os.fsdecode(path), reason=_reason(error)) from None
            continue
        return
    os.chdir("/")


def _reason(error: OSError) -> str:
    return (error.strerror or "").lower()


def _is_program(path: bytes) -> bool:
    try:
        facts = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and os.access(path, os.X_OK)


def _find(name: bytes, path: bytes) -> bytes:
    if b"/" in name:
        try:
            os.stat(name)
        except OSError as error:
            raise NotStarted(text=f"stat {os.fsdecode(name)}: {_reason(error)}") from None
        return name
    for directory in path.split(b":"):
        candidate = os.path.join(directory or b".", name)
        if _is_program(candidate):
            return candidate
    raise NotStarted(text=f'"{os.fsdecode(name)}": executable file not found in $PATH')


def _start_without_shell(
    context: StartContext, message: dict[bytes, list[bytes]], directory: bytes
) -> None:
    action = message[b"action"][0]
    arguments = message[b"arguments"]
    if action != b"exec":
        arguments = [b"/.singularity.d/runscript", *arguments]
        if action != b"run" or not _is_program(arguments[0]):
            raise NotStarted(text="/bin/sh does not exist in container")
    environment = [*message[b"plain"], b"PWD=" + directory]
    path = next(entry[5:] for entry in environment if entry.startswith(b"PATH="))
    program = _find(arguments[0], path)
    problem = context.execve(program, arguments, environment)
    raise NotStarted(text=_explain(program, problem))


def _explain(program: bytes, problem: OSError) -> str:
    name = os.fsdecode(program)
    if problem.errno == errno.ENOENT and os.path.exists(program):
        return f"{name}: its interpreter does not exist in the container"
    if problem.errno == errno.ENOEXEC:
        return f"{name}: exec format error: a script needs a #! line, a program this architecture"
    return f"{name}: {_reason(problem)}"
