"""Keyrings in files: what is cut out of them, and what is no key."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apptainer_py.crypto import keyring, packets

MODULUS = b"\x04\x00" + b"\x80" + bytes(127)
PUBLIC = b"\x04" + (1_700_000_000).to_bytes(4, "big") + b"\x01" + MODULUS + b"\x00\x11\x01\x00\x01"
SECRET = PUBLIC + b"\x00" + b"secret numbers"


def old(tag: int, body: bytes) -> bytes:
    return bytes((0x80 | tag << 2 | 1,)) + len(body).to_bytes(2, "big") + body


def certificate(name: bytes, *, secret: bool = False, salt: bytes = b"") -> bytes:
    body = (
        (SECRET if secret else PUBLIC)[:1]
        + salt.ljust(4, b"\0")
        + (SECRET if secret else PUBLIC)[5:]
    )
    return old(5 if secret else 6, body) + old(13, name) + old(12, b"trust") + old(2, b"sig")


def test_a_ring_is_cut_into_keys_and_trust_packets_are_left_out():
    first, second = packets.read(
        certificate(b"A <a@b>") + certificate(b"B", secret=True, salt=b"x")
    )
    assert (first.user_ids, first.bits, first.is_secret) == (("A <a@b>",), 1024, False)
    assert (second.user_id, second.is_secret, second.is_locked) == ("B", True, False)
    assert first.fingerprint != second.fingerprint
    assert b"trust" not in first.raw + second.raw


def test_the_public_half_has_the_fingerprint_and_nothing_that_is_secret():
    key = packets.read(certificate(b"B", secret=True))[0]
    public = packets.public_of(key)
    assert public.fingerprint == key.fingerprint == packets.read(public.raw)[0].fingerprint
    assert not public.is_secret
    assert b"secret numbers" in key.raw
    assert b"secret numbers" not in public.raw


def test_text_and_back():
    key = packets.read(certificate(b"A"))[0]
    text = packets.armored(key)
    assert packets.read(b"some words\n\n" + text)[0] == key
    broken = text.replace(base64.b64encode(key.raw)[:8], b"AAAAAAAA")
    for wrong in (broken, text.replace(b"END", b"DNE"), b"root:x:0:0", b"-----BEGIN PGP "):
        with pytest.raises(packets.RingError):
            packets.read(wrong)


@given(st.binary(max_size=200))
def test_anything_else_is_refused_or_read(data):
    for text in (data, b"\x99" + data, certificate(b"A")[: len(data)] + data):
        try:
            packets.read(text)
        except packets.RingError:
            pass


def test_a_ring_changes_as_a_whole(tmp_path):
    path = str(tmp_path / "keys/pgp-public")
    one, two = (packets.read(certificate(b"A", salt=salt))[0] for salt in (b"1", b"2"))
    keyring.add(path, one)
    keyring.add(path, two)
    with pytest.raises(keyring.AlreadyThere):
        keyring.add(path, two)
    keyring.remove(path, one.fingerprint.lower())
    assert keyring.load(path) == (two,)
    with pytest.raises(keyring.NoSuchKey):
        keyring.remove(path, one.fingerprint)
    assert os.listdir(tmp_path / "keys") == ["pgp-public"]
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(tmp_path / "keys").st_mode & 0o777 == 0o700
