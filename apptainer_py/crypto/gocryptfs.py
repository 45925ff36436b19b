"""gocryptfs inside a SIF file: the one encrypted squashfs is written, decrypted, to an open file.

Runs as a program of its own, so that `cryptography` is never loaded in a stage. The key, or what
leads to it, comes through a pipe; nothing secret is ever in a command line or an environment.
Root's program becomes nobody before it reads a byte of the image: `become_nobody`.
Formats: gocryptfs 2 with HKDF and 128-bit nonces, as the real one writes them (facts §5.4).
"""

from __future__ import annotations

import hashlib
import os
import sys
from binascii import a2b_base64

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from typing import Any

_SUPERBLOCK, _PADDING = 96, 4096
_TOLD_FD, _IMAGE_FD, _OUT_FD = 3, 4, 5
_UNSQUASHFS = "/usr/bin/unsquashfs"
_UNSQUASHFS_BYTES = 1 << 30
_NOBODY = 65534
# sched.h and prctl.h
_NEW_SPACES = 0x40000000 | 0x08000000 | 0x04000000  # NET, IPC, UTS
_PR_SET_NO_NEW_PRIVS = 38
CONF = "gocryptfs.conf"
BLOCK_BYTES, NONCE_BYTES, _TAG, FILE_ID_BYTES = 4096, 16, 16, 16
VERSION, FILE_VERSION = 2, b"\0\2"
_HEADER = len(FILE_VERSION) + FILE_ID_BYTES
FLAGS = {"HKDF", "GCMIV128", "PlaintextNames"}
# What a hostile image may make us compute: scrypt's memory is 128 * N * R bytes.
_MOST_SCRYPT_BYTES = 1 << 28
_MOST_CONF_BYTES = 1 << 16
_MOST_TYPED_BYTES = 4096
_MOST_LISTED_BYTES = 1 << 16
_COPIED_BYTES = 1 << 20


class Unreadable(Exception):
    """Says in one line why the image cannot be decrypted."""


def key_from_pem(pem: bytes, message: bytes) -> bytes:
    """Return the key that a SIF file's cryptographic message holds for a private RSA key.

    Raises:
        Unreadable: it is for another key, or one of them is malformed.
    """
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise Unreadable(f"invalid encryption private key: {error}") from None
    if not isinstance(private, rsa.RSAPrivateKey):
        raise Unreadable("invalid encryption private key: it is no RSA key")
    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
    try:
        key: bytes = private.decrypt(_octets(message), oaep)
    except ValueError:
        raise Unreadable(
            "the private key is not the one that the image was encrypted for"
        ) from None
    return key


def _octets(message: bytes) -> bytes:
    """Return what is in the ASN.1 octet string of a PEM block of type MESSAGE."""
    lines = message.strip().splitlines()
    if len(lines) < 3 or lines[0] != b"-----BEGIN MESSAGE-----":
        raise Unreadable("the image's cryptographic message is malformed")
    der = a2b_base64(b"".join(lines[1:-1]))
    if len(der) < 2 or der[0] != 4:
        raise Unreadable("the image's cryptographic message is malformed")
    start = 2 + (der[1] & 0x7F if der[1] & 0x80 else 0)
    return der[start:]


def master_key(conf: bytes, password: bytes) -> bytes:
    """Return the key of a file system, from its gocryptfs.conf and a password.

    Raises:
        Unreadable: the password is wrong, or the file system is of another kind.
    """
    import json

    try:
        facts: dict[str, Any] = json.loads(conf)
        scrypt = facts["ScryptObject"]
        n, r, p = int(scrypt["N"]), int(scrypt["R"]), int(scrypt["P"])
        salt, encrypted = a2b_base64(scrypt["Salt"]), a2b_base64(facts["EncryptedKey"])
        flags = set(map(str, facts["FeatureFlags"]))
        if n < 1 or r < 1:
            raise ValueError("scrypt takes numbers above 0")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Unreadable(f"{CONF} is malformed: {error}") from None
    if facts.get("Version") != VERSION or flags != FLAGS:
        raise Unreadable(f"gocryptfs with the features {', '.join(sorted(flags))} is not supported")
    if 128 * n * r > _MOST_SCRYPT_BYTES or not 0 < p <= 4 or scrypt.get("KeyLen") != 32:
        raise Unreadable(f"{CONF} asks for more work than is reasonable")
    try:
        hashed = hashlib.scrypt(
            password, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=2 * _MOST_SCRYPT_BYTES
        )
    except ValueError as error:
        raise Unreadable(f"{CONF} is malformed: {error}") from None
    return _open(cipher_of(hashed), encrypted, bytes(8), "the key is wrong")


