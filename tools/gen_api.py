"""Write apptainer_py/api/keywords.pyi: the options of each command as types of keyword arguments.

Only type checkers read it; at run time `api/options.py` looks at the table itself. Run as
`gen_api.py [file]`; without a file the text goes to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apptainer_py.cli.table import BOOL, INT, LIST, MAP, REPEAT, STRING, SYNONYMS, options_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.cli.table import Option

# The class of each command's keywords, and those options that its function has by itself.
CLASSES = (
    ("Global", "", ("version",)),
    ("Exec", "exec", ()),
    ("Run", "run", ()),
    ("Test", "test", ()),
    ("Start", "instance start", ()),
    ("StartRun", "instance run", ()),
    ("Build", "build", ("docker-login",)),
    ("Pull", "pull", ("name", "docker-login")),
    ("Push", "push", ("docker-login",)),
)
_TYPES = {
    BOOL: "bool",
    INT: "int",
    STRING: "_Text",
    LIST: "_Text | Iterable[_Text]",
    REPEAT: "_Text | Iterable[_Text]",
    MAP: "Mapping[str, str]",
}
_HEAD = """\
# Made by tools/gen_api.py from apptainer_py/cli/table.py.

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import TypedDict

_Text = str | PathLike[str]
"""


def keyword(row: Option) -> str:
    """Return the line of one option."""
    return f"    {row[0].replace('-', '_')}: {_TYPES[row[2]]}\n"


def text() -> str:
    """Return the whole stub."""
    parts = [_HEAD]
    for name, command, without in CLASSES:
        base = "TypedDict" if name == "Global" else "Global"
        total = ", total=False"
        parts.append(f"\nclass {name}({base}{total}):\n")
        outer = {row[0] for row in options_of("")} if command else set()
        parts += [
            keyword(row)
            for row in options_of(command)
            if row[0] not in (*without, *SYNONYMS, *outer)
        ]
    return "".join(parts)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text())
    else:
        sys.stdout.write(text())
