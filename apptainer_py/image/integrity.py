"""What a signature of a SIF file covers: header, descriptors and data of a group (facts §5.3).

Who has signed is another matter: a caller hands in what turns a signature object into the text that
it proves. Nothing of that text is believed before.
"""

from __future__ import annotations

import os

from apptainer_py.base.record import Record
from apptainer_py.image import ahead, sif

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from apptainer_py.image.ahead import Pieces
    from apptainer_py.image.sif import Descriptor

SIGNATURE_BYTES = 1 << 20
_COVERED = "<iBIIqqqq"
LEGACY_PREFIX = b"SIFHASH:\n"
_LEGACY_HASHES = {64: "sha256", 96: "sha384", 128: "sha512"}


class NotIntact(sif.SifError):
    """What was signed is not what is in the file."""

    message = "integrity: {reason}"


class NotSigned(NotIntact):
    """A group has no signature."""

    message = "signature not found for object group {group}"


class Group(Record):
    """The objects of one group, and the signatures that are over the group."""

    number: int
    objects: tuple[Descriptor, ...]
    signatures: tuple[Descriptor, ...]


def group_of(fd: int, number: int) -> Group:
    """Return a group of an open SIF file.

    Raises:
        SifError: the file is damaged.
    """
    entries = sif.read_descriptors(fd)
    if len({entry.id for entry in entries}) != len(entries):
        raise NotIntact(image="", reason="two objects have the same number")
    _check_apart(entries)
    return Group(
        number=number,
        objects=tuple(entry for entry in entries if entry.group == number),
        signatures=tuple(
            entry
            for entry in entries
            if entry.data_type == sif.SIGNATURE and entry.link_is_group and entry.link == number
        ),
    )


def _check_apart(entries: Sequence[Descriptor]) -> None:
    """Check that no byte is in two objects: a small file could have no end of bytes to hash."""
    spans = sorted((e.offset, e.size_bytes, e.id) for e in entries if e.size_bytes > 0)
    for (start, size, first), (at, _, second) in zip(spans, spans[1:], strict=False):  # noqa: RUF007
        if start + size > at:
            raise NotIntact(image="", reason=f"objects {first} and {second} overlap")


def primary_group(fd: int) -> int:
    """Return the group of the root file system, or 0.

    Raises:
        SifError: the file is damaged, or it has not one root file system.
    """
    return sif.primary_partition(fd).group


def read_signature(fd: int, entry: Descriptor) -> bytes:
    """Return the content of a signature object."""
    return sif.read_object(fd, entry, limit_bytes=SIGNATURE_BYTES).rstrip(b"\0")


class Outcome(Record):
    """How far a proven text is true: what was compared and is whole, and what is not."""

    verified: tuple[Descriptor, ...]
    failed: Descriptor | None = None
    error: NotIntact | None = None