def cipher_of(key: bytes) -> Any:
    """Return what seals and opens blocks with a file system's key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"AES-GCM file content encryption"
    return AESGCM(HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(key))


def _open(cipher: Any, block: bytes, associated: bytes, wrong: str) -> bytes:
    from cryptography.exceptions import InvalidTag

    if len(block) < NONCE_BYTES + _TAG:
        raise Unreadable("the encrypted data is cut short")
    try:
        opened: bytes = cipher.decrypt(block[:NONCE_BYTES], block[NONCE_BYTES:], associated)
    except InvalidTag:
        raise Unreadable(wrong) from None
    return opened


def decrypt(key: bytes, source: Any) -> Iterator[bytes]:
    """Return the plain text of one file's cipher text, block by block.

    Raises:
        Unreadable: a block was changed, or is missing.
    """
    head = source.read(_HEADER)
    if len(head) != _HEADER or head[:2] != FILE_VERSION:
        raise Unreadable("the encrypted data has no header")
    cipher, number = cipher_of(key), 0
    while block := source.read(NONCE_BYTES + BLOCK_BYTES + _TAG):
        associated = number.to_bytes(8, "big") + head[2:]
        if not any(block):
            yield bytes(max(0, len(block) - NONCE_BYTES - _TAG))  # a hole
        else:
            yield _open(cipher, block, associated, f"block {number} of the image was changed")
        number += 1


def _unsquashfs(image_fd: int, offset: int, *words: str) -> subprocess.Popen[bytes]:
    import resource
    import subprocess

    argv = [_UNSQUASHFS, "-o", str(offset), "-processors", "1", "-data-queue", "16"]
    argv += ["-frag-queue", "16", words[0], f"/proc/self/fd/{image_fd}", *words[1:]]
    child = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(image_fd,), env={}
    )
    try:
        # An image can make the program that unpacks it ask for any amount of memory.
        resource.prlimit(child.pid, resource.RLIMIT_AS, (_UNSQUASHFS_BYTES, _UNSQUASHFS_BYTES))
    except (OSError, ValueError):
        pass  # it has ended, or has less
    return child


def _cat(image_fd: int, offset: int, name: str) -> subprocess.Popen[bytes]:
    return _unsquashfs(image_fd, offset, "-cat", name)


def _name_of_cipher(image_fd: int, offset: int) -> str:
    with _unsquashfs(image_fd, offset, "-lc") as listing:
        assert listing.stdout is not None
        listed = listing.stdout.read(_MOST_LISTED_BYTES)
        listing.kill()
    names = [line.partition("/")[2] for line in listed.decode(errors="replace").splitlines()]
    found = [name for name in names if name.startswith("squashfs-") and "/" not in name]
    if CONF not in names or len(found) != 1:
        raise Unreadable("its encrypted partition does not hold one gocryptfs file system")
    return found[0]


def unlock(image_fd: int, offset: int, out_fd: int, password: bytes) -> None:
    """Write the squashfs inside of an encrypted partition to an open file.

    Raises:
        Unreadable: as `master_key` and `decrypt`.
    """
    name = _name_of_cipher(image_fd, offset)
    with _cat(image_fd, offset, CONF) as conf:
        assert conf.stdout is not None
        key = master_key(conf.stdout.read(_MOST_CONF_BYTES), password)
    with _cat(image_fd, offset, name) as source, os.fdopen(out_fd, "wb", closefd=False) as out:
        assert source.stdout is not None
        left: int | None = None
        for block in decrypt(key, source.stdout):
            # Blocks of zeros are not authenticated: what is appended must not become memory.
            left = (_size_of(block) if left is None else left) - len(block)
            if left < -_PADDING:
                raise Unreadable("the encrypted data is longer than the file system in it")
            if any(block):
                out.write(block)
            else:
                # A hole takes no memory, however large the image says that it is.
                out.seek(len(block), os.SEEK_CUR)
        out.truncate()


def _size_of(start: bytes) -> int:
    """Return the size of a squashfs by its superblock (kernel, Documentation/filesystems)."""
    if len(start) < _SUPERBLOCK or start[:4] != b"hsqs":
        raise Unreadable("it holds no squashfs")
    return int.from_bytes(start[40:48], "little")


def _ask() -> bytes:
    """Return a passphrase that the user types, or the first line of what stands for a terminal."""
    prompt = "Enter encryption passphrase: "
    if os.isatty(0):
        import getpass

        return os.fsencode(getpass.getpass(prompt))
    sys.stderr.write(prompt + "\n")
    sys.stderr.flush()
    typed = b""
    # What comes behind is the payload's.
    while (byte := os.read(0, 1)) not in (b"", b"\n") and len(typed) < _MOST_TYPED_BYTES:
        typed += byte
    return typed


def _password() -> bytes:
    with os.fdopen(_TOLD_FD, "rb") as told:
        kind, _, size = told.readline().decode().partition(" ")
        secret, message = told.read(int(size or 0)), told.read()
    if kind == "ask":
        return _ask()
    if not secret:
        raise Unreadable("the key is empty")
    return key_from_pem(secret, message) if kind == "pem" else secret


def become_nobody() -> None:
    """Give up root's rights for ever: what a hostile image does to its readers is nobody's deed.

    Raises:
        Unreadable: root's rights are still there.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getuid() != 0:
        return
    libc.unshare(_NEW_SPACES)
    # SAFE: from root to nobody, all ids at once, and no way back.
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError:
        if not _is_mapped():
            return  # root of a user namespace alone, where nobody else is
        raise Unreadable("root's rights cannot be given up") from None
    try:
        os.setresuid(0, 0, 0)
    except OSError:
        return
    raise Unreadable("root's rights cannot be given up")


