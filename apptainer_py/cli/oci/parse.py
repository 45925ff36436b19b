"""Understands a command line the way runc's own parser does (Go's `flag`, urfave/cli v1)."""

from __future__ import annotations

from apptainer_py.base.errors import UsageError
from apptainer_py.cli.oci.table import APPTAINER, COMMANDS, GLOBAL, flags_of
from apptainer_py.model.oci_call import OciCall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STATE_ROOT = "apptainer-py-oci"
_TRUE = ("1", "t", "T", "true", "TRUE", "True")
_FALSE = ("0", "f", "F", "false", "FALSE", "False")


class OciUsage(UsageError):
    """A wrong command line: `shown` is what precedes the help text, `command` whose help it is."""

    def __init__(self, text: str, *, command: str = "", shown: str = "", status: int = 1) -> None:
        super().__init__(text=text)
        self.command = command
        self.shown = shown
        self.status = status


class HelpWanted(UsageError):
    """Not a mistake: the help of `command` ("" for the program), or the version, is asked for."""

    def __init__(self, command: str, *, version: bool = False, apptainer: bool = False) -> None:
        super().__init__(text="")
        self.command = command
        self.version = version
        self.apptainer = apptainer


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-"


def _known(word: str, flags: dict[str, tuple[str, str]]) -> bool:
    return _is_flag(word) and word.lstrip("-").partition("=")[0] in flags


def _in_order(words: Sequence[str], flags: dict[str, tuple[str, str]]) -> list[str]:
    """Put flags that follow an argument before it, with what looks like their values."""
    first: list[str] = []
    rest: list[str] = []
    may_be_value = False
    for place, word in enumerate(words):
        if word == "--":
            rest += words[place:]
            break
        # "-" is standard input, "-1" no limit.
        if may_be_value and (not word.startswith("-") or word == "-" or word[1:].isdigit()):
            may_be_value = False
            first.append(word)
        elif _known(word, flags):
            may_be_value = True
            first.append(word)
        else:
            rest.append(word)
    return first + rest


class _Wrong(Exception):
    pass


def _switch(name: str, equals: str, value: str) -> bool:
    if not equals or value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise _Wrong(f'invalid boolean value "{value}" for -{name}: parse error')


def _number(name: str, value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise _Wrong(f'invalid value "{value}" for flag -{name}: parse error') from None


def _one_more(before: object, name: str, typed: str, value: str) -> tuple[str, ...]:
    is_number = value.removeprefix("-").isdigit() and value.isascii()
    if name == "additional-gids" and not is_number:
        why = f'strconv.ParseInt: parsing "{value}": invalid syntax'
        raise _Wrong(f'invalid value "{value}" for flag -{typed}: {why}')
    assert isinstance(before, tuple)
    return (*before, value)


def _scan(
    words: Sequence[str], flags: dict[str, tuple[str, str]]
) -> tuple[dict[str, object], list[str]]:
    """Take flags up to the first argument; returns their values and what follows."""
    values: dict[str, object] = {}
    place = 0
    while place < len(words) and _is_flag(words[place]):
        word = words[place]
        place += 1
        if word == "--":
            break
        typed, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if not typed or typed.startswith("-"):
            raise _Wrong(f"bad flag syntax: {word}")
        if typed not in flags:
            # Every command has these two.
            if typed in ("help", "h"):
                values["help"] = True
                continue
            raise _Wrong(f"flag provided but not defined: -{typed}")
        name, takes = flags[typed]
        if not takes:
            values[name] = _switch(typed, equals, value)
            continue
        if not equals:
            if place == len(words):
                raise _Wrong(f"flag needs an argument: -{typed}")
            value = words[place]
            place += 1
        if takes == "*":
            values[name] = _one_more(values.get(name, ()), name, typed, value)
        else:
            values[name] = _number(typed, value) if takes == "#" else value
    return values, list(words[place:])


def _check_count(program: str, command: str, given: int, row: tuple[str, int, int, str]) -> None:
    _, least, most, kind = row
    wrong = ""
    if kind == "x" and given != least:
        wrong = f"requires exactly {least} argument(s)"
    elif given < least:
        wrong = f"requires a minimum of {least} argument(s)"
    elif 0 <= most < given:
        wrong = f"requires a maximum of {most} argument(s)"
    if wrong:
        raise OciUsage(
            f'{program}: "{command}" {wrong}', command=command, shown="Incorrect Usage.\n\n"
        )


def state_root(environment: Mapping[str, str], *, rootless: bool) -> str:
    """Return the directory of all containers' state where no --root was given."""
    if rootless:
        runtime = environment.get("XDG_RUNTIME_DIR", "")
        if runtime:
            return f"{runtime}/{STATE_ROOT}"
    return f"/run/{STATE_ROOT}"


def parse(
    words: Sequence[str], environment: Mapping[str, str], *, own_user: bool, apptainer: bool = False
) -> OciCall:
    """Return what a command line says, the program's name first.

    `own_user` tells that the caller has not the machine's root rights, so that the state lies in
    XDG_RUNTIME_DIR.

    Raises:
        OciUsage: it is wrong.
        HelpWanted: help or the version is asked for.
    """
    program = words[0]
    try:
        settings, rest = _scan(words[1:], flags_of(GLOBAL))
    except _Wrong as why:
        if apptainer:
            raise _apptainer_wrong("", why) from None
        raise OciUsage(f"{why}", shown=f"Incorrect Usage. {why}\n\n") from None
    if settings.get("version") or settings.get("help") or not rest:
        version = bool(settings.get("version") and not settings.get("help"))
        raise HelpWanted("", version=version, apptainer=apptainer)
    read = _read_apptainer if apptainer else _read_command
    options, arguments = read(program, rest[0], rest[1:], environment)
    return OciCall(
        program=program,
        command=rest[0],
        options=options,
        arguments=arguments,
        root=str(settings.get("root") or state_root(environment, rootless=own_user)),
        root_given=bool(settings.get("root")),
        log=str(settings.get("log", "")),
        log_format=str(settings.get("log-format", "text")),
        debug=bool(settings.get("debug")) or settings.get("log-level") == "debug",
        cgroup_manager=_cgroup_manager(settings),
        rootless=str(settings.get("rootless", "auto")),
        criu=str(settings.get("criu", "criu")),
        apptainer=apptainer,
    )


def _read_command(
    program: str, command: str, words: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, object], tuple[str, ...]]:
    row = COMMANDS.get(command)
    if row is None:
        if command in ("help", "h"):
            if words and words[0] not in COMMANDS:
                raise OciUsage(f"No help topic for '{words[0]}'\n", status=3)
            raise HelpWanted(words[0] if words else "")
        raise OciUsage(f"No help topic for '{command}'\n", status=3)
    try:
        options, arguments = _scan_command(words, row)
    except _Wrong as why:
        raise OciUsage(f"{why}", command=command, shown=f"Incorrect Usage: {why}\n\n") from None
    if options.pop("help", False):
        raise HelpWanted(command)
    _check_count(program, command, len(arguments), row)
    return options, tuple(arguments)


