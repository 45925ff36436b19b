"""What a hostile image says of its encryption."""

from __future__ import annotations

import io
import json

import pytest

from apptainer_py.crypto import gocryptfs

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


def test_holes_stay_holes(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    import os
    from contextlib import nullcontext
    from types import SimpleNamespace

    blocks = 500
    stored = b"\0\2" + bytes(16) + bytes((4096 + 32) * blocks)
    streams = [SimpleNamespace(stdout=io.BytesIO(data)) for data in (b"", stored)]
    monkeypatch.setattr(gocryptfs, "_name_of_cipher", lambda fd, offset: "x")
    monkeypatch.setattr(gocryptfs, "master_key", lambda conf, password: bytes(32))
    monkeypatch.setattr(gocryptfs, "_cat", lambda *words: nullcontext(streams.pop(0)))
    monkeypatch.setattr(gocryptfs, "_content_key", lambda key: None)
    out = os.memfd_create("root")
    gocryptfs.unlock(-1, 0, out, b"secret")
    facts = os.fstat(out)
    os.close(out)
    assert facts.st_size == 4096 * blocks
    assert facts.st_blocks == 0
