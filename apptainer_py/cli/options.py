"""The options of one command: read from the command line, then from the environment."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError, NotSupported, UsageError
from apptainer_py.base.log import INFO, WARN
from apptainer_py.cli.table import (
    ADDING,
    BOOL,
    DEPRECATED,
    INTERSPERSED,
    LIST,
    OCI_ONLY,
    PREFIXES,
    PROGRAM,
    REFUSED,
    SYNONYMS,
    options_of,
)
from apptainer_py.cli.values import converted, plain, quoted, to_bool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from apptainer_py.cli.table import Option


class CommandLineWrong(UsageError):
    """The command line cannot be understood; `shows` says which part of the usage helps."""

    message = 'Error for command "{command}": {text}'

    def __init__(self, *, command: str, text: str, shows: str) -> None:
        super().__init__(command=command.rpartition(" ")[2] or PROGRAM, text=text)
        self.path = command
        self.shows = shows


class BadVariable(ApptainerError):
    """An environment variable has a value that its option cannot take."""

    message = (
        "While parsing {which}environment variables: while updating flags from environment: "
        "unable to set flag {flag} to value {value}: {reason}"
    )


class OptionRefused(NotSupported):
    """Apptainer has this option; it changes too much to be left out silently."""

    hint = "{remedy}"


class Options:
    """The options of one command: what is known of each, and what was found."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.rows = options_of(command)
        self.by_name = {row[0]: row for row in self.rows}
        self.by_letter = {row[1]: row for row in self.rows if row[1]}
        self.values: dict[str, Any] = {
            row[0]: row[3] for row in self.rows if row[0] not in SYNONYMS
        }
        self.given: set[str] = set()
        self.asked_by: dict[str, str] = {}
        self.notes: tuple[tuple[int, str], ...] = ()
        self.wants_help = False

    def read(self, arguments: Sequence[str]) -> list[str]:
        """Take the options from the front of `arguments`; return what follows them."""
        queue = list(arguments)
        queue.reverse()
        left: list[str] = []
        while queue:
            word = queue.pop()
            if word == "--":
                break
            if len(word) < 2 or word[0] != "-":
                left.append(word)
                if self.command not in INTERSPERSED:
                    break
            elif word[1] == "-":
                self._long(word, queue)
            else:
                self._letters(word[1:], queue)
        queue.reverse()
        return left + queue

    def _long(self, word: str, queue: list[str]) -> None:
        name, equals, value = word[2:].partition("=")
        if not name or name[0] == "-":
            raise self._wrong(f"bad flag syntax: {plain(word)}")
        row = self.by_name.get(name)
        if row is None:
            if name != "help":
                raise self._wrong(f"unknown flag: --{plain(name)}")
            self._help(value if equals else "true")
        elif equals:
            self._set(row, value)
        elif row[2] == BOOL:
            self._set(row, "true")
        elif queue:
            self._set(row, queue.pop())
        else:
            raise self._wrong(f"flag needs an argument: --{name}")

    def _letters(self, letters: str, queue: list[str]) -> None:
        while letters:
            letter, rest = letters[0], letters[1:]
            row = self.by_letter.get(letter)
            if row is None and letter != "h":
                shown = plain(letter).replace("'", "\\'")
                raise self._wrong(f"unknown shorthand flag: '{shown}' in -{plain(letters)}")
            value, letters = self._letter_value(row, letter, rest, queue)
            if row is None:
                self._help(value)
            else:
                self._set(row, value)

    def _letter_value(
        self, row: Option | None, letter: str, rest: str, queue: list[str]
    ) -> tuple[str, str]:
        if len(rest) > 1 and rest[0] == "=":
            return rest[1:], ""
        if row is None or row[2] == BOOL:
            return "true", rest
        if rest:
            return rest, ""
        if queue:
            return queue.pop(), ""
        raise self._wrong(f"flag needs an argument: '{letter}' in -{letter}")

    def _help(self, value: str) -> None:
        try:
            self.wants_help = to_bool(value)
        except ValueError as reason:
            raise self._wrong(
                f'invalid argument {quoted(value)} for "-h, --help" flag: {reason}'
            ) from None

    def _set(self, row: Option, value: str) -> None:
        name, letter = row[0], row[1]
        if name in DEPRECATED:
            self.notes += ((WARN, f"Flag --{name} has been deprecated, {DEPRECATED[name]}"),)
        try:
            self._store(row, value)
        except ValueError as reason:
            flag = f"-{letter}, --{name}" if letter else f"--{name}"
            raise self._wrong(
                f'invalid argument {quoted(value)} for "{flag}" flag: {reason}'
            ) from None

    def _store(self, row: Option, value: str) -> None:
        name = SYNONYMS.get(row[0], row[0])
        # A list that is given takes the place of its default.
        before = self.values[name] if name in self.given or self.values[name] != row[3] else ()
        self.values[name] = converted(row[2], value, before)
        self.given.add(name)

    def _wrong(self, text: str) -> CommandLineWrong:
        return CommandLineWrong(command=self.command, text=text, shows="options")

    def read_environment(self, environ: Mapping[str, str]) -> tuple[tuple[int, str], ...]:
        """Set what the command line left open; return messages about names of old."""
        notes: list[tuple[int, str]] = []
        found: dict[str, str] = {}
        if not any(name.startswith(PREFIXES) for name in environ):
            return ()
        for prefix in PREFIXES:
            for row in self.rows:
                for key in row[4]:
                    value = environ.get(prefix + key)
                    if value is None:
                        continue
                    if prefix != PREFIXES[0]:
                        note = note_on_prefix(prefix, key, value, found.get(key))
                        notes += note
                        if key in found:
                            continue
                    found[key] = value
                    self._set_from_variable(row, prefix + key, value)
        return tuple(notes)

    def _set_from_variable(self, row: Option, variable: str, value: str) -> None:
        name = SYNONYMS.get(row[0], row[0])
        if not value.strip() or (name in self.given and name not in ADDING):
            return
        if name not in ADDING:
            value = value.strip()
        if row[2] == LIST:
            value = ",".join(part.strip() for part in value.split(","))
        try:
            self._store(row, value)
        except ValueError as reason:
            raise BadVariable(
                which="" if self.command else "global ",
                flag=name,
                value=plain(value),
                reason=reason,
            ) from None
        self.asked_by[name] = variable

    def _lacks(self, row: Option) -> bool:
        return row[6] == REFUSED or (row[6] == OCI_ONLY and not self.values.get("oci"))

    def refuse(self) -> None:
        """Raise NotSupported if an option that we lack was switched on."""
        for row in self.rows:
            name = row[0]
            if self._lacks(row) and self.values.get(name, row[3]) not in (row[3], ""):
                variable = self.asked_by.get(name)
                remedy = f"unset {variable}" if variable else f"leave `--{name}` out"
                if row[6] == OCI_ONLY:
                    remedy += ", or add `--oci`"
                raise OptionRefused(what=variable or f"`--{name}`", remedy=remedy)


def note_on_prefix(
    prefix: str, key: str, value: str, preferred: str | None
) -> list[tuple[int, str]]:
    """Return what to say about a variable with a prefix of old, beside the value of the new."""
    old, new = prefix + key, PREFIXES[0] + key
    if preferred is None:
        return [(INFO, f"Environment variable {old} is set, but {new} is preferred")]
    if preferred != value:
        return [(WARN, f"{old} and {new} have different values, using the latter")]
    return []
