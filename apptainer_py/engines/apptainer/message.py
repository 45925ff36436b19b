"""Lists of byte strings by name, packed for the way from master to stage 2."""

from __future__ import annotations

import errno
import os

from apptainer_py.model import protocol

# What a program that exists and cannot be executed lacks; both stages say it.
LIBRARY_MISSING = "a shared library is likely missing in the image"


def refused_label(kind: int, text: str, number: int) -> str:
    """Return why the kernel does not take the payload's label; both stages may have to say it."""
    word, reason = "SELinux context", os.strerror(number).lower()
    if kind == protocol.LABELKIND_APPARMOR:
        word = "AppArmor profile"
        reason = "no profile of this name is loaded" if number == errno.ENOENT else reason
    elif number == errno.EINVAL:
        reason = "the policy knows no such context"
    return f"failed to apply security configuration: {word} {text}: {reason}"


def pack(lists: dict[bytes, list[bytes]]) -> bytes:
    """Return the lists as one byte string: how many, then name, count and items of each.

    Raises:
        ValueError: a name or item has a NUL in it, which ends each of them.
    """
    parts = [b"%d" % len(lists)]
    for name, items in lists.items():
        parts += [name, b"%d" % len(items), *items]
    parts.append(b"")
    data = b"\0".join(parts)
    if data.count(b"\0") != len(parts) - 1:
        raise ValueError("an item of a message has a NUL in it")
    return data


def unpack(data: bytes) -> dict[bytes, list[bytes]]:
    """Return what `pack` was given.

    Raises:
        ValueError: the data is cut short, malformed, or has more than it says.
    """
    parts = data.split(b"\0")
    at = 0

    def number() -> int:
        nonlocal at
        at += 1
        if at >= len(parts):
            raise ValueError("a message is cut short")
        if not parts[at - 1].isdigit():
            raise ValueError("a message is malformed")
        return int(parts[at - 1])

    lists = {}
    for _ in range(number()):
        name = parts[at]
        at += 1
        count = number()
        lists[name] = parts[at : at + count]
        at += count
        if at >= len(parts):
            raise ValueError("a message is cut short")
    if parts[at:] != [b""]:
        raise ValueError("a message is too long")
    return lists
