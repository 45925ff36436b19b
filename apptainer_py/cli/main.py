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
    except Exception as error:  # noqa: BLE001 the last line before the user
        status = report.show_bug(error)
    return status


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotPrint(reason=(error.strerror or "").lower()) from None


def _run(arguments: Sequence[str], environ: Mapping[str, str], command: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and labels are printed as the bytes that they are.
        sys.stdout.reconfigure(errors="surrogateescape")
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