def _is_mapped() -> bool:
    with open("/proc/self/uid_map", "rb") as rows:
        spans = [(int(row.split()[0]), int(row.split()[2])) for row in rows]
    return any(first <= _NOBODY < first + count for first, count in spans)


def _readable(image_fd: int, offset: int, size: int) -> tuple[int, int]:
    """Return a descriptor that unsquashfs may open again, and where in it the partition begins."""
    try:
        os.close(os.open(f"/proc/self/fd/{image_fd}", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        copy = os.memfd_create("encrypted", os.MFD_CLOEXEC)
        os.lseek(image_fd, offset, os.SEEK_SET)
        while size > 0 and (data := os.read(image_fd, min(size, _COPIED_BYTES))):
            size -= len(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(copy, rest) :]
        return copy, 0
    return image_fd, offset


def _say(reason: object) -> None:
    os.write(1, str(reason).encode())


def main() -> int:
    """Decrypt from descriptor 4 to 5 with what the pipe at 3 says; say on 1 why it cannot be."""
    try:
        become_nobody()
        password = _password()
        unlock(*_readable(_IMAGE_FD, int(sys.argv[1]), int(sys.argv[2])), _OUT_FD, password)
    except Unreadable as error:
        _say(error)
        return 1
    except ModuleNotFoundError as error:
        _say(f"the Python package {error.name} is missing: install python3-cryptography")
        return 1
    except OSError as error:
        _say((error.strerror or "it failed").lower())
        return 1
    return 0
