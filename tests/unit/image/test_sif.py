"""The reader of SIF files, on good ones and on hostile ones (security.md T-I07)."""

from __future__ import annotations

import os
import struct

import pytest

from apptainer_py.image import sif
from tests import images, sif_bytes
from tests.sif_bytes import PARTITION_OFFSET, SQUASHFS, partition

BIG = (1 << 63) - 1


@pytest.fixture
def opened(tmp_path):
    made = []

    def write(content):
        path = tmp_path / f"{len(made)}.sif"
        path.write_bytes(content)
        made.append(os.open(path, os.O_RDONLY))
        return made[-1]

    yield write
    for fd in made:
        os.close(fd)


def reason_of(fd):
    with pytest.raises(sif.SifError) as caught:
        sif.layout(fd, host="amd64")
    assert caught.value.exit_code == 255
    return caught.value.facts["reason"]


def test_the_primary_partition_is_found_by_its_descriptor(opened):
    fd = opened(
        sif_bytes.sif(
            [
                sif_bytes.entry(sif_bytes.GENERIC_JSON, 1, 32176, 10, name=b"x.json"),
                partition(2, part=1),
                partition(3, part=2),
            ]
        )
    )
    assert sif.primary_partition(fd, host="amd64") == sif.Partition(
        id=3,
        group=1,
        offset=PARTITION_OFFSET,
        size_bytes=len(SQUASHFS),
        fs="squashfs",
        arch="amd64",
        part_type="primary-system",
    )


@pytest.mark.parametrize(
    "launch", [b"", b"#!/bin/other\n", b"\xff" * 32, b"hsqs", b"#!/bin/sh\nrm"]
)
def test_any_launcher_line_will_do(opened, launch):
    assert sif.primary_partition(opened(sif_bytes.sif(launch=launch)), host="amd64").id == 3


def test_unused_descriptors_do_not_count(opened):
    fd = opened(sif_bytes.sif([partition(1, used=0), partition(3)]))
    assert [entry.id for entry in sif.read_descriptors(fd)] == [3]
    assert sif.primary_partition(fd, host="amd64").id == 3


def test_overlays_of_the_same_group_are_reported(opened):
    content = SQUASHFS * 3
    entries = [
        partition(1),
        partition(2, PARTITION_OFFSET + 4096, part=4),
        partition(3, PARTITION_OFFSET + 8192, part=4, group=0xF0000002),
    ]
    found = sif.layout(opened(sif_bytes.sif(entries, content=content)), host="amd64")
    assert [part.id for part in found.overlays] == [2]
    assert found.overlays[0].part_type == "overlay"


@pytest.mark.parametrize(
    ("number", "name"), [(4, "raw"), (5, "encrypted-squashfs"), (6, "gocryptfs")]
)
def test_other_file_systems_are_named(opened, number, name):
    fd = opened(sif_bytes.sif([partition(fs=number)]))
    assert sif.primary_partition(fd, host="amd64").fs == name


@pytest.mark.parametrize("number", [0, 3, 7, -1, 1 << 30])
def test_unknown_file_systems_are_refused(opened, number):
    assert "unknown filesystem type" in reason_of(opened(sif_bytes.sif([partition(fs=number)])))


@pytest.mark.parametrize("total", [-1, -(1 << 63), 4097, 1 << 31, BIG])
def test_impossible_counts(opened, total):
    reason = reason_of(opened(sif_bytes.sif(total=total, table_bytes=BIG)))
    assert "is not between 0 and 4096" in reason


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (-4096, "negative offset"),
        (0, "inside the header"),
        (127, "inside the header"),
        (BIG, "reading descriptors"),
        (1 << 40, "EOF"),
    ],
)
def test_impossible_table_offsets(opened, offset, words):
    assert words in reason_of(opened(sif_bytes.sif(table_offset=offset)))


@pytest.mark.parametrize("size", [-1, 0, 584, 48 * 585 - 1])
def test_a_table_larger_than_it_says(opened, size):
    assert "EOF" in reason_of(opened(sif_bytes.sif(table_bytes=size)))


@pytest.mark.parametrize("length", [0, 1, 127, 128, 4096, 32175])
def test_a_file_cut_short(opened, length):
    assert "EOF" in reason_of(opened(sif_bytes.sif()[:length]))


@pytest.mark.parametrize("magic", [b"SIF_MAGIX", b"", b"SIF_MAGICX"])
def test_another_magic(opened, magic):
    assert reason_of(opened(sif_bytes.sif(magic=magic))) == "invalid SIF magic"


