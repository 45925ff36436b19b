"""What the payload is: its directory, its environment, its program.

Stage 2 finds it out inside the container, sealed. Where stage 2 is lean, master does, and stage 2
carries it out. Each has a view of the container (views.py).
"""

from __future__ import annotations

import errno
import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.engines.apptainer import dockerenv
from apptainer_py.engines.apptainer.message import LIBRARY_MISSING
from apptainer_py.engines.apptainer.shellenv import NotSimple, environment
from apptainer_py.engines.apptainer.views import NotSeen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.engines.apptainer.views import Inside, Outside

    View = Inside | Outside
    Message = dict[bytes, list[bytes]]

_SHELL, _BASH = b"/bin/sh", b"/bin/bash"
_RUNSCRIPT = b"/.singularity.d/runscript"
_SCRIPTS = {b"run": _RUNSCRIPT, b"start": b"/.singularity.d/startscript"}
_FOLDER = "/.singularity.d/env"
_FILE_BYTES = 1 << 16
# An image has a handful; what has more is left to its own shell, within its own limits.
_FILES_MAX = 64
# The actions whose program is found here as the script does; the others are the script's.
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


def rehearse(message: Message) -> None:
    """Evaluate an example with what this launch is told; nothing comes of it."""
    if _leaves_to_shell(message):
        return
    try:
        _variables(message, [("99-base.sh", _EXAMPLE)], b"/", lambda _kind, _path: False)
    except NotSimple:
        return


