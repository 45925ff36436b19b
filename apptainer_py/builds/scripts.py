"""The scripts of a definition file: %pre and %setup on the host, %post and %test in a container.

A shell traces what it runs with a prompt that has the line's number in it; the trace is shown
without that, and the last number tells which line failed. Where the shell knows no numbers (dash),
the text of the last command is looked for in the script.
"""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from io import BufferedReader

    # Arguments, environment, umask, stdout and stderr.
    Launch = Callable[[Sequence[str], Mapping[str, str], int, tuple[int, int]], int]

POST_SCRIPT = ".post.script"
_MARK = b"\x1f"
# The first character is repeated for each subshell, as for any PS4.
_PROMPT = "PS4='+\x1f${LINENO-}\x1f '; set -x\n"
_LINES_KEPT = 4096
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ScriptFailed(ApptainerError):
    """A section ended with an error; `where` is the line of the definition file, if it is known."""

    message = "While performing build: {what}: exit status {status}"

    def advice(self) -> str | None:
        """Return the line that failed."""
        return str(self.facts["where"]) or None


class Script(Record):
    """A section's lines with their numbers in the definition file, 0 for those that are ours.

    `options` are the shell's, where no interpreter stands in its place; the last
    `of_apps` lines are those of %appinstall.
    """

    section: str
    lines: tuple[tuple[int, str], ...]
    interpreter: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    of_apps: int = 0

    @property
    def text(self) -> str:
        """What the shell is given."""
        start = "" if self.interpreter else _PROMPT
        return start + "".join(f"{text}\n" for _, text in self.lines)

    def where(self, number: int, command: str) -> str:
        """Return the place of a failure: the shell's line number if it gave one, the command."""
        offset = 2 if not self.interpreter else 1
        if 0 <= number - offset < len(self.lines) and self.lines[number - offset][0]:
            return self._at(number - offset)
        matching = [at for at, one in enumerate(self.lines) if one[0] and _same(one[1], command)]
        if len(matching) == 1:
            return self._at(matching[0])
        return f"it failed in section %{self.section} at: {command}" if command else ""

    def _at(self, at: int) -> str:
        number, text = self.lines[at]
        section = "appinstall" if at >= len(self.lines) - self.of_apps else self.section
        return f"it failed in line {number} of section %{section}: {text.strip()}"


def _same(line: str, command: str) -> bool:
    plain = line.replace('"', "").replace("'", "").strip()
    return bool(command) and command.replace("'", "") in plain


class Trace:
    """Shows what a script prints on stderr, and remembers its last command."""

    def __init__(self) -> None:
        self.number = 0
        self.command = ""

    def show(self, stream: BufferedReader, shown: int) -> None:
        """Copy a stream until its end."""
        kept = b""
        while data := stream.read1(_LINES_KEPT):
            *lines, kept = (kept + data).split(b"\n")
            for line in lines:
                _write(shown, self._plain(line + b"\n"))
            # A question has no end of line, and waits for an answer.
            if len(kept) >= _LINES_KEPT or not _may_be_trace(kept):
                _write(shown, kept)
                kept = b""
        _write(shown, self._plain(kept))

    def _plain(self, line: bytes) -> bytes:
        if not line.startswith(b"+") or line.count(_MARK) < 2:
            return line
        start, number, rest = line.split(_MARK, 2)
        if start.strip(b"+"):
            return line
        if len(start) == 1:
            self.number = int(number) if number.isdigit() else 0
            self.command = rest.decode("utf-8", "replace").strip()
        return start + rest


def _may_be_trace(start: bytes) -> bool:
    return start.startswith(b"+") and start.lstrip(b"+")[:1] in (b"", _MARK)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def on_host(script: Script, environ: Mapping[str, str], *, folder: str, umask: int) -> None:
    """Run %pre or %setup on the host, from a file in a folder of the build's own.

    Raises:
        ScriptFailed: it ended with an error.
    """
    path = f"{folder}/{script.section}.script"
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(script.text)
    status, trace = _run([*_shell(script), path], environ, umask)
    os.unlink(path)
    if status:
        what = f"failed to run %{script.section} script"
        raise ScriptFailed(
            what=what, status=status, where=script.where(trace.number, trace.command)
        )


