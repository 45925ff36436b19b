"""Images that are unpacked to files (T-S11): what is in them writes nowhere else."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.three_flows import run
from tests.own_install import files

# Names of one length each: they lie in the image as they are, and can be exchanged.
DIRECTORY, LINK, TWIN, FILE = b"Q1", b"link-A", b"link-B", b"aQescape"
_ENTRY = b"\1\0\1\0"  # a directory's entry: kind, and length of the name
CRAFTED = {
    "parent": (_ENTRY + DIRECTORY, _ENTRY + b".."),
    "directory-over-a-link": (TWIN, LINK),
    "slash": (FILE, b"a/escape"),
    "link-over-a-directory": (LINK, TWIN),
}


@pytest.fixture(scope="module")
def place(require_root: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="apptainer-py-s11-", dir="/var/tmp") as folder:
        made = Path(folder)
        made.chmod(0o1777)
        (made / "outside").mkdir(mode=0o777)
        (made / "outside").chmod(0o777)
        yield made


@pytest.fixture(scope="module")
def honest(place: Path) -> bytes:
    tree = place / "tree"
    subprocess.run(["cp", "-a", images.small_tree(images.shared_folder()), tree], check=True)
    for folder in (DIRECTORY, TWIN):
        (tree / folder.decode()).mkdir()
        (tree / folder.decode() / "escape").write_text("x\n")
    (tree / LINK.decode()).symlink_to(place / "outside")
    (tree / FILE.decode()).write_text("x\n")
    plain = ["-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet", "-all-root"]
    subprocess.run(["mksquashfs", tree, place / "honest.squashfs", *plain], check=True)
    return (place / "honest.squashfs").read_bytes()


def crafted(place: Path, honest: bytes, name: str) -> Path:
    old, new = CRAFTED[name]
    assert (honest.count(old), len(old)) == (1, len(new))
    made = place / f"{name}.squashfs"
    made.write_bytes(honest.replace(old, new))
    return made


def commands(image: Path, target: Path) -> list[list[str | Path]]:
    return [
        ["exec", "--unsquash", image, "true"],
        ["instance", "start", "--unsquash", image, "apy-test-s11"],
        ["build", "--sandbox", target, image],
    ]


@pytest.mark.parametrize("flow", ["setuid", "root"])
@pytest.mark.parametrize("name", CRAFTED)
def test_s11_an_image_writes_nothing_beside_its_directory(
    product, place: Path, honest: bytes, name: str, flow: str
) -> None:
    image = crafted(place, honest, name)
    before = files(place / "outside")
    beside = sorted(os.listdir(place))
    for words in commands(image, place / "target"):
        with tempfile.TemporaryDirectory(dir=place, prefix="tmp-") as folder:
            os.chmod(folder, 0o1777)
            done = run(product.program, flow, words, env={"APPTAINER_TMPDIR": folder})
            left = list(Path(folder).glob("*/*"))
        assert (done.returncode, done.stdout) == (255, ""), done.stderr
        assert done.stderr.count("FATAL:") == 1
        assert left == []
        assert files(place / "outside") == before
        assert sorted(os.listdir(place)) == beside


def test_s11_the_same_image_unchanged(product, place: Path, honest: bytes) -> None:
    """What is refused above is refused for the one name."""
    image = place / "same.squashfs"
    image.write_bytes(honest)
    done = run(product.program, "setuid", ["exec", "--unsquash", image, "ls", "/Q1"])
    assert (done.returncode, done.stdout) == (0, "escape\n"), done.stderr