class Checker:
    """Compares proven texts with the file; what is large is read once, by `pieces`."""

    def __init__(self, fd: int, group: Group, pieces: Pieces = ahead.in_turn) -> None:
        self.fd = fd
        self.group = group
        self._pieces = pieces
        self._digests: dict[tuple[str, int], str] = {}

    def check(self, text: bytes) -> None:
        """Check that a proven text is about exactly this group, as it is in the file.

        Raises:
            NotIntact: it is not.
        """
        error = self.outcome(text).error
        if error is not None:
            raise error

    def outcome(self, text: bytes, only: Sequence[Descriptor] | None = None) -> Outcome:
        """Return how far a proven text is true of the group, or of `only` some of its objects."""
        verified: list[Descriptor] = []
        at: Descriptor | None = None
        try:
            header, pairs = self._said(text)
            first = min((entry.id for entry in self.group.objects), default=0)
            if only is None:
                self._check_numbers({number + first for number in pairs})
            wanted = self.group.objects if only is None else only
            for entry in wanted:
                if entry.id - first not in pairs:
                    raise self._wrong(f"object {entry.id}: object not signed")
            if not self._matches(header, _header_bytes(self.fd)):
                raise self._wrong("header integrity compromised")
            for at in wanted:
                self._check_object(at, first, *pairs[at.id - first])
                verified.append(at)
        except NotIntact as error:
            return Outcome(verified=tuple(verified), failed=at, error=error)
        return Outcome(verified=tuple(verified))

    def legacy_outcome(self, text: bytes, only: Sequence[Descriptor]) -> Outcome:
        """Return whether a proven text of the old form is true: one hash over all the data."""
        words = text.split()
        name = _LEGACY_HASHES.get(len(words[1]), "") if len(words) == 2 else ""
        at: Descriptor | None = None
        try:
            if not name or words[0] != LEGACY_PREFIX.rstrip():
                raise self._wrong("legacy signature has an unknown form")
            state = _new_hash(name)
            for at in only:
                self._feed(at, state.update)
            if state.hexdigest().encode() != words[1].lower():
                compromised = "data object integrity compromised"
                ids = "" if len(only) > 1 else f": {only[0].id}"
                raise self._wrong(compromised + ids)
        except NotIntact as error:
            return Outcome(verified=(), failed=at, error=error)
        return Outcome(verified=tuple(only))

    def metadata(self, only: Sequence[Descriptor]) -> bytes:
        """Return what is to be signed to vouch for `only` these objects of the group."""
        import hashlib
        import json

        def digest(data: bytes) -> str:
            return f"sha256:{hashlib.sha256(data).hexdigest()}"

        first = min(entry.id for entry in self.group.objects)
        objects = [
            {
                "relativeId": entry.id - first,
                "descriptorDigest": digest(_descriptor_bytes(entry, first)),
                "objectDigest": self._content_digest(entry, "sha256:"),
            }
            for entry in only
        ]
        header = {"digest": digest(_header_bytes(self.fd))}
        document = {"version": 1, "header": header, "objects": objects}
        return json.dumps(document, separators=(",", ":")).encode()

    def _said(self, text: bytes) -> tuple[str, dict[int, tuple[str, str]]]:
        """Return the header's digest, and those of each object by its number in the group."""
        import json

        try:
            said = json.loads(text)
            header, objects = said["header"]["digest"], said["objects"]
            rows = {entry["relativeId"]: entry for entry in objects}
            if said["version"] != 1 or len(rows) != len(objects):
                raise ValueError
            pairs = {
                number: (str(row["descriptorDigest"]), str(row["objectDigest"]))
                for number, row in rows.items()
            }
            if not all(type(number) is int for number in pairs):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._wrong("the signed metadata has an unknown form") from None
        for digest in (str(header), *(digest for pair in pairs.values() for digest in pair)):
            self._algorithm(digest)
        return str(header), pairs

    def _check_numbers(self, signed: set[int]) -> None:
        present = {entry.id for entry in self.group.objects}
        if signed - present:
            raise self._wrong(f"object {min(signed - present)}: signed object not found")
        if present - signed:
            raise self._wrong(f"object {min(present - signed)}: object not signed")

    def _check_object(self, entry: Descriptor, first: int, descriptor: str, content: str) -> None:
        if not self._matches(descriptor, _descriptor_bytes(entry, first)):
            raise self._wrong(f"data object descriptor integrity compromised: {entry.id}")
        if content != self._content_digest(entry, content):
            raise self._wrong(f"data object integrity compromised: {entry.id}")

    def _wrong(self, reason: str) -> NotIntact:
        return NotIntact(image="", reason=reason)

    def _algorithm(self, digest: str) -> str:
        name = digest.partition(":")[0]
        if name not in ("sha256", "sha384", "sha512"):
            raise self._wrong("the signed metadata has an unknown digest")
        return name

    def _matches(self, digest: str, data: bytes) -> bool:
        import hashlib

        name = self._algorithm(digest)
        return digest == f"{name}:{hashlib.new(name, data).hexdigest()}"

    def _content_digest(self, entry: Descriptor, like: str) -> str:
        name = self._algorithm(like)
        if (name, entry.id) not in self._digests:
            state = _new_hash(name)
            self._feed(entry, state.update)
            self._digests[name, entry.id] = f"{name}:{state.hexdigest()}"
        return self._digests[name, entry.id]

    def _feed(self, entry: Descriptor, take: Callable[[bytes | memoryview], object]) -> None:
        sif.check_inside(self.fd, entry)
        left = entry.size_bytes
        for part in self._pieces(self.fd, entry.offset, left):
            take(part)
            left -= len(part)
        if left:
            raise self._wrong(f"object {entry.id} is cut short")


def _new_hash(name: str) -> Any:
    import hashlib

    return hashlib.new(name)


def _header_bytes(fd: int) -> bytes:
    """Return what is signed of the header: launch line, magic, version, identity."""
    raw = os.pread(fd, sif.HEADER_BYTES, 0)
    return raw[:45] + raw[48:64]


def _descriptor_bytes(entry: Descriptor, first: int) -> bytes:
    """Return what is signed of a descriptor; its number counts from the group's first."""
    import struct

    (kind, used, number, _, link, _, size, _, created, _, uid, gid, name, extra) = sif.raw_fields(
        entry
    )
    head = struct.pack(_COVERED, kind, used, number - first, link, size, created, uid, gid)
    return b"".join((head, name, extra))


def signers(
    fd: int, group: Group, prove: Callable[[bytes], tuple[str, bytes] | None]
) -> Sequence[str]:
    """Return who has signed the group as it is in the file.

    `prove` returns a fingerprint and the text that it stands for, None for a stranger's signature,
    and raises for one that is no good.

    Raises:
        NotSigned: nobody has.
        NotIntact: somebody known has signed something else.
    """
    if not group.signatures or not group.objects or group.number == 0:
        raise NotSigned(image="", group=group.number, reason="")
    checker = Checker(fd, group)
    found = []
    for entry in group.signatures:
        proven = prove(read_signature(fd, entry))
        if proven is not None:
            checker.check(proven[1])
            found.append(proven[0])
    return found
