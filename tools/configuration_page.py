"""Write docs/configuration.md: every directive of starter/config.def, for administrators.

python3 tools/configuration_page.py docs/configuration.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import gen_directives

BEGINNING = """\
# The administrator's file

`/etc/apptainer-py/apptainer-py.conf` (the directory is compiled in) has Apptainer's own syntax and
all of its directives, so an `apptainer.conf` can be copied in as it is. This page is made from
`starter/config.def`, the table that the C and the Python side read too.

* The file and every directory above it must belong to root and be writable by nobody else, and no
  part of the path may be a symbolic link. Else the setuid flow is refused, in one line.
* An unknown directive, a directive that is given twice or a value that is not allowed refuses the
  setuid flow too; the message has file, line and the nearest directive.
* In the user-namespace flow a user is bound by no rule of this file: the namespace is the user's.
* `apptainer-py config check` lists what is wrong and what is not enforced;
  `apptainer-py config show --effective --user NAME` shows the result and where each value is from.

What becomes of a directive: **enforced** holds for every launch of the setuid flow, **advisory** is
applied but can be got around, **refuses** ends the launches that need it with "not supported yet".

| directive | values | default | | what it does |
|---|---|---|---|---|
"""
ENDING = """
Of our own, not in Apptainer's file: `allow setuid users`, `allow setuid groups` and `audit log`.

The audit record is one line of JSON for each launch, written before anything is done (`begun`),
one more where the plan turns out to be another (`allowed`), and one where no container came of it:
`refused` by a rule on images, namespaces or identities, or else `failed`. A launch with neither of
these two ran, or was killed. Each holds time, process, user, group, decision, namespaces, flags,
the payload's capabilities and the image. What a user chose is escaped and bounded, so a record can
be neither forged nor split. With a path, the file is made with mode 0600 and must be root's; with
`syslog`, the record goes to `authpriv.notice`.

Every attempt is written and none is held back, as sudo does it: at most three records a launch,
each under 4 KiB. How fast they come is bounded by how fast the user can start processes; how many
are kept, by the log's own rules (`logrotate`, journald's `RateLimitBurst`).
"""
SHOWN = {"LIST": "a list of {0}", "UINT": "{0} to {1}", "STRING": "any text"}


def values(kind: str, allowed: str) -> str:
    """Return what a directive takes, in words."""
    words = allowed.split("|")
    if kind in SHOWN:
        return SHOWN[kind].format(*words, "")
    if kind == "PATHLIST":
        return "directories, `:` between" + (f", or `{allowed}`" if allowed else "")
    if kind == "PATH":
        return ", ".join([*(f"`{word}`" for word in words if word), "an absolute path"])
    return ", ".join(f"`{word}`" for word in words)


def page(text: str) -> str:
    """Return the page for the text of the table."""
    lines = []
    for _, key, kind, default, allowed, enforcement, sentence in gen_directives.rows(text):
        shown = f"`{default}`" if default else "none"
        cells = (f"`{key}`", values(kind, allowed), shown, enforcement.lower(), sentence)
        lines.append(f"| {' | '.join(cells)} |\n")
    return BEGINNING + "".join(lines) + ENDING


def main() -> int:
    """Write the page."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(page(gen_directives.TABLE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
