"""A directory for one command, which is removed however that ends."""

from __future__ import annotations

import os

from apptainer_py.base import held
from apptainer_py.base.errors import ApptainerError
from apptainer_py.image.oci_layers import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_STREAMS = 3
_PREFIX = "apptainer-py-fetch-"


class NoPlace(ApptainerError):
    message = "unable to make a temporary directory in {folder}: {reason}"
    hint = "--tmpdir or APPTAINER_TMPDIR names another directory"


class Folder:
    """A directory for files that pass, and the process that removes it.

    It does so when it is told, or when whoever made it has ended and all that was forked since:
    each holds an end of a pipe.
    """

    def __init__(self, above: str) -> None:
        import tempfile

        for path in held.abandoned(above, _PREFIX):
            try:
                _remove(path)
            except OSError:
                pass  # it is in nobody's way
        try:
            self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=above)
            self._lock = held.hold(self.path)
        except OSError as error:
            raise NoPlace(folder=above, reason=(error.strerror or "").lower()) from None
        reading, self._held = os.pipe()
        self._sweeper = os.fork()
        if self._sweeper == 0:
            os.close(self._held)
            self._sweep(reading)
        os.close(reading)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        os.write(self._held, b"\n")
        os.close(self._held)
        os.waitpid(self._sweeper, 0)
        os.close(self._lock)

    def _sweep(self, reading: int) -> NoReturn:
        import signal

        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(_STREAMS):
                os.dup2(null, fd)
            # Nothing of the command's is kept open by the process that waits for its end.
            os.closerange(_STREAMS, reading)
            os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
            os.chdir("/")
            os.read(reading, 1)
            _remove(self.path)
        finally:
            os._exit(0)


def _remove(path: str) -> None:
    above, name = os.path.split(path)
    parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, os.fsencode(name))
    except FileNotFoundError:
        pass
    finally:
        os.close(parent)
