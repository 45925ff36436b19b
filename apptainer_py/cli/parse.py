"""Command line and environment to a request, by the table; the rules are those of cobra and pflag.

Options end at the first argument, short ones cluster (`-Cc`, `-Bvalue`, `-B=value`), names are
never abbreviated. Texts of errors are Apptainer's, because scripts compare them.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError, NotSupported, UsageError
from apptainer_py.base.log import DEBUG, ERROR, INFO, LOG, VERBOSE, WARN
from apptainer_py.cli.options import CommandLineWrong, Options, note_on_prefix
from apptainer_py.cli.table import (
    ACTIONS,
    CONVERTED,
    FETCH,
    FETCHED,
    FETCHING,
    GROUPS,
    IMPLIED,
    INSTANCES,
    LAYOUTS,
    OF_STARTS,
    PREFIXES,
    PROGRAM,
    REFUSED,
    TRANSPORTS,
    command_row,
    transport,
)
from apptainer_py.cli.values import plain, to_int
from apptainer_py.model.request import ActionRequest, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


class UnknownCommand(UsageError):
    """There is no such command; `typed` is what stood there."""

    message = 'Error: unknown command "{command}" for "{program}"'

    def __init__(self, *, command: str) -> None:
        super().__init__(command=plain(command), program=PROGRAM)
        self.typed = command


class NoCommand(UsageError):
    """Nothing was asked for; there is only the usage to show."""

    message = ""


class NotFetched(NotSupported):
    """The image lies elsewhere."""

    message = "an image from `{name}:` is not supported yet"
    hint = "fetch it first, for example with `apptainer pull image.sif {image}`"


class Unfetched(NotFetched):
    """It is written as one that is fetched is not."""

    message = "{image} names no image"
    hint = "write `{name}://{rest}`"


class Gone(NotFetched):
    """Nobody can fetch it any more."""

    hint = "Singularity Hub ended in 2021: its images are no longer to be had"


class UnfitName(ApptainerError):
    message = (
        "while executing starter: while checking instance name: {name} is not a valid instance name"
    )


class JoinedByOci(ApptainerError):
    message = "instances cannot be joined with --oci: leave it out"


class NotFromAnother(ApptainerError):
    message = "While setting image/instance: starting an instance from another is not allowed"


class UnknownTransport(ApptainerError):
    message = "Unsupported transport type: {name}"


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> ActionRequest | Parsed:
    """Return what `arguments` (without the program's name) and `environ` ask for.

    Raises:
        UsageError: the command line is wrong; a subclass says how.
        NotSupported: a command, option or kind of image that Apptainer has and we have not.
        BadVariable: an environment variable cannot be understood.
    """
    outer = Options("")
    rest = outer.read(arguments)
    if outer.wants_help:
        return Parsed(command="", options={}, help=True)
    if outer.values["version"]:
        return Parsed(command="version", options={"version": True})
    command, rest = _find_command(rest)
    inner = Options(command)
    rest = inner.read(rest)
    if inner.wants_help:
        return Parsed(command=command, options={}, help=True)
    _check_count(command, rest)
    notes = outer.notes + inner.notes
    if command in ACTIONS and transport(rest[0]) == "instance":
        notes += _without_effect(inner)
    notes += outer.read_environment(environ)
    notes += inner.read_environment(environ)
    outer.refuse()
    inner.refuse()
    general = _general(outer.values, environ, notes)
    if command in ACTIONS or command in INSTANCES:
        if _is_fetched(rest[0], has_oci=bool(inner.values.get("oci"))):
            return Parsed(command=FETCH, options=inner.values, arguments=tuple(rest), **general)
        return _action(inner, rest, general)
    return Parsed(command=command, options=inner.values, arguments=tuple(rest), **general)


def _without_effect(typed: Options) -> tuple[tuple[int, str], ...]:
    """Return what to say of typed options that change nothing of an instance that runs.

    Variables are often set for every launch, so nothing is said of these.
    """
    switched = (name for name in typed.given & OF_STARTS if typed.values[name] is not False)
    names = ", ".join(f"--{name}" for name in sorted(switched))
    if not names:
        return ()
    text = f"{names}: without effect on an instance that runs; for `instance start`"
    return ((WARN, text),)


def foreign(arguments: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Return the same for a command that the table lacks, whose words are its own affair.

    Raises:
        ApptainerError: what stands before the command is wrong.
    """
    outer = Options("")
    command, *rest = outer.read(arguments)
    notes = outer.notes + outer.read_environment(environ)
    outer.refuse()
    general = _general(outer.values, environ, notes)
    return Parsed(command=command, options={}, arguments=tuple(rest), **general)


def _is_fetched(image: str, *, has_oci: bool) -> bool:
    """Return whether an image becomes a file first; --oci starts a layout as it is."""
    kind = transport(image)
    if kind in CONVERTED:
        return not (has_oci and kind in LAYOUTS and not image.startswith(f"{kind}://"))
    return kind in FETCHED and image.startswith(f"{kind}://")


def _find_command(rest: Sequence[str]) -> tuple[str, list[str]]:
    if not rest or not rest[0]:
        raise NoCommand
    command, *rest = rest
    row = command_row(command)
    if row is None or " " in command:
        raise UnknownCommand(command=command)
    inner = command_row(f"{command} {rest[0]}") if command in GROUPS and rest else None
    if inner:
        row, rest = inner, rest[1:]
    if row[4] == REFUSED:
        raise NotSupported(what=f"the command `{row[0]}`")
    return row[0], list(rest)


def _check_count(command: str, rest: list[str]) -> None:
    row = command_row(command)
    assert row is not None
    least, most, got = row[2], row[3], len(rest)
    if least <= got and (most < 0 or got <= most):
        return
    if command.startswith("completion "):
        text = f'unknown command "{plain(rest[0])}" for "{PROGRAM} {command}"'
    elif most < 0:
        text = f"requires at least {least} arg(s), only received {got}"
    elif least == most:
        text = f"accepts {least} arg(s), received {got}"
    elif least == 0 and not command.startswith("capability "):
        text = f"accepts at most {most} arg(s), received {got}"
    else:
        text = f"accepts between {least} and {most} arg(s), received {got}"
    raise CommandLineWrong(command=command, text=text, shows="usage")


def _general(
    values: Mapping[str, Any], environ: Mapping[str, str], notes: tuple[tuple[int, str], ...]
) -> dict[str, Any]:
    level, more = _message_level(values, environ)
    return {
        "message_level": level,
        "colour": False if values["nocolor"] or _is_without_colour(environ) else None,
        "config_file": values["config"],
        "build_config": values["build-config"],
        "trace_file": values["trace"],
        "notes": more + notes,
    }


def _is_without_colour(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"


def _message_level(
    values: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[int, tuple[tuple[int, str], ...]]:
    for name, level in (("debug", DEBUG), ("verbose", VERBOSE), ("quiet", LOG), ("silent", ERROR)):
        if values[name]:
            return level, ()
    new, old = (environ.get(prefix + "MESSAGELEVEL", "") for prefix in PREFIXES)
    notes: tuple[tuple[int, str], ...] = ()
    if old and old != new:
        notes = tuple(note_on_prefix(PREFIXES[1], "MESSAGELEVEL", old, new or None))
    try:
        return max(-4, min(DEBUG, to_int(new or old))), notes
    except ValueError:
        return INFO, notes


def _check_instance(name: str) -> None:
    """Refuse what would be taken for no name, or could not be shown; the engine has the rest."""
    if not name or not name.isprintable():
        raise UnfitName(name=ascii(name)[1:-1])


def _check_transport(kind: str, image: str) -> None:
    """Refuse an image that lies elsewhere, all but those which are fetched."""
    if kind not in TRANSPORTS:
        raise UnknownTransport(name=plain(kind))
    if kind == "shub":
        raise Gone(name=kind)
    if kind in FETCHED:
        rest = image.partition(":")[2] or "..."
        raise Unfetched(name=kind, image=plain(image), rest=plain(rest))
    if kind not in LAYOUTS:
        raise NotFetched(name=kind, image=plain(image))


def _booted(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what --boot sets beside: what an init believes to own must not be the host's."""
    dropped = () if wanted["keep-privs"] else ("CAP_SYS_BOOT", "CAP_SYS_RAWIO")
    return {
        "contain": True,
        "net": True,
        "uts": True,
        "hostname": wanted["hostname"] or wanted["instance"],
        "drop-caps": ",".join(filter(None, (wanted["drop-caps"], *dropped))),
    }


def _action(found: Options, rest: list[str], general: dict[str, Any]) -> ActionRequest:
    command, values = found.command, found.values
    image, *arguments = rest
    kind = transport(image)
    if kind == "instance" and command in INSTANCES:
        raise NotFromAnother
    if kind and not (kind == "instance" and command in ACTIONS):
        _check_transport(kind, image)
    if kind == "instance" and values.get("oci"):
        raise JoinedByOci
    wanted = dict(values)
    if command in INSTANCES:
        wanted["instance"], *arguments = arguments
        _check_instance(wanted["instance"])
    for name, others in IMPLIED:
        if wanted[name]:
            wanted.update(dict.fromkeys(others, True))
    if wanted.get("no-pid"):
        wanted["pid"] = False
    if command in INSTANCES:
        wanted["pid"] = True  # an instance lives as long as its first process
        if wanted["boot"]:
            wanted.update(_booted(wanted))
    fields = {name: wanted[name] for name in ("instance",) if name in wanted} | {
        row[0].replace("-", "_"): wanted[row[0]]
        for row in found.rows
        if row[0] in wanted and row[6] not in (REFUSED, FETCHING)
    }
    return ActionRequest(
        command=command.removeprefix("instance "),
        image=image,
        arguments=tuple(arguments),
        **general,
        **fields,
    )
