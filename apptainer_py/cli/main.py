"""What the plain interpreter does: the commands that start no container, and wrong ones."""

from __future__ import annotations

import io
import os
import sys

from apptainer_py.base.errors import ApptainerError, LaunchError
from apptainer_py.cli import commands, report
from apptainer_py.cli.parse import UnknownCommand, foreign, parse
from apptainer_py.cli.table import FETCH, PROGRAM
from apptainer_py.model.request import ActionRequest, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from _typeshed import ReadableBuffer

EXIT_PIPE = 141
EXIT_INTERRUPTED = 130


class NotFromHere(LaunchError):
    message = "`{command}` is started by {launcher}, not by the interpreter"
    hint = "launcher and package are of different versions: install both again"


class CannotPrint(ApptainerError):
    message = "cannot write to the standard output: {reason}"


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run a command line, the program's name first; return the exit status."""
    command = [""]
    try:
        if environ is None:
            environ = os.environ  # noqa: TID251 this is where it is read
        if len(argv) > 2 and argv[1] == "oci":
            # The launcher of the other engine sends us its own name, and what follows.
            from apptainer_py.cli.oci.main import main as oci

            return oci(argv[2:], environ)
        status = _run(argv[1:], environ, command)
        _flush()
    except ApptainerError as error:
        status = report.show(error, command=command[0])
    except BrokenPipeError:
        # Whatever is still buffered would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_PIPE
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except OSError as error:
        status = _failed(error)
    except Exception as error:  # noqa: BLE001 the last line before the user
        status = report.show_bug(error)
    return status


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unprinted(error) from None


def _unprinted(error: OSError) -> CannotPrint:
    return CannotPrint(reason=(error.strerror or "").lower())


class Output(io.FileIO):
    """The standard output, whose failures can be told from those of other files."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        """Write some of it, and keep what goes wrong."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _failed(error: OSError) -> int:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Output) and raw.failure is error:
        return report.show(_unprinted(error))
    return report.show_bug(error)


def _take_output() -> None:
    """Have names and labels printed as the bytes that they are, and failures told."""
    was = sys.stdout
    if type(was) is io.TextIOWrapper and was.fileno() == 1:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(Output(1, "w", closefd=False)),
            encoding=was.encoding,
            errors="surrogateescape",
            line_buffering=was.line_buffering,
        )


def _run(arguments: Sequence[str], environ: Mapping[str, str], command: list[str]) -> int:
    _take_output()
    try:
        parsed = parse(arguments, environ)
    except UnknownCommand as unknown:
        return _run_foreign(unknown, arguments, environ)
    command[0] = parsed.command
    report.begin(parsed)
    if parsed.command == FETCH and isinstance(parsed, Parsed):
        from apptainer_py.cli import images

        return images.start(parsed, arguments)
    if isinstance(parsed, ActionRequest) and parsed.unsquash and not parsed.oci:
        from apptainer_py.cli import unsquash

        return unsquash.start(parsed, arguments, environ)
    if isinstance(parsed, ActionRequest):
        from apptainer_py.base import build

        raise NotFromHere(command=parsed.command, launcher=f"{build.BINDIR}/{PROGRAM}")
    return commands.run(parsed)


def _run_foreign(
    unknown: UnknownCommand, arguments: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Run the command of a plug-in, if there is one of that name."""
    from apptainer_py.cli import plugins

    if unknown.typed not in plugins.extras():
        raise unknown
    parsed = foreign(arguments, environ)
    report.begin(parsed)
    return plugins.start(parsed)
