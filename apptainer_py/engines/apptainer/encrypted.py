"""Encrypted SIF files: a key is found, and the root file system decrypted into memory.

What is decrypted lies in a sealed memory file that has no name: it goes with the launch's last
process, whoever is killed. The key reaches one short-lived process, through a pipe.
"""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import LaunchError
from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.engines.apptainer import policy
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.image.sif import Partition
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext

_PREFIXES = ("APPTAINER_", "SINGULARITY_")
_MOST_KEY_BYTES = 1 << 16
_PROGRAM = (
    "import sys; sys.path.insert(0, {library!r}); from apptainer_py.crypto import gocryptfs; "
    "sys.exit(gocryptfs.main())"
)
# fcntl.h: F_ADD_SEALS, and SEAL | SHRINK | GROW | WRITE
_ADD_SEALS, _SEALS = 1033, 0xF


class KeyMissing(LaunchError):
    """The image is encrypted, and nothing says with what."""

    message = (
        "While checking container encryption: required option --passphrase or --pem-path missing"
    )


class CannotDecrypt(LaunchError):
    """The key is wrong, or the image is not one that can be decrypted here."""

    message = "While checking container encryption: cannot decrypt {image}: {reason}"


def open_root(
    prepared: Prepared, part: Partition, action: ActionRequest, context: PrepareContext
) -> None:
    """Decrypt the root of a SIF file; what is served from now on is the memory that holds it.

    Raises:
        LaunchError: there is no key, or a wrong one, or the administrator forbids it.
    """
    facts, image = context.facts, prepared.image
    if not facts.configuration["allow container encrypted"]:
        raise policy.Disallowed(kind="encrypted SIF containers")
    if part.fs != "gocryptfs":
        raise CannotDecrypt(image=image.path, reason=_why_not_luks())
    if facts.flow == protocol.FLOW_SETUID and policy.judges_images(facts):
        # The decrypting process is its user's to alter.
        raise policy.NotPermitted(
            text=f"{image.path}: encrypted images cannot be used in the setuid flow where "
            "`limit container` directives or an execution control list are in force"
        )
    kind, secret = find_key(action, context.environment)
    message = _message(image.fd, part.id) if kind == "pem" else b""
    if kind == "pem" and not message:
        reason = "it was encrypted with a passphrase, not with a key"
        raise CannotDecrypt(image=image.path, reason=reason)
    fd = os.memfd_create("root", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    reason = _decrypt(image.fd, part, fd, (kind, secret, message))
    if reason:
        raise CannotDecrypt(image=image.path, reason=reason)
    import fcntl

    fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    prepared.root_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    prepared.root_fs, prepared.offset = "squashfs", 0
    prepared.size_bytes = os.fstat(prepared.root_fd).st_size


def _why_not_luks() -> str:
    reason = "it is encrypted with LUKS, which is not supported yet"
    if not os.path.exists("/dev/mapper/control"):
        reason = "it is encrypted with LUKS, and this kernel has no device mapper"
    return f"{reason}; `apptainer build --encrypt` of an ordinary user makes one that works here"


def find_key(action: ActionRequest, environment: Mapping[str, str]) -> tuple[str, bytes]:
    """Return "pem", "passphrase" or "ask" (then nothing more), and the secret.

    Raises:
        KeyMissing: no option and no variable names one.
        LaunchError: a file with a key cannot be read.
    """
    if action.pem_path:
        return "pem", _read(action.pem_path)
    if action.passphrase:
        return "ask", b""
    for name, kind in (("PEM_PATH", "path"), ("PEM_DATA", "pem"), ("PASSPHRASE", "passphrase")):
        for prefix in _PREFIXES:
            value = environment.get(f"{prefix}ENCRYPTION_{name}", "")
            if value:
                return ("pem", _read(value)) if kind == "path" else (kind, os.fsencode(value))
    raise KeyMissing


def check_named(action: ActionRequest, environment: Mapping[str, str]) -> None:
    """Check the key that a caller names for an image that needs none.

    Raises:
        LaunchError: it is not there, or no key.
    """
    path = action.pem_path or environment.get("APPTAINER_ENCRYPTION_PEM_PATH", "")
    if path and b"-----BEGIN " not in _read(path):
        raise LaunchError(
            text=f"Invalid encryption private key: could not read {path}: no PEM data"
        )


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        return read_at_most(fd, _MOST_KEY_BYTES)
    except FileNotFoundError:
        raise LaunchError(text=f"Specified PEM file {path}: does not exist.") from None
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise LaunchError(text=f"Specified PEM file {path}: {reason}") from None


def _message(fd: int, part_id: int) -> bytes:
    from apptainer_py.image import sif

    for entry in sif.read_descriptors(fd):
        if entry.data_type == sif.CRYPTO_MESSAGE and entry.link == part_id:
            return sif.read_object(fd, entry, limit_bytes=_MOST_KEY_BYTES)
    return b""


def _decrypt(image_fd: int, part: Partition, out_fd: int, key: tuple[str, bytes, bytes]) -> str:
    """Have the program decrypt; returns why it could not."""
    kind, secret, message = key
    told, tells = os.pipe2(os.O_CLOEXEC)
    heard, says = os.pipe2(os.O_CLOEXEC)
    apart = [_apart(fd) for fd in (says, told, image_fd, out_fd)]
    actions: list[Any] = [
        (os.POSIX_SPAWN_DUP2, fd, number) for fd, number in zip(apart, (1, 3, 4, 5), strict=True)
    ]
    program = _PROGRAM.format(library=build.LIBDIR)
    place = (str(part.offset), str(part.size_bytes))
    words = [build.PYTHON, "-I", "-B", "-c", program, *place]
    pid = os.posix_spawn(words[0], words, {}, file_actions=actions, setsigmask=[])
    for fd in (told, says, *apart):
        os.close(fd)
    try:
        write_all(tells, f"{kind} {len(secret)}\n".encode() + secret + message)
    except BrokenPipeError:
        pass  # it has ended, which shows below
    reason = read_at_most(heard, _MOST_KEY_BYTES).decode("utf-8", "replace").strip()
    status = os.waitpid(pid, 0)[1]
    return "" if status == 0 else reason or "the process that decrypts has ended"


def _apart(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
