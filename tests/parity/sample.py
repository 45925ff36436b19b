"""One run of one program, brought into a form in which two programs can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable

Table = dict[str, tuple[str, str, frozenset[str]]]
Restrictions = tuple[tuple[str, tuple[str, ...], str], ...]
_SAID = ("FATAL:", "ERROR:", "WARNING:", "Error")
# The real one's clean-up is noisy after a failure (facts, appendix A 4).
_NOISE = ("Cleanup error", "Terminating squashfuse", "Timeouts can be caused")
_FLAGS = ("ro", "nosuid", "nodev", "noexec")


def said(stderr: str) -> list[str]:
    """Return the warnings and errors, without the paths in which the programs must differ."""
    lines = []
    for line in stderr.splitlines():
        if not line.startswith(_SAID) or any(noise in line for noise in _NOISE):
            continue
        lines.append(" ".join(line.replace("apptainer-py", "apptainer").split()))
    return sorted(set(lines))


def instances(stdout: str) -> str:
    """Return what is listed of instances, without process numbers and the places of logs."""
    text = re.sub(r'("pid": |\s)\d{2,}\b', r"\1N", stdout)
    text = re.sub(r"\S*/instances/logs/\S*?(\.out|\.err)", r"LOG\1", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


PARTS = ("status", "limits", "mountinfo", "environ")
# What a process gets from whoever starts it; the rest of the file is its own affair.
_STATUS = frozenset(
    "Umask Uid Gid Groups NSpid SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs "
    "Seccomp Seccomp_filters Cpus_allowed_list Mems_allowed_list".split()
)


def process(status: str) -> dict[str, str]:
    """Return what /proc/self/status says of identity, rights and signals."""
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "NSpid":
            found[name] = f"{len(value.split())} deep"
        elif name in _STATUS:
            found[name] = " ".join(value.split())
    return found


def payload(stdout: str) -> dict[str, object]:
    """Return what the files of PAYLOAD say, by aspect; nothing where it did not run."""
    parts = dict(zip(PARTS, re.split(r"^==\n", stdout, flags=re.MULTILINE)[1:], strict=False))
    if len(parts) < len(PARTS):
        return {"stdout": stdout}
    return {
        "process": process(parts["status"]),
        "limits": parts["limits"],
        "mounts": mounts(parts["mountinfo"].splitlines()),
        "environ": variables(parts["environ"].replace("\0", "\n")),
    }


# The real one adds its own search directories to what the caller had.
_SEARCHED = ":/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin:/usr/local/sbin"


def variables(stdout: str) -> list[str]:
    """Return the output of `env` in an order of its own."""
    return sorted(
        line.removesuffix(_SEARCHED) if line.startswith("USER_PATH=") else line
        for line in stdout.splitlines()
    )


def _field(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def mounts(mountinfo: Iterable[str]) -> Table:
    """Return the visible mounts by their mount point: file system, root path, restrictions."""
    table: Table = {}
    for line in mountinfo:
        left, _, right = line.partition(" - ")
        _, _, _, root, point, options = left.split()[:6]
        fs = right.split()[0].partition(".")[0]
        flags = frozenset(options.split(",")) & frozenset(_FLAGS)
        table[_field(point)] = (fs, _field(root), flags)
    return table


def _root(fs: str, root: str, point: str) -> str:
    """Return the root path of a mount, without the names of the session directory."""
    # resolv.conf is the host's own file here, so that the host's later changes are seen; the real
    # one copies it.
    if point == "/etc/resolv.conf" or fs == "tmpfs":
        return ""
    return root


def unexplained(
    ours: Table, real: Table, restrictions: Restrictions
) -> dict[str, tuple[object, object]]:
    """Return the mounts that differ, but for restrictions that only we have."""
    found: dict[str, tuple[object, object]] = {}
    for point in sorted({*ours, *real}):
        mine, theirs = ours.get(point), real.get(point)
        if mine is None or theirs is None:
            found[point] = (mine, theirs)
            continue
        allowed = {
            flag for flag, where, _ in restrictions if not where or {mine[0], point} & {*where}
        }
        same_fs = mine[0] == theirs[0] or point == "/etc/resolv.conf"
        same_root = _root(mine[0], mine[1], point) == _root(theirs[0], theirs[1], point)
        if not (same_fs and same_root and theirs[2] <= mine[2] <= theirs[2] | allowed):
            found[point] = (mine, theirs)
    return found
