"""`exec`, `run`, `test` and `stream`: programs in containers, started by the launcher as a child.

A container is made by programs of its own, so a caller's threads, descriptors and signals have no
part in it. What is not asked for is closed: standard input is empty, and output is collected.
"""

from __future__ import annotations

import os

from apptainer_py.api import ending
from apptainer_py.api.errors import CommandFailed, NotLaunched, TimedOut
from apptainer_py.api.options import global_words
from apptainer_py.base import build
from apptainer_py.base.errors import LaunchError, UsageError
from apptainer_py.base.record import Record
from apptainer_py.cli.table import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence
    from typing import IO, Any, Self, TypeAlias, Unpack

    from apptainer_py.api import keywords

    Path: TypeAlias = str | os.PathLike[str]
    # A descriptor, or anything with one.
    Stream: TypeAlias = int | IO[Any]

_FAILED, _MISUSED = 255, 1
_FATAL, _FOLLOWING = b"FATAL:   ", (b"INFO:    ",)
_USAGE = b"Error for command "
# What must not be seen in a list of processes.
_SECRET = {"docker_password": "APPTAINER_DOCKER_PASSWORD"}
# After a SIGKILL the pipes may be held open by what has left the container's session.
_LAST_WORDS_S = 5.0


class Completed(Record):
    """What a program in a container has done; `args` are what was asked for."""

    args: tuple[str, ...]
    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Return what it has printed, as text; bytes that are none are shown as U+FFFD."""
        return self.stdout.decode("utf-8", "replace")

    def raise_for_status(self) -> Self:
        """Return this very object.

        Raises:
            CommandFailed: the program did not end with 0.
        """
        if self.returncode != 0:
            raise CommandFailed(self)
        return self


class How(Record):
    """What a caller wants of the child that is no option of the command."""

    input: bytes | str | None = None
    stdin: Stream | None = None
    stdout: Stream | None = None
    stderr: Stream | None = None
    timeout: float | None = None
    check: bool = False
    environ: Mapping[str, str] | None = None


def exec(  # noqa: A001, PLR0913 the command's name
    image: Path,
    command: Sequence[Path],
    *,
    input: bytes | str | None = None,  # noqa: A002 as subprocess names it
    stdin: Stream | None = None,
    stdout: Stream | None = None,
    stderr: Stream | None = None,
    timeout: float | None = None,
    check: bool = False,
    environ: Mapping[str, str] | None = None,
    **options: Unpack[keywords.Exec],
) -> Completed:
    """Run a program in a container, and wait for its end.

    `input` is what it reads; `stdin`, `stdout` and `stderr` are descriptors or files to use in
    place of pipes; `environ` is in place of the caller's environment; `options` are those of the
    command line.

    Raises:
        LaunchError: the container could not be made.
        TimedOut: it took longer than `timeout` seconds.
        CommandFailed: with `check`, it did not end with 0.
        TypeError: an option has no such name or type.
    """
    how = How(
        input=input, stdin=stdin, stdout=stdout, stderr=stderr, timeout=timeout, check=check,
        environ=environ,
    )  # fmt: skip
    return complete("exec", image, _program(command), how, options)


def run(  # noqa: PLR0913 as above
    image: Path,
    arguments: Sequence[Path] = (),
    *,
    input: bytes | str | None = None,  # noqa: A002
    stdin: Stream | None = None,
    stdout: Stream | None = None,
    stderr: Stream | None = None,
    timeout: float | None = None,
    check: bool = False,
    environ: Mapping[str, str] | None = None,
    **options: Unpack[keywords.Run],
) -> Completed:
    """Run what the image's author has meant to be run; as `exec` in all else.

    Raises:
        ApptainerError, TypeError: as `exec`.
    """
    how = How(
        input=input, stdin=stdin, stdout=stdout, stderr=stderr, timeout=timeout, check=check,
        environ=environ,
    )  # fmt: skip
    return complete("run", image, words_of(arguments), how, options)


def test(
    image: Path,
    arguments: Sequence[Path] = (),
    *,
    timeout: float | None = None,
    check: bool = False,
    environ: Mapping[str, str] | None = None,
    **options: Unpack[keywords.Test],
) -> Completed:
    """Run the image's test; as `exec` in all else.

    Raises:
        ApptainerError, TypeError: as `exec`.
    """
    how = How(timeout=timeout, check=check, environ=environ)
    return complete("test", image, words_of(arguments), how, options)


class Running:
    """A program in a container that has been started: its pipes, its end.

    As a context manager it ends the container when it is left.
    """

    def __init__(self, args: Sequence[str], child: subprocess.Popen[bytes]) -> None:
        self.args = tuple(args)
        self._child = child
        self.stdin = child.stdin
        self.stdout = child.stdout
        self.stderr = child.stderr

    @property
    def returncode(self) -> int | None:
        """Return the exit status, 128 and the signal if it was killed; None while it runs."""
        status = self._child.poll()
        return None if status is None else _status(status)

    def lines(self) -> Iterator[str]:
        """Yield each line of what it prints, without its end, as soon as it is there."""
        if self.stdout is None:
            raise ValueError("its output is not collected")
        for line in self.stdout:
            yield line.decode("utf-8", "replace").rstrip("\n")

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens once it has ended."""
        self._child.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, as soon as it has ended.

        Raises:
            TimedOut: that took longer than `timeout` seconds; it goes on.
        """
        import subprocess

        try:
            return _status(self._child.wait(timeout))
        except subprocess.TimeoutExpired:
            raise _timed_out(self.args, timeout, b"", b"") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        ending.end(self._child)
        for pipe in (self.stdin, self.stdout, self.stderr):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                continue
        self._child.wait()


def stream(
    image: Path,
    command: Sequence[Path],
    *,
    stdin: Stream | None = None,
    stdout: Stream | None = None,
    stderr: Stream | None = None,
    environ: Mapping[str, str] | None = None,
    **options: Unpack[keywords.Exec],
) -> Running:
    """Start a program in a container, and return while it runs; all of its streams are pipes.

    Whether the container could be made is seen by its status: 255, with a line on `stderr`.

    Raises:
        LaunchError: nothing could be started at all.
        TypeError: an option has no such name or type.
    """
    import subprocess

    pipe = subprocess.PIPE
    words, given = _command("exec", image, _program(command), options)
    child = spawn(
        words,
        environment_of(environ) | given,
        stdin=pipe if stdin is None else stdin,
        stdout=pipe if stdout is None else stdout,
        stderr=pipe if stderr is None else stderr,
    )
    return Running(_shown("exec", image, _program(command)), child)


def complete(
    command: str, image: Path, words: Sequence[str], how: How, options: Mapping[str, object]
) -> Completed:
    """Run any command that starts a container, and wait for its end.

    Raises:
        ApptainerError, TypeError: as `exec`.
    """
    import subprocess

    argv, given = _command(command, image, words, options)
    args = _shown(command, image, words)
    pipe, data = subprocess.PIPE, how.input
    child = spawn(
        argv,
        environment_of(how.environ) | given,
        stdin=_source(how),
        stdout=pipe if how.stdout is None else how.stdout,
        stderr=pipe if how.stderr is None else how.stderr,
    )
    with child:
        try:
            out, err = child.communicate(
                data.encode() if isinstance(data, str) else data, timeout=how.timeout
            )
        except subprocess.TimeoutExpired:
            ending.end(child)
            out, err = _last_words(child)
            raise _timed_out(args, how.timeout, out, err) from None
        except BaseException:
            ending.end(child)
            child.wait()
            raise
    done = Completed(
        args=args, returncode=_status(child.returncode), stdout=out or b"", stderr=err or b""
    )
    _look_for_refusal(done)
    return done.raise_for_status() if how.check else done


def spawn(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: Stream,
    stdout: Stream,
    stderr: Stream,
) -> subprocess.Popen[bytes]:
    """Start the launcher.

    Raises:
        LaunchError: it is not there.
    """
    import subprocess

    try:
        return subprocess.Popen(argv, env=environ, stdin=stdin, stdout=stdout, stderr=stderr)
    except OSError as error:
        text = f"{argv[0]}: {(error.strerror or '').lower()}"
        raise LaunchError(text=text) from None


def _source(how: How) -> Stream:
    import subprocess

    if how.input is not None:
        if how.stdin is not None:
            raise ValueError("input and stdin exclude each other")
        return subprocess.PIPE
    return subprocess.DEVNULL if how.stdin is None else how.stdin


def _command(
    command: str, image: Path, words: Sequence[str], options: Mapping[str, object]
) -> tuple[list[str], dict[str, str]]:
    """Return the launcher's command line, and what it is told by its environment."""
    given = {}
    plain = {}
    for keyword, value in options.items():
        if keyword in _SECRET and isinstance(value, str):
            given[_SECRET[keyword]] = value
        else:
            plain[keyword] = value
    outer, inner = global_words(command, plain)
    launcher = f"{build.BINDIR}/{PROGRAM}"
    return [launcher, *outer, *command.split(), *inner, "--", os.fspath(image), *words], given


