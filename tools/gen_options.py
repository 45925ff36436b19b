"""Write starter/generated/options.h, the launcher's share of the option table.

The launcher must know where the options end (`-B -u` is not `-u`), so its scanner reads the same
rows as the parser. Run as `gen_options.py [file]`; without a file the header goes to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apptainer_py.cli.table import (
    ACTIONS,
    BOOL,
    INSTANCES,
    LAYOUTS,
    OPTIONS,
    PREFIXES,
    SUPPORTED,
    TRANSPORTS,
    command_row,
)
from apptainer_py.model.request import RANK_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from apptainer_py.cli.table import Option

# Options whose value the launcher acts upon; the others it only steps over. Whatever it does not
# act upon is judged by the parser, which reads the same arguments again in the starter's child.
MEANINGS = {
    "add-caps": "OPT_UNFORESEEN",
    "boot": "OPT_UNFORESEEN",
    "compat": "OPT_COMPAT",
    "containall": "OPT_CONTAINALL",
    "fakeroot": "OPT_FAKEROOT",
    "help": "OPT_HELP",
    "fusemount": "OPT_INTERPRETER",
    "hostname": "OPT_UTS",
    "ignore-subuid": "OPT_IGNORE_SUBUID",
    "ignore-userns": "OPT_IGNORE_USERNS",
    "ipc": "OPT_IPC",
    "net": "OPT_UNFORESEEN",
    "netns-path": "OPT_UNFORESEEN",
    "network": "OPT_UNFORESEEN",
    "network-args": "OPT_UNFORESEEN",
    "no-init": "OPT_NO_INIT",
    "no-pid": "OPT_NO_PID",
    "no-privs": "OPT_UNFORESEEN",
    "oci": "OPT_OCI",
    "pid": "OPT_PID",
    "security": "OPT_INTERPRETER",
    "sharens": "OPT_SHARENS",
    "unsquash": "OPT_UNSQUASH",
    "trace": "OPT_TRACE",
    "userns": "OPT_USERNS",
    "uts": "OPT_UTS",
    "version": "OPT_VERSION",
    "writable-tmpfs": "OPT_WRITABLE_TMPFS",
}

_LAUNCHES = ACTIONS + INSTANCES

_HEAD = """\
/* Made by tools/gen_options.py from apptainer_py/cli/table.py. */
#ifndef APY_OPTIONS_H
#define APY_OPTIONS_H

enum option_flag {
    OPT_VALUE = 1,      /* takes a value */
    OPT_HELP = 2,
    OPT_VERSION = 4,
    OPT_USERNS = 8,
    OPT_FAKEROOT = 16,
    OPT_TRACE = 32,     /* its value is the trace file */
    OPT_PID = 64,
    OPT_NO_PID = 128,
    OPT_IPC = 256,
    OPT_UTS = 512,
    OPT_CONTAINALL = 1024,
    OPT_COMPAT = 2048,
    OPT_NO_INIT = 4096,
    OPT_WRITABLE_TMPFS = 8192,
    OPT_UNFORESEEN = 16384, /* changes the plan in ways that the launcher does not know */
    OPT_OCI = 32768,    /* the other engine */
    OPT_INTERPRETER = 1 << 24, /* stage 2 cannot be lean */
    OPT_UNSQUASH = 1 << 25, /* a directory is made of the image first */
    OPT_SHARENS = 1 << 26, /* several launches of one parent process in one container */
    OPT_IGNORE_SUBUID = 1 << 28,
    OPT_IGNORE_USERNS = 1 << 29
};

struct option_row {
    const char *name;
    char letter;             /* or NUL */
    unsigned flags;          /* enum option_flag */
    unsigned char commands;  /* bit n: action_commands[n]; 0: stands before the command */
};

struct action_command {
    const char *name;        /* "instance start" is two words */
    int arguments;           /* fewest, the image among them */
};
"""


def header() -> str:
    """Return the text of options.h."""
    parts = [
        _HEAD,
        _table("struct action_command", "action_commands", (_action(name) for name in _LAUNCHES)),
        _table("struct option_row", "option_rows", _options()),
        _strings("prefixes", PREFIXES),
        _strings("userns_keys", _keys("userns")),
        _strings("fakeroot_keys", _keys("fakeroot")),
        _strings("ignore_subuid_keys", _keys("ignore-subuid")),
        _strings("ignore_userns_keys", _keys("ignore-userns")),
        _strings("oci_keys", _keys("oci")),
        _strings("sharens_keys", _keys("sharens")),
        _strings("unsquash_keys", _keys("unsquash")),
        _strings("rank_variables", RANK_VARIABLES),
        _strings("transports", TRANSPORTS),
        _strings("layouts", LAYOUTS),
        "#endif\n",
    ]
    return "\n".join(parts)


def _action(name: str) -> str:
    row = command_row(name)
    if row is None or row[4] != SUPPORTED:
        raise ValueError(f"{name} is not a supported command")
    return f'{{"{name}", {row[2]}}}'


def _options() -> Iterable[str]:
    everywhere = sum(1 << i for i in range(len(_LAUNCHES)))
    for mask in (0, everywhere):
        yield f"{{\"help\", 'h', {MEANINGS['help']}, {mask}}}"
    for row in OPTIONS:
        mask = sum(1 << i for i, name in enumerate(_LAUNCHES) if name in row[5])
        if mask or "" in row[5]:
            letter = f"'{row[1]}'" if row[1] else "'\\0'"
            yield f'{{"{row[0]}", {letter}, {_flags(row)}, {mask}}}'


def _flags(row: Option) -> str:
    flags = [] if row[2] == BOOL else ["OPT_VALUE"]
    if row[0] in MEANINGS:
        flags.append(MEANINGS[row[0]])
    return " | ".join(flags) or "0"


def _keys(option: str) -> tuple[str, ...]:
    return next(row[4] for row in OPTIONS if row[0] == option and ACTIONS[0] in row[5])


def _table(kind: str, name: str, rows: Iterable[str]) -> str:
    inside = "".join(f"    {row},\n" for row in rows)
    return f"static const {kind} {name}[] = {{\n{inside}}};\n"


def _strings(name: str, strings: Iterable[str]) -> str:
    return _table("char *const", name, (f'"{text}"' for text in strings))


def main(arguments: list[str]) -> int:
    """Write the header to the file that `arguments` names, or to stdout."""
    if arguments:
        target = Path(arguments[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(header(), encoding="utf-8")
    else:
        sys.stdout.write(header())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
