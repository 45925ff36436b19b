"""Directories that are there for one command, and what killed commands have left of them.

A command holds a lock on each directory that it makes. So one that nobody holds is left over, and
the next command of its kind removes it.
"""

from __future__ import annotations

import os
import time

# Between a directory and its lock lies an instant.
_FRESH_S = 60.0
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def hold(path: str) -> int:
    """Lock a directory, as long as the descriptor that is returned is open here or in a child.

    Raises:
        OSError: it cannot be opened.
    """
    import fcntl

    fd = os.open(path, _FLAGS)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # on a file system without locks nothing is taken for abandoned
    return fd


def is_held(path: str) -> bool:
    """Return whether a command holds a directory; where that cannot be known, none does."""
    import fcntl

    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _is_abandoned(path: str) -> bool:
    """Return whether a directory is the caller's own, and nobody holds it."""
    import fcntl

    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or time.time() - facts.st_mtime < _FRESH_S:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def abandoned(above: str, prefix: str) -> list[str]:
    """Return the paths of abandoned directories whose names begin so."""
    try:
        names = sorted(os.listdir(above))
    except OSError:
        return []
    paths = [f"{above}/{name}" for name in names if name.startswith(prefix)]
    return [path for path in paths if _is_abandoned(path)]


class Directory:
    """A directory for the time of a block; what killed commands have left of its kind goes first.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, above: str, prefix: str) -> None:
        import tempfile

        for path in abandoned(above, prefix):
            self._remove(path)
        self.path = tempfile.mkdtemp(prefix=prefix, dir=above)
        self._lock = hold(self.path)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._remove(self.path)
        os.close(self._lock)

    @staticmethod
    def _remove(path: str) -> None:
        import shutil

        shutil.rmtree(path, ignore_errors=True)
