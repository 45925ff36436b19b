"""Text to the values of options, with pflag's syntax and the texts of its errors."""

from __future__ import annotations

from apptainer_py.cli.table import BOOL, INT, LIST, MAP, REPEAT

_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1


def converted(kind: str, value: str, before: object) -> object:
    """Return `value` as an option of `kind` stores it; lists continue `before`.

    Raises:
        ValueError: the value has the wrong form; its text is pflag's.
    """
    if kind == BOOL:
        return to_bool(value)
    if kind == INT:
        return to_int(value)
    if kind == REPEAT:
        return (*_tuple(before), value)
    if kind == LIST:
        return (*_tuple(before), *_fields(value))
    if kind == MAP:
        return (*_tuple(before), *_pairs(value))
    return value


def _tuple(value: object) -> tuple[object, ...]:
    assert isinstance(value, tuple)
    return value


def to_bool(value: str) -> bool:
    """Return what strconv.ParseBool makes of `value`.

    Raises:
        ValueError: it is none of the accepted spellings.
    """
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"strconv.ParseBool: parsing {quoted(value)}: invalid syntax")


def to_int(value: str) -> int:
    """Return what strconv.ParseInt (base 0, 64 bits) makes of `value`.

    Raises:
        ValueError: it is no number or does not fit.
    """
    digits = value.lstrip("+-").replace("_", "")
    try:
        if not value.isascii() or not value or value[-1].isspace() or value[0].isspace():
            raise ValueError
        old_octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        number = int(value, 8 if old_octal else 0)
    except ValueError:
        reason = "invalid syntax"
    else:
        if _INT_MIN <= number <= _INT_MAX:
            return number
        reason = "value out of range"
    raise ValueError(f"strconv.ParseInt: parsing {quoted(value)}: {reason}")


def _pairs(value: str) -> list[tuple[str, str]]:
    count = value.count("=")
    pairs = [value.strip('"')] if count == 1 else _fields(value) if count else [value]
    found = []
    for pair in pairs:
        name, equals, content = pair.partition("=")
        if not equals:
            raise ValueError(f"{plain(pair)} must be formatted as key=value")
        # As in "A=1, B=2".
        found.append((name.lstrip(), content))
    return found


def _fields(text: str) -> list[str]:
    """Split at commas as Go's encoding/csv does: the first line only, fields may be quoted."""
    if '"' not in text and "\n" not in text:
        return text.split(",") if text else []
    text = text.lstrip("\n")
    found: list[str] = []
    position = 0
    while True:
        field, position = _field(text, position)
        found.append(field)
        if position >= len(text) or text[position] != ",":
            return found
        position += 1


def _field(text: str, start: int) -> tuple[str, int]:
    if not text.startswith('"', start):
        ends = [place for mark in ",\n" if (place := text.find(mark, start)) >= 0]
        end = min(ends, default=len(text))
        quote = text.find('"', start, end)
        if quote >= 0:
            raise ValueError(
                f'parse error on line 1, column {quote + 1}: bare " in non-quoted-field'
            )
        return text[start:end].removesuffix("\r"), end
    content, position = "", start + 1
    while (quote := text.find('"', position)) >= 0:
        content += text[position:quote]
        following = text[quote + 1 : quote + 2]
        if following != '"':
            if following in ("", ",", "\n"):
                return content, quote + 1
            raise _quote_error(quote + 1)
        content += '"'
        position = quote + 2
    raise _quote_error(len(text) + 1)


def _quote_error(column: int) -> ValueError:
    return ValueError(
        f'parse error on line 1, column {column}: extraneous or missing " in quoted-field'
    )


def plain(text: str) -> str:
    """Return `text` with control characters and invalid bytes spelled out."""
    # What was typed must not move the cursor or start a second line.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(text: str) -> str:
    """Return `text` in double quotes as Go's %q writes it."""
    inside = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain(inside)}"'
