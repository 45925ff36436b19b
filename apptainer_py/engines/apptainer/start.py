"""`start_process`: inside the container, sealed; directory, shell or program, and execve."""

from __future__ import annotations

import errno
import os
import stat
import time

from apptainer_py.base import log
from apptainer_py.base.errors import ImageGone, LaunchError, is_gone
from apptainer_py.engines.apptainer import dockerenv
from apptainer_py.engines.apptainer.message import LIBRARY_MISSING, refused_label, unpack
from apptainer_py.engines.apptainer.shellenv import NotSimple, environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.runtime.contexts import StartContext

_SHELL, _BASH = b"/bin/sh", b"/bin/bash"
_RUNSCRIPT, _INIT = b"/.singularity.d/runscript", b"/sbin/init"
_SCRIPTS = {b"run": _RUNSCRIPT, b"start": b"/.singularity.d/startscript"}
_FOLDER = "/.singularity.d/env"
_FILE_BYTES = 1 << 16
_STARTER_ENDS_S = 5
# SIGINT, SIGQUIT and SIGTSTP, which the terminal sends, are for the payload.
_BLOCKED = (2, 3, 20)
# The actions whose program stage 2 finds as the script does; the others are the script's.
_DIRECT = (b"exec", b"run", b"start")


# Of the kind that images have, for code that has run once is faster.
_EXAMPLE = r"""#!/bin/sh
# Copyright
if [ -z "${EXAMPLE_PATH:-}" ]; then
    EXAMPLE_PATH="/.singularity.d/libs"
else
    EXAMPLE_PATH="$EXAMPLE_PATH:/.singularity.d/libs"
fi
if test -n "${EXAMPLE:-}" && [ -d "/scif" ]; then
    EXAMPLE="${EXAMPLE}:${EXAMPLE_PATH}"
elif [ -f "/scif/file" ]; then
    EXAMPLE=''
fi
export EXAMPLE EXAMPLE_PATH
unset EXAMPLE \
      EXAMPLE_PATH
"""


class BadDirectory(LaunchError):
    """--cwd names a directory that the container has not."""

    message = "failed to set working directory: chdir {path}: {reason}"


class NotStarted(LaunchError):
    """The program cannot be executed."""

    message = "{text}"


def rehearse(raw: bytes) -> None:
    """Evaluate an example with what this launch is told; nothing comes of it."""
    message = unpack(raw)
    if _leaves_to_shell(message):
        return
    try:
        _variables(message, [("99-base.sh", _EXAMPLE)], b"/", lambda _kind, _path: False)
    except NotSimple:
        return


def start(context: StartContext) -> None:
    """Become the payload.

    Raises:
        LaunchError: the directory or the program cannot be used.
    """
    message = unpack(context.message)
    log.set_level(int(message[b"level"][0]))
    if message[b"fuses"]:
        _serve_fuses(context, message)
    _enter_directory(message[b"cwd"], required=bool(message[b"cwd_required"]))
    if message[b"console"]:
        _take_console()
    if message[b"label"]:
        _take_label(context, *message[b"label"])
    if message[b"filter"]:
        code, number = message[b"filter"]
        context.filter_calls(bytes.fromhex(code.decode()), int(number))
    os.umask(int(message[b"umask"][0]))
    directory = os.fsencode(os.getcwd())
    _check_start(message)
    if message[b"action"][0] == b"boot":
        _boot(context, message, directory)
    evaluated = _evaluate(message, directory)
    if evaluated is not None:
        _start_directly(context, message, evaluated)
    shell = _interpreter(message)
    if shell:
        forwarded = message[b"forwarded"]
        words = [shell, b"-c", b'eval "$1"', b"apptainer-py", _script(message)]
        words += [b"%d" % len(forwarded), *forwarded, *message[b"arguments"]]
        problem = context.execve(shell, words, [*message[b"environment"], b"PWD=" + directory])
        if message[b"action"][0] != b"exec":
            raise NotStarted(text=_explain(shell, problem))
    _start_without_shell(context, message, directory)


def _take_label(context: StartContext, kind: bytes, text: bytes) -> None:
    number = context.label(int(kind), text)
    if number:
        raise NotStarted(text=refused_label(int(kind), os.fsdecode(text), number))


def _serve_fuses(context: StartContext, message: dict[bytes, list[bytes]]) -> None:
    """Start the programs of --fusemount that run here, each with its device."""
    left = message[b"fuses"]
    while left:
        ends, count = left[0] == b"1", int(left[1])
        words, left = left[2 : 2 + count], left[2 + count :]
        device = context.fetch()
        _serve_fuse(context, message, words, device, ends=ends)
        os.close(device)


