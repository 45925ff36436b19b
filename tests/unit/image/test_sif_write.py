"""The writer of SIF files: read by us, and read and run by the real Apptainer."""

from __future__ import annotations

import json
import os

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import sif, sif_write
from tests import images, sif_bytes

DEFFILE = b"Bootstrap: scratch\n"
METADATA = b'{"data":{"attributes":{"labels":{"A":"b"}}},"type":"container"}'


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "root.squashfs"
    path.write_bytes(sif_bytes.SQUASHFS)
    return str(path)


def write(target, packed, **facts):
    sif_write.write_sif(str(target), packed, **{"arch": "amd64", **facts})
    return target.read_bytes()


def test_what_is_written_can_be_read(tmp_path, packed):
    target = tmp_path / "image.sif"
    write(target, packed, deffile=DEFFILE, metadata=METADATA, epoch=12345)
    fd = os.open(target, os.O_RDONLY)
    try:
        header = sif.read_header(fd)
        objects = sif.read_descriptors(fd)
        found = sif.layout(fd, host="amd64")
        contents = [sif.read_object(fd, entry, limit_bytes=1 << 20) for entry in objects]
    finally:
        os.close(fd)
    assert header.launch == b"#!/usr/bin/env run-singularity\n"
    assert (header.descriptors_total, header.descriptors_free) == (48, 45)
    assert (header.created_s, header.modified_s) == (12345, 12345)
    assert header.data_offset + header.data_bytes == target.stat().st_size
    assert [entry.data_type for entry in objects] == [0x4001, 0x4006, 0x4004]
    assert [(entry.id, entry.group) for entry in objects] == [(1, 1), (2, 1), (3, 1)]
    assert objects[1].name == b"inspect-metadata.json"
    assert contents == [DEFFILE, METADATA, sif_bytes.SQUASHFS]
    assert found.primary.offset % 4096 == 0
    assert found.primary.arch == "amd64"


def test_objects_can_be_left_out(tmp_path, packed):
    target = tmp_path / "image.sif"
    write(target, packed)
    fd = os.open(target, os.O_RDONLY)
    try:
        assert [entry.data_type for entry in sif.read_descriptors(fd)] == [0x4004]
        assert sif.read_header(fd).created_s > 1_600_000_000
    finally:
        os.close(fd)


def test_same_input_same_bytes(tmp_path, packed):
    facts = {"deffile": DEFFILE, "metadata": METADATA, "epoch": 1}
    first = write(tmp_path / "a.sif", packed, **facts)
    assert write(tmp_path / "b.sif", packed, **facts) == first
    other = write(tmp_path / "c.sif", packed, **{**facts, "deffile": b"x"})
    assert other[48:64] != first[48:64], "another content has another identity"


def test_without_an_epoch_the_identity_is_random(tmp_path, packed):
    first, second = (write(tmp_path / name, packed)[48:64] for name in ("a.sif", "b.sif"))
    assert first != second
    for identity in (first, second):
        assert identity[6] >> 4 == 4
        assert identity[8] >> 6 == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0, 0o755)])
def test_the_umask_is_heeded(tmp_path, packed, mask, mode):
    old = os.umask(mask)
    try:
        write(tmp_path / "image.sif", packed)
    finally:
        os.umask(old)
    assert (tmp_path / "image.sif").stat().st_mode & 0o7777 == mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, packed, monkeypatch):
    target = tmp_path / "image.sif"
    target.write_text("old")
    before = sorted(tmp_path.iterdir())

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(target, packed)
    assert target.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_only_a_squashfs_is_wrapped(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"not squashfs" * 100)
    with pytest.raises(ImageError, match="not a valid squashfs image"):
        write(tmp_path / "image.sif", str(other))
    assert not (tmp_path / "image.sif").exists()


def test_only_architectures_with_a_code(tmp_path, packed):
    with pytest.raises(ImageError, match="no code for the architecture vax"):
        write(tmp_path / "image.sif", packed, arch="vax")


@pytest.mark.parity
def test_the_real_apptainer_reads_and_runs_it():
    if not images.have_real_apptainer():
        pytest.skip("did not run: there is no Apptainer")
    path = images.own_sif(images.shared_folder())
    listed = images.real_apptainer("sif", "list", path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split("|")[-1] for line in listed.stdout.splitlines()[3:]] == [
        "Def.FILE",
        "JSON.Generic",
        "FS (Squashfs/*System/amd64)",
    ]
    shown = images.real_apptainer("inspect", "--json", path)
    assert json.loads(shown.stdout)["data"]["attributes"]["labels"]["Version"] == "1.0"
    fuse = os.stat("/dev/fuse").st_mode
    if fuse & 0o006 != 0o006:
        pytest.skip("did not run to the end: /dev/fuse is closed to ordinary users")
    ran = images.real_apptainer("exec", path, "cat", "/etc/test-release")
    assert (ran.returncode, ran.stdout) == (0, "a small tree\n"), ran.stderr
