"""Help, version, and what is said of a wrong command line; the layout is runc's (urfave/cli)."""

from __future__ import annotations

import sys

from apptainer_py import __version__
from apptainer_py.cli.oci import report
from apptainer_py.cli.oci.help_texts import DETAILS, FLAGS, OF_COMMANDS
from apptainer_py.cli.oci.help_texts import GLOBAL as GLOBAL_TEXTS
from apptainer_py.cli.oci.parse import HelpWanted, OciUsage
from apptainer_py.cli.oci.table import COMMANDS, GLOBAL
from apptainer_py.cli.options import CommandLineWrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.base.errors import UsageError

SPEC_VERSION = "1.2.1"
_PROGRAM = "apptainer-py-oci"
_ID = "<container-id>"
# Command → what it does, and what follows it.
_ABOUT = {
    "checkpoint": ("checkpoint a running container", f"[command options] {_ID}"),
    "create": ("create a container", f"[command options] {_ID}"),
    "delete": (
        "delete a container and whatever it holds",
        f"[command options] {_ID}",
    ),
    "events": (
        "display what a container uses, and when memory runs out",
        f"[command options] {_ID}",
    ),
    "exec": (
        "execute new process inside the container",
        f"[command options] {_ID} <command> [command options]  || -p process.json {_ID}",
    ),
    "features": ("show the enabled features", "[arguments...]"),
    "kill": (
        "send a signal (default: SIGTERM) to the container's first process",
        f"[command options] {_ID} [signal]",
    ),
    "list": ("list containers that were made with the given root", "[command options] "),
    "pause": ("suspend all processes of a container", _ID),
    "ps": (
        "display the processes of a container",
        f"[command options] {_ID} [ps options]",
    ),
    "restore": (
        "restore a container from a previous checkpoint",
        f"[command options] {_ID}",
    ),
    "resume": ("let the processes of a paused container go on", _ID),
    "run": ("create and run a container", f"[command options] {_ID}"),
    "spec": ("create a new specification file", "[command options] [arguments...]"),
    "start": ("start the program of a created container", _ID),
    "state": ("print the state of a container", _ID),
    "update": ("update container resource constraints", f"[command options] {_ID}"),
}


def _option_lines(words: str, texts: Mapping[str, str]) -> str:
    rows = []
    for word in words.split():
        takes = " value" if word[-1] in "=*#" else ""
        name, _, letter = word.rstrip("=*#").partition(",")
        spelled = f"--{name}{takes}" + (f", -{letter}{takes}" if letter else "")
        rows.append((spelled, texts[name]))
    width = max(len(spelled) for spelled, _ in rows) + 2
    return "".join(f"   {spelled:<{width}}{text}\n" for spelled, text in rows)


def command_help(name: str) -> str:
    """Return the help of one command; that of the program where there is no such command."""
    row = COMMANDS.get(name)
    if row is None:
        return program_help()
    what, follows = _ABOUT[name]
    text = f"NAME:\n   {_PROGRAM} {name} - {what}\n\nUSAGE:\n   {_PROGRAM} {name} {follows}\n"
    details = DETAILS[name].replace("\n", "\n   ")
    text += f"\nDESCRIPTION:\n   {details}\n"
    own = {flag: said for (command, flag), said in OF_COMMANDS.items() if command == name}
    return text + (f"\nOPTIONS:\n{_option_lines(row[0], FLAGS | own)}   \n" if row[0] else "")


def program_help() -> str:
    """Return the help of the program."""
    names = "".join(f"   {name:<12}{_ABOUT[name][0]}\n" for name in COMMANDS)
    return (
        f"NAME:\n   {_PROGRAM} - Open Container Initiative runtime\n\n"
        f"USAGE:\n   {_PROGRAM} [global options] command [command options] [arguments...]\n\n"
        f"VERSION:\n   {__version__}\nspec: {SPEC_VERSION}\n\nCOMMANDS:\n{names}"
        "   help, h     Shows a list of commands or help for one command\n\n"
        f"GLOBAL OPTIONS:\n{_option_lines(GLOBAL, GLOBAL_TEXTS)}"
    )


def version() -> str:
    """Return what --version prints: clients look for the first line, and for `spec:`."""
    return f"{_PROGRAM} version {__version__}\nspec: {SPEC_VERSION}\n"


def _show_apptainer(command: str) -> int:
    from apptainer_py.cli import help as texts
    from apptainer_py.cli.table import command_row

    path = f"oci {command}".rstrip()
    sys.stdout.write(texts.full(path) if command_row(path) else command_help(command))
    sys.stdout.flush()
    return 0


def show(error: UsageError) -> int:
    """Print help, or what is wrong with a command line; returns the exit status."""
    if isinstance(error, HelpWanted) and error.apptainer:
        return _show_apptainer(error.command)
    if isinstance(error, CommandLineWrong):
        from apptainer_py.cli import report as plain

        return plain.show(error)
    if isinstance(error, HelpWanted):
        sys.stdout.write(version() if error.version else command_help(error.command))
        sys.stdout.flush()
        return 0
    if isinstance(error, OciUsage):
        if error.shown:
            sys.stdout.write(f"{error.shown}{command_help(error.command)}")
            sys.stdout.flush()
        report.messages.fatal(str(error))
        return error.status
    report.messages.fatal(str(error))
    return 1
