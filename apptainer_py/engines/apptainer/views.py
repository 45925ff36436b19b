"""The container's files as the payload will see them: for stage 2, which is inside, or master.

A path is the container's own; a relative one is below the payload's directory.
"""

from __future__ import annotations

import errno
import os

from apptainer_py.base.errors import ImageGone, is_gone
from apptainer_py.engines.apptainer.shellwords import NotSimple
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.runtime.bearer import Bearer
    from apptainer_py.runtime.contexts import StartContext

    Path = str | bytes

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_STARTER_ENDS_S = 5
# linux/openat2.h; such a walk follows no magic link either.
_IN_ROOT = 0x10
_UNCLEAR = (errno.EXDEV, errno.EAGAIN)


class NotSeen(NotSimple):
    """A file that is another one for each process that looks at it."""


class Inside:
    """Stage 2's: it is where the payload will be, with the payload's identity."""

    __slots__ = ("_context",)

    def __init__(self, context: StartContext) -> None:
        self._context = context

    def enter(self, path: bytes) -> bytes:
        """Make a directory the payload's; returns where that is.

        Raises:
            OSError: it cannot be entered.
        """
        os.chdir(path)
        return os.fsencode(os.getcwd())

    def open(self, path: Path) -> int:
        """Open a file to read it, without waiting for whatever it may be."""
        return os.open(path, _READ)

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """Return what stat(2) says, or lstat(2)."""
        return os.stat(path, follow_symlinks=follow)

    def access(self, path: Path, mode: int) -> bool:
        """Return whether the payload may use a file so, as access(2)."""
        return os.access(path, mode)

    def names(self, folder: Path) -> list[str]:
        """Return the names of a directory's entries."""
        return os.listdir(os.fsdecode(folder))

    def check_served(self, error: OSError) -> None:
        """Wait to be killed where the image has gone: who ends this says why, once."""
        if not is_gone(error.errno):
            return
        try:
            os.listdir("/")  # a mount of the user's may be what is gone
        except OSError:
            import time

            time.sleep(_STARTER_ENDS_S)
            raise ImageGone from None

    def execute(self, path: bytes, arguments: list[bytes], entries: list[bytes]) -> OSError | None:
        """Become the payload; returns only with the reason why not."""
        return self._context.execve(path, arguments, entries)


class Outside:
    """Master's, by a descriptor of the container's root; a lean stage 2 does what it decides."""

    __slots__ = ("_asked", "_root", "_umask", "bearer", "directory")

    def __init__(self, root: int, bearer: Bearer, umask: int) -> None:
        self._root = root
        self.bearer = bearer
        self._umask = umask
        self._asked = b""
        self.directory = b"/"

    def ask_to_enter(self, path: bytes) -> None:
        """Have stage 2 enter a directory as soon as it may; `enter` has the answer."""
        self._asked = path
        self.directory = path
        self.bearer.ask_place(path)

    def enter(self, path: bytes) -> bytes:
        """Make a directory the payload's; returns where that is.

        Raises:
            OSError: it cannot be entered.
        """
        if path != self._asked:
            self.bearer.ask_place(path)
        self._asked = b""
        number, place = self.bearer.place()
        if number:
            raise OSError(number, os.strerror(number))
        self.directory = place or path
        return self.directory

    def _open(self, path: Path, flags: int) -> int:
        full = os.path.join(self.directory, os.fsencode(path))
        try:
            fd = _starter.openat2(self._root, full, flags, _IN_ROOT)
        except OSError as error:
            if error.errno in _UNCLEAR:
                raise NotSeen from None
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None
        if _starter.is_proc(fd):
            os.close(fd)
            raise NotSeen
        return fd

    def open(self, path: Path) -> int:
        """Open a file to read it, without waiting for whatever it may be."""
        return self._open(path, _READ)

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """Return what stat(2) says, or lstat(2).

        Raises:
            NotSeen: that may be something else for the payload.
            OSError: as the system call fails.
        """
        fd = self._open(path, os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW)
        facts = os.fstat(fd)
        os.close(fd)
        return facts

    def access(self, path: Path, mode: int) -> bool:
        """Return whether the payload may use a file so, as access(2)."""
        try:
            fd = self._open(path, os.O_PATH)
        except OSError:
            return False
        allowed = os.access(b"/proc/self/fd/%d" % fd, mode)
        os.close(fd)
        return allowed

    def names(self, folder: Path) -> list[str]:
        """Return the names of a directory's entries."""
        fd = self._open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def check_served(self, error: OSError) -> None:
        """Say so where the image has gone: that is why something went wrong."""
        if not is_gone(error.errno):
            return
        try:
            self.names("/")  # a mount of the user's may be what is gone
        except OSError:
            raise error from None

    def take_console(self) -> None:
        """Make the terminal /dev/console, the only name that it has in the container's own /dev."""
        terminals = [fd for fd in range(3) if os.isatty(fd)]
        try:
            console = self._open("/dev/console", os.O_RDWR | os.O_NOCTTY)
        except (NotSeen, OSError):
            return
        for fd in terminals:
            self.bearer.stream(fd, console)
        os.close(console)

    def execute(self, path: bytes, arguments: list[bytes], entries: list[bytes]) -> OSError | None:
        """Make stage 2 the payload; returns the reason why not, or None."""
        number = self.bearer.execute(path, arguments, entries, self._umask)
        return OSError(number, os.strerror(number)) if number else None
