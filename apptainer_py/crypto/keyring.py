"""The user's keyrings and the machine's, in the files that Apptainer has them in."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most
from apptainer_py.crypto import packets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apptainer_py.crypto.packets import Key

PUBLIC, SECRET = "pgp-public", "pgp-secret"


class KeyringError(ApptainerError):
    message = "{text}"


class NoSuchKey(KeyringError):
    message = "no key matching given fingerprint found"


class AlreadyThere(KeyringError):
    message = "the key with fingerprint {fingerprint} already belongs to the keyring"


def load(path: str) -> tuple[Key, ...]:
    """Return the keys of a ring; none where there is no file.

    Raises:
        KeyringError: it cannot be read.
        RingError: it is no ring of keys.
    """
    return packets.read(load_bytes(path))


def load_bytes(path: str) -> bytes:
    """Return a ring as it is in its file; nothing where there is none.

    Raises:
        KeyringError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        data = read_at_most(fd, packets.RING_BYTES_MAX + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise KeyringError(text=f"open {path}: {reason}") from None
    if len(data) > packets.RING_BYTES_MAX:
        raise KeyringError(text=f"{path} is larger than {packets.RING_BYTES_MAX} bytes")
    return data


def add(path: str, key: Key, *, mode: int = 0o600) -> None:
    """Add a key to a ring.

    Raises:
        AlreadyThere: it has the key.
        KeyringError: it cannot be changed.
    """

    def change(keys: Sequence[Key]) -> list[Key]:
        if any(old.fingerprint == key.fingerprint for old in keys):
            raise AlreadyThere(fingerprint=key.fingerprint)
        return [*keys, key]

    _change(path, change, mode)


def remove(path: str, fingerprint: str, *, mode: int = 0o600) -> None:
    """Take a key out of a ring.

    Raises:
        NoSuchKey: it has none with this fingerprint.
        KeyringError: it cannot be changed.
    """

    def change(keys: Sequence[Key]) -> list[Key]:
        left = [key for key in keys if key.fingerprint != fingerprint.upper()]
        if len(left) == len(keys):
            raise NoSuchKey
        return left

    _change(path, change, mode)


def _change(path: str, change: Callable[[Sequence[Key]], list[Key]], mode: int) -> None:
    """Replace a ring by what `change` makes of it, unless it raises; one at a time."""
    import fcntl

    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _replace(path, b"".join(key.raw for key in change(load(path))), mode)
        finally:
            os.close(lock)
    except OSError as error:
        reason = (error.strerror or "cannot be written").lower()
        raise KeyringError(text=f"{path}: {reason}") from None


def _replace(path: str, content: bytes, mode: int) -> None:
    target = os.path.realpath(path)
    partial = f"{target}.{os.urandom(8).hex()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
