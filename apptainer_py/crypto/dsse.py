"""Signatures by X.509 keys: DSSE envelopes, PEM files, certificates and their chains.

The library is Debian's python3-cryptography; a chain is judged by `openssl verify`, which knows
the rules of RFC 5280.
"""

from __future__ import annotations

import os

from apptainer_py.base import packages
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PAYLOAD_TYPE = "application/vnd.sylabs.sif-metadata+json"
OPENSSL = "/usr/bin/openssl"
_FILE_BYTES = 1 << 20
_PRIVATE = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY")
_LOCKED = "ENCRYPTED PRIVATE KEY"
_PUBLIC = ("PUBLIC KEY", "RSA PUBLIC KEY")
_THRESHOLD = (
    "dsse: verify envelope failed: accepted signatures do not match threshold, Found: 0, Expected 1"
)
_UNTRUSTED = "x509: certificate signed by unknown authority"
_EXPIRED = "x509: certificate has expired or is not yet valid"
_CHAIN_ERRORS = {"9": _EXPIRED, "10": _EXPIRED}
_WRONG_USE = "x509: certificate specifies an incompatible key usage"


class KeyWrong(ApptainerError):
    """A file is not the key or certificate that it should be."""

    message = "{reason}"


class NotValid(ApptainerError):
    """The envelope was not signed by this key."""

    message = "{reason}"


class Untrusted(ApptainerError):
    """The certificate does not lead to a root that is trusted."""

    message = "{reason}"


def is_envelope(data: bytes) -> bool:
    """Return whether a signature object has this form."""
    return data.lstrip()[:1] == b"{"


def sign(text: bytes, key: Any) -> bytes:
    """Return the envelope of a text, signed with a private key."""
    import base64
    import json

    public = key.public_key()
    entry = {
        "keyid": _key_id(public),
        "sig": base64.b64encode(_signature(key, _encoded(text))).decode(),
    }
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(text).decode(),
        "signatures": [entry],
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def verify(envelope: bytes, key: Any) -> bytes:
    """Return the text that an envelope proves, by a public key.

    Raises:
        NotValid: it proves none.
    """
    import base64
    import json

    try:
        said = json.loads(envelope)
        kind, signatures = said["payloadType"], said["signatures"]
        text = base64.b64decode(said["payload"], validate=True)
        found = [base64.b64decode(entry["sig"], validate=True) for entry in signatures]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise NotValid(reason="dsse: the envelope has an unknown form") from None
    if kind != PAYLOAD_TYPE:
        raise NotValid(reason="dsse: the envelope has an unknown type")
    if not any(_is_signature(key, signature, _encoded(text)) for signature in found[:16]):
        raise NotValid(reason=_THRESHOLD)
    return text


def private_key(path: str, ask_hidden: Callable[[str], str]) -> Any:
    """Return the private key of a PEM file.

    Raises:
        KeyWrong: it cannot be read, or is none.
    """
    data = read_file(path)
    kind = _pem_kind(data)
    if kind != _LOCKED and kind not in _PRIVATE:
        raise KeyWrong(reason=f"unknown private key PEM file type: {kind}")
    locked = kind == _LOCKED or b"Proc-Type: 4,ENCRYPTED" in data
    password = ask_hidden("Enter key passphrase : ").encode() if locked else None
    _find_library()
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(data, password)
    except Exception as error:  # noqa: BLE001 the library names no class for all that is wrong
        raise KeyWrong(reason=f"private key: {_reason(error)}") from None
    _check_kind(key.public_key())
    return key


def public_key(path: str) -> Any:
    """Return the public key of a PEM file.

    Raises:
        KeyWrong: it cannot be read, or is none.
    """
    data = read_file(path)
    kind = _pem_kind(data)
    if kind not in _PUBLIC:
        raise KeyWrong(
            reason=f"unknown Public key PEM file type: {kind}. "
            "Are you passing the correct public key?"
        )
    _find_library()
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:  # noqa: BLE001 as above
        raise KeyWrong(reason=f"public key: {_reason(error)}") from None
    _check_kind(key)
    return key


def certificates(path: str) -> list[Any]:
    """Return the certificates of a PEM file.

    Raises:
        KeyWrong: it cannot be read, or has none.
    """
    data = read_file(path)
    _find_library()
    from cryptography import x509

    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    blocks = [begin + part.partition(end)[0] + end + b"\n" for part in data.split(begin)[1:]]
    try:
        found = [x509.load_pem_x509_certificate(block) for block in blocks]
    except Exception as error:  # noqa: BLE001 as above
        raise KeyWrong(reason=f"x509: malformed certificate: {_reason(error)}") from None
    if not found:
        raise KeyWrong(reason=f"x509: there is no certificate in {path}")
    return found


