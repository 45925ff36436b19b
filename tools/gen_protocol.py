"""Turn starter/protocol.def, the one list of numbers, into a Python module.

A row is `WORD(NAME, number, ...)`. It becomes `WORD_NAME = number`; each word but LIMIT gets a
dictionary `WORD_NAMES` from number to name and, where rows end in a text, `WORD_TEXTS`. A row
without a number is kept as it is in the tuple `WORD_ROWS`.
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_COMMENT_OR_TEXT = re.compile(r'/\*.*?\*/|//[^\n]*|("(?:\\.|[^"\\])*")', re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\.)*(?:\\\n[^\n\\]*)*$", re.MULTILINE)
_ROW_START = re.compile(r"\b([A-Z][A-Z0-9_]*)\s*\(")
_SUFFIX = re.compile(r"\b(0[xX][0-9a-fA-F]+|\d+)[uUlL]+\b")
_SUMS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
}


class BadRow(ValueError):
    """A row of the table that cannot be read."""


def rows(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's word and arguments, as written, in the order of the file."""
    text = _COMMENT_OR_TEXT.sub(lambda found: found[1] or " ", text)
    text = _DIRECTIVE.sub("", text)
    position = 0
    while start := _ROW_START.search(text, position):
        arguments, position = _arguments(text, start.end())
        yield start[1], arguments


def _arguments(text: str, position: int) -> tuple[list[str], int]:
    found = [""]
    depth = 0
    while position < len(text):
        if text[position] == '"':
            end = _COMMENT_OR_TEXT.match(text, position)
            if end is None:
                raise BadRow(f"unfinished text: {text[position : position + 40]!r}")
            found[-1] += end[0]
            position = end.end()
            continue
        character = text[position]
        position += 1
        if character == ")" and depth == 0:
            return [argument.strip() for argument in found], position
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    raise BadRow(f"row without an end: {found[0]!r}")


def number(text: str, known: dict[str, int]) -> int | None:
    """Return the value of a sum of integers and earlier names, or None for anything else."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as plain):
                return plain
            case ast.Name(id=name) if name in known:
                return known[name]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -value(inner)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _SUMS:
                return _SUMS[type(sign)](value(left), value(right))
        raise BadRow(text)

    try:
        return value(ast.parse(_SUFFIX.sub(r"\1", text), mode="eval").body)
    except (BadRow, SyntaxError):
        return None


def _text(argument: str) -> str | None:
    if not argument.startswith('"'):
        return None
    try:
        return str(ast.literal_eval(f"({argument})"))
    except (SyntaxError, ValueError):
        return None


def python_module(text: str) -> str:
    """Return the source of the module for a table.

    Raises:
        BadRow: a name or a number is given twice under one word, or a row does not end.
    """
    known: dict[str, int] = {}
    names: dict[str, dict[int, str]] = {}
    texts: dict[str, dict[int, str]] = {}
    plain: dict[str, list[tuple[str, ...]]] = {}
    for word, arguments in rows(text):
        value = number(arguments[1], known) if len(arguments) > 1 else None
        if value is None:
            plain.setdefault(word, []).append(tuple(_text(a) or a for a in arguments))
            continue
        name = f"{word}_{arguments[0]}"
        if name in known:
            raise BadRow(f"{name} is there twice")
        known[name] = value
        # Limits may be equal by chance; everything else is told apart by its number.
        if word == "LIMIT":
            continue
        if value in names.get(word, {}):
            raise BadRow(f"{name} and {word}_{names[word][value]} share the number {value}")
        names.setdefault(word, {})[value] = arguments[0]
        if (said := _text(arguments[-1])) is not None:
            texts.setdefault(word, {})[value] = said
    return "\n".join(_lines(known, names, texts, plain))


def _lines(
    known: dict[str, int],
    names: dict[str, dict[int, str]],
    texts: dict[str, dict[int, str]],
    plain: dict[str, list[tuple[str, ...]]],
) -> Iterator[str]:
    yield '"""The numbers of starter/protocol.def; generated, not edited."""\n'
    yield "from __future__ import annotations\n"
    for name, value in known.items():
        yield f"{name} = {value}"
    for suffix, tables in (("NAMES", names), ("TEXTS", texts)):
        for word, table in tables.items():
            yield f"{word}_{suffix}: dict[int, str] = {{"
            yield from (f"    {value}: {_quoted(said)}," for value, said in table.items())
            yield "}"
    if "CAPABILITY" in names:
        yield "CAPABILITIES: dict[str, int] = {"
        yield from (f'    "CAP_{name}": {value},' for value, name in names["CAPABILITY"].items())
        yield "}"
    for word, kept in plain.items():
        yield f"{word}_ROWS: tuple[tuple[str, ...], ...] = ("
        for row in kept:
            yield f"    ({', '.join(map(_quoted, row))},),"
        yield ")"
    yield ""


def _quoted(text: str) -> str:
    shown = repr(text)
    if shown[0] == "'" and '"' not in shown:
        shown = f'"{shown[1:-1]}"'
    return shown


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(python_module(source.read_text()))