def _scan_command(
    words: Sequence[str], row: tuple[str, int, int, str]
) -> tuple[dict[str, object], list[str]]:
    flags = flags_of(row[0])
    ordered = words if "s" in row[3] else _in_order(words, {**flags, "help": ("help", "")})
    return _scan(ordered, flags)


def _apptainer_wrong(command: str, why: _Wrong, shows: str = "options") -> UsageError:
    from apptainer_py.cli.oci.apptainer import wrong

    return wrong(command, f"{why}", shows=shows)


def _read_apptainer(
    program: str, command: str, words: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, object], tuple[str, ...]]:
    from apptainer_py.cli.oci import apptainer

    if command == "help" or not apptainer.is_known(command):
        raise HelpWanted("".join(words[:1]) if command == "help" else "", apptainer=True)
    if apptainer.is_ours(command):
        read = apptainer.read_words(command, words, environment)
        if read is None:
            raise HelpWanted(command, apptainer=True)
        return read
    row = APPTAINER.get(command) or COMMANDS[command]
    try:
        options, arguments = _scan_command(words, row)
        if options.pop("help", False):
            raise HelpWanted(command, apptainer=True)
        _, least, most, _ = row
        if len(arguments) < least or 0 <= most < len(arguments):
            raise _Wrong(f"requires at least {least} arg(s), only received {len(arguments)}")
    except _Wrong as why:
        raise _apptainer_wrong(command, why, "usage") from None
    return {**apptainer.read_variables(command, environment), **options}, tuple(arguments)


def _cgroup_manager(settings: dict[str, object]) -> str:
    kind = str(settings.get("cgroup-manager", "cgroupfs"))
    if kind not in ("cgroupfs", "systemd", "disabled"):
        raise OciUsage(f'invalid cgroup manager "{kind}": it is cgroupfs, systemd or disabled')
    return "systemd" if settings.get("systemd-cgroup") else kind


def is_apptainer(words: Sequence[str]) -> bool:
    """Return whether the program was called by the name of the one with Apptainer's commands."""
    return words[0].rpartition("/")[2] == "apptainer-py"


def parse_typed(words: Sequence[str], environment: Mapping[str, str], *, uid: int) -> OciCall:
    """Understand a call of either program: `apptainer-py-oci ...`, or `apptainer-py oci ...`.

    Raises:
        OciUsage: it is wrong.
        HelpWanted: help or the version is asked for.
    """
    if not is_apptainer(words):
        return parse(words, environment, own_user=uid != 0)
    from apptainer_py.cli.options import Options

    outer = Options("")
    rest = outer.read(words[1:])
    if outer.wants_help or rest[:1] != ["oci"]:
        raise HelpWanted("", apptainer=True)
    call = parse([words[0], *rest[1:]], environment, own_user=uid != 0, apptainer=True)
    return call.replace(debug=True) if outer.values["debug"] else call
