"""`verify`: whether the objects of a SIF file are those that somebody has signed.

Nothing is printed here: `show` is called for each signature, in the order of the file.
"""

from __future__ import annotations

import os

from apptainer_py.base import packages
from apptainer_py.base.errors import ApptainerError, ImageError
from apptainer_py.base.record import Record
from apptainer_py.crypto import dsse, ocsp, openpgp
from apptainer_py.image import ahead, integrity, sif

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from apptainer_py.image.sif import Descriptor

_CLEAR_SIGNED = b"-----BEGIN PGP SIGNED MESSAGE-----"
_OK = 200
_ANSWER_BYTES = 1 << 16
_ANSWER_S = 30
_NO_KEY = "key material not provided for {form} signature"


class VerifyFailed(ApptainerError):
    message = "Failed to verify container: {reason}"


class CertificateWrong(ApptainerError):
    message = "Failed to load {what}: {reason}"


class Wanted(Record):
    """What is to be verified: a group, an object, or with neither the whole file."""

    group: int = 0
    ident: int = 0
    legacy: bool = False
    everything: bool = False


class Verdict(Record):
    """What one signature is worth: who has made it, and which objects are as they were."""

    name: str = ""
    fingerprint: str = ""
    is_local: bool = False
    is_pgp: bool = False
    verified: tuple[Descriptor, ...] = ()
    failed: Descriptor | None = None
    error: str = ""


class Task(Record):
    """What is verified together: a group's signatures, and which of its objects they are to cover.

    `is_whole` says that the group may have no object beside these.
    """

    group: integrity.Group
    signatures: tuple[Descriptor, ...]
    objects: tuple[Descriptor, ...]
    is_whole: bool


def verify(
    path: str,
    wanted: Wanted,
    prove: Callable[[bytes], tuple[Verdict, bytes]],
    show: Callable[[Verdict], None],
) -> None:
    """Verify signatures of a file.

    Raises:
        VerifyFailed: something is not signed, or not as it was.
    """
    fd = _opened(path)
    try:
        for task in _tasks(fd, wanted):
            checker = integrity.Checker(fd, task.group, ahead.ahead)
            for entry in task.signatures:
                verdict = _judge(fd, entry, task, checker, prove)
                show(verdict)
                if verdict.error:
                    raise VerifyFailed(reason=f"integrity: {verdict.error}")
    except integrity.NotSigned as error:
        raise VerifyFailed(reason=f"integrity: {error}") from None
    except integrity.NotIntact as error:
        raise VerifyFailed(reason=f"integrity: {error.facts['reason']}") from None
    except ImageError as error:
        raise VerifyFailed(reason=error.facts["reason"]) from None
    except OSError as error:
        raise VerifyFailed(reason=f"read {path}: {(error.strerror or '').lower()}") from None
    finally:
        os.close(fd)


def by_keyrings(
    rings: Sequence[tuple[bytes, bool]], fetch: Callable[[str], bytes] | None = None
) -> Callable[[bytes], tuple[Verdict, bytes]]:
    """Return what proves OpenPGP signatures by rings, each with whether it counts as local.

    `fetch` returns the ring that a key server has for a fingerprint.
    """

    def prove(message: bytes) -> tuple[Verdict, bytes]:
        if not message.startswith(_CLEAR_SIGNED):
            raise integrity.NotIntact(image="", reason=_NO_KEY.format(form="DSSE envelope"))
        # gpgv reads one block that ends with a line; the file may end without.
        message += b"\n"
        unknown: openpgp.UnknownEntity | None = None
        for ring, is_local in rings:
            try:
                return _pgp_verdict(openpgp.verify(message, ring), is_local=is_local)
            except openpgp.UnknownEntity as error:
                unknown = error
        claimed = str(unknown.facts["claimed"]) if unknown else ""
        found = fetch(claimed) if fetch and claimed else b""
        return _pgp_verdict(openpgp.verify(message, found), is_local=False)

    return prove


def by_key(key: Any) -> Callable[[bytes], tuple[Verdict, bytes]]:
    """Return what proves envelopes by one public key."""

    def prove(message: bytes) -> tuple[Verdict, bytes]:
        if not dsse.is_envelope(message):
            raise integrity.NotIntact(image="", reason=_NO_KEY.format(form="PGP clear-sign"))
        return Verdict(), dsse.verify(message, key)

    return prove


def check_revocation(leaf: Any, intermediates: Sequence[Any], roots: Sequence[Any] | None) -> None:
    """Ask the issuers of a certificate and of those above it whether they have been revoked.

    Raises:
        VerifyFailed: one has, or nobody says that it has not.
    """
    try:
        above = dsse.certificates(ocsp.SYSTEM_ROOTS) if roots is None else roots
        ocsp.check(ocsp.chain_of(leaf, intermediates, above), _ask)
    except (ocsp.NotGood, dsse.KeyWrong) as error:
        raise VerifyFailed(reason=error) from None


