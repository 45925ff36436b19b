"""Mutated SIF files that are changed, signed and verified: an answer or one of our errors.

Whatever a file says of itself, what it held before is there after a change, and after a change that
failed the file is as it was.
"""

from __future__ import annotations

import os
import random
import resource

import pytest

from apptainer_py.base.errors import ApptainerError
from apptainer_py.image import sif, sif_edit
from apptainer_py.verbs import sign, verify
from tests import sif_bytes
from tests.fuzz.test_fuzz_sif import MEMORY_LIMIT_BYTES, mutate, seeds

SEED = 20_260_115
ITERATIONS = 1_500
NOW = 1_700_000_000
# In a hostile file an object may lie there; it is no part of what is kept.
META_BYTES = sif_bytes.DATA_OFFSET

__all__ = ["seeds"]


def contents(fd):
    """Return what can be read of each object behind the tables, by its place."""
    found = {}
    try:
        entries = sif.read_descriptors(fd)
    except ApptainerError:
        return found
    for entry in entries:
        try:
            if entry.offset >= META_BYTES:
                read = sif.read_object(fd, entry, limit_bytes=1 << 20)
                found[entry.offset, entry.size_bytes] = read
        except ApptainerError:
            continue
    return found


def change(chance, fd, path):
    """Do one thing that commands do; return its name."""
    what = chance.choice(("add", "delete", "primary", "sign"))
    if what == "add":
        kind = chance.choice((sif.GENERIC, sif.PARTITION))
        extra = sif_edit.partition_extra(sif.RAW, chance.randrange(1, 5), "amd64")
        new = sif_edit.NewObject(
            data_type=kind, content=b"new" * 100, group=chance.randrange(3),
            extra=extra if kind == sif.PARTITION else b"", alignment=chance.choice((0, 4096)),
        )  # fmt: skip
        sif_edit.add(fd, [new] * chance.randrange(1, 4), now_s=NOW)
    elif what == "delete":
        sif_edit.delete(fd, chance.randrange(6), now_s=NOW)
    elif what == "primary":
        sif_edit.set_primary(fd, chance.randrange(6), now_s=NOW)
    else:
        sign.sign(path, lambda text: (b"{" + text, b""), epoch=NOW)
        verdicts = []
        verify.verify(path, verify.Wanted(), believe, verdicts.append)
        assert verdicts
    return what


def believe(message):
    return verify.Verdict(), message[1:]


def test_no_change_loses_or_invents_anything(tmp_path, seeds, monkeypatch):
    monkeypatch.setattr(sif_edit.os, "fsync", lambda fd: None)
    chance = random.Random(SEED)
    path = tmp_path / "mutant.sif"
    seen: dict[str, int] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for turn in range(ITERATIONS):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(0, 3)):
            mutate(chance, data)
        if chance.random() < 0.05:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        fd = os.open(path, os.O_RDWR)
        try:
            kept = contents(fd)
            result = change(chance, fd, str(path))
        except ApptainerError as error:
            assert "\n" not in str(error)
            result = "refused"
            if not isinstance(error, verify.VerifyFailed):
                assert path.read_bytes() == data, turn
        finally:
            os.close(fd)
        after = path.read_bytes()
        assert len(after) < len(data) + (1 << 21)
        for (at, size), content in kept.items():
            assert after[at : at + size] == content, turn
        seen[result] = seen.get(result, 0) + 1
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert set(seen) == {"add", "delete", "primary", "sign", "refused"}
    assert min(seen.values()) > ITERATIONS // 60
    assert grown_bytes < MEMORY_LIMIT_BYTES


def crossed(total, first, second, **more):
    """A file with one object at `first` and one at `second`, each an (offset, size)."""
    rows = [sif_bytes.entry(0x4007, number, *where) for number, where in ((1, first), (2, second))]
    return sif_bytes.sif(rows, total=total, **more)


@pytest.mark.parametrize(
    "data",
    [
        crossed(-1, (36864, 10), (36874, 10)),
        crossed(1 << 31, (36864, 10), (36874, 10)),
        crossed((1 << 63) - 1, (36864, 10), (36874, 10)),
        crossed(48, (36864, 4096), (36864, 4096)),
        crossed(48, (-1, 10), (36864, 10)),
        crossed(48, (36864, -1), (36864, 10)),
        crossed(48, ((1 << 63) - 1, 1), (36864, 10)),
        crossed(48, (36864, (1 << 63) - 1), (36864, 10)),
        crossed(48, (36864, 10), (36874, 10), table_offset=(1 << 63) - 1),
        crossed(48, (36864, 10), (36874, 10), table_bytes=-1),
    ],
)
def test_hostile_ranges_end_signing_and_verifying_in_one_line(tmp_path, data):
    path = tmp_path / "x.sif"
    path.write_bytes(data)
    with pytest.raises(ApptainerError) as found:
        sign.sign(str(path), lambda text: (b"{" + text, b""))
    assert "\n" not in str(found.value)
    assert path.read_bytes() == data
    with pytest.raises(ApptainerError):
        verify.verify(str(path), verify.Wanted(), believe, print)
