"""OpenPGP keyrings as files: packets, and the keys that they are (RFC 4880, 4.2 and 5.5).

Nothing here is cryptography: a ring is cut into keys, which are listed, kept, left out and written
back byte by byte. Whether a key's own signatures are good is judged by gpgv and gpg, on use.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

RING_BYTES_MAX = 1 << 24
_SIGNATURE, _SECRET_KEY, _PUBLIC_KEY, _SECRET_SUBKEY, _USER_ID, _SUBKEY, _ATTRIBUTE = (
    2, 5, 6, 7, 13, 14, 17,
)  # fmt: skip
_PRIMARIES = (_SECRET_KEY, _PUBLIC_KEY)
_KEPT = (_SIGNATURE, _SECRET_SUBKEY, _USER_ID, _SUBKEY, _ATTRIBUTE)
_PUBLIC_OF = {_SECRET_KEY: _PUBLIC_KEY, _SECRET_SUBKEY: _SUBKEY}
# How many numbers the public part of a key has, by algorithm; a curve's name goes before them.
_NUMBERS = {1: 2, 2: 2, 3: 2, 16: 3, 17: 4, 18: 1, 19: 1, 22: 1}
_WITH_CURVE = (18, 19, 22)
_ECDH = 18
_BEGIN, _END = b"-----BEGIN PGP ", b"-----END PGP "
_LINE = 64


class RingError(ApptainerError):
    """What should be a key, or a ring of them, is none."""

    message = "openpgp: {text}"


class Key(Record):
    """A key with everything that belongs to it."""

    raw: bytes
    fingerprint: str
    created_s: int
    bits: int
    user_ids: tuple[str, ...]
    is_secret: bool
    is_locked: bool

    @property
    def user_id(self) -> str:
        """Return the first of its names."""
        return self.user_ids[0] if self.user_ids else ""


def read(data: bytes) -> tuple[Key, ...]:
    """Return the keys of a binary ring, or of a text with one armored block.

    Raises:
        RingError: it is neither.
    """
    if data.lstrip()[:1] == b"-" or (data and not data[0] & 0x80):
        data = dearmored(data)
    found: list[list[tuple[int, bytes]]] = []
    for tag, body in _packets(data):
        if tag in _PRIMARIES:
            found.append([(tag, body)])
        elif not found:
            raise RingError(text="invalid data: a key must come first")
        elif tag in _KEPT:
            found[-1].append((tag, body))
    return tuple(_key(packets) for packets in found)


def public_of(key: Key) -> Key:
    """Return the public half of a key."""
    if not key.is_secret:
        return key
    packets = [
        (_PUBLIC_OF[tag], body[: _public_bytes(body)]) if tag in _PUBLIC_OF else (tag, body)
        for tag, body in _packets(key.raw)
    ]
    return _key(packets)


def armored(key: Key) -> bytes:
    """Return a key as a text."""
    import base64

    kind = b"PRIVATE" if key.is_secret else b"PUBLIC"
    text = base64.b64encode(key.raw)
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    check = b"=" + base64.b64encode(_crc24(key.raw).to_bytes(3, "big"))
    head, tail = _BEGIN + kind + b" KEY BLOCK-----", _END + kind + b" KEY BLOCK-----"
    return b"\n".join((head, b"", *lines, check, tail, b""))


def dearmored(text: bytes) -> bytes:
    """Return the bytes of the first armored block of a text.

    Raises:
        RingError: there is none, or it is damaged.
    """
    import base64
    import binascii

    lines = [line.strip() for line in text.splitlines()]
    begins = [at for at, line in enumerate(lines) if line.startswith(_BEGIN)]
    if not begins:
        raise RingError(text="invalid argument: no armored data found")
    body = lines[begins[0] + 1 :]
    ends = [at for at, line in enumerate(body) if line.startswith(_END)]
    if not ends or b"" not in body[: ends[0]]:
        raise RingError(text="invalid data: the armored block has no end")
    body = body[body.index(b"") + 1 : ends[0]]
    check = body.pop() if body and len(body[-1]) == 5 and body[-1].startswith(b"=") else b""
    try:
        data = base64.b64decode(b"".join(body), validate=True)
        given = int.from_bytes(base64.b64decode(check[1:], validate=True), "big") if check else None
    except binascii.Error:
        raise RingError(text="invalid data: the armored block is damaged") from None
    if given is not None and given != _crc24(data):
        raise RingError(text="invalid data: armor invalid")
    return data


def _crc24(data: bytes) -> int:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc = crc << 1 ^ (0x1864CFB if crc & 0x800000 else 0)
    return crc & 0xFFFFFF


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        tag, start, size = _head(data, at)
        at = start + size
        if at > len(data):
            raise RingError(text="invalid data: a packet is cut short")
        yield tag, data[start:at]


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, start and length of a packet's body."""
    first = data[at]
    if not first & 0x80:
        raise RingError(text="invalid data: tag byte does not have MSB set")
    rest = data[at + 1 : at + 6].ljust(5, b"\0")
    if first & 0x40:
        if rest[0] < 192:
            return first & 0x3F, at + 2, rest[0]
        if rest[0] < 224:
            return first & 0x3F, at + 3, (rest[0] - 192 << 8) + rest[1] + 192
        if rest[0] == 255:
            return first & 0x3F, at + 6, int.from_bytes(rest[1:5], "big")
    elif first & 3 != 3:
        width = 1 << (first & 3)
        return first >> 2 & 0xF, at + 1 + width, int.from_bytes(rest[:width], "big")
    raise RingError(text="invalid data: a key's packet has no length")


