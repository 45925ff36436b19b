"""Help and usage texts, made from the table in the shape that cobra gives Apptainer's."""

from __future__ import annotations

from apptainer_py.cli.help_texts import ABOUT, EXAMPLES
from apptainer_py.cli.table import (
    ACTIONS,
    BOOL,
    COMMANDS,
    HIDDEN,
    HIDDEN_COMMANDS,
    INT,
    MAP,
    OCI_ONLY,
    PROGRAM,
    REFUSED,
    STRING,
    command_row,
    options_of,
)
from apptainer_py.cli.values import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.cli.table import Command, Option

_WIDTH = 80


def _row(path: str) -> Command | None:
    """Return the row of a command, of a plug-in's too."""
    row = command_row(path)
    if row is None and path:
        from apptainer_py.cli import plugins

        row = plugins.row(path)
    return row


def full(path: str) -> str:
    """Return what `--help` prints for a command, or for the program if `path` is ""."""
    row = _row(path)
    refused = row is not None and row[4] == REFUSED
    head = row[5] if row else "Containers for shared machines, compatible with Apptainer"
    about = "Not supported yet." if refused else ABOUT.get(path, "")
    synopsis = f"{path} {row[1]}".rstrip() if row else "[global options...]"
    parts = [head, f"Usage:\n  {PROGRAM} {synopsis}"]
    if about:
        parts.append(f"Description:\n{_indented(about)}")
    parts.append(f"Options:\n{_options(path)}")
    commands = _commands(path)
    if commands:
        parts.append(f"Available Commands:\n{commands}")
    if path in EXAMPLES:
        lines = "\n".join(f"  $ {PROGRAM} {example}" for example in EXAMPLES[path])
        parts.append(f"Examples:\n{lines}")
    return "\n\n".join(parts) + "\n"


def topic(words: Sequence[str]) -> str:
    """Return what `help` prints for the command that `words` name."""
    if not words:
        return full("")
    for count in (2, 1):
        path = " ".join(words[:count])
        if len(words) >= count and _row(path):
            return full(path)
    shown = " ".join(f"`{plain(word)}`" for word in words)
    return f"Unknown help topic [{shown}]\n{_program_usage()}"


def usage(path: str) -> str:
    """Return what stands on stdout after a wrong number of arguments, or no command."""
    row = command_row(path)
    if row is None:
        return f"{_program_usage()}\n{_more()}"
    synopsis = f"{path} {row[1]}".rstrip()
    return f"Usage:\n  {PROGRAM} [global options...] {synopsis}\n\n{_more()}"


def options(path: str) -> str:
    """Return what stands on stdout after a wrong option."""
    name = path.rpartition(" ")[2] or PROGRAM
    return f"Options for {name} command:\n\n{_options(path)}\n\n{_more()}"


def suggestions(typed: str) -> list[str]:
    """Return the commands that may have been meant, by cobra's rule: two edits, or a prefix."""
    return [
        name
        for name in _visible("")
        if name.startswith(typed.lower()) or _distance(typed.lower(), name) <= 2
    ]


def _distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one[:64], 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _more() -> str:
    return f"Run '{PROGRAM} --help' for more detailed usage information.\n"


def _program_usage() -> str:
    return (
        f"Usage:\n  {PROGRAM} [global options...] <command>\n\n"
        f"Available Commands:\n{_commands('')}\n"
    )


def _visible(path: str) -> list[str]:
    """Return the names of the commands below `path`."""
    start = f"{path} " if path else ""
    names = [row[0] for row in COMMANDS if row[0].startswith(start)]
    rest = [name[len(start) :] for name in names if name not in HIDDEN_COMMANDS]
    below = [name for name in rest if " " not in name]
    if path:
        return below
    from apptainer_py.cli import plugins

    return sorted([*below, *plugins.extras()])


def _commands(path: str) -> str:
    names = _visible(path)
    width = max((len(name) for name in names), default=0)
    lines = []
    for name in names:
        row = _row(f"{path} {name}".strip())
        if row:
            note = " (not supported yet)" if row[4] == REFUSED else ""
            lines.append(_columns(f"  {name:<{width}}  ", f"{row[5]}{note}", width + 4))
    return "\n".join(lines)


def _options(path: str) -> str:
    name = path.rpartition(" ")[2] or PROGRAM
    rows: list[tuple[str, str]] = [
        (_left(row), _right(row, path))
        for row in options_of(path)
        if row[0] not in HIDDEN and row[6] != REFUSED
    ]
    rows.append(("  -h, --help", f"help for {name}"))
    rows.sort(key=lambda row: row[0][6:])
    width = max(len(left) for left, _ in rows) + 3
    return "\n".join(_columns(left, right, width) for left, right in rows)


def _left(row: Option) -> str:
    letter = f"-{row[1]}, " if row[1] else "    "
    kind = "" if row[2] == BOOL else f" {row[2]}"
    return f"  {letter}--{row[0]}{kind}"


def _right(row: Option, path: str) -> str:
    text, default = row[7], ""
    if row[0] == "home" and path in ACTIONS:
        default = ' (default "$HOME")'
    elif row[2] == MAP:
        default = " (default [])"
    elif row[2] == STRING and row[3] not in ("", "\0"):
        default = f' (default "{row[3]}")'
    elif row[2] == INT and row[3] not in (0, -1):
        default = f" (default {row[3]})"
    note = f" ({OCI_ONLY})" if row[6] == OCI_ONLY else ""
    return text + default + note


def _columns(left: str, right: str, width: int) -> str:
    import textwrap

    lines = textwrap.wrap(right, _WIDTH - width, break_on_hyphens=False) or [""]
    return f"\n{' ' * width}".join([f"{left:<{width}}{lines[0]}", *lines[1:]])


def _indented(text: str) -> str:
    import textwrap

    paragraph, newline, rest = text.partition("\n")
    wrapped = textwrap.fill(paragraph, _WIDTH - 2) + newline + rest
    return textwrap.indent(wrapped, "  ")
