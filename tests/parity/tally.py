"""What became of each line of the table, counted for the last line that pytest prints."""

from __future__ import annotations

from collections import Counter

EQUAL, INTENDED, UNEXPLAINED = "equal", "intended", "unexplained"
count: Counter[str] = Counter()


def line() -> str:
    """Return the result of the whole table."""
    return (
        f"{count.total()} cases, {count[EQUAL]} equal, "
        f"{count[INTENDED]} intended, {count[UNEXPLAINED]} unexplained"
    )
