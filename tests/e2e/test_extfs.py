"""ext3 images as roots, overlays and sources of binds, in the three flows."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, images
from tests.e2e import three_flows
from tests.own_install import Household, Installation, read_until


@pytest.fixture(params=three_flows.FLOWS)
def flow(request) -> str:
    return str(request.param)


@pytest.fixture
def owner(own: Installation, flow: str) -> int:
    return 0 if flow == "root" else own.user.pw_uid


@pytest.fixture
def place(user_tmp: Path, owner: int) -> Iterator[Path]:
    user_tmp.chmod(0o755)
    os.chown(user_tmp, owner, owner)
    yield user_tmp
    shutil.rmtree(user_tmp, ignore_errors=True)


@pytest.fixture
def run(own: Installation, flow: str, place: Path, sif: Path):
    def launch(*words: str | Path, script: str = "true", image: Path = sif):
        return three_flows.run(
            own.program, flow, ["exec", *words, image, "sh", "-c", script], cwd=place
        )

    return launch


@pytest.fixture
def overlay(place: Path, owner: int) -> Path:
    image = extfs_images.extfs(place / "overlay.img", owner=owner)
    os.chown(image, owner, owner)
    return image


def real_sif(sif: Path, place: Path, part: Path, part_type: str) -> Path:
    """Return a copy of a SIF file with one more partition, added by the real Apptainer."""
    target = place / f"{part_type}.sif"
    shutil.copy(sif, target)
    command = ["apptainer", "sif", "add", "--datatype", "4", "--parttype", part_type]
    command += ["--partfs", "2", "--partarch", "2", "--groupid", "1", target, part]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_an_overlay_keeps_what_is_written(run, overlay):
    done = run("--overlay", overlay, script="echo kept > /kept; mkdir -p /a/b; echo x > /a/b/c")
    assert (done.returncode, done.stderr) == (0, "")
    assert extfs_images.is_clean(overlay)
    done = run("--overlay", f"{overlay}:ro", script="cat /kept /a/b/c; touch /new")
    assert done.stdout == "kept\nx\n"
    assert done.returncode != 0
    done = run("--overlay", overlay, script="rm -r /a /kept; ls /a /kept")
    assert done.returncode != 0
    assert extfs_images.is_clean(overlay)
    done = run("--overlay", overlay, script="ls /a /kept")
    assert done.stdout == ""


def test_two_launches_one_after_another_do_not_meet(run, overlay):
    for number in range(3):
        done = run("--overlay", overlay, script=f"ls /{number - 1} && touch /{number}; touch /0")
        assert "in use" not in done.stderr
    assert run("--overlay", f"{overlay}:ro", script="ls /2").returncode == 0


def test_a_root(run, place, owner):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "mine").mkdir()
    os.chown(tree / "mine", owner, owner)
    image = extfs_images.extfs(place / "root.img", tree)
    os.chown(image, owner, owner)
    done = run(image=image, script="cat /etc/test-release; touch /x")
    assert done.stdout == "a small tree\n"
    assert done.returncode != 0
    done = run("-w", image=image, script="echo w > /mine/w && cat /mine/w")
    assert done.stdout == "w\n", done.stderr
    assert extfs_images.is_clean(image)
    done = run(image=image, script="cat /mine/w")
    assert done.stdout == "w\n", done.stderr


def test_an_image_without_write_permission(run, overlay, flow):
    overlay.chmod(0o444)
    done = run("--overlay", overlay, script="touch /new")
    if flow == "root":
        assert done.returncode == 0, done.stderr
    else:
        said = f"Overlay image {overlay} is not writable, proceeding with read-only"
        assert said in done.stderr
        assert done.returncode != 0


def test_what_is_written_to_is_locked(own, home: Household, flow, place, overlay, sif):
    words = ["exec", *(["-u"] if flow == "userns" else []), "--overlay", overlay, sif]
    how = {} if flow == "root" else own.identity()
    process = home.adopt(
        subprocess.Popen(
            [own.program, *words, "sh", "-c", "echo on; read line"], env=own.environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=place, **how,
        )
    )  # fmt: skip
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"on\n")
    for option, how_used in (
        ("", "writing, currently in use by another process"),
        (":ro", "reading, currently in use for writing by another process"),
    ):
        line = ["exec", "--overlay", f"{overlay}{option}", sif, "true"]
        done = three_flows.run(own.program, flow, line, cwd=place)
        assert done.returncode == 255
        assert done.stderr == (
            f"FATAL:   while loading overlay images: failed to open overlay image {overlay}: while "
            f"locking ext3 partition from {overlay}: can't open {overlay} for {how_used}\n"
        )
    process.communicate(b"\n", timeout=20)
    assert process.returncode == 0
    line = ["exec", "--overlay", overlay, sif, "true"]
    assert three_flows.run(own.program, flow, line, cwd=place).returncode == 0


def test_binds_from_images(run, place, overlay, owner, flow):
    tree = place / "data"
    (tree / "dir").mkdir(parents=True)
    (tree / "dir/file").write_text("data\n")
    for path in (tree, tree / "dir", tree / "dir/file"):
        os.chown(path, owner, owner)
    data = extfs_images.extfs(place / "data.img", tree)
    os.chown(data, owner, owner)
    done = run("-B", f"{data}:/no/such/place:image-src=/dir", script="cat /no/such/place/file")
    assert (done.stdout, done.stderr) == ("data\n", "")
    done = run("-B", f"{data}:/file:image-src=/dir/file,ro", script="cat /file; echo x > /file")
    assert done.stdout == "data\n"
    assert done.returncode != 0
    spec = f"type=bind,src={data},dst=/d,image-src=/"
    done = run("--mount", spec, script="echo new > /d/dir/new; cat /d/dir/new")
    assert (done.stdout, done.stderr) == ("new\n", "")
    assert extfs_images.is_clean(data)
    squash = images.bare_squashfs(images.shared_folder())
    done = run("-B", f"{squash}:/a:image-src=/etc,{squash}:/b:id=1", script="ls /a /b")
    assert "test-release" in done.stdout
    assert ".singularity.d" in done.stdout or "bin" in done.stdout


REFUSED = {
    "{squash}:/a:image-src=/nope": "container creation failed: /nope doesn't exist in image "
    "{squash}",
    "{sif}:/a:image-src=/": "container creation failed: no data partition found in {sif}",
    "{sif}:/a:id=7": "container creation failed: no data partition found in {sif}",
    "{sif}:/a:id=0": "container creation failed: id number must be greater than 0",
    "{tree}:/a:image-src=/": "container creation failed: could not use {tree} for image binding: "
    "not supported image format",
    "/nonexistent:/a:image-src=/": "while loading data bind images: failed to load data image "
    "/nonexistent: failed to retrieve path for /nonexistent: lstat /nonexistent: no such file or "
    "directory",
}


@pytest.mark.parametrize("spec", list(REFUSED))
def test_binds_that_cannot_be(run, sif, spec):
    paths = {
        "sif": sif,
        "squash": images.bare_squashfs(images.shared_folder()),
        "tree": images.small_tree(images.shared_folder()),
    }
    done = run("-B", spec.format(**paths))
    assert done.returncode == 255
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert fatal == [f"FATAL:   {REFUSED[spec].format(**paths)}"]


def test_a_partition_of_a_sif_file(run, place, sif, overlay, owner):
    made = real_sif(sif, place, overlay, "4")
    os.chown(made, owner, owner)
    done = run("-w", image=made, script="echo kept > /kept")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(image=made, script="cat /kept; touch /new")
    assert done.stdout == "kept\n"
    assert done.returncode != 0
    done = run("--overlay", f"{made}:ro", script="cat /kept")
    assert done.stdout == "kept\n"
    assert run(script="cat /kept").returncode != 0
    data = real_sif(sif, place, overlay, "3")
    os.chown(data, owner, owner)
    done = run("-B", f"{data}:/d:image-src=/", script="ls -d /d/upper")
    assert done.stdout == "/d/upper\n", done.stderr
