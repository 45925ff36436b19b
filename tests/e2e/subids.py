"""Launches in a mount namespace with other files of the system; those of the machine stay."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.own_install import Installation

BASE = 100_000


def launch(
    own: Installation,
    *words: str | Path,
    files: Mapping[str, str | Path] | None = None,
    root: bool = False,
    before: str = "",
    env: Mapping[str, str] | None = None,
    program: str | Path = "",
) -> subprocess.CompletedProcess[str]:
    """Run our program with texts, or other files, in the place of some of the system's.

    `before` is run by root, in that mount namespace.
    """
    lines = ["set -e", "mount --make-rprivate /"]
    for number, (path, text) in enumerate((files or {}).items()):
        source = text
        if isinstance(text, str):
            source = own.place / f"file{number}"
            source.unlink(missing_ok=True)
            source.write_text(text)
            source.chmod(0o644)
        lines.append(f"mount --bind {source} {path}")
    user = own.user
    drop = "" if root else f"setpriv --reuid {user.pw_uid} --regid {user.pw_gid} --init-groups "
    command = shlex.join([str(program or own.program), *map(str, words)])
    lines += [before, "cd /", f"exec {drop}{command}"]
    home = "/root" if root else user.pw_dir
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", "\n".join(lines)],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, **(env or {})},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def range_of(own: Installation, first: int = BASE, count: int = 65536) -> str:
    """Return a line of /etc/subuid for the ordinary user."""
    return f"{own.user.pw_name}:{first}:{count}\n"


def both(text: str) -> dict[str, str | Path]:
    """Return the files where /etc/subuid and /etc/subgid both hold a text."""
    return {"/etc/subuid": text, "/etc/subgid": text}
