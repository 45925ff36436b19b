"""`sign`: signatures of the groups of a SIF file, or of one object, added to the file."""

from __future__ import annotations

import os
import time

from apptainer_py.base.errors import ApptainerError, ImageError
from apptainer_py.base.record import Record
from apptainer_py.crypto import dsse, gnupg, keyring
from apptainer_py.image import ahead, integrity, sif, sif_edit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apptainer_py.crypto.packets import Key
    from apptainer_py.image.sif import Descriptor

    Signer = Callable[[bytes], tuple[bytes, bytes]]

_SHA256 = 1


class SignFailed(ApptainerError):
    message = "Failed to sign container: {reason}"


class NoKeyMaterial(ApptainerError):
    message = "Failed to load key material: {reason}"


class Part(Record):
    """What one signature is to cover: objects of a group."""

    group: integrity.Group
    objects: tuple[Descriptor, ...]


def sign(
    path: str, signer: Signer, *, group: int = 0, ident: int = 0, epoch: int | None = None
) -> None:
    """Add a signature for each group of a file, or for one group, and one object.

    `signer` turns a text into a signature object's content, and the signer's fingerprint. `epoch`
    stands for the time, in seconds since 1970.

    Raises:
        SignFailed: the file cannot be written or has no such group or object.
    """
    try:
        fd = sif_edit.open_to_change(path)
    except OSError as error:
        raise SignFailed(reason=f"open {path}: {(error.strerror or '').lower()}") from None
    except ImageError as error:
        raise SignFailed(reason=error.facts["reason"]) from None
    try:
        _sign(fd, signer, group, ident, epoch)
    except OSError as error:
        raise SignFailed(reason=f"write {path}: {(error.strerror or '').lower()}") from None
    except integrity.NotIntact as error:
        raise SignFailed(reason=f"integrity: {error.facts['reason']}") from None
    except ImageError as error:
        raise SignFailed(reason=error.facts["reason"]) from None
    finally:
        os.close(fd)


def with_pgp(
    secret_ring: str,
    number: int,
    *,
    choose: Callable[[Sequence[Key]], int],
    ask_hidden: Callable[[str], str],
    epoch: int | None = None,
) -> Signer:
    """Return what signs with a private key of the user's, by its number or what `choose` says.

    With `epoch`, in seconds since 1970, the same text gives the same signature.

    Raises:
        SignFailed: there is no such key.
    """
    try:
        keys = keyring.load(secret_ring)
        if not keys:
            raise SignFailed(reason="keyring is empty")
        if number < 0:
            number = choose(keys) if len(keys) > 1 else 0
        if not 0 <= number < len(keys):
            raise SignFailed(reason="index out of range")
        key = keys[number]
        passphrase = ask_hidden("Enter key passphrase : ") if key.is_locked else ""
    except SignFailed:
        raise
    except ApptainerError as error:
        raise SignFailed(reason=str(error)) from None

    def signer(text: bytes) -> tuple[bytes, bytes]:
        try:
            return gnupg.sign(text, key, passphrase, epoch), bytes.fromhex(key.fingerprint)
        except ApptainerError as error:
            raise SignFailed(reason=str(error)) from None

    return signer


def with_key(path: str, *, ask_hidden: Callable[[str], str]) -> Signer:
    """Return what signs with a private key in a PEM file.

    Raises:
        NoKeyMaterial: there is none in it.
    """
    try:
        key = dsse.private_key(path, ask_hidden)
    except dsse.KeyWrong as error:
        raise NoKeyMaterial(reason=str(error)) from None

    def signer(text: bytes) -> tuple[bytes, bytes]:
        return dsse.sign(text, key), b""

    return signer


def _sign(fd: int, signer: Signer, group: int, ident: int, epoch: int | None) -> None:
    new = []
    for part in parts(fd, group, ident):
        checker = integrity.Checker(fd, part.group, ahead.ahead)
        content, fingerprint = signer(checker.metadata(part.objects))
        new.append(
            sif_edit.NewObject(
                data_type=sif.SIGNATURE,
                content=content,
                link=part.group.number,
                link_is_group=True,
                extra=sif_edit.signature_extra(_SHA256, fingerprint),
            )
        )
    sif_edit.add(fd, new, now_s=int(time.time()) if epoch is None else epoch)


def parts(fd: int, group: int, ident: int) -> list[Part]:
    """Return what is asked for: a group and an object, or, with neither, every group.

    Raises:
        NotIntact: there is no such group or object.
    """
    entries = [e for e in sif.read_descriptors(fd) if e.data_type != sif.SIGNATURE]
    numbers = sorted({entry.group for entry in entries if entry.group})
    found = []
    if group:
        if group not in numbers:
            raise integrity.NotIntact(image="", reason="group not found")
        found.append(_whole(fd, group))
    if ident:
        entry = next((e for e in entries if e.id == ident), None)
        if entry is None or not entry.group:
            raise integrity.NotIntact(image="", reason="object not found")
        found.append(Part(group=_whole(fd, entry.group).group, objects=(entry,)))
    if not group and not ident and numbers:
        if any(not entry.group for entry in entries):
            reason = "non-signature object not associated with object group"
            raise integrity.NotIntact(image="", reason=reason)
        found = [_whole(fd, number) for number in numbers]
    if not found:
        raise integrity.NotIntact(image="", reason="no groups found")
    return found


def _whole(fd: int, number: int) -> Part:
    group = integrity.group_of(fd, number)
    return Part(group=group, objects=group.objects)