def _serve_fuse(
    context: StartContext,
    message: dict[bytes, list[bytes]],
    words: list[bytes],
    device: int,
    *,
    ends: bool,
) -> None:
    path = next(entry[5:] for entry in message[b"plain"] if entry.startswith(b"PATH="))
    failed = f"could not start program {os.fsdecode(b' '.join(words))}"
    try:
        program = words[0] if b"/" in words[0] else _find(words[0], path)
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
        reason = f"fork/exec {os.fsdecode(program)}: {_reason(error)}"
        raise NotStarted(text=f"{failed}: {reason}") from None
    finally:
        os.close(empty)
        os.close(end)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ends else 0
    if status != 0:
        reason = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise NotStarted(text=f"{failed}: {reason}")


def _check_start(message: dict[bytes, list[bytes]]) -> None:
    """Refuse an instance of an application that has nothing to start, while somebody listens."""
    app = message[b"app"]
    if message[b"action"][0] != b"start" or not app:
        return
    if not _is_program(b"/scif/apps/" + app[0] + b"/scif/startscript"):
        raise NotStarted(text=f"No startscript for contained app: {os.fsdecode(app[0])}")


def _interpreter(message: dict[bytes, list[bytes]]) -> bytes:
    """Return the image's shell that runs the script; empty where none is fit for this action."""
    shells = (_SHELL, _BASH) if message[b"action"][0] in _DIRECT else (_SHELL,)
    return next((shell for shell in shells if _is_program(shell)), b"")


def _evaluate(message: dict[bytes, list[bytes]], directory: bytes) -> list[bytes] | None:
    """Return the payload's environment, where it can be had without the image's shell.

    None leaves it to that shell: a language that only it understands, or an action of its own.
    """
    if _leaves_to_shell(message):
        return None
    try:
        variables = _variables(message, _environment_files(), directory, _file_test)
    except NotSimple:
        return None
    except OSError as error:
        _check_served(error)
        return None
    # Last what no shell could hold, as bash's exported functions: no file of the image sees it.
    return [os.fsencode(f"{name}={value}") for name, value in variables.items()] + message[b"odd"]


def _leaves_to_shell(message: dict[bytes, list[bytes]]) -> bool:
    return message[b"action"][0] not in _DIRECT or bool(message[b"app"])


def _variables(
    message: dict[bytes, list[bytes]],
    files: list[tuple[str, str]],
    directory: bytes,
    exists: Callable[[str, str], bool],
) -> dict[str, str]:
    return environment(
        files,
        os.fsdecode(message[b"values"][0]),
        os.fsdecode(message[b"paths"][0]),
        _pairs([*message[b"environment"], b"PWD=" + directory]),
        _pairs(message[b"forwarded"]),
        exists,
    )


def _pairs(entries: list[bytes]) -> dict[str, str]:
    parts = [os.fsdecode(entry).partition("=") for entry in entries]
    return {name: value for name, _, value in parts}


def _environment_files() -> list[tuple[str, str]]:
    try:
        names = [name for name in os.listdir(_FOLDER) if name.endswith(".sh") and name[0] != "."]
        paths = [f"{_FOLDER}/{name}" for name in names]
    except FileNotFoundError:
        paths = ["/environment"]
    found = [(path, text) for path in paths if (text := _read_text(path)) is not None]
    return [(path, _meant(path, text)) for path, text in found]


def _meant(path: str, text: str) -> str:
    return (path.endswith(dockerenv.NAME) and dockerenv.rewritten(text)) or text


def _script(message: dict[bytes, list[bytes]]) -> bytes:
    """Return the script, with the variables of an OCI image as they were meant."""
    script = message[b"script"][0]
    try:
        text = _read_text(f"{_FOLDER}/{dockerenv.NAME}")
        better = dockerenv.rewritten(text) if text else None
    except (NotSimple, OSError):
        better = None
    if better is None:
        return script
    return script.replace(b"#@DOCKER@", os.fsencode(dockerenv.assignment(better)), 1)