class Payload:
    """The payload of one launch; `message` is what `process.lists` says of it."""

    __slots__ = ("_directory", "_entries", "_found", "_judged", "_message", "_view")

    def __init__(self, message: Message, view: View) -> None:
        self._message = message
        self._view = view
        self._directory = b"/"
        self._judged = b""
        self._entries: list[bytes] | None = None
        self._found: bytes | None = None

    def enter(self) -> None:
        """Enter the directory, the first of the candidates that can be.

        Raises:
            BadDirectory: it was asked for, and cannot be.
        """
        candidates = self._message[b"cwd"]
        for path, instead in zip(candidates, [*candidates[1:], b"/"], strict=True):
            try:
                self._directory = self._view.enter(path)
                return
            except OSError as error:
                facts = {"path": os.fsdecode(path), "reason": reason(error)}
                if self._message[b"cwd_required"]:
                    raise BadDirectory(**facts) from None
                log.warning(
                    "Error changing the container working directory. Using "
                    f"'{os.fsdecode(instead)}' instead: chdir {facts['path']}: {facts['reason']}"
                )
        self._directory = self._view.enter(b"/")

    def judge(self, directory: bytes) -> None:
        """Find environment and program for a directory; `start` does so again if it is another."""
        self._check_start()
        self._judged = directory
        self._entries = self._evaluate(directory)
        self._found = self._find_ahead(directory)

    def start(self) -> None:
        """Begin it.

        Raises:
            NotStarted: nothing can be.
        """
        if self._judged != self._directory:
            self.judge(self._directory)
        try:
            if self._entries is not None and self._start_directly(self._entries):
                return
        except NotSeen:
            pass  # the image's shell sees it
        if not self._start_by_shell():
            self._start_without_shell()

    def _check_start(self) -> None:
        """Refuse an instance of an application that has nothing to start, while one listens."""
        app = self._message[b"app"]
        if self._message[b"action"][0] != b"start" or not app:
            return
        if not is_program(self._view, b"/scif/apps/" + app[0] + b"/scif/startscript"):
            raise NotStarted(text=f"No startscript for contained app: {os.fsdecode(app[0])}")

    # ---- the environment ----

    def _evaluate(self, directory: bytes) -> list[bytes] | None:
        """Return the payload's environment, where it can be had without the image's shell.

        None leaves it to that shell: a language that only it understands, or an action of its own.
        """
        message = self._message
        if _leaves_to_shell(message):
            return None
        try:
            files = self._environment_files()
            variables = _variables(message, files, directory, self._file_test)
        except NotSimple:
            return None
        except OSError as error:
            self._view.check_served(error)
            return None
        # Last what no shell could hold, as bash's exported functions: no file of the image sees it.
        entries = [os.fsencode(f"{name}={value}") for name, value in variables.items()]
        return entries + message[b"odd"]

    def _environment_files(self) -> list[tuple[str, str]]:
        try:
            names = self._view.names(_FOLDER)
            shown = [name for name in names if name.endswith(".sh") and name[0] != "."]
            paths = [f"{_FOLDER}/{name}" for name in shown]
        except FileNotFoundError:
            paths = ["/environment"]
        if len(paths) > _FILES_MAX:
            raise NotSimple
        found = [(path, text) for path in paths if (text := self._read_text(path)) is not None]
        return [(path, _meant(path, text)) for path, text in found]

    def _script(self) -> bytes:
        """Return the script, with the variables of an OCI image as they were meant."""
        script = self._message[b"script"][0]
        try:
            text = self._read_text(f"{_FOLDER}/{dockerenv.NAME}")
            better = dockerenv.rewritten(text) if text else None
        except (NotSimple, OSError):
            better = None
        if better is None:
            return script
        return script.replace(b"#@DOCKER@", os.fsencode(dockerenv.assignment(better)), 1)

    def _read_text(self, path: str) -> str | None:
        """Return a small regular file's text; None where the shell would not source it."""
        try:
            fd = self._view.open(path)
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

    def _file_test(self, kind: str, path: str) -> bool:
        view = self._view
        if kind in "rx":
            return view.access(path, os.R_OK if kind == "r" else os.X_OK)
        try:
            facts = view.stat(path, follow=kind not in "hL")
        except OSError:
            return False
        if kind == "s":
            return facts.st_size > 0
        formats = {"d": stat.S_IFDIR, "f": stat.S_IFREG, "h": stat.S_IFLNK, "L": stat.S_IFLNK}
        return kind == "e" or stat.S_IFMT(facts.st_mode) == formats[kind]

    # ---- the program ----

    def _find_ahead(self, directory: bytes) -> bytes | None:
        """Return the program, if that is clear; what is not is told when it is begun."""
        if self._entries is None or self._message[b"action"][0] in _SCRIPTS:
            return None
        try:
            return find(self._view, self._message[b"arguments"][0], _path(self._entries), directory)
        except (NotSeen, NotStarted):
            return None

    def _start_directly(self, entries: list[bytes]) -> bool:
        """Begin the command, or the runscript; False where the shell has to say more."""
        message, view = self._message, self._view
        arguments = message[b"arguments"]
        script = _SCRIPTS.get(message[b"action"][0])
        if script is not None:
            if not is_program(view, script):
                return False
            arguments = [script, *arguments]
        program = self._found or find(view, arguments[0], _path(entries), self._directory)
        if message[b"prefix"]:
            arguments = [*message[b"prefix"], program, *arguments[1:]]
            program = arguments[0]
        problem = view.execute(program, [program, *arguments[1:]], entries)
        if problem is not None and problem.errno == errno.ENOEXEC:
            problem = view.execute(_SHELL, [_SHELL, program, *arguments[1:]], entries)
        if problem is not None:
            raise NotStarted(text=explain(view, program, problem))
        return True

    def _start_by_shell(self) -> bool:
        """Begin the image's shell with the script; False where it has none fit for this action."""
        message = self._message
        exec_alone = message[b"action"][0] == b"exec"
        shells = (_SHELL, _BASH) if message[b"action"][0] in _DIRECT else (_SHELL,)
        shell = next((shell for shell in shells if may_be_program(self._view, shell)), b"")
        if not shell:
            return False
        forwarded = message[b"forwarded"]
        words = [shell, b"-c", b'eval "$1"', b"apptainer-py", self._script()]
        words += [b"%d" % len(forwarded), *forwarded, *message[b"arguments"]]
        own = b"PWD=" + self._directory
        problem = self._view.execute(shell, words, [*message[b"environment"], own])
        if problem is not None and not exec_alone:
            raise NotStarted(text=explain(self._view, shell, problem))
        return problem is None

    def _start_without_shell(self) -> None:
        action, view = self._message[b"action"][0], self._view
        arguments = self._message[b"arguments"]
        if action != b"exec":
            arguments = [_SCRIPTS.get(action, b""), *arguments]
            if action not in _SCRIPTS or not may_be_program(view, arguments[0]):
                raise NotStarted(text="/bin/sh does not exist in container")
        entries = [*self._message[b"plain"], b"PWD=" + self._directory]
        path = next(entry[5:] for entry in entries if entry.startswith(b"PATH="))
        try:
            program = find(view, arguments[0], path, self._directory)
        except NotSeen:
            program = arguments[0]
            if b"/" not in program:
                raise NotStarted(text=_not_found(program)) from None
        problem = view.execute(program, [program, *arguments[1:]], entries)
        if problem is not None:
            raise NotStarted(text=explain(view, program, problem))


