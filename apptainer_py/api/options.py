"""Keyword arguments and the options of a command: the same names, kinds and refusals.

`bind=["/a", "/b"]` is `--bind /a --bind /b`, `no_home=True` is `--no-home`.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import NotSupported
from apptainer_py.cli.table import (
    BOOL,
    INT,
    LIST,
    MAP,
    OCI_ONLY,
    REFUSED,
    STRING,
    options_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from apptainer_py.cli.table import Option

_KINDS = {BOOL: "a bool", INT: "an int", STRING: "a str", MAP: "a mapping of str to str"}
# These ask whoever sits at the terminal.
_ASKING = ("docker_login",)
_OWN = frozenset(("version",))


class OptionRefused(NotSupported):
    """The command has the option, and refuses it."""

    message = "{command}(): {name} is not supported yet"


def global_words(command: str, keywords: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """Return keywords as the words before a command's name, and as those behind it.

    Raises:
        TypeError: an option has no such name, or is not of such a type.
        NotSupported: Apptainer has the option, and we have not.
    """
    own, before = _rows(command), _rows("")
    outer: list[str] = []
    inner: list[str] = []
    for keyword, value in keywords.items():
        row = own.get(keyword) or before.get(keyword)
        if row is None:
            raise _unknown(command, keyword, (*own, *before))
        if value is None:
            continue
        _check(command, row, value, keywords)
        (inner if keyword in own else outer).extend(_words(command, row, value))
    return outer, inner


def values(command: str, keywords: Mapping[str, object]) -> dict[str, object]:
    """Return the value of every option of a command by its long name, as a parser would.

    Raises:
        TypeError, NotSupported: as `global_words`.
    """
    own = {name: row for name, row in _rows(command).items() if name not in _ASKING}
    found: dict[str, object] = {row[0]: row[3] for row in own.values()}
    for keyword, value in keywords.items():
        row = own.get(keyword)
        if row is None:
            raise _unknown(command, keyword, tuple(own))
        if value is None:
            continue
        _check(command, row, value, keywords)
        found[row[0]] = _plain(command, row, value)
    return found


def _rows(command: str) -> dict[str, Option]:
    found = {row[0].replace("-", "_"): row for row in options_of(command)}
    return found if command else {name: found[name] for name in found if name not in _OWN}


def _unknown(command: str, keyword: str, names: Iterable[str]) -> TypeError:
    from difflib import get_close_matches

    near = get_close_matches(keyword, list(names), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    function = command.rpartition(" ")[2]
    return TypeError(f"{function}() got an unexpected keyword argument {keyword!r}{hint}")


def _check(command: str, row: Option, value: object, keywords: Mapping[str, object]) -> None:
    unchanged = value in (row[3], "", ())
    if (row[6] == REFUSED or (row[6] == OCI_ONLY and not keywords.get("oci"))) and not unchanged:
        raise OptionRefused(command=command.rpartition(" ")[2], name=row[0].replace("-", "_"))


def _words(command: str, row: Option, value: object) -> list[str]:
    plain = _plain(command, row, value)
    if isinstance(plain, bool):
        return [f"--{row[0]}={'true' if plain else 'false'}"]
    if row[2] == MAP:
        assert isinstance(plain, tuple)
        return [f"--{row[0]}={_pair(*pair)}" for pair in plain]
    if isinstance(plain, tuple):
        return [f"--{row[0]}={_field(text) if row[2] == LIST else text}" for text in plain]
    return [f"--{row[0]}={plain}"]


def _plain(command: str, row: Option, value: object) -> object:
    """Return a value in the one form that an option of its kind has."""
    kind = row[2]
    wrong = TypeError(
        f"{command.rpartition(' ')[2] or 'apptainer_py'}(): {row[0].replace('-', '_')} must be "
        f"{_KINDS.get(kind, 'a str or several')}, not {_kind_of(value)}"
    )
    if kind in (BOOL, INT):
        if type(value) is not (bool if kind == BOOL else int):
            raise wrong
        return value
    try:
        if kind == MAP:
            return _pairs(value)
        if kind == STRING or isinstance(value, (str, os.PathLike)):
            text = _text(value)
            return text if kind == STRING else (text,)
        return tuple(_text(one) for one in _several(value))
    except (TypeError, ValueError):
        raise wrong from None


def _kind_of(value: object) -> str:
    """Return the type of a value, of those in a mapping too."""
    name = type(value).__name__
    if not isinstance(value, dict):
        return name
    inner = sorted({f"{type(key).__name__} to {type(one).__name__}" for key, one in value.items()})
    return f"a {name} of {' and '.join(inner)}" if inner else name


def _several(value: object) -> Iterable[object]:
    if isinstance(value, (bytes, dict)):
        raise TypeError
    return tuple(value)  # type: ignore[arg-type]  # what is no iterable raises the TypeError


def _text(value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    pairs = dict(value).items()  # type: ignore[call-overload]  # as above
    return tuple((_text(name), _text(text)) for name, text in pairs)


def _field(text: str) -> str:
    """Return a text as one field of a line of comma separated values."""
    if text and not any(letter in text for letter in ',"\n\r'):
        return text
    return '"' + text.replace('"', '""') + '"'


def _pair(name: str, text: str) -> str:
    # One pair alone is taken as it stands but for quotes at its ends; two are read as fields.
    pair = f"{name}={text}"
    plain = pair.count("=") == 1 and pair == pair.strip('"')
    return pair if plain else f"{_field(pair)},{_field(pair)}"
