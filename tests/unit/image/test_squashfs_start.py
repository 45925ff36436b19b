"""An image is the same one after its start was made quick."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from apptainer_py.image import squashfs, squashfs_start
from tests import images

LOADER, LIBRARY = "lib64/ld-linux-x86-64.so.2", "lib/libc.so.6"


def words(seed: int, size: int) -> bytes:
    """Return text that zstd makes smaller, but not to nothing."""
    chosen = random.Random(seed)
    known = [chosen.randbytes(6).hex() for _ in range(5000)]
    return " ".join(chosen.choices(known, k=size // 13)).encode()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("start") / "tree"
    for number in range(40):
        (place / f"usr/share/{number}").mkdir(parents=True)
        (place / f"usr/share/{number}/text").write_bytes(words(number, 700_000))
        (place / f"usr/share/{number}/small").write_bytes(words(number, 3_000))
        (place / f"usr/share/{number}/link").symlink_to(f"../{number}/text")
    for name, size in ((LOADER, 60_000), (LIBRARY, 150_000), ("bin/bash", 300_000)):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(words(size, 4 * size))
    (place / "usr/copy").write_bytes((place / LIBRARY).read_bytes())
    os.link(place / LIBRARY, place / "usr/hard")
    os.mkfifo(place / "pipe")
    with (place / "usr/sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(words(7, 300_000))
    os.setxattr(place / "usr/copy", "user.kept", b"value")
    return place


def pack(tree: Path, folder: Path, **how: object) -> Path:
    packed = folder / "packed"
    squashfs.pack(str(tree), str(packed), squashfs.Packing(epoch=images.EPOCH, **how))  # type: ignore[arg-type]
    return packed


def arranged(packed: Path, folder: Path) -> tuple[Path, list[squashfs_start.Piece]]:
    target = folder / "arranged"
    with packed.open("rb") as file:
        pieces = squashfs_start.rearranged(file.fileno())
        target.write_bytes(b"".join(squashfs_start.chunks(file.fileno(), pieces)))
    return target, pieces


def listed(image: Path) -> str:
    argv = ["unsquashfs", "-lln", str(image)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def content(image: Path, name: str) -> bytes:
    argv = ["unsquashfs", "-no-progress", "-cat", str(image), name]
    return subprocess.run(argv, capture_output=True, check=True).stdout


def test_the_image_is_the_same_one(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path)
    target, pieces = arranged(packed, tmp_path)
    assert len(pieces) > 4
    assert listed(target) == listed(packed)
    out = tmp_path / "out"
    argv = ["unsquashfs", "-no-progress", "-quiet", "-d", str(out), str(target)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert (out / path.relative_to(tree)).read_bytes() == path.read_bytes(), path
    assert os.getxattr(out / "usr/copy", "user.kept") == b"value"


def test_what_every_start_reads_is_stored_as_it_is(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path)
    target, _ = arranged(packed, tmp_path)
    before, after = packed.read_bytes(), target.read_bytes()
    first = (tree / LOADER).read_bytes()[:131072]
    assert first not in before
    assert first in after
    assert (tree / "usr/share/1/text").read_bytes()[:1000] not in after
    # Only a part of what is wanted fits.
    assert len(before) < len(after) <= len(before) * 1.011 + 4096
    assert (tree / "bin/bash").read_bytes()[:131072] not in after


@pytest.mark.parametrize(
    "how", [{"compression": "gzip", "level": None}, {"quick_start": False}, {"level": 1}]
)
def test_another_image_stays_as_it_is_or_right(
    tree: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    packed = pack(tree, tmp_path, **how)
    target, pieces = arranged(packed, tmp_path)
    if how != {"level": 1}:
        assert len(pieces) == 1
        assert target.read_bytes() == packed.read_bytes()
    assert content(target, LIBRARY) == (tree / LIBRARY).read_bytes()


def test_damaged_images_end_in_a_copy_or_keep_what_nobody_reads(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path)
    data = packed.read_bytes()
    grown = arranged(packed, tmp_path)[0].stat().st_size - len(data)
    chosen = random.Random(3)
    ends = set()
    for _ in range(20):
        broken = bytearray(data)
        for _ in range(3):
            broken[chosen.choice((chosen.randrange(96), -chosen.randrange(1, 20000)))] ^= 0x41
        path = tmp_path / "broken"
        path.write_bytes(broken)
        result = arranged(path, tmp_path)[0].read_bytes()
        ends.add((result == broken, len(result) - len(broken)))
    assert ends == {(True, 0), (False, grown)}