def _shell(script: Script) -> list[str]:
    return list(script.interpreter) or ["/bin/sh", "-e", *script.options]


class Container(Record):
    """How scripts of the image are run: the caller's options, and his environment."""

    root: str
    options: tuple[str, ...]
    environ: Mapping[str, str]
    launch: Launch
    umask: int = 0o022
    program: str = f"{build.BINDIR}/apptainer-py"

    def post(self, script: Script) -> None:
        """Run %post as root of the image.

        Raises:
            ScriptFailed: it ended with an error.
        """
        path = f"{self.root}/{POST_SCRIPT}"
        if os.path.lexists(path):
            os.unlink(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, flags, 0o755), "wb") as file:
            file.write(script.text.encode("utf-8", "surrogateescape"))
        argv = [*self._launch(), "exec", "--pwd", "/", "--writable", "--cleanenv", "--pid"]
        argv += ["--env", "APPTAINER_LABELS=/.build.labels,SINGULARITY_LABELS=/.build.labels"]
        argv += [*self._binds(), *self.options, self.root]
        argv += [*_shell(script), f"/{POST_SCRIPT}"]
        try:
            status, trace = _run(argv, self.environ, self.umask, self.launch)
        finally:
            os.unlink(path)
        if status:
            what = "while running engine: while running %post section"
            where = script.where(trace.number, trace.command)
            raise ScriptFailed(what=what, status=status, where=where)

    def test(self, *, writable_tmpfs: bool) -> None:
        """Run the image's test script.

        Raises:
            ScriptFailed: it ended with an error.
        """
        argv = [*self._launch(), "test", "--pwd", "/", "--pid"]
        argv += ["--writable-tmpfs"] if writable_tmpfs else []
        argv += [*self._binds(), *self.options, self.root]
        status, _ = _run(argv, self.environ, self.umask, self.launch)
        if status:
            what = "failed to execute %test script"
            raise ScriptFailed(what=what, status=status, where="")

    def _launch(self) -> list[str]:
        level = [] if log.level > log.INFO else ["--quiet"]
        return [self.program, *level, "--build-config"]

    def _binds(self) -> list[str]:
        """Return the options for the host's own names of hosts, where the image has the files."""
        wanted = [
            path
            for path in ("/etc/resolv.conf", "/etc/hosts")
            if os.path.isfile(path) and _is_plain(f"{self.root}{path}")
        ]
        return ["--bind", ",".join(wanted)] if wanted else []


def _is_plain(path: str) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def host_environment(environ: Mapping[str, str], root: str) -> dict[str, str]:
    """Return the caller's environment with what %setup is told."""
    return {**environ, "APPTAINER_ROOTFS": root, "SINGULARITY_ROOTFS": root}


def _run(
    argv: Sequence[str], environ: Mapping[str, str], umask: int, launch: Launch | None = None
) -> tuple[int, Trace]:
    """Run a program and show what it prints; return its status (128 and more for a signal).

    Where both of our streams are one file, all of it goes one way: a log has it in its order.
    """
    import threading

    trace = Trace()
    log.debug(f"running {' '.join(argv)}")
    reading, writing = os.pipe()
    with open(reading, "rb") as stream:
        shower = threading.Thread(target=trace.show, args=(stream, 2))
        shower.start()
        try:
            streams = (writing if _is_one_log() else 1, writing)
            status = (launch or _start)(argv, environ, umask, streams)
        finally:
            os.close(writing)
            shower.join()
    return status, trace


def _is_one_log() -> bool:
    """Return whether stdout and stderr are the same file; a terminal stays one for scripts."""
    try:
        out, error = os.fstat(1), os.fstat(2)
    except OSError:
        return False
    return (out.st_dev, out.st_ino) == (error.st_dev, error.st_ino) and not os.isatty(1)


def _start(
    argv: Sequence[str], environ: Mapping[str, str], umask: int, streams: tuple[int, int]
) -> int:
    import subprocess

    out, err = streams
    done = subprocess.run(argv, env=dict(environ), stdout=out, stderr=err, umask=umask, check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
