"""A layout's layers in a directory for the time of one container, with the container's own ids."""

from __future__ import annotations

import fcntl
import os

from apptainer_py.base.errors import ApptainerError, LaunchError
from apptainer_py.base.files import read_at_most, temporary_directory
from apptainer_py.image.oci_layers import Unpacker, remove_tree
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apptainer_py.image.oci_layout import Image, Layout

_TEXT_BYTES = 4096
_FAILED = 1


def folder_of(environment: Mapping[str, str], uid: int) -> str:
    """Return where images are unpacked: below the directory for temporary files, for one user."""
    above = os.path.abspath(temporary_directory(environment))
    return f"{above}/apptainer-py-images-{uid}"


class Unpacking:
    """One directory, which is locked for as long as its maker lives.

    What a killed launch has left is not locked any more, and goes when the next image is unpacked.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.root = f"{folder}/{name}/root"
        self._name = name
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = -1
        self._userns = -1

    def unpack(self, layout: Layout, image: Image, userns: int) -> None:
        """Unpack it, as root of a user namespace that is taken over, or as root itself (-1).

        Raises:
            LaunchError: it cannot be unpacked, or was interrupted.
        """
        self._userns = userns
        fcntl.flock(self._folder, fcntl.LOCK_EX)
        os.mkdir(self._name, 0o700, dir_fd=self._folder)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._lock = os.open(self._name, flags, dir_fd=self._folder)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

        def work() -> None:
            _remove_stale(self._folder, self._name)
            fcntl.flock(self._folder, fcntl.LOCK_UN)
            os.mkdir("root", 0o755, dir_fd=self._lock)
            unpacker = Unpacker(self.root)
            layout.unpack(image, unpacker)
            unpacker.close()

        try:
            _in_child(work, userns, "unpacking the image was interrupted")
        finally:
            fcntl.flock(self._folder, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove what was unpacked.

        Raises:
            LaunchError: it cannot be removed.
        """
        if self._lock >= 0:

            def work() -> None:
                remove_tree(self._folder, os.fsencode(self._name))

            _in_child(work, self._userns, "removing the unpacked image was interrupted")
            os.close(self._lock)
            self._lock = -1
        if self._userns >= 0:
            os.close(self._userns)
            self._userns = -1


def _remove_stale(folder: int, own: str) -> None:
    for name in os.listdir(folder):
        if name == own:
            continue
        try:
            fd = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
            )
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(folder, os.fsencode(name))
        except OSError:
            continue
        finally:
            os.close(fd)


def _in_child(work: Callable[[], None], userns: int, interrupted: str) -> None:
    """Do something in a process of its own, which can be interrupted and have other ids."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _container.end_with(parent)
        _run(work, userns, writing)
    os.close(writing)
    said = read_at_most(reading, _TEXT_BYTES).decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if status:
        raise LaunchError(text=said or interrupted)


def _run(work: Callable[[], None], userns: int, writing: int) -> None:
    status = _FAILED
    try:
        # The launch holds signals back for the payload, which is not there yet.
        # `signal` brings classes for its numbers; this is what it is made of.
        from _signal import SIG_SETMASK, pthread_sigmask  # type: ignore[import-not-found]

        pthread_sigmask(SIG_SETMASK, ())
        if userns >= 0:
            _container.enter_userns(userns)
            # The new ids have undone it.
            _container.end_with(0)
        # What no layer names has this mode; the directory around the image is 0700.
        os.umask(0o022)
        work()
        status = 0
    except ApptainerError as error:
        os.write(writing, str(error).encode("utf-8", "replace")[:_TEXT_BYTES])
    except OSError as error:
        text = f"{error.filename or 'the unpacked image'}: {(error.strerror or '').lower()}"
        os.write(writing, text.encode("utf-8", "replace")[:_TEXT_BYTES])
    except Exception as error:  # noqa: BLE001 a mistake of ours must reach the user as a line
        text = f"internal error: {type(error).__name__}: {error}"
        os.write(writing, text.encode("utf-8", "replace")[:_TEXT_BYTES])
    finally:
        os._exit(status)
