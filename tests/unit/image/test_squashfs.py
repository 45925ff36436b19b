"""Facts of a superblock, packing, and reading single files."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import squashfs
from tests import images
from tests.sif_bytes import SQUASHFS


@pytest.fixture(scope="module")
def bare():
    fd = os.open(images.bare_squashfs(images.shared_folder()), os.O_RDONLY)
    yield fd
    os.close(fd)


def test_who_unpacks_writes_in_one_place(require_root, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    script = "touch in/made; : >/dev/null; touch out/made in/../out/other; test ! -e out/made"
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=tmp_path,
        preexec_fn=lambda: squashfs.write_only_below(str(inside)),
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr.count(b"Read-only")) == (0, 2), done.stderr
    assert [path.name for path in tmp_path.glob("*/*")] == ["made"]
    (outside / "still").touch()


def changed(layout, offset, value):
    data = bytearray(SQUASHFS)
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


def test_facts():
    assert squashfs.parse_superblock(SQUASHFS, image="x") == squashfs.Superblock(
        compression="gzip",
        block_size_bytes=131072,
        used_bytes=4096,
        inodes=1,
        made_s=0,
        version=(4, 0),
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SQUASHFS[:95],
        bytes(96),
        changed("<H", 20, 9),
        changed("<H", 22, 16),
        changed("<H", 22, 63),
        changed("<I", 12, 0),
        changed("<H", 28, 3),
        changed("<Q", 40, 0),
    ],
)
def test_hostile_superblocks(data):
    with pytest.raises(ImageError):
        squashfs.parse_superblock(data, image="x")


@pytest.mark.parametrize("compression", ["zstd", "gzip", "xz", "lz4"])
def test_packing_names_its_compression(tmp_path, compression):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("content")
    target = tmp_path / "out"
    how = squashfs.Packing(compression=compression, block_size_bytes=65536, epoch=7)
    facts = squashfs.pack(str(tmp_path / "tree"), str(target), how)
    assert (facts.compression, facts.block_size_bytes, facts.made_s) == (compression, 65536, 7)
    assert facts.used_bytes <= target.stat().st_size
    fd = os.open(target, os.O_RDONLY)
    try:
        assert squashfs.read_file(fd, 0, "/file", limit_bytes=100) == b"content"
    finally:
        os.close(fd)


def test_what_every_start_reads_is_stored_as_it_is(tmp_path):
    quick = ("etc/group", "etc/passwd", ".singularity.d/runscript")
    packed = ("lib/libc.so.6", "bin/large", "etc/other")
    lines = {name: f"a line of {name}\n".encode() * 20000 for name in (*quick, *packed)}
    for name, content in lines.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    stored = {}
    for quick_start in (True, False):
        how = squashfs.Packing(epoch=images.EPOCH, quick_start=quick_start)
        squashfs.pack(str(tmp_path / "tree"), str(tmp_path / "out"), how)
        image = (tmp_path / "out").read_bytes()
        stored[quick_start] = {name for name, content in lines.items() if content in image}
    assert stored == {True: set(quick), False: set()}


def test_packing_twice_gives_the_same_bytes(tmp_path):
    tree = images.small_tree(images.shared_folder())
    for name in ("a", "b"):
        squashfs.pack(str(tree), str(tmp_path / name), squashfs.Packing(epoch=images.EPOCH))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_many_files_of_one_size_are_not_compared(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    for number in range(20):
        data = bytes([number]) * 70_000
        (tree / str(number)).write_bytes(data)
        (tree / "below" / str(number)).write_bytes(data)
        (tree / f"empty{number}").touch()
    assert squashfs.too_many_alike(str(tree), 39)
    assert not squashfs.too_many_alike(str(tree), 40)
    said, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda argv, **how: said.append(argv) or start(argv, **how)
    )
    sizes = []
    for alike in (False, True):
        monkeypatch.setattr(squashfs, "too_many_alike", lambda tree, alike=alike: alike)
        sizes.append(squashfs.pack(str(tree), str(tmp_path / "out")).used_bytes)
    assert ["-no-duplicates" in argv for argv in said] == [False, False, True]
    assert sizes[0] < sizes[1]


def test_a_full_disk_is_named(tmp_path):
    program = tmp_path / "packer"
    lines = ("Write failed because No space left on device", "FATAL ERROR: Failed to write")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{one}' >&2\n" for one in lines) + "exit 1\n")
    program.chmod(0o755)
    with pytest.raises(squashfs.PackFailed, match=r"No space left on device$"):
        squashfs.pack(str(tmp_path), str(tmp_path / "out"), squashfs.Packing(program=str(program)))


def test_what_is_done_meanwhile_may_fail(tmp_path, monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **b: started.append(start(*a, **b)) or started[-1]
    )
    (tmp_path / "tree").mkdir()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        squashfs.pack(str(tmp_path / "tree"), str(tmp_path / "out"), meanwhile=fail)
    assert started[0].returncode is not None


def test_packing_what_is_not_there(tmp_path):
    with pytest.raises(squashfs.PackFailed) as caught:
        squashfs.pack(str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_missing_tool_is_named():
    with pytest.raises(squashfs.ToolMissing, match="mkdarkness was not found"):
        squashfs.find_tool("mkdarkness")


def test_paths_below_folders(bare):
    paths = squashfs.list_paths(bare, 0, ("/.singularity.d", "/scif/apps", "/none"), depth=6)
    assert "/.singularity.d/env/90-environment.sh" in paths
    assert "/scif/apps/foo/scif/runscript" in paths
    assert not [path for path in paths if path.startswith("/bin")]


def test_reading_is_bounded(bare):
    assert squashfs.read_file(bare, 0, "/etc/test-release", limit_bytes=99) == b"a small tree\n"
    with pytest.raises(squashfs.ReadFailed, match="more than 4 bytes"):
        squashfs.read_file(bare, 0, "/etc/test-release", limit_bytes=4)
    with pytest.raises(squashfs.ReadFailed):
        squashfs.read_file(bare, 0, "/etc/nothing", limit_bytes=4)


def test_a_damaged_image_is_an_error(tmp_path):
    whole = images.bare_squashfs(images.shared_folder()).read_bytes()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    fd = os.open(damaged, os.O_RDONLY)
    try:
        with pytest.raises(squashfs.ReadFailed):
            squashfs.list_paths(fd, 0, ("/.singularity.d",), depth=4)
    finally:
        os.close(fd)
