"""An --env-file, evaluated by the host's shell, as its author has tried it out there."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

_BASH, _OTHER = "/bin/bash", "/bin/sh"
_SECONDS = 60
# What a shell reads or obeys at its start, before it has seen the file.
_LEFT_OUT = frozenset(("BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "POSIXLY_CORRECT", "PS4"))
# What a shell changes by itself.
_MOVING = frozenset(
    "_ OLDPWD PWD SHLVL RANDOM SRANDOM SECONDS LINENO EPOCHSECONDS EPOCHREALTIME FUNCNAME"
    " BASH_COMMAND BASH_ARGV0 BASH_SUBSHELL PIPESTATUS HISTCMD OPTIND OPTARG".split()
)
# What is set is shown before the file and behind it.  A word that is no command is a mistake in
# the file, as in `NAME = value`.
_SHOW = r"""
command_not_found_handle() {
    printf '%s: command not found\n' "$1" >&2
    kill -s KILL $$
}
__show() {
    local __name IFS=$' \t\n' __arrays
    __arrays=" $(compgen -A arrayvar) "
    __arrays=${__arrays//$'\n'/ }
    for __name in $(compgen -A variable); do
        case $__arrays,$__name in
        *,__* | *" $__name "*) continue ;;
        esac
        [ -z "${!__name+x}" ] || printf '%s\0' "$__name=${!__name}"
    done
    printf '\0'
}
__show
. "$1" >&2
__show
[ -n "$__whole" ]
"""
# Other shells cannot list what is set; there the names are those that stand before a `=`.
_SHOW_NAMED = """\
printf '_=\\0\\0'
. "$1" >&2
for __name in @NAMES@; do
    eval "[ -z \\"\\${$__name+x}\\" ] || printf '%s\\\\0' \\"$__name=\\$$__name\\""
done
printf '_=\\0\\0'
[ -n "$__whole" ]
"""


class Failed(Exception):
    """The file is no shell language, or has ended the shell."""


def evaluate(text: bytes, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a file sets, exported or not.

    Raises:
        Failed: it cannot be evaluated.
    """
    named = _named(text)
    shell, script = _OTHER, _SHOW_NAMED.replace("@NAMES@", " ".join(sorted(named)))
    if os.access(_BASH, os.X_OK):
        shell, script = _BASH, _SHOW
    done = _run(shell, script, text + b"\n__whole=1\n", environment)
    parts = done.stdout.split(b"\0\0")
    if len(parts) != 3 or (done.returncode != 0 and done.stderr):
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it fails"]
        raise Failed(lines[-1].partition("/proc/self/fd/")[2].partition(": ")[2] or lines[-1])
    before, after = (_pairs(part) for part in parts[:2])
    return {
        name: value
        for name, value in after.items()
        if name not in _MOVING and (name in named or before.get(name) != value)
    }


def _run(
    shell: str, script: str, text: bytes, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    import subprocess

    fd = os.memfd_create("env-file", os.MFD_CLOEXEC)
    try:
        os.write(fd, text)
        return subprocess.run(
            [shell, "-c", script, shell, f"/proc/self/fd/{fd}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={name: value for name, value in environment.items() if _is_passed(name)},
            pass_fds=[fd],
            check=False,
            timeout=_SECONDS,
        )
    finally:
        os.close(fd)


def _is_passed(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith("BASH_FUNC_")


def _named(text: bytes) -> set[str]:
    words = [line.split(b"=", 1)[0] for line in text.splitlines() if b"=" in line]
    names = [word.lstrip().removeprefix(b"export ").strip().decode("latin-1") for word in words]
    return {name for name in names if name.isascii() and name.isidentifier()}


def _pairs(part: bytes) -> dict[str, str]:
    found = [entry.partition(b"=") for entry in part.split(b"\0") if entry]
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in found}