def _path(entries: list[bytes]) -> bytes:
    return next((entry[5:] for entry in entries if entry.startswith(b"PATH=")), b"")


def _leaves_to_shell(message: Message) -> bool:
    return message[b"action"][0] not in _DIRECT or bool(message[b"app"])


def _variables(
    message: Message,
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


def _meant(path: str, text: str) -> str:
    return (path.endswith(dockerenv.NAME) and dockerenv.rewritten(text)) or text


def reason(error: OSError) -> str:
    """Return why a system call failed, as a message has it."""
    return (error.strerror or "").lower()


def is_program(view: View, path: bytes) -> bool:
    """Return whether a path is a file that may be executed.

    Raises:
        NotSeen: that may be something else for the payload.
    """
    try:
        facts = view.stat(path)
        return stat.S_ISREG(facts.st_mode) and view.access(path, os.X_OK)
    except OSError as error:
        view.check_served(error)
        return False


def may_be_program(view: View, path: bytes) -> bool:
    """Return whether it is worth an execve, which tells what cannot be seen."""
    try:
        return is_program(view, path)
    except NotSeen:
        return True


def find(view: View, name: bytes, path: bytes, directory: bytes) -> bytes:
    """Return the program of a name, as a shell finds it along a PATH.

    Raises:
        NotSeen: whatever is there may be something else for the payload.
        NotStarted: there is none.
    """
    if b"/" in name:
        return _check_program(view, os.path.join(directory, name.removeprefix(b"./")))
    for folder in path.split(b":"):
        candidate = os.path.join(folder or b".", name)
        if is_program(view, candidate):
            return candidate
    raise NotStarted(text=_not_found(name))


def _not_found(name: bytes) -> str:
    return f'"{os.fsdecode(name)}": executable file not found in $PATH'


def _check_program(view: View, program: bytes) -> bytes:
    try:
        mode = view.stat(program).st_mode
        allowed = view.access(program, os.X_OK)
    except OSError as error:
        view.check_served(error)
        raise NotStarted(text=f"stat {os.fsdecode(program)}: {reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise NotStarted(text="is a directory")
    if not allowed:
        raise NotStarted(text="permission denied")
    return program


def explain(view: View, program: bytes, problem: OSError) -> str:
    """Return what to tell the user of a program that execve(2) refused."""
    view.check_served(problem)
    name = os.fsdecode(program)
    if problem.errno == errno.ENOENT and _is_there(view, program):
        return f"exec {name} failed: {LIBRARY_MISSING}"
    if problem.errno == errno.ENOEXEC:
        return f"{name}: exec format error: a script needs a #! line, a program this architecture"
    return f"{name}: {reason(problem)}"


def _is_there(view: View, path: bytes) -> bool:
    try:
        view.stat(path)
    except NotSeen:
        return True
    except OSError:
        return False
    return True