@pytest.mark.parametrize("version", [b"02", b"1", b"", b"\xff\xff\xff"])
def test_another_version(opened, version):
    assert reason_of(opened(sif_bytes.sif(version=version))) == "incompatible SIF version"


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-1, 4096),
        (PARTITION_OFFSET, -1),
        (PARTITION_OFFSET, 4097),
        (PARTITION_OFFSET, BIG),
        (BIG, BIG),
        (BIG, 4096),
        (1 << 40, 4096),
        (PARTITION_OFFSET + 4096, 1),
        (0, 4096),
        (127, 4096),
        (4096, 4096),
        (PARTITION_OFFSET, 0),
        (PARTITION_OFFSET, 95),
        (PARTITION_OFFSET, 4000),
    ],
)
def test_partitions_outside_of_the_file_or_over_its_tables(opened, offset, size):
    assert reason_of(opened(sif_bytes.sif([partition(3, offset, size)])))


def test_an_incomplete_file_says_that_it_is(opened):
    assert "incomplete or damaged" in reason_of(opened(sif_bytes.sif()[:-1]))


def test_a_partition_smaller_than_its_squashfs(opened):
    content = bytearray(SQUASHFS)
    struct.pack_into("<Q", content, 40, 1 << 30)
    assert "bytes of a squashfs" in reason_of(opened(sif_bytes.sif(content=bytes(content))))


def test_a_partition_without_its_magic(opened):
    reason = reason_of(opened(sif_bytes.sif(content=bytes(4096))))
    assert reason.endswith("while parsing squashfs super block: not a valid squashfs image")


def test_an_overlay_over_the_root_is_refused(opened):
    content = SQUASHFS + bytes(4096)
    over = partition(4, PARTITION_OFFSET + 4000, 100, fs=4, part=4)
    assert "overlap" in reason_of(opened(sif_bytes.sif([partition(), over], content=content)))


@pytest.mark.parametrize("entries", [[], [partition(part=1)], [partition(part=3)]])
def test_no_primary_partition(opened, entries):
    fd = opened(sif_bytes.sif(entries))
    with pytest.raises(sif.NoRootFileSystem) as caught:
        sif.layout(fd)
    assert str(caught.value).startswith("while getting root filesystem in /")
    assert str(caught.value).endswith(": no root filesystem found")


def test_two_primary_partitions(opened):
    fd = opened(sif_bytes.sif([partition(1), partition(2)]))
    with pytest.raises(sif.NoRootFileSystem, match="2 primary system partitions"):
        sif.layout(fd)


def test_another_architecture_is_refused_with_apptainers_text(opened):
    fd = opened(sif_bytes.sif([partition(arch=b"11\0")]))
    reason = "the image's architecture (s390x) could not run on the host's (amd64)"
    assert reason_of(fd) == reason
    assert sif.primary_partition(fd, host="s390x").arch == "s390x"


@pytest.mark.parametrize(
    ("code", "name"), [(b"01\0", "386"), (b"00\0", "unknown"), (b"77\0", "unknown")]
)
def test_architectures_that_run_here(opened, code, name):
    fd = opened(sif_bytes.sif([partition(arch=code)]))
    assert sif.primary_partition(fd, host="amd64").arch == name


def test_objects_are_found_by_number(opened):
    fd = opened(sif_bytes.sif([partition(1), partition(2), partition(2)]))
    objects = sif.read_descriptors(fd)
    assert sif.find_object(objects, 1).id == 1
    for number, words in ((0, "invalid"), (2, "multiple"), (9, "not found")):
        with pytest.raises(sif.ImageError, match=words):
            sif.find_object(objects, number)
    with pytest.raises(sif.ImageError, match="no objects"):
        sif.find_object((), 1)


def test_an_object_is_read_up_to_a_limit(opened):
    fd = opened(sif_bytes.sif())
    (entry,) = sif.read_descriptors(fd)
    assert sif.read_object(fd, entry, limit_bytes=4096) == SQUASHFS
    with pytest.raises(sif.SifError, match="the limit is 4095"):
        sif.read_object(fd, entry, limit_bytes=4095)
    with pytest.raises(sif.SifError, match="ends at byte"):
        sif.read_object(fd, entry.replace(size_bytes=1 << 60), limit_bytes=1 << 62)


def test_a_directory_is_no_sif(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert "is a directory" in reason_of(fd)
    finally:
        os.close(fd)


def test_a_file_of_the_real_apptainer():
    if not images.have_real_apptainer():
        pytest.skip("did not run: there is no Apptainer to build an image with")
    path = images.real_sif(images.shared_folder())
    fd = os.open(path, os.O_RDONLY)
    try:
        found = sif.layout(fd)
        names = [entry.name for entry in sif.read_descriptors(fd)]
    finally:
        os.close(fd)
    assert names == [b"", b"inspect-metadata.json", b""]
    assert (found.primary.id, found.primary.fs, found.overlays) == (3, "squashfs", ())
    assert found.primary.offset + found.primary.size_bytes == path.stat().st_size