def check_chain(leaf: Any, intermediates: list[Any], roots: list[Any] | None) -> Any:
    """Check that a certificate leads to a trusted root; return its key. None: the system's roots.

    Raises:
        Untrusted: it does not, or is not for signing code.
        KeyWrong: its key is of an unknown kind.
    """
    from cryptography import x509

    _check_use(leaf, x509)
    status, said = _openssl_verify(leaf, intermediates, roots)
    if status != 0:
        number = said.partition("error ")[2].partition(" ")[0]
        raise Untrusted(reason=_CHAIN_ERRORS.get(number, _UNTRUSTED))
    key = leaf.public_key()
    _check_kind(key)
    return key


def read_file(path: str) -> bytes:
    """Return a small file.

    Raises:
        KeyWrong: it cannot be read, or is not small.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        data = read_at_most(fd, _FILE_BYTES + 1)
    except OSError as error:
        raise KeyWrong(reason=f"open {path}: {(error.strerror or '').lower()}") from None
    if len(data) > _FILE_BYTES:
        raise KeyWrong(reason=f"{path} is larger than {_FILE_BYTES} bytes")
    return data


def _find_library() -> None:

    packages.allow()
    try:
        import cryptography
    except ImportError:
        raise KeyWrong(reason="python3-cryptography is not installed: install that package") from (
            None
        )
    assert cryptography


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _pem_kind(data: bytes) -> str:
    start = data.partition(b"-----BEGIN ")[2]
    kind, dashes, _ = start.partition(b"-----")
    if not dashes or len(kind) > 64 or b"\n" in kind:
        raise KeyWrong(reason="PEM decoding failed")
    return kind.decode("ascii", "replace")


def _check_kind(key: Any) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if not isinstance(key, (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)):
        raise KeyWrong(reason=f"a key of the kind {type(key).__name__} cannot be used")


def _encoded(text: bytes) -> bytes:
    """Return what is signed: type and text, each with its length (PAE)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(text), text)


def _key_id(public: Any) -> str:
    import base64
    import hashlib

    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.OpenSSH
    line = public.public_bytes(serialization.Encoding.OpenSSH, form)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _signature(key: Any, data: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    if isinstance(key, rsa.RSAPrivateKey):
        return bytes(key.sign(data, padding.PKCS1v15(), hashes.SHA256()))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return bytes(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return bytes(key.sign(data))


def _is_signature(key: Any, signature: bytes, data: bytes) -> bool:
    return verified(key, signature, data, "SHA256")


def verified(key: Any, signature: bytes, data: bytes, hash_name: str) -> bool:
    """Return whether a signature of some bytes was made with the private half of a key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    algorithm = getattr(hashes, hash_name)()
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, data, ec.ECDSA(algorithm))
        else:
            key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _check_use(leaf: Any, x509: Any) -> None:
    try:
        uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    except ValueError as error:
        raise Untrusted(reason=f"x509: {_reason(error)}") from None
    oids = x509.oid.ExtendedKeyUsageOID
    if oids.CODE_SIGNING not in uses and oids.ANY_EXTENDED_KEY_USAGE not in uses:
        raise Untrusted(reason=_WRONG_USE)


def _openssl_verify(
    leaf: Any, intermediates: list[Any], roots: list[Any] | None
) -> tuple[int, str]:
    import subprocess

    from cryptography.hazmat.primitives.serialization import Encoding

    argv = [
        OPENSSL,
        "verify",
        "-partial_chain",
    ]
    pools = [("-untrusted", intermediates)] if intermediates else []
    if roots is not None:
        argv += ["-no-CApath", "-no-CAstore"]
        pools.append(("-CAfile", roots))
    fds = []
    try:
        for option, pool in (*pools, ("", [leaf])):
            fds.append(os.memfd_create("certificates", os.MFD_CLOEXEC))
            os.write(fds[-1], b"".join(entry.public_bytes(Encoding.PEM) for entry in pool))
            argv += [*([option] if option else []), f"/proc/self/fd/{fds[-1]}"]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=fds, cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        raise Untrusted(reason=f"{OPENSSL} cannot be run: install the package openssl") from None
    finally:
        for fd in fds:
            os.close(fd)
    return done.returncode, done.stderr + done.stdout
