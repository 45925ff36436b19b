"""The one place that turns an error into messages and an exit status."""

from __future__ import annotations

import os
import sys

from apptainer_py.base import log
from apptainer_py.base.errors import UsageError
from apptainer_py.cli.options import CommandLineWrong
from apptainer_py.cli.parse import NoCommand, UnknownCommand
from apptainer_py.cli.values import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.base.errors import ApptainerError
    from apptainer_py.model.request import Invocation

EXIT_BUG = 255
NO_DIRECTORY = "the current directory has no path (was it removed?): go to another one"


def begin(request: Invocation, *, told: bool = False) -> None:
    """Set level and colour of messages; show those that the parser has left, if not `told`."""
    log.set_level(request.message_level)
    if request.colour is not None:
        log.colour = request.colour
    for level, text in () if told else request.notes:
        if level == log.WARN:
            log.warning(text)
        else:
            log.info(text)


def show(error: ApptainerError, *, command: str = "") -> int:
    """Tell the user what went wrong in `command`; return the exit status."""
    if isinstance(error, UsageError):
        _show_usage_error(error, command)
    elif error.message.startswith("Error for command"):
        sys.stderr.write(f"{plain(str(error))}\n")
    else:
        log.fatal(str(error))
    advice = error.advice()
    if advice:
        log.info(advice)
    return error.exit_code


def no_directory(error: BaseException) -> bool:
    """Return whether a path could not be completed for want of a current directory."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    try:
        os.getcwd()
    except OSError as reason:
        return reason.errno == error.errno
    return False


def show_bug(error: BaseException) -> int:
    """Tell the user that this program is wrong; the traceback is for those who asked for it."""
    if no_directory(error):
        log.fatal(NO_DIRECTORY)
        return EXIT_BUG
    text = str(error)
    log.fatal(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    if log.level >= log.DEBUG:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    else:
        log.info("this should not happen; `-d` before the command shows where it did")
    return EXIT_BUG


def _show_usage_error(error: UsageError, command: str) -> None:
    # The help texts are seldom needed, and never on the way to a container.
    from apptainer_py.cli import help as texts

    if isinstance(error, NoCommand):
        sys.stdout.write(texts.usage(""))
    elif isinstance(error, UnknownCommand):
        sys.stderr.write(f"{error}\n{_suggested(texts.suggestions(error.typed))}\n")
        sys.stdout.write(texts.usage(""))
    elif isinstance(error, CommandLineWrong):
        sys.stderr.write(f"{error}\n\n")
        shown = texts.options if error.shows == "options" else texts.usage
        sys.stdout.write(shown(error.path))
    else:
        name = command.rpartition(" ")[2]
        sys.stderr.write(f'Error for command "{name}": {plain(str(error))}\n\n')
        sys.stdout.write(texts.usage(command))


def _suggested(names: list[str]) -> str:
    if not names:
        return ""
    lines = "".join(f"\t{name}\n" for name in names)
    return f"\nDid you mean this?\n{lines}\n"
