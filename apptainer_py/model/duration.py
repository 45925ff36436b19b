"""Durations as Go writes them: "5s", "1m30s", "250ms", "-1.5h", "0"."""

from __future__ import annotations

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(word: str) -> float:
    """Return a duration in seconds.

    Raises:
        ValueError: it is none; the text is Go's.
    """
    rest = word[1:] if word[:1] in ("-", "+") else word
    if rest == "0":
        return 0.0
    if not rest:
        raise ValueError(f'time: invalid duration "{word}"')
    total = 0.0
    while rest:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789."))]
        if not digits.isascii() or not digits.strip(".") or digits.count(".") > 1:
            raise ValueError(f'time: invalid duration "{word}"')
        rest = rest[len(digits) :]
        unit = next((u for u in ("ns", "us", "µs", "ms", "s", "m", "h") if rest.startswith(u)), "")
        if not unit:
            what = f'unknown unit "{rest}" in' if rest else "missing unit in"
            raise ValueError(f'time: {what} duration "{word}"')
        total += float(digits) * _UNITS[unit]
        rest = rest[len(unit) :]
    return -total if word.startswith("-") else total
