"""Writes JSON as Go's encoding/json does, without importing `json` or its extension module."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ESCAPES = {
    **{number: f"\\u{number:04x}" for number in (*range(32), ord("<"), ord(">"), ord("&"))},
    **{ord(c): f"\\{letter}" for c, letter in zip('"\\\n\r\t\b\f', '"\\nrtbf', strict=True)},
    0x2028: "\\u2028",
    0x2029: "\\u2029",
    # A byte that is no UTF-8 came in as a lone surrogate, which no reader would take.
    **{0xDC80 + number: "\\ufffd" for number in range(128)},
}
_PLAIN = str.maketrans("", "", '"\\<>&')


def quoted(text: str) -> str:
    """Return a string as JSON."""
    if text.isascii() and text.isprintable() and len(text.translate(_PLAIN)) == len(text):
        return f'"{text}"'
    return f'"{text.translate(_ESCAPES)}"'


def dumps(value: Any, indent: str = "", level: str = "\n") -> str:
    """Return plain data as JSON: in one line, or with each level further in by `indent`."""
    if isinstance(value, str):
        return quoted(value)
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, (int, float)):
        return repr(value)
    deeper = level + indent if indent else ""
    colon = ": " if indent else ":"
    if isinstance(value, dict):
        if not value:
            return "{}"
        parts = [
            f"{quoted(name)}{colon}{dumps(part, indent, deeper)}" for name, part in value.items()
        ]
        ends = "{}"
    else:
        if not value:
            return "[]"
        parts = [dumps(part, indent, deeper) for part in value]
        ends = "[]"
    last = level if indent else ""
    return f"{ends[0]}{deeper}{f',{deeper}'.join(parts)}{last}{ends[1]}"
