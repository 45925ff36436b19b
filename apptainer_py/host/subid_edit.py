"""Changing /etc/subuid and /etc/subgid: one user's line, all others as they were to the byte.

Both files are locked as shadow's own tools lock them, and each is replaced by a whole new one.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import ConfigError
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.host import subid_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from apptainer_py.host.subid_file import Entry

# The ids are handed out from the top down, as Apptainer does it.
HIGHEST: Final = 4294836224
LOWEST: Final = 65536
_FILE_BYTES: Final = 4 << 20
_LOCK_S: Final = 10


class NoEntry(ConfigError):
    message = "no mapping entry found in {file} for {user}"


class NoRoom(ConfigError):
    message = "no range of 65536 ids is left in {file} for {user}"


def _own_lines(text: str, user: str, number: int) -> list[tuple[int, Entry]]:
    """Return the numbers of a user's lines with enough ids, and what they say."""
    found = []
    for place, line in enumerate(text.split("\n")):
        entry = subid_file.parse_line(line)
        if entry and entry.belongs_to(user, number) and entry.count >= subid_file.WANTED:
            found.append((place, entry))
    return found


def _entries(text: str) -> list[Entry]:
    return [one for line in text.split("\n") if (one := subid_file.parse_line(line)) is not None]


def free_start(entries: Sequence[Entry], others: Sequence[int]) -> int:
    """Return the first id of the highest range that nobody has, 0 if there is none.

    `others` are ids of accounts.
    """
    first = HIGHEST
    taken = [(one.first, one.end) for one in entries] + [(one, one + 1) for one in others]
    while first >= LOWEST:
        end = first + subid_file.WANTED
        if not any(first < other_end and start < end for start, other_end in taken):
            return first
        first -= subid_file.WANTED
    return 0


def add(text: str, user: str, number: int, file: str, others: Sequence[int] = ()) -> str:
    """Return the file with a range for a user; unchanged where there is one.

    Raises:
        NoRoom: none is left.
    """
    if _own_lines(text, user, number):
        return text
    first = free_start(_entries(text), others)
    if not first:
        raise NoRoom(file=file, user=user)
    begin = text if text.endswith("\n") or not text else text + "\n"
    return f"{begin}{number}:{first}:{subid_file.WANTED}\n"


def remove(text: str, user: str, number: int, file: str) -> str:
    """Return the file without a user's ranges.

    Raises:
        NoEntry: there is none.
    """
    gone = {place for place, _ in _existing(text, user, number, file)}
    lines = text.split("\n")
    return "\n".join(line for place, line in enumerate(lines) if place not in gone)


def disable(text: str, user: str, number: int, file: str) -> str:
    """Return the file with a user's ranges switched off.

    Raises:
        NoEntry: there is none.
    """
    lines = text.split("\n")
    for place, entry in _existing(text, user, number, file):
        if not entry.disabled:
            lines[place] = "!" + lines[place].lstrip()
    return "\n".join(lines)


def enable(text: str, user: str, number: int, file: str) -> str:
    """Return the file with a user's ranges switched on.

    Raises:
        NoEntry: there is none.
    """
    lines = text.split("\n")
    for place, _ in _existing(text, user, number, file):
        lines[place] = lines[place].lstrip().removeprefix("!")
    return "\n".join(lines)


def _existing(text: str, user: str, number: int, file: str) -> list[tuple[int, Entry]]:
    found = _own_lines(text, user, number)
    if not found:
        raise NoEntry(file=file, user=user)
    return found


class Lock:
    """shadow's lock of a file: FILE.lock, with the number of the process that holds it."""

    def __init__(self, path: str) -> None:
        self.path = f"{path}.lock"

    def __enter__(self) -> None:
        import time

        end = time.monotonic() + _LOCK_S
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            try:
                fd = os.open(self.path, flags, 0o600)
            except FileExistsError:
                if self._is_stale():
                    os.unlink(self.path)
                elif time.monotonic() > end:
                    reason = "somebody else changes this file; try again"
                    raise ConfigError(file=self.path, reason=reason) from None
                else:
                    time.sleep(0.05)
                continue
            except OSError as error:
                raise ConfigError(file=self.path, reason=f"{error.strerror}".lower()) from None
            write_all(fd, b"%d" % os.getpid())
            return

    def __exit__(self, *_: object) -> None:
        os.unlink(self.path)

    def _is_stale(self) -> bool:
        """Return whether the process that made the lock has ended."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            owner = int(read_at_most(fd, 32).rstrip(b"\0\n") or b"0")
            if owner <= 0:
                return False
            os.kill(owner, 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            return False
        return False


def read_text(path: str) -> tuple[str, os.stat_result]:
    """Return a file's text and facts; an empty one of root's where there is none.

    Raises:
        ConfigError: it is no regular file that belongs to root, or is too large.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return "", os.stat("/")
    except OSError as error:
        raise ConfigError(file=path, reason=f"{error.strerror}".lower()) from None
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != 0 or facts.st_mode & 0o022:
        os.close(fd)
        raise ConfigError(file=path, reason="must be a file that nobody but root can write")
    data = read_at_most(fd, _FILE_BYTES + 1)
    if len(data) > _FILE_BYTES:
        raise ConfigError(file=path, reason="is larger than 4 MiB")
    return data.decode("utf-8", "surrogateescape"), facts


def replace(path: str, text: str, facts: os.stat_result) -> None:
    """Put a new file in the place of another, with its owner and mode.

    Raises:
        ConfigError: it cannot be written; the old one stays.
    """
    fresh = f"{path}+"
    mode = stat.S_IMODE(facts.st_mode) if stat.S_ISREG(facts.st_mode) else 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if os.path.lexists(fresh):  # of a tool that was killed: the lock is ours
            os.unlink(fresh)
        fd = os.open(fresh, flags, 0o600)
        os.fchown(fd, facts.st_uid, facts.st_gid)
        os.fchmod(fd, mode)
        other = os.dup(fd)
        write_all(fd, text.encode("utf-8", "surrogateescape"))
        os.fsync(other)
        os.close(other)
        os.rename(fresh, path)
    except OSError as error:
        raise ConfigError(file=path, reason=f"cannot be written: {error.strerror}") from None
