"""A private key under another passphrase."""

from __future__ import annotations

import pytest

from apptainer_py.crypto import gnupg
from apptainer_py.crypto.packets import Key


@pytest.fixture(scope="module")
def key() -> Key:
    try:
        return gnupg.generate("Ann <a@b.c>", 1024, "old one")
    except gnupg.GpgError as error:
        pytest.skip(f"did not run: {error}")


def test_the_passphrase_of_a_key_changes(key: Key) -> None:
    changed = gnupg.reprotected(key, "old one", "new one")
    assert changed.fingerprint == key.fingerprint
    assert gnupg.sign(b"x\n", changed, "new one").startswith(b"-----BEGIN PGP SIGNED")
    with pytest.raises(gnupg.WrongPassphrase):
        gnupg.sign(b"x\n", changed, "old one")


def test_the_old_passphrase_is_needed(key: Key) -> None:
    with pytest.raises(gnupg.WrongPassphrase):
        gnupg.reprotected(key, "bad", "new one")


def test_a_passphrase_goes_and_comes(key: Key) -> None:
    bare = gnupg.reprotected(key, "old one", "")
    assert gnupg.sign(b"x\n", bare)
    again = gnupg.reprotected(bare, "", "third")
    with pytest.raises(gnupg.WrongPassphrase):
        gnupg.sign(b"x\n", again)
