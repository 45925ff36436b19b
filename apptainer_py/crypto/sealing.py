"""Encrypting the squashfs of a SIF file, so that Apptainer and `crypto.gocryptfs` can read it.

The password of the gocryptfs file system is a passphrase, or random and encrypted for an RSA key.
It lives in this process's memory alone: no other program is given it.
"""

from __future__ import annotations

import os
from binascii import b2a_base64

from apptainer_py.base import log, packages
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most
from apptainer_py.crypto import gocryptfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

VARIABLES = tuple(
    f"{prefix}ENCRYPTION_{name}"
    for name in ("PEM_PATH", "PEM_DATA", "PASSPHRASE")
    for prefix in ("APPTAINER_", "SINGULARITY_")
)
# What gocryptfs reads of a password; it ends with the line.
_MOST_PASSPHRASE_BYTES = 2048
_MOST_KEY_BYTES = 1 << 16
_RANDOM_BYTES, _KEY_BYTES = 32, 32
# gocryptfs's own default, 64 MiB and a fifth of a second for each guess.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 65536, 8, 1
_BATCH = 256
_LINE = 64


# prctl.h
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


class Closed:
    """Keeps this process, and what is forked from it, closed to others of the same user.

    They could read its memory, with a password in it; the programs that it starts have none.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._before = 0

    def __enter__(self) -> None:
        if self._wanted:
            self._before = _prctl(_PR_GET_DUMPABLE, 0)
            _prctl(_PR_SET_DUMPABLE, 0)

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            _prctl(_PR_SET_DUMPABLE, self._before)


def _prctl(option: int, value: int) -> int:
    import ctypes

    done: int = ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    return done


class CannotEncrypt(ApptainerError):
    """There is no key, or none that can be used."""

    message = "{reason}"


class Lock:
    """What an image is encrypted with; not a record, whose text would show it."""

    def __init__(self, password: bytes, message: bytes = b"") -> None:
        self._password = password
        self.message = message

    def seal(self, plain: str, folder: str) -> None:
        """Make a directory with the gocryptfs file system that holds the file `plain`.

        Raises:
            OSError: it cannot be written.
        """
        _find_library()
        master = os.urandom(_KEY_BYTES)
        os.mkdir(folder, 0o700)
        with open(f"{folder}/{gocryptfs.CONF}", "xb") as conf:
            conf.write(_settings(master, self._password))
        number = int.from_bytes(os.urandom(4), "little")
        with open(plain, "rb") as source, open(f"{folder}/squashfs-{number}", "xb") as out:
            _encrypt(master, source, out)


def find_lock(
    environ: Mapping[str, str], *, encrypt: bool, pem_path: str, ask: Callable[[], str] | None
) -> Lock | None:
    """Return what options and variables say, None if nothing is to be encrypted.

    `ask` returns a passphrase that is typed, None where none was asked for.

    Raises:
        CannotEncrypt: they say too little, or something that is no key.
    """
    named = [(name, environ[name]) for name in VARIABLES if environ.get(name)]
    if not (encrypt or pem_path or ask):
        if named:
            log.warning(
                "Encryption related env vars found, but --encrypt was not specified. "
                "NOT encrypting container."
            )
        return None
    if pem_path:
        return for_key(_read(pem_path))
    if ask:
        return for_passphrase(os.fsencode(ask()))
    for name, value in named:
        if name.endswith("PATH"):
            return for_key(_read(value))
        content = os.fsencode(value)
        return for_key(content) if name.endswith("DATA") else for_passphrase(content)
    raise CannotEncrypt(
        reason="Missing encryption info, please add `--passphrase` or `--pem-path` or "
        "corresponding environment variable"
    )


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for other programs."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}


def for_passphrase(passphrase: bytes) -> Lock:
    """Return the lock that a passphrase opens.

    Raises:
        CannotEncrypt: no program would take it.
    """
    reason = ""
    if not passphrase:
        reason = "it is empty"
    elif b"\n" in passphrase or b"\0" in passphrase:
        reason = "it has more than one line"
    elif len(passphrase) > _MOST_PASSPHRASE_BYTES:
        reason = f"it has more than {_MOST_PASSPHRASE_BYTES} bytes"
    if reason:
        raise CannotEncrypt(reason=f"Invalid encryption passphrase: {reason}")
    return Lock(passphrase)


def for_key(pem: bytes) -> Lock:
    """Return a new lock that the private half of an RSA key opens.

    Raises:
        CannotEncrypt: it is no public RSA key.
    """
    _find_library()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    key = _public_key(pem)
    password = os.urandom(_RANDOM_BYTES).hex().encode()
    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
    try:
        encrypted: bytes = key.encrypt(password, oaep)
    except ValueError:
        raise _no_key(f"an RSA key of {key.key_size} bits is too small") from None
    return Lock(password, _message(encrypted))


def _public_key(pem: bytes) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    if b"PRIVATE KEY-----" in pem:
        raise _no_key(
            "it is a private key; `openssl rsa -in KEY -RSAPublicKey_out` prints the public one"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        words = str(error).splitlines() or ["it cannot be read"]
        raise _no_key(words[0][:200]) from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise _no_key("it is no RSA key")
    return key


def _no_key(reason: str) -> CannotEncrypt:
    return CannotEncrypt(reason=f"Invalid encryption public key: {reason}")


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        return read_at_most(fd, _MOST_KEY_BYTES)
    except FileNotFoundError:
        raise CannotEncrypt(reason=f"Specified PEM file {path}: does not exist.") from None
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"Specified PEM file {path}: {(words or '').lower()}"
        raise CannotEncrypt(reason=reason) from None


def _find_library() -> None:
    packages.allow()
    try:
        import cryptography
    except ImportError:
        reason = "python3-cryptography is not installed: install that package"
        raise CannotEncrypt(reason=reason) from None
    assert cryptography


def _message(encrypted: bytes) -> bytes:
    """Return a PEM block of an ASN.1 octet string."""
    size = len(encrypted)
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 0x80 else bytes([0x80 | len(digits)]) + digits
    text = b2a_base64(b"\x04" + length + encrypted, newline=False)
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    return b"\n".join((b"-----BEGIN MESSAGE-----", *lines, b"-----END MESSAGE-----", b""))


def _settings(master: bytes, password: bytes) -> bytes:
    import hashlib
    import json

    salt = os.urandom(_KEY_BYTES)
    n, r, p = _SCRYPT_N, _SCRYPT_R, _SCRYPT_P
    hashed = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=256 * n * r)
    nonce = os.urandom(gocryptfs.NONCE_BYTES)
    sealed = nonce + gocryptfs.cipher_of(hashed).encrypt(nonce, master, bytes(8))
    scrypt = {"Salt": _text(salt), "N": n, "R": r, "P": p, "KeyLen": _KEY_BYTES}
    facts = {
        "Creator": "apptainer-py",
        "EncryptedKey": _text(sealed),
        "ScryptObject": scrypt,
        "Version": gocryptfs.VERSION,
        "FeatureFlags": sorted(gocryptfs.FLAGS),
    }
    return json.dumps(facts, indent="\t").encode() + b"\n"


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


def _encrypt(master: bytes, source: Any, out: Any) -> None:
    cipher, ident = gocryptfs.cipher_of(master), os.urandom(gocryptfs.FILE_ID_BYTES)
    out.write(gocryptfs.FILE_VERSION + ident)
    block, nonce_size, number = gocryptfs.BLOCK_BYTES, gocryptfs.NONCE_BYTES, 0
    while data := source.read(block * _BATCH):
        nonces = os.urandom(nonce_size * _BATCH)
        for turn, at in enumerate(range(0, len(data), block)):
            nonce = nonces[turn * nonce_size : (turn + 1) * nonce_size]
            associated = number.to_bytes(8, "big") + ident
            out.write(nonce + cipher.encrypt(nonce, data[at : at + block], associated))
            number += 1
