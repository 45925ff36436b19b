"""Patterns of names as Go's filepath.Match has them, which users of Apptainer know."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class BadPattern(ApptainerError):
    message = "Could not list instances: could not retrieve instance list: syntax error in pattern"
    hint = "a [ needs its ], and a backslash something behind it"


def name_test(pattern: str) -> Callable[[str], object]:
    """Return what tells whether a name matches: `*`, `?`, `[a-z]`, `[^a-z]`, and a backslash.

    Raises:
        BadPattern: it is no pattern.
    """
    import re

    parts, at = [""], 0
    while at < len(pattern):
        c = pattern[at]
        if c == "*":
            parts.append("")
            at += 1
        elif c == "[":
            part, at = _class(pattern, at + 1)
            parts[-1] += part
        elif c == "?":
            parts[-1] += "."
            at += 1
        else:
            c, at = _literal(pattern, at)
            parts[-1] += re.escape(c)
    first, *more = parts
    if more:
        # Between two `*` the first place that fits will do: to go back and try others would take
        # a time that grows with each `*`.
        first += "".join(f"(?>.*?{part})" for part in more[:-1] if part) + f".*{more[-1]}"
    return re.compile(first, re.DOTALL).fullmatch


def _literal(pattern: str, at: int) -> tuple[str, int]:
    """Return the character at a place, which a backslash may precede, and the place behind it."""
    at += pattern[at : at + 1] == "\\"
    if at >= len(pattern):
        raise BadPattern
    return pattern[at], at + 1


def _class(pattern: str, at: int) -> tuple[str, int]:
    """Return the regular expression for what follows a `[`, and the place behind the `]`."""
    import re

    negated = pattern[at : at + 1] == "^"
    at += negated
    ranges = ""
    while not ranges or pattern[at : at + 1] != "]":
        if pattern[at : at + 1] in ("-", "]"):
            raise BadPattern
        low, at = _literal(pattern, at)
        high = low
        if pattern[at : at + 1] == "-":
            high, at = _literal(pattern, at + 1)
        # A range from a later character to an earlier one holds nothing; no name has a NUL.
        ranges += f"{re.escape(low)}-{re.escape(high)}" if low <= high else r"\0"
    return f"[{'^' if negated else ''}{ranges}]", at + 1
