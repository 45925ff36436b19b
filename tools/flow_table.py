"""Write the table of what works in which flow, from tests/flows.toml, into README.md."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROWS = Path(__file__).resolve().parent.parent / "tests/flows.toml"
FLOWS = ("setuid", "userns", "root")
HEAD = ("| | setuid | user namespace (`-u`) | root |", "|---|---|---|---|")


def rows() -> list[dict[str, object]]:
    """Return the rows of the file."""
    found: list[dict[str, object]] = tomllib.loads(ROWS.read_text())["row"]
    return found


def table() -> str:
    """Return the table as Markdown."""
    lines = [
        "| " + " | ".join(str(row[name]) for name in ("what", *FLOWS)) + " |" for row in rows()
    ]
    return "\n".join((*HEAD, *lines))


def replaced(text: str) -> str:
    """Return a text with the table in the place of its table."""
    before, head, rest = text.partition(HEAD[0])
    if not head:
        raise ValueError(f"no line {HEAD[0]}")
    _, blank, after = rest.partition("\n\n")
    return before + table() + blank + after


def main() -> None:
    """Rewrite the named files."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(replaced(path.read_text()))


if __name__ == "__main__":
    main()