def _packed(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 192:
        head = bytes((size,))
    elif size < 8384:
        head = bytes(((size - 192 >> 8) + 192, size - 192 & 0xFF))
    else:
        head = b"\xff" + size.to_bytes(4, "big")
    return bytes((0xC0 | tag,)) + head + body


def _key(packets: list[tuple[int, bytes]]) -> Key:
    import hashlib

    tag, body = packets[0]
    size = _public_bytes(body)
    public = body[:size]
    digest = hashlib.sha1(b"\x99" + size.to_bytes(2, "big") + public, usedforsecurity=False)
    secret = tag == _SECRET_KEY
    return Key(
        raw=b"".join(_packed(kind, content) for kind, content in packets),
        fingerprint=digest.hexdigest().upper(),
        created_s=int.from_bytes(body[1:5], "big"),
        bits=_bits(public),
        user_ids=tuple(
            content.decode("utf-8", "replace") for kind, content in packets if kind == _USER_ID
        ),
        is_secret=secret,
        # The byte after the public part says how the secret one is protected, 0: not at all.
        is_locked=secret and len(body) > size and body[size] != 0,
    )


def _public_bytes(body: bytes) -> int:
    """Return how many bytes of a key's packet are its public part."""
    if len(body) < 6 or body[0] != 4:
        raise RingError(text="unsupported feature: public key version")
    algorithm, at = body[5], 6
    if algorithm not in _NUMBERS:
        raise RingError(text=f"unsupported feature: public key type: {algorithm}")
    if algorithm in _WITH_CURVE:
        at += 1 + (body[at] if at < len(body) else 0)
    for _ in range(_NUMBERS[algorithm]):
        at += 2 + (int.from_bytes(body[at : at + 2], "big") + 7 >> 3)
    if algorithm == _ECDH:
        at += 1 + (body[at] if at < len(body) else 0)
    if at > len(body):
        raise RingError(text="invalid data: a key is cut short")
    return at


def _bits(public: bytes) -> int:
    at = 6
    if public[5] in _WITH_CURVE:
        at += 1 + public[at]
        # A point is a byte and two numbers, or a byte and one.
        bits = int.from_bytes(public[at : at + 2], "big")
        return 256 if bits in (263, 515) else bits // 2
    return int.from_bytes(public[at : at + 2], "big")
