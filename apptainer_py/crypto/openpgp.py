"""OpenPGP clear-text signatures, verified by Debian's gpgv with a keyring that is named to it.

gpgv reads no configuration, knows no keyring of its own here and asks nobody; what it says comes by
its status lines (doc/DETAILS of GnuPG), of which only those named below mean a good signature.
"""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

GPGV = "/usr/bin/gpgv"
_BEGIN = b"-----BEGIN PGP SIGNED MESSAGE-----"
_PREFIX = "[GNUPG:] "
_SECONDS = 60
_FINGERPRINT_CHARS = 40
# One of these, whatever else is said: the signature is not one to rely on.
_BAD = frozenset((
    "BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "KEYEXPIRED", "KEYREVOKED", "NODATA",
    "UNEXPECTED", "FAILURE",
))  # fmt: skip


class OpenPgpError(ApptainerError):
    """Signatures cannot be verified on this machine."""

    message = "{text}"


class BadSignature(OpenPgpError):
    """The signature is not good, whoever made it."""


class UnknownEntity(OpenPgpError):
    """No key of the keyring has made the signature; `claimed` is who says to have, unproven."""

    message = "openpgp: signature made by unknown entity"


class Signed(Record):
    """What was signed, and by whom: the fingerprint of the primary key, in capitals."""

    text: bytes
    fingerprint: str
    entity: str


def verify(message: bytes, keyring: bytes, program: str = GPGV) -> Signed:
    """Return what a clear-signed message says, once it is proven who has signed it.

    Whoever may trace `program` may say what it says: where the caller is not trusted, it is a copy
    that its user may run but not read.

    Raises:
        UnknownEntity: the keyring has no key for it.
        BadSignature: it is malformed, altered, expired, or its key is.
        OpenPgpError: gpgv is not installed.
    """
    if not message.startswith(_BEGIN) or message.count(_BEGIN) != 1:
        raise BadSignature(text="openpgp: this is not one clear-signed message")
    text, status, ended = _run(message, keyring, program)
    rows = [line.split(" ") for line in status.splitlines()]
    words = [row[0] for row in rows]
    claimed = "".join(_claim(row) for row in rows)
    if "NO_PUBKEY" in words and "BADSIG" not in words:
        raise UnknownEntity(claimed=claimed)
    good = [row for row in rows if row[0] == "GOODSIG"]
    valid = [row for row in rows if row[0] == "VALIDSIG"]
    if ended != 0 or len(good) != 1 or len(valid) != 1 or words.count("PLAINTEXT") != 1:
        raise BadSignature(text="openpgp: invalid signature")
    if words.count("NEWSIG") != 1 or not _BAD.isdisjoint(words):
        raise BadSignature(text="openpgp: invalid signature")
    fingerprint = valid[0][-1].upper()
    if not is_fingerprint(fingerprint):
        raise BadSignature(text="openpgp: invalid signature")
    return Signed(text=text, fingerprint=fingerprint, entity=" ".join(good[0][2:]))


def is_fingerprint(text: str) -> bool:
    """Return whether a text is the fingerprint of a version 4 key: 40 hexadecimal digits."""
    return len(text) == _FINGERPRINT_CHARS and all(c in "0123456789abcdefABCDEF" for c in text)


def _claim(row: list[str]) -> str:
    # ERRSIG <keyid> <pkalgo> <hashalgo> <sig_class> <time> <rc> <fpr>
    last = row[-1].upper()
    return last if row[0] == "ERRSIG" and is_fingerprint(last) else ""


def _run(message: bytes, keyring: bytes, program: str) -> tuple[bytes, str, int]:
    """Return the plain text, the status lines and the exit status of gpgv."""
    import subprocess

    files = {
        name: os.memfd_create(name, os.MFD_CLOEXEC)
        for name in ("message", "keyring", "text", "status")
    }
    try:
        for name, data in (("message", message), ("keyring", keyring)):
            with open(files[name], "wb", closefd=False) as target:
                target.write(data)
            os.lseek(files[name], 0, os.SEEK_SET)
        argv = [
            program, "--homedir", "/nonexistent", "--weak-digest", "SHA1",
            "--status-fd", str(files["status"]), "--keyring", f"/proc/self/fd/{files['keyring']}",
            "--output", "-", f"/proc/self/fd/{files['message']}",
        ]  # fmt: skip
        ended = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=files["text"],
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "LANGUAGE": "C"},
            pass_fds=tuple(files.values()),
            cwd="/",
            timeout=_SECONDS,
            check=False,
        ).returncode
        text, status = (_content(files[name]) for name in ("text", "status"))
    except FileNotFoundError:
        raise OpenPgpError(
            text=f"{program} is not installed: install the package gpgv and then apptainer-py "
            "again (./install)"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise OpenPgpError(text=f"{program} cannot be run: {error}") from None
    finally:
        for fd in files.values():
            os.close(fd)
    lines = status.decode("utf-8", "replace").split("\n")
    shown = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    return text, "\n".join(shown), ended


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
