"""What a line of the tables is.

`{name}` in a line stands for a path of place.py; `{own}` for an empty folder that each program has
for itself, where an instance's record is too.  Several commands, a line each, are run one after the
other: their statuses are a list, their outputs are joined.

A line runs in the setuid flow, again with `-u`,
and as root, unless `flows` says otherwise.  `form` says how stdout is read:

    text     as it is (aspect stdout)
    env      the output of env (stdout)
    mounts   /proc/self/mountinfo (mounts)
    usage    not at all: the help texts are our own
    instances  what `instance list` prints (stdout)
    payload  /proc/self/{status,limits,mountinfo,environ} (process, limits, mounts, environ)

`under` is what a shell does before it becomes the program: `exec "$@"` follows, or is in it.

`differs` names what may differ, one of these aspects or status or said (warnings and errors), and
why; `aspect@flow` is for one flow.  A test fails where such a difference is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SETUID, USERNS, ROOT = "setuid", "userns", "root"
BOTH = (SETUID, USERNS)
ALL = (SETUID, USERNS, ROOT)


@dataclass(frozen=True)
class Case:
    """One command line; `form` says how its output is read."""

    line: str
    form: str = "text"
    env: dict[str, str] = field(default_factory=dict)
    stdin: str = ""
    cwd: str = "{work}"
    umask: int = 0o022
    flows: tuple[str, ...] = ALL
    under: str = ""
    differs: dict[str, str] = field(default_factory=dict)


def sequence(*lines: str, **options: object) -> Case:
    return Case("\n".join(lines), env={"APPTAINER_CONFIGDIR": "{own}"}, **options)  # type: ignore[arg-type]


def environment(line: str, **options: object) -> Case:
    return Case(line, form="env", **options)  # type: ignore[arg-type]


def mounted(options: str, image: str = "{sif}", **more: object) -> Case:
    line = f"exec {options} {image} cat /proc/self/mountinfo"
    return Case(line, form="mounts", **more)  # type: ignore[arg-type]


PAYLOAD = "for f in status limits mountinfo environ; do echo ==; cat /proc/self/$f; done"


def payload(options: str, image: str = "{sif}", **more: object) -> Case:
    line = f"exec {options} {image} sh -c '{PAYLOAD}'"
    return Case(line, form="payload", **more)  # type: ignore[arg-type]
