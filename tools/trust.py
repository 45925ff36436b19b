"""Who could write a path: what root runs, and what runs as root, must be root's alone."""

from __future__ import annotations

import os
import stat
import sysconfig
from pathlib import Path

_LINKS_MAX = 40


class Untrusted(Exception):
    """A path that somebody other than root could change."""


def complaint(path: str, facts: os.stat_result) -> str | None:
    """Say why an ordinary user could write this very file or directory, or return None."""
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid != 0:
        return f"{path} belongs to uid {facts.st_uid}: chown root:root {path}"
    if stat.S_ISLNK(facts.st_mode):
        return None
    if mode & stat.S_IWOTH:
        # A sticky directory is meant to be so: nobody should be told to change /tmp.
        advice = "" if mode & stat.S_ISVTX else f": chmod o-w {path}"
        return f"{path} is writable by everybody (mode {mode:04o}){advice}"
    if mode & stat.S_IWGRP:
        group = facts.st_gid
        return f"{path} is writable by group {group} (mode {mode:04o}): chmod g-w {path}"
    return None


def check_path(path: str) -> str:
    """Return the resolved path, after a look at each directory and link that leads to it.

    What does not exist yet is root's to make, once everything above it is root's.

    Raises:
        Untrusted: an ordinary user could change the path, or one of its parents up to `/`.
    """
    pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    resolved, links = "/", 0
    _check_one(resolved)
    while pending:
        part = pending.pop()
        if part == "..":
            resolved = os.path.dirname(resolved)
            continue
        step = os.path.join(resolved, part)
        facts = _check_one(step)
        if facts is not None and stat.S_ISLNK(facts.st_mode):
            links += 1
            if links > _LINKS_MAX:
                raise Untrusted(f"{path} has too many symbolic links")
            target = os.readlink(step)
            resolved = "/" if target.startswith("/") else resolved
            pending += [piece for piece in reversed(target.split("/")) if piece not in ("", ".")]
            continue
        resolved = step
    return resolved


def _check_one(path: str) -> os.stat_result | None:
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    if said := complaint(path, facts):
        raise Untrusted(said)
    return facts


def check_tree(top: str) -> None:
    """Look at a directory, all that leads to it and all below it.

    Raises:
        Untrusted: an ordinary user could change any of it.
    """
    check_path(top)
    for folder, names, files in os.walk(top):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            facts = _check_one(path)
            if facts is not None and stat.S_ISLNK(facts.st_mode):
                check_path(path)


def check_interpreter(python: str, library: str) -> None:
    """Look at the interpreter, its shared library and its standard library.

    Raises:
        Untrusted: an ordinary user could change what every launch loads.
    """
    for path in (python, library):
        if not Path(path).exists():
            raise Untrusted(f"{path} is not there")
        check_path(path)
    check_tree(sysconfig.get_path("stdlib"))
