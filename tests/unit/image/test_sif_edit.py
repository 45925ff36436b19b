"""Changes to SIF files: what readers find afterwards, and after any write that was the last."""

from __future__ import annotations

import os

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import sif, sif_edit

NOW = 1_700_000_000


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "x.sif"
    sif_edit.create(str(path), now_s=NOW)
    fd = sif_edit.open_to_change(str(path))
    yield fd
    os.close(fd)


def partition(part_type: int, arch: str = "amd64", **more: object) -> sif_edit.NewObject:
    return sif_edit.NewObject(
        data_type=sif.PARTITION,
        content=b"p" * 100,
        extra=sif_edit.partition_extra(sif.RAW, part_type, arch),
        alignment=4096,
        **more,
    )


def generic(content: bytes, **more: object) -> sif_edit.NewObject:
    return sif_edit.NewObject(data_type=sif.GENERIC, content=content, **more)


def contents(fd: int) -> dict[int, bytes]:
    return {e.id: sif.read_object(fd, e, limit_bytes=1 << 20) for e in sif.read_descriptors(fd)}


def test_objects_are_found_again_and_numbers_are_used_again(image):
    assert sif_edit.add(image, [generic(b"one"), partition(2, group=1)], now_s=NOW) == (1, 2)
    header = sif.read_header(image)
    assert (header.arch, header.descriptors_free) == (b"02", 46)
    assert header.data_offset + header.data_bytes == os.fstat(image).st_size
    assert sif.primary_partition(image, host="amd64").offset % 4096 == 0
    sif_edit.delete(image, 1, now_s=NOW)
    assert sif_edit.add(image, [generic(b"again", link=1, link_is_group=True)], now_s=NOW) == (1,)
    assert contents(image) == {1: b"again", 2: b"p" * 100}
    first = sif.find_object(sif.read_descriptors(image), 1)
    assert (first.link, first.link_is_group) == (1, True)


def test_the_primary_partition_is_one(image):
    sif_edit.add(image, [partition(2), partition(1, "arm64"), partition(3)], now_s=NOW)
    with pytest.raises(ImageError, match="already contains a primary"):
        sif_edit.add(image, [partition(2)], now_s=NOW)
    sif_edit.set_primary(image, 2, now_s=NOW)
    parts = [sif.partition_facts(entry)[1] for entry in sif.read_descriptors(image)]
    assert (parts, sif.read_header(image).arch) == ([1, 2, 3], b"04")
    with pytest.raises(ImageError, match="not a system partition"):
        sif_edit.set_primary(image, 3, now_s=NOW)
    sif_edit.delete(image, 2, now_s=NOW)
    assert sif.read_header(image).arch == b"00"


def test_a_full_table_and_a_damaged_header_change_nothing(image):
    sif_edit.add(image, [generic(b"x")] * 48, now_s=NOW)
    before = os.pread(image, 1 << 20, 0)
    with pytest.raises(ImageError, match="no descriptor available"):
        sif_edit.add(image, [generic(b"y")], now_s=NOW)
    assert os.pread(image, 1 << 20, 0) == before
    sif_edit.delete(image, 1, now_s=NOW)
    os.pwrite(image, (1 << 60).to_bytes(8, "little"), 120)
    with pytest.raises(ImageError, match="sizes"):
        sif_edit.add(image, [generic(b"y")], now_s=NOW)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs afterwards."""


CHANGES = {
    "add": lambda fd: sif_edit.add(fd, [generic(b"new" * 50), generic(b"more")], now_s=NOW + 1),
    "delete": lambda fd: sif_edit.delete(fd, 2, now_s=NOW + 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_write_is_the_last_nothing_is_lost(image, monkeypatch, name):
    sif_edit.add(image, [generic(b"old"), generic(b"older"), partition(2)], now_s=NOW)
    start = os.pread(image, 1 << 20, 0)
    write, cut, left = os.pwrite, os.ftruncate, [0]

    def counted(fd, data, at):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return write(fd, data, at)

    def refused(fd, size):
        if left[0] == 0:
            raise Killed
        cut(fd, size)

    monkeypatch.setattr(sif_edit.os, "pwrite", counted)
    monkeypatch.setattr(sif_edit.os, "ftruncate", refused)
    seen = set()
    for last in range(40):
        cut(image, 0)
        write(image, start, 0)
        left[0] = last
        try:
            CHANGES[name](image)
        except Killed:
            ended = False
        else:
            ended = True
        found = contents(image)
        assert found[1] == b"old"
        assert found[3] == b"p" * 100
        assert set(found.values()) <= {b"old", b"older", b"p" * 100, b"new" * 50, b"more"}
        header = sif.read_header(image)
        end = header.data_offset + header.data_bytes
        assert all(e.offset + e.size_bytes <= end for e in sif.read_descriptors(image))
        seen.add(len(found))
        if ended:
            break
    else:
        pytest.fail("the change never ended")
    assert len(seen) > 1
