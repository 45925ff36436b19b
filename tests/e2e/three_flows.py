"""Runs the product in each of its flows: as the ordinary user, as that user with -u, as root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import images

DEADLINE_S = 120
FLOWS = ("setuid", "userns", "root")
Do = Callable[..., subprocess.CompletedProcess[str]]


def run(
    program: str | Path,
    flow: str,
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Return what a command line did; `-u` is put behind the command in the userns flow."""
    line = [str(word) for word in words]
    if flow == "userns":
        line.insert(1, "-u")
    user = images.ordinary_user()
    home = "/root" if flow == "root" else user.pw_dir
    ids: dict[str, object] = {}
    if flow != "root":
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        ids = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    done = subprocess.run(  # type: ignore[call-overload]
        [str(program), *line],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, **(env or {})},
        cwd=cwd or "/",
        input=stdin.encode(),
        capture_output=True,
        check=False,
        timeout=60,
        **ids,
    )
    # Decoded here: text=True would make newlines of the carriage returns that a payload prints.
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def run_at(
    home: Path, program: str | Path, *words: str | Path, stdin: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """Return what a program did as the ordinary user, with a directory as home and to work in."""
    user = images.ordinary_user()
    return subprocess.run(
        [program, *words],
        input=stdin,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), **environ},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
    )


def doing_at(home: Path, ours: Path) -> Do:
    """Return what runs a command line of ours, or of another `program`, by `run_at`."""

    def do(
        *words: str | Path, program: str | Path = ours, **more: str
    ) -> subprocess.CompletedProcess[str]:
        return run_at(home, program, *words, **more)

    return do


def good(done: subprocess.CompletedProcess[str]) -> str:
    """Return what was written by a program that has succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout
