"""Files of `docker save`: which image, which layers, and what does not fit together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image.docker_archive import Archive
from apptainer_py.image.oci_layers import Unpacker
from tests import docker_images

ONE = docker_images.layer(("file", b"one"), ("gone", b"x"))
TWO = docker_images.layer((".wh.gone", b""), ("mine", b"two"))


def unpacked(path: Path, reference: str = "") -> list[str]:
    archive = Archive(f"{path}{reference}", str(path.parent))
    try:
        root = path.parent / "root"
        root.mkdir()
        unpacker = Unpacker(str(root), owns_all=False)
        archive.unpack(archive.image(), unpacker)
        unpacker.close()
    finally:
        archive.close()
    return sorted(one.name for one in root.iterdir())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reference", ["", ":@0", ":localhost/busybox:1"])
def test_an_image(tmp_path: Path, reference: str, packed: bool) -> None:
    docker_images.image(tmp_path / "d.tar", ONE, TWO, packed=packed)
    assert unpacked(tmp_path / "d.tar", reference) == ["file", "mine"]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_an_archive_with_sparse_files(tmp_path: Path, kind: str) -> None:
    layer = docker_images.layer(("big", bytes(1 << 20)), ("mine", b"two"))
    docker_images.image(tmp_path / "d.tar", layer)
    (tmp_path / "parts").mkdir()
    subprocess.run(["tar", "-xf", "d.tar", "-C", "parts"], cwd=tmp_path, check=True)
    for path in (tmp_path / "parts").rglob("*"):
        if path.is_file():
            subprocess.run(["fallocate", "--dig-holes", path], check=True)
    argv = ["tar", "-cSf", "d.tar", f"--format={kind}", "-C", "parts", "."]
    subprocess.run(argv, cwd=tmp_path, check=True)
    assert (tmp_path / "d.tar").stat().st_size < 1 << 20, "tar knows no holes here"
    assert unpacked(tmp_path / "d.tar") == ["big", "mine"]
    assert (tmp_path / "root/big").read_bytes() == bytes(1 << 20)


def test_a_layer_by_another_name(tmp_path: Path) -> None:
    config = docker_images.configuration(ONE, ONE)
    layers = ["0/layer.tar", "again/layer.tar"]
    docker_images.image(tmp_path / "d.tar", ONE, config=config, Layers=layers)
    assert unpacked(tmp_path / "d.tar") == ["file", "gone"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, ":other:1", "it has no image other:1; it has: localhost/busybox:1"),
    ({}, ":@1", "none of the number 1"),
    ({"rows": []}, "", "it has 0 images"),
    ({"rows": {}}, "", "manifest.json is no list"),
    ({"rows": [3]}, "", "manifest.json is no list"),
    ({"Config": "none.json"}, "", "it has no none.json"),
    ({"Config": "../../etc/passwd"}, "", "it has no ../../etc/passwd"),
    ({"Layers": ["/etc/passwd"]}, "", "it has no /etc/passwd"),
    ({"Layers": []}, "", "as many layers"),
    ({"Layers": [3]}, "", "what is no layer"),
    ({"config": b"[]"}, "", "configuration is no JSON object"),
    ({"config": docker_images.configuration(TWO)}, "", "damaged or incomplete"),
    (
        {"config": docker_images.configuration(ONE).replace(b"amd64", b"s390x")},
        "",
        "could not run on the host's",
    ),
]


@pytest.mark.parametrize(("changes", "reference", "says"), WRONG, ids=[one[2] for one in WRONG])
def test_what_does_not_fit_together(
    tmp_path: Path, changes: dict[str, Any], reference: str, says: str
) -> None:
    docker_images.image(tmp_path / "d.tar", ONE, **changes)
    with pytest.raises(ImageError) as caught:
        unpacked(tmp_path / "d.tar", reference)
    assert says in str(caught.value)


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(ImageError):
        Archive(str(tmp_path / "d.tar"), str(tmp_path))
    with pytest.raises(ImageError, match="no such file"):
        Archive(str(tmp_path / "none.tar"), str(tmp_path))
    assert not [one for one in tmp_path.iterdir() if one.name != "d.tar"]