def _ask(address: str, body: bytes) -> bytes:
    """Post a request to a responder; its answer has a size and a time, and is no other address."""
    packages.allow()
    import requests

    from apptainer_py.registry import proxied

    headers = {"Content-Type": "application/ocsp-request", "Accept-Encoding": "identity"}
    too_much = VerifyFailed(reason=f"OCSP: {address} says too much, or too slowly")
    content = b""
    try:
        with requests.Session() as session:
            for scheme in ("https://", "http://"):
                session.mount(scheme, proxied.Adapter())
            answer = session.post(
                address, body, headers=headers, timeout=_ANSWER_S, stream=True,
                allow_redirects=False, auth=lambda request: request,
            )  # fmt: skip
            clock = proxied.watch_of(answer)
            if clock is not None:
                clock.give(_ANSWER_S)
            for part in answer.iter_content(1 << 12):
                content += part
                if len(content) > _ANSWER_BYTES:
                    raise too_much
            status = answer.status_code
            if clock is not None:
                clock.stop()
                if clock.has_cut:
                    raise too_much
    except requests.RequestException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerifyFailed(reason=f"OCSP: {address} does not answer: {reason}") from None
    if status != _OK:
        raise VerifyFailed(reason=f"OCSP: {address} answers with status {status}")
    return content


def _pgp_verdict(signed: openpgp.Signed, *, is_local: bool) -> tuple[Verdict, bytes]:
    verdict = Verdict(
        name=signed.entity, fingerprint=signed.fingerprint, is_local=is_local, is_pgp=True
    )
    return verdict, signed.text


def _opened(path: str) -> int:
    import stat

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        words = (error.strerror or "").lower() if isinstance(error, OSError) else str(error)
        raise VerifyFailed(reason=f"open {path}: {words}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise VerifyFailed(reason=f"{path} is not a regular file")
    return fd


def _judge(
    fd: int,
    entry: Descriptor,
    task: Task,
    checker: integrity.Checker,
    prove: Callable[[bytes], tuple[Verdict, bytes]],
) -> Verdict:
    message = integrity.read_signature(fd, entry)
    try:
        verdict, text = prove(message)
    except (openpgp.OpenPgpError, dsse.NotValid) as error:
        return Verdict(error=f"signature object {entry.id} not valid: {error}")
    if _is_legacy(message):
        outcome = checker.legacy_outcome(text, task.objects)
    else:
        outcome = checker.outcome(text, None if task.is_whole else task.objects)
    reason = str(outcome.error.facts["reason"]) if outcome.error else ""
    return verdict.replace(verified=outcome.verified, failed=outcome.failed, error=reason)


def _is_legacy(message: bytes) -> bool:
    body = message.partition(b"\n\n")[2] if message.startswith(_CLEAR_SIGNED) else b""
    return body.startswith(integrity.LEGACY_PREFIX)


def _tasks(fd: int, wanted: Wanted) -> Iterator[Task]:
    entries = sif.read_descriptors(fd)
    objects = [entry for entry in entries if entry.data_type != sif.SIGNATURE]
    groups = sorted({entry.group for entry in objects if entry.group})
    if wanted.group or wanted.ident:
        yield from _chosen(fd, wanted, entries, groups)
        return
    if wanted.legacy:
        for entry in objects if wanted.everything else [_primary(objects)]:
            yield _object_task(fd, entry, entries, legacy=True)
        return
    if not groups:
        raise integrity.NotIntact(image="", reason="no groups found")
    if any(not entry.group for entry in objects):
        reason = "non-signature object not associated with object group"
        raise integrity.NotIntact(image="", reason=reason)
    for number in groups:
        yield _group_task(fd, number, legacy=False)


def _chosen(
    fd: int, wanted: Wanted, entries: Sequence[Descriptor], groups: Sequence[int]
) -> Iterator[Task]:
    if wanted.group:
        if wanted.group not in groups:
            raise integrity.NotIntact(image="", reason="group not found")
        yield _group_task(fd, wanted.group, legacy=wanted.legacy)
    if wanted.ident:
        objects = [entry for entry in entries if entry.data_type != sif.SIGNATURE]
        entry = next((e for e in objects if e.id == wanted.ident), None)
        if entry is None:
            raise integrity.NotIntact(image="", reason="object not found")
        yield _object_task(fd, entry, entries, legacy=wanted.legacy)


def _primary(objects: Sequence[Descriptor]) -> Descriptor:
    primaries = [
        entry
        for entry in objects
        if entry.data_type == sif.PARTITION and sif.partition_facts(entry)[1] == sif.PRIMARY_SYSTEM
    ]
    if len(primaries) != 1:
        raise ImageError(image="", reason="object not found")
    return primaries[0]


def _group_task(fd: int, number: int, *, legacy: bool) -> Task:
    group = integrity.group_of(fd, number)
    return Task(
        group=group,
        signatures=_signatures(fd, group, group.signatures, legacy=legacy),
        objects=group.objects,
        is_whole=True,
    )


def _object_task(
    fd: int, entry: Descriptor, entries: Sequence[Descriptor], *, legacy: bool
) -> Task:
    group = integrity.group_of(fd, entry.group)
    if legacy:
        over = [e for e in entries if e.data_type == sif.SIGNATURE and not e.link_is_group]
        found = [e for e in over if e.link == entry.id and _is_legacy(_content(fd, e))]
        if not found:
            reason = f"signature not found for object {entry.id}"
            raise integrity.NotIntact(image="", reason=reason)
        signatures = tuple(found)
    else:
        signatures = _signatures(fd, group, group.signatures, legacy=False)
    return Task(group=group, signatures=signatures, objects=(entry,), is_whole=False)


def _signatures(
    fd: int, group: integrity.Group, entries: Sequence[Descriptor], *, legacy: bool
) -> tuple[Descriptor, ...]:
    found = tuple(e for e in entries if _is_legacy(_content(fd, e)) == legacy)
    if not found:
        raise integrity.NotSigned(image="", group=group.number, reason="")
    return found


def _content(fd: int, entry: Descriptor) -> bytes:
    return integrity.read_signature(fd, entry)
