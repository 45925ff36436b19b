"""Apptainer's own `oci` commands: their options, variables and words; the rules are cobra's."""

from __future__ import annotations

from apptainer_py.cli.oci.table import APPTAINER, COMMANDS
from apptainer_py.cli.options import CommandLineWrong, Options
from apptainer_py.cli.table import command_row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.base.errors import UsageError
    from apptainer_py.model.oci_call import OciCall

# Their options are runc's, which that parser knows.
_AS_RUNC = ("exec", "update")
# What runc's words for a failure are called here; {id} is the container's.
_TEXTS = {
    "container does not exist": "no container found with name {id}",
    "container with given ID already exists": "{id} already exists",
    "cannot exec in a stopped container": "cannot execute command {command}, container '{id}' is "
    "not running",
    "container not paused": "container {id} is not paused",
}
_OF_COMMANDS = {
    ("exec", "container does not exist"): "{id} doesn't exist",
    ("pause", "container not running"): "container {id} is not running",
    ("update", "container not running"): "container {id} is neither running nor created",
}


def is_ours(command: str) -> bool:
    """Return whether a command's options are in the table of this program."""
    return command not in _AS_RUNC and command_row(f"oci {command}") is not None


def is_known(command: str) -> bool:
    """Return whether there is such a command, of Apptainer's or of runc's."""
    return command in APPTAINER or command in COMMANDS


def read_words(
    command: str, words: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, object], tuple[str, ...]] | None:
    """Return the options and arguments of a command; None: its help is asked for.

    Raises:
        UsageError: they are wrong.
        BadVariable: a variable of the environment is.
    """
    path = f"oci {command}"
    inner = Options(path)
    arguments = inner.read(words)
    if inner.wants_help:
        return None
    row = command_row(path)
    assert row is not None
    _, _, least, most, _, _ = row
    if not least <= len(arguments) <= most:
        text = f"accepts {least} arg(s), received {len(arguments)}"
        if most > least:
            text = f"requires at least {least} arg(s), only received {len(arguments)}"
        raise CommandLineWrong(command=path, text=text, shows="usage")
    inner.read_environment(environment)
    if "bundle" in inner.values and not inner.values["bundle"]:
        text = 'required flag(s) "bundle" not set'
        raise CommandLineWrong(command=path, text=text, shows="usage")
    options = {name: value for name, value in inner.values.items() if value}
    return options, tuple(arguments)


def read_variables(command: str, environment: Mapping[str, str]) -> dict[str, object]:
    """Return what the environment says for a command whose options runc's parser reads."""
    path = environment.get("APPTAINER_FROM_FILE", "").strip()
    return {"from-file": path} if command == "update" and path else {}


def wrong(command: str, text: str, *, shows: str = "options") -> UsageError:
    """Return the error for a command line that runc's parser has not understood."""
    return CommandLineWrong(command=f"oci {command}".rstrip(), text=text, shows=shows)


def text_of(text: str, call: OciCall) -> str:
    """Return what Apptainer says where the engine says `text`."""
    template = _OF_COMMANDS.get((call.command, text)) or _TEXTS.get(text)
    name = call.arguments[0] if call.arguments else ""
    if template is not None:
        return template.format(id=name, command=_quoted(" ".join(call.arguments[1:])))
    bundle = call.text("bundle")
    if text.startswith("chdir ") and bundle:
        return f"failed to change directory to {_absolute(bundle)}: {text}"
    if text.startswith("JSON specification file") and bundle:
        path = f"{_absolute(bundle)}/config.json"
        return f'oci specification file "{path}" is missing or cannot be read'
    return text


def _quoted(text: str) -> str:
    from apptainer_py.model.json_out import quoted

    return quoted(text)


def _absolute(path: str) -> str:
    import os

    return os.path.abspath(path)
