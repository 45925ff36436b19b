"""/etc/subuid and /etc/subgid as lines: whose range is which (subuid(5)).

A line that begins with `!` is one that `config fakeroot --disable` has switched off. The starter
reads the same files for itself (starter/subids.c); what is found here decides nothing.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError
from apptainer_py.base.files import read_at_most
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

SUBUID: Final = "/etc/subuid"
SUBGID: Final = "/etc/subgid"
WANTED: Final = 65536
_NONE: Final = (1 << 32) - 1
_DIGITS: Final = 10
_FILE_BYTES: Final = 4 << 20


class NoMapping(LaunchError):
    message = "could not use fakeroot: no mapping entry found in {file} for {user}"
    hint = "the administrator adds one with `apptainer-py config fakeroot --add {user}`"


class SwitchedOff(LaunchError):
    message = (
        "could not use fakeroot: your fakeroot mapping has been disabled by the administrator in "
        "{file}"
    )
    hint = "the administrator enables it with `apptainer-py config fakeroot --enable {user}`"


class TooFew(LaunchError):
    message = (
        "could not use fakeroot: mapping entries for user {user} found in {file} but all with a "
        "range count lower than 65536"
    )
    hint = "the administrator adds one with `apptainer-py config fakeroot --add {user}`"


class Entry(Record):
    """One line: `owner` is a name or a number."""

    owner: str
    first: int
    count: int
    disabled: bool = False

    @property
    def end(self) -> int:
        """The first id behind the range."""
        return self.first + self.count

    def belongs_to(self, name: str, number: int) -> bool:
        """Return whether the line is of the user with this name and number."""
        return self.owner == name or (_is_number(self.owner) and int(self.owner) == number)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= _DIGITS


def parse_line(line: str) -> Entry | None:
    """Return the range of a line; None for a comment, or what is none.

    Fields behind the third are nobody's, as for shadow's newuidmap.
    """
    owner, *rest = line.removesuffix("\r").split(":")
    disabled = owner.startswith("!")
    owner = owner.removeprefix("!")
    numbers = rest[:2]
    if not owner or len(numbers) != 2:
        return None
    if not all(map(_is_number, numbers)):
        return None
    first, count = map(int, numbers)
    if count == 0 or first + count > _NONE:
        return None
    return Entry(owner=owner, first=first, count=count, disabled=disabled)


def read(path: str) -> list[Entry]:
    """Return the ranges of a file; none where it cannot be read."""
    try:
        data = read_at_most(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), _FILE_BYTES)
    except OSError:
        return []
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    return [entry for line in lines if (entry := parse_line(line)) is not None]


def find(entries: Sequence[Entry], name: str, number: int) -> Entry | None:
    """Return the line that counts for a user, as starter/subids.c: it may be switched off.

    The first one of just the wanted size, else the largest.
    """
    own = [one for one in entries if one.belongs_to(name, number)]
    fit = (one for one in own if one.count == WANTED)
    return next(fit, max(own, key=lambda one: one.count, default=None))


def is_listed(entry: Entry | None) -> bool:
    """Return whether a user is named at all; a range that is too small is a mistake to tell."""
    return entry is not None and not (entry.disabled and entry.count >= WANTED)


def check(path: str, name: str, number: int) -> Entry:
    """Return a user's range of enough ids.

    Raises:
        NoMapping: there is none.
        TooFew: each is too small.
        SwitchedOff: by the administrator.
    """
    entry = find(read(path), name, number)
    if entry is None:
        raise NoMapping(file=path, user=name)
    if entry.count < WANTED:
        raise TooFew(file=path, user=name)
    if entry.disabled:
        raise SwitchedOff(file=path, user=name)
    return entry
