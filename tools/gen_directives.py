"""Turn starter/config.def, the one list of directives, into a Python module.

    gen_directives.py [SOURCE] TARGET

The module has `ROWS`, the table as it is written, and `Config`, a record with one typed field for
each directive whose defaults are what holds where there is no file at all.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE = Path(__file__).resolve().parent.parent / "starter" / "config.def"
COLUMNS = ("id", "key", "type", "default", "allowed", "enforcement", "sentence")
ENFORCEMENTS = ("ENFORCED", "ADVISORY", "REFUSES")

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_TEXT = r'"(?:[^"\\]|\\.)*"'
_ROW = re.compile(
    rf"CONFIG\((?P<id>[A-Z_]+),\s*(?P<key>{_TEXT}),\s*(?P<type>[A-Z]+),\s*(?P<default>{_TEXT}),"
    rf"\s*(?P<allowed>{_TEXT}),\s*(?P<enforcement>[A-Z]+),\s*(?P<sentence>{_TEXT}(?:\s*{_TEXT})*)\)"
)


class BadRow(ValueError):
    """A row of the table that cannot be read."""


def rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the seven columns of each row, in the order of the file.

    Raises:
        BadRow: something is neither a row nor a comment, or a row contradicts itself.
    """
    text = _COMMENT.sub("", text)
    if left := _ROW.sub("", text).strip():
        raise BadRow(f"not a row: {left[:60]!r}")
    found = tuple(
        tuple(_value(match[column]) for column in COLUMNS) for match in _ROW.finditer(text)
    )
    for row in found:
        _check(row)
    for column in (0, 1):
        names = [row[column] for row in found]
        if len(set(names)) != len(names):
            raise BadRow(f"there twice: {max(names, key=names.count)!r}")
    return found


def _value(argument: str) -> str:
    return str(ast.literal_eval(f"({argument})")) if argument.startswith('"') else argument


def _check(row: tuple[str, ...]) -> None:
    identifier, key, kind, default, allowed, enforcement, sentence = row
    words = allowed.split("|")
    if re.sub("[ -]", "_", key).upper() != identifier or not re.fullmatch("[a-zA-Z _-]+", key):
        raise BadRow(f"{identifier} is not the name for {key!r}")
    if kind not in _ANNOTATION:
        raise BadRow(f"{identifier}: no type {kind}")
    if enforcement not in ENFORCEMENTS or not sentence:
        raise BadRow(f"{identifier}: what becomes of it?")
    if kind in ("BOOL", "ENUM") and default not in words:
        raise BadRow(f"{identifier}: {default!r} is not in {allowed!r}")
    if kind == "BOOL" and allowed != "yes|no":
        raise BadRow(f"{identifier}: a BOOL is yes|no")
    if kind == "UINT" and not int(words[0]) <= int(default) <= int(words[1]):
        raise BadRow(f"{identifier}: {default} is not within {allowed}")


_ANNOTATION = {
    "BOOL": "bool",
    "ENUM": "",
    "UINT": "int",
    "STRING": "str",
    "PATH": "str",
    "PATHLIST": "str",
    "LIST": "tuple[str, ...]",
}


def field(key: str) -> str:
    """Return the name under which a directive is a field of `Config`."""
    return re.sub("[ -]", "_", key)


def default_of(kind: str, text: str) -> object:
    """Return the value that a default stands for."""
    if kind == "BOOL":
        return text == "yes"
    if kind == "UINT":
        return int(text)
    if kind == "LIST":
        return tuple(text.split(",")) if text else ()
    return text


def python_module(text: str) -> str:
    """Return the source of the module for a table.

    Raises:
        BadRow: the table cannot be read.
    """
    return "\n".join(_lines(rows(text)))


def _lines(table: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    yield '"""The directives of starter/config.def; generated, not edited."""\n'
    yield "from __future__ import annotations\n"
    yield "from apptainer_py.base.record import Record\n"
    yield "TYPE_CHECKING = False"
    yield "if TYPE_CHECKING:"
    yield "    from typing import Literal\n"
    yield f"COLUMNS = {_shown(COLUMNS)}"
    yield "ROWS: tuple[tuple[str, str, str, str, str, str, str], ...] = ("
    for row in table:
        yield "    ("
        yield from (f"        {_shown(column)}," for column in row)
        yield "    ),"
    yield ")\n\n"
    yield "class Config(Record):"
    yield '    """The administrator\'s file, one field for each directive."""\n'
    for _, key, kind, default, allowed, *_ in table:
        words = ", ".join(map(_shown, allowed.split("|")))
        annotation = _ANNOTATION[kind] or f"Literal[{words}]"
        yield f"    {field(key)}: {annotation} = {_shown(default_of(kind, default))}"
    yield ""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    shown = repr(value)
    if shown[0] == "'" and '"' not in shown:
        shown = f'"{shown[1:-1]}"'
    return shown


if __name__ == "__main__":
    *source, target = map(Path, sys.argv[1:])
    target.write_text(python_module((source[0] if source else TABLE).read_text()))
