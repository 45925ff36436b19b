"""Mutated SIF files: every one gives an answer or one of our errors, and little memory is used."""

from __future__ import annotations

import itertools
import os
import random
import resource
import struct

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import detect, sif
from apptainer_py.verbs import sif as verb
from tests import sif_bytes

SEED = 20_250_601
ITERATIONS = 20_000
MEMORY_LIMIT_BYTES = 32 << 20
NUMBERS = [0, 1, 2, 127, 128, 585, 4095, 4096, 32176, 36864, 40960, 0x4004, 0x7FFFFFFF, 1 << 31]
NUMBERS += [0xFFFFFFFF, 1 << 32, (1 << 63) - 1, -(1 << 63), -1, -585, (1 << 63) - 4096]
HEADER_FIELDS = [*range(64, 128, 8)]
ENTRY_FIELDS = [(0, "<i"), (5, "<I"), (9, "<I"), (13, "<I"), (17, "<q"), (25, "<q"), (33, "<q")]
ENTRY_FIELDS += [(201, "<i"), (205, "<i")]
WIDTHS = {"<i": 32, "<I": 32, "<q": 64}


@pytest.fixture(scope="module")
def seeds():
    """Two good files; the second has an overlay, and more behind it."""
    one = sif_bytes.sif(
        [
            sif_bytes.entry(0x4001, 1, 32176, 33),
            sif_bytes.entry(0x4006, 2, 32209, 60, name=b"inspect-metadata.json"),
            sif_bytes.partition(3),
        ]
    )
    two = sif_bytes.sif(
        [
            sif_bytes.partition(1),
            sif_bytes.partition(2, sif_bytes.PARTITION_OFFSET + 4096, part=4),
            sif_bytes.entry(0x4005, 3, 32176, 100, extra=struct.pack("<i", 1)),
            sif_bytes.entry(0x400B, 4, 32276, 9, extra=b"sha256:" + b"ab" * 32),
        ],
        content=sif_bytes.SQUASHFS * 2,
    )
    return [one, two]


def put(data, offset, layout, number):
    bits = WIDTHS[layout]
    number &= (1 << bits) - 1
    if layout != "<I" and number >> (bits - 1):
        number -= 1 << bits
    struct.pack_into(layout, data, offset, number)


def number(chance):
    value = chance.choice(NUMBERS)
    return value + chance.randint(-2, 2) if chance.random() < 0.5 else value


def mutate(chance, data):
    kind = chance.randrange(6)
    if kind == 0:
        put(data, chance.choice(HEADER_FIELDS), "<q", number(chance))
    elif kind == 1:
        offset, layout = chance.choice(ENTRY_FIELDS)
        start = sif_bytes.TABLE_OFFSET + chance.randrange(5) * sif_bytes.ENTRY_BYTES
        put(data, start + offset, layout, number(chance))
    elif kind == 2:
        data[chance.randrange(128)] = chance.randrange(256)
    elif kind == 3:
        data[sif_bytes.TABLE_OFFSET + chance.randrange(5 * 585)] = chance.randrange(256)
    elif kind == 4:
        data[sif_bytes.PARTITION_OFFSET + chance.randrange(96)] = chance.randrange(256)
    else:
        source, target = (
            sif_bytes.TABLE_OFFSET + chance.randrange(5) * sif_bytes.ENTRY_BYTES for _ in "ab"
        )
        data[target : target + 585] = data[source : source + 585]


def check_layout(found, size):
    for part in (found.primary, *found.overlays):
        assert part.offset >= 128
        assert 0 < part.size_bytes <= size - part.offset
    spans = sorted((p.offset, p.offset + p.size_bytes) for p in (found.primary, *found.overlays))
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start


def outcome(fd, path, size, *, verbs):
    """Read the file in every way; return the name of what happened."""
    try:
        detect.kind_of(os.pread(fd, detect.HEAD_BYTES, 0))
        found = sif.layout(fd, host="amd64")
    except ImageError as error:
        assert "\n" not in str(error)
        result = type(error).__name__
    else:
        check_layout(found, size)
        result = "ok"
    for command in (verb.sif_list, verb.sif_header, verb.sif_list_json) if verbs else ():
        try:
            assert all(line.isprintable() for line in command(path).splitlines())
        except verb.SifCommandFailed as error:
            assert "\n" not in str(error)
    return result


def test_every_outcome_is_an_answer_or_an_error(tmp_path, seeds):
    chance = random.Random(SEED)
    path = tmp_path / "mutant.sif"
    seen: dict[str, int] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("w+b", buffering=0) as stream:
        for turn in range(ITERATIONS):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randint(1, 4)):
                mutate(chance, data)
            if chance.random() < 0.05:
                del data[chance.randrange(len(data)) :]
            os.pwrite(stream.fileno(), data, 0)
            os.truncate(stream.fileno(), len(data))
            result = outcome(stream.fileno(), str(path), len(data), verbs=turn % 4 == 0)
            seen[result] = seen.get(result, 0) + 1
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(seen.values()) == ITERATIONS
    # The mutations reach all sides: good files, broken ones, and good ones without a root.
    assert set(seen) == {"ok", "SifError", "NoRootFileSystem"}
    assert min(seen.values()) > ITERATIONS // 50
    assert grown_bytes < MEMORY_LIMIT_BYTES
