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
_FILE_BYTES: Final = 4 << 20


class NoMapping(LaunchError):
    message = "could not use fakeroot: no mapping entry found in {file} for {user}"
    hint = "the administrator adds one with `apptainer-py config fakeroot --add {user}`"


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
        return self.owner == name or (
            self.owner.isascii() and self.owner.isdecimal() and int(self.owner) == number
        )


def parse_line(line: str) -> Entry | None:
    """Return the range of a line; None for a comment, or what is none."""
    owner, *rest = line.strip().split(":")
    disabled = owner.startswith("!")
    owner = owner.removeprefix("!")
    if not owner or len(rest) != 2:
        return None
    if not all(word.isascii() and word.isdecimal() and len(word) <= 10 for word in rest):
        return None
    first, count = int(rest[0]), int(rest[1])
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


def usable(entries: Sequence[Entry], name: str, number: int) -> list[Entry]:
    """Return a user's ranges that are switched on."""
    return [one for one in entries if not one.disabled and one.belongs_to(name, number)]


def check(path: str, name: str, number: int) -> None:
    """Make sure that a user has a range of enough ids.

    Raises:
        NoMapping: there is none.
        TooFew: each is too small.
    """
    own = usable(read(path), name, number)
    if not own:
        raise NoMapping(file=path, user=name)
    if all(entry.count < WANTED for entry in own):
        raise TooFew(file=path, user=name)
