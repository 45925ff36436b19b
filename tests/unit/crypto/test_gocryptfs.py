"""What a hostile image says of its encryption, and how much it may become."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from apptainer_py.base import packages

packages.allow()
pytest.importorskip("cryptography")

from apptainer_py.crypto import gocryptfs  # noqa: E402

SCRYPT = {"N": 1024, "R": 8, "P": 1, "KeyLen": 32, "Salt": ""}
CONF = {"ScryptObject": SCRYPT, "EncryptedKey": "", "FeatureFlags": [], "Version": 2}


@pytest.mark.parametrize(
    "conf",
    [
        b"[" * 60_000,
        b"{}",
        json.dumps({**CONF, "FeatureFlags": [1, "x"]}).encode(),
        json.dumps({**CONF, "ScryptObject": {**SCRYPT, "N": float("inf")}}).encode(),
        json.dumps({**CONF, "ScryptObject": {**SCRYPT, "N": -1}}).encode(),
        json.dumps({**CONF, "ScryptObject": {**SCRYPT, "N": 1 << 70, "R": 0}}).encode(),
        json.dumps({**CONF, "ScryptObject": {**SCRYPT, "N": 1 << 62, "R": -1}}).encode(),
        json.dumps({**CONF, "ScryptObject": {**SCRYPT, "R": 1 << 40}}).encode(),
    ],
)
def test_settings_that_are_none(conf: bytes) -> None:
    with pytest.raises(gocryptfs.Unreadable):
        gocryptfs.master_key(conf, b"secret")


class Cat:
    """Stands for the process that prints a file of the encrypted partition."""

    def __init__(self, content: bytes) -> None:
        self.stdout = io.BytesIO(content)

    def __enter__(self) -> Cat:
        return self

    def __exit__(self, *_words: object) -> None:
        pass


def superblock(size: int) -> bytes:
    return (b"hsqs" + bytes(36) + size.to_bytes(8, "little")).ljust(4096, b"\0")


@pytest.fixture
def unlock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def unlock(blocks: list[bytes]) -> tuple[int, int]:
        monkeypatch.setattr(gocryptfs, "_name_of_cipher", lambda *_words: "squashfs-1")
        monkeypatch.setattr(gocryptfs, "_cat", lambda *_words: Cat(b""))
        monkeypatch.setattr(gocryptfs, "master_key", lambda *_words: b"")
        monkeypatch.setattr(gocryptfs, "decrypt", lambda *_words: iter(blocks))
        fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            gocryptfs.unlock(0, 0, fd, b"")
            facts = os.fstat(fd)
            return facts.st_size, facts.st_blocks * 512
        finally:
            os.close(fd)

    return unlock


def test_a_file_system_and_what_pads_it(unlock) -> None:
    assert unlock([superblock(5000), bytes(4096)])[0] == 8192


def test_holes_stay_holes(unlock) -> None:
    size, stored = unlock([superblock(500 * 4096), *(bytes(4096) for _ in range(499))])
    assert size == 500 * 4096
    assert stored <= 2 * 4096


def test_what_is_appended_is_refused(unlock) -> None:
    with pytest.raises(gocryptfs.Unreadable, match="longer than the file system"):
        unlock([superblock(5000), *(bytes(4096) for _ in range(1000))])


def test_something_else_is_refused(unlock) -> None:
    with pytest.raises(gocryptfs.Unreadable, match="no squashfs"):
        unlock([bytes(4096)])