def _read_text(path: str) -> str | None:
    """Return a small regular file's text; None where the shell would not source it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = os.read(fd, _FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _FILE_BYTES or b"\0" in data:
        raise NotSimple
    return os.fsdecode(data)


def _file_test(kind: str, path: str) -> bool:
    if kind in "rx":
        return os.access(path, os.R_OK if kind == "r" else os.X_OK)
    try:
        facts = os.lstat(path) if kind in "hL" else os.stat(path)
    except OSError:
        return False
    if kind == "s":
        return facts.st_size > 0
    formats = {"d": stat.S_IFDIR, "f": stat.S_IFREG, "h": stat.S_IFLNK, "L": stat.S_IFLNK}
    return kind == "e" or stat.S_IFMT(facts.st_mode) == formats[kind]


def _start_directly(
    context: StartContext, message: dict[bytes, list[bytes]], entries: list[bytes]
) -> None:
    """Execute the command, or the runscript; comes back only where the shell has to say more."""
    arguments = message[b"arguments"]
    script = _SCRIPTS.get(message[b"action"][0])
    if script is not None:
        if not _is_program(script):
            return
        arguments = [script, *arguments]
    path = next((entry[5:] for entry in entries if entry.startswith(b"PATH=")), b"")
    program = _find(arguments[0], path)
    if message[b"prefix"]:
        arguments = [*message[b"prefix"], program, *arguments[1:]]
        program = arguments[0]
    problem = context.execve(program, [program, *arguments[1:]], entries)
    if problem.errno == errno.ENOEXEC:
        problem = context.execve(_SHELL, [_SHELL, program, *arguments[1:]], entries)
    raise NotStarted(text=_explain(program, problem))


def _enter_directory(candidates: list[bytes], *, required: bool) -> None:
    for path, instead in zip(candidates, [*candidates[1:], b"/"], strict=True):
        try:
            os.chdir(path)
            return
        except OSError as error:
            facts = {"path": os.fsdecode(path), "reason": _reason(error)}
            if required:
                raise BadDirectory(**facts) from None
            log.warning(
                "Error changing the container working directory. Using "
                f"'{os.fsdecode(instead)}' instead: chdir {facts['path']}: {facts['reason']}"
            )
    os.chdir("/")


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


def _reason(error: OSError) -> str:
    return (error.strerror or "").lower()


def _check_served(error: OSError) -> None:
    """Wait to be killed where the image has gone: who ends this says why, once."""
    if not is_gone(error.errno):
        return
    try:
        os.listdir("/")  # a mount of the user's may be what is gone
    except OSError:
        time.sleep(_STARTER_ENDS_S)
        raise ImageGone from None


def _is_program(path: bytes) -> bool:
    try:
        facts = os.stat(path)
    except OSError as error:
        _check_served(error)
        return False
    return stat.S_ISREG(facts.st_mode) and os.access(path, os.X_OK)


def _find(name: bytes, path: bytes) -> bytes:
    if b"/" in name:
        program = os.path.join(os.fsencode(os.getcwd()), name.removeprefix(b"./"))
        try:
            mode = os.stat(program).st_mode
        except OSError as error:
            _check_served(error)
            raise NotStarted(text=f"stat {os.fsdecode(program)}: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise NotStarted(text="is a directory")
        if not os.access(program, os.X_OK):
            raise NotStarted(text="permission denied")
        return program
    for directory in path.split(b":"):
        candidate = os.path.join(directory or b".", name)
        if _is_program(candidate):
            return candidate
    raise NotStarted(text=f'"{os.fsdecode(name)}": executable file not found in $PATH')


def _boot(context: StartContext, message: dict[bytes, list[bytes]], directory: bytes) -> None:
    """Become the image's init, which reads no environment of the image's, nor arguments."""
    if not _is_program(_INIT):
        raise NotStarted(text="--boot: /sbin/init does not exist in container, or is no program")
    # By this variable an init knows that it has no machine to start (container(7) of systemd).
    environment = [*message[b"plain"], b"container=apptainer", b"PWD=" + directory]
    problem = context.execve(_INIT, [_INIT], environment)
    raise NotStarted(text=_explain(_INIT, problem))


def _start_without_shell(
    context: StartContext, message: dict[bytes, list[bytes]], directory: bytes
) -> None:
    action = message[b"action"][0]
    arguments = message[b"arguments"]
    if action != b"exec":
        arguments = [_SCRIPTS.get(action, b""), *arguments]
        if action not in _SCRIPTS or not _is_program(arguments[0]):
            raise NotStarted(text="/bin/sh does not exist in container")
    environment = [*message[b"plain"], b"PWD=" + directory]
    path = next(entry[5:] for entry in environment if entry.startswith(b"PATH="))
    program = _find(arguments[0], path)
    problem = context.execve(program, [program, *arguments[1:]], environment)
    raise NotStarted(text=_explain(program, problem))


def _explain(program: bytes, problem: OSError) -> str:
    _check_served(problem)
    name = os.fsdecode(program)
    if problem.errno == errno.ENOENT and os.path.exists(program):
        return f"exec {name} failed: {LIBRARY_MISSING}"
    if problem.errno == errno.ENOEXEC:
        return f"{name}: exec format error: a script needs a #! line, a program this architecture"
    return f"{name}: {_reason(problem)}"
