"""Layers on their way through the packer: many files of one size."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from apptainer_py.builds import streaming
from apptainer_py.image import squashfs
from apptainer_py.image.blobs import Blob, Digest
from apptainer_py.image.oci_layout import Object
from apptainer_py.image.oci_stream import Merger, Owners, TooManyAlike
from apptainer_py.image.tar_stream import BLOCK, FILE, Entry


def layer_of(path: Path, number: int, size: int) -> Object:
    """Write a layer of files, two of each content."""
    head = tarfile.TarInfo()
    with open(path, "wb") as file:
        for at in range(number):
            head.name, head.size = f"d{at // 1000}/{at}", size
            data = (at // 2).to_bytes(8, "little").ljust(size, b"x")
            file.write(head.tobuf(tarfile.GNU_FORMAT) + data + bytes(-size % BLOCK))
        file.write(bytes(2 * BLOCK))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Object(digest=f"sha256:{digest}", size_bytes=path.stat().st_size)


def packed(folder: Path, number: int, size: int) -> tuple[int, list[str]]:
    """Stream a layer; return the image's number of files, and what was left in the root."""
    layer = layer_of(folder / "layer.tar", number, size)
    root = folder / "root"
    root.mkdir()

    def opened(wanted: Object) -> Blob:
        fd = os.open(folder / "layer.tar", os.O_RDONLY)
        return Blob(fd, 0, wanted.size_bytes, Digest(wanted.digest))

    how = squashfs.Packing(level=1)
    plan = streaming.Plan(target=str(folder / "image"), how=how, now_s=0)
    made = streaming.stream(plan, [layer], opened, str(root))
    assert made is not None
    made.finish(str(root))
    done = subprocess.run(
        ["unsquashfs", "-ll", str(folder / "image")], capture_output=True, check=True
    )
    lines = done.stdout.splitlines()
    return sum(line.startswith(b"-") for line in lines), os.listdir(root)


@pytest.mark.parametrize(("number", "starts"), [(40, 1), (41, 2)])
def test_files_of_one_size_are_compared_while_they_are_few(
    number: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, start = [], subprocess.Popen

    def told(argv: list[str], **how: object) -> subprocess.Popen[bytes]:
        said.append("-no-duplicates" in argv)
        return start(argv, **how)

    monkeypatch.setattr(squashfs, "ALIKE_MOST", 40)
    monkeypatch.setattr(subprocess, "Popen", told)
    assert packed(tmp_path, number, 700)[0] == number
    # The last is unsquashfs.
    assert said[:-1] == [False, True][:starts]


def test_the_merger_counts_each_size() -> None:
    merger = Merger(lambda _data: None, Owners(), (), alike_most=squashfs.ALIKE_MOST)
    entry = Entry(
        kind=FILE, name=b"", link=b"", mode=0o644, uid=0, gid=0, size_bytes=3, modified_ns=0
    )
    for _ in range(squashfs.ALIKE_MOST):
        merger._count_alike(entry)
        merger._count_alike(entry.replace(size_bytes=0))
    merger._count_alike(entry.replace(size_bytes=4))
    with pytest.raises(TooManyAlike):
        merger._count_alike(entry)


@pytest.mark.long
def test_200_000_files_of_one_size(tmp_path: Path) -> None:
    """Compared with each other, they would keep the packer busy for minutes."""
    assert packed(tmp_path, 200_000, 200)[0] == 200_000