def environment_of(environ: Mapping[str, str] | None) -> dict[str, str]:
    """Return what a caller has given as the environment, or else the process's own."""
    return dict(os.environ if environ is None else environ)  # noqa: TID251 a caller's own


def _program(command: Sequence[Path]) -> tuple[str, ...]:
    words = words_of(command)
    if not words:
        raise ValueError("there is no command to run")
    return words


def words_of(words: Sequence[Path]) -> tuple[str, ...]:
    """Return words as texts.

    Raises:
        TypeError: it is one word in place of several, or something else.
    """
    if isinstance(words, (str, bytes, os.PathLike)):
        raise TypeError(f"words must be a list of them, not {type(words).__name__}")
    return tuple(os.fspath(word) for word in words)


def _shown(command: str, image: Path, words: Sequence[str]) -> tuple[str, ...]:
    return (*command.split(), os.fspath(image), *words)


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _last_words(child: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    import subprocess

    try:
        out, err = child.communicate(timeout=_LAST_WORDS_S)
    except subprocess.TimeoutExpired as error:
        return error.stdout or b"", error.stderr or b""
    return out or b"", err or b""


def _timed_out(
    args: Sequence[str], seconds: float | None, stdout: bytes, stderr: bytes
) -> TimedOut:
    return TimedOut(command=" ".join(args), seconds=seconds or 0, stdout=stdout, stderr=stderr)


def _look_for_refusal(done: Completed) -> None:
    """Raise what the program's last lines say, if they are not those of what it has started.

    Its status alone does not tell: a program in a container may end with 255 too.
    """
    lines = done.stderr.rstrip().splitlines()
    while lines and lines[-1].startswith(_FOLLOWING):
        lines.pop()
    if done.returncode == _FAILED and lines and lines[-1].startswith(_FATAL):
        text = lines[-1].removeprefix(_FATAL).decode("utf-8", "replace")
        raise NotLaunched(text=text, returncode=done.returncode)
    if done.returncode == _MISUSED and done.stderr.startswith(_USAGE):
        text = done.stderr.splitlines()[0].partition(b": ")[2].decode("utf-8", "replace")
        raise UsageError(text=text)
