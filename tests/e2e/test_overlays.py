"""`--overlay`, looked at from inside the container, in the three flows."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e import three_flows
from tests.own_install import Installation

FLOWS = three_flows.FLOWS


@pytest.fixture(params=FLOWS)
def flow(request) -> str:
    return str(request.param)


@pytest.fixture
def place(own: Installation, user_tmp: Path, flow: str) -> Iterator[Path]:
    """A directory of who runs the flow, with overlay directories a, b and e."""
    for name in ("a/upper", "b", "e"):
        (user_tmp / name).mkdir(parents=True)
    (user_tmp / "a/upper/both").write_text("a\n")
    (user_tmp / "a/upper/only-a").write_text("a\n")
    (user_tmp / "b/both").write_text("b\n")
    user_tmp.chmod(0o755)
    if flow != "root":
        for path in (user_tmp, *user_tmp.rglob("*")):
            os.chown(path, own.user.pw_uid, own.user.pw_gid)
    yield user_tmp
    shutil.rmtree(user_tmp, ignore_errors=True)


@pytest.fixture
def run(own: Installation, flow: str, place: Path, sif: Path):
    def launch(*words: str | Path, script: str = "true", image: Path = sif):
        line = ["exec", *words, image, "sh", "-c", script]
        return three_flows.run(own.program, flow, line, cwd=place)

    return launch


def squashed(place: Path) -> Path:
    """A squashfs file with one file in it."""
    (place / "packed").mkdir()
    (place / "packed/both").write_text("squashfs\n")
    (place / "packed").chmod(0o755)
    target = place / "layer.sqfs"
    command = ["mksquashfs", place / "packed", target, "-quiet", "-no-progress", "-all-root"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def test_the_last_one_lies_on_top(run):
    done = run("--overlay", "a:ro", "--overlay", "b:ro", script="cat /both /only-a")
    assert (done.returncode, done.stdout, done.stderr) == (0, "b\na\n", "")
    done = run("--overlay", "b:ro,a:ro", script="cat /both")
    assert done.stdout == "a\n"


def test_a_directory_takes_what_is_written(run, place, own, flow):
    script = "echo kept > /kept && mkdir -p /d/e && rm -r /d && mkdir /d && touch /d/f"
    done = run("--overlay", "e", script=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "e/upper/kept").read_text() == "kept\n"
    owner = 0 if flow == "root" else own.user.pw_uid
    assert (place / "e/upper/kept").stat().st_uid == owner
    assert run("--overlay", "e", script="cat /kept; ls /d").stdout == "kept\nf\n"
    assert run("--overlay", "e:ro", script="cat /kept; ls /d").stdout == "kept\nf\n"
    assert run("--overlay", "e:ro", script="echo x > /kept").returncode != 0
    assert run("--overlay", "e", script="rm /kept /d/f").returncode == 0
    assert run(script="ls /kept").returncode != 0


def test_a_file_of_the_image_can_be_changed_by_its_owner(run, place, own, flow):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    owner = 0 if flow == "root" else own.user.pw_uid
    (tree / "mine").write_text("old\n")
    os.chown(tree / "mine", owner, owner and own.user.pw_gid)
    done = run("--overlay", "e", script="echo new >> /mine; cat /mine", image=tree)
    assert (done.stdout, done.stderr) == ("old\nnew\n", "")
    assert (tree / "mine").read_text() == "old\n"
    assert run("--overlay", "e", script="rm /mine; ls /mine", image=tree).returncode != 0


def test_root_changes_files_of_others(own, place, sif, flow):
    if flow != "root":
        pytest.skip("only root may")
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "theirs").write_text("old\n")
    os.chown(tree / "theirs", own.user.pw_uid, own.user.pw_gid)
    for option in ("--overlay=e", "--writable-tmpfs"):
        line = ["exec", option, tree, "sh", "-c", "echo new >> /theirs; stat -c %u /theirs"]
        done = three_flows.run(own.program, flow, line, cwd=place)
        assert (done.stdout, done.stderr) == (f"{own.user.pw_uid}\n", "")


def test_squashfs_and_directory_together(run, place):
    packed = squashed(place)
    done = run("--overlay", f"{packed}:ro", "--overlay", "a:ro", script="cat /both; id -u >&2")
    assert done.stdout == "a\n"
    done = run("--overlay", "a:ro", "--overlay", packed, "--overlay", "e", script="cat /both")
    assert done.stdout == "squashfs\n"
    assert f"WARNING: Overlay image {packed} is not writable, proceeding with read-only" in (
        done.stderr
    )


def test_memory_over_an_overlay(run, place):
    done = run("--overlay", "a:ro", "--writable-tmpfs", script="echo n > /only-a && cat /only-a")
    assert (done.stdout, done.stderr) == ("n\n", "")
    assert (place / "a/upper/only-a").read_text() == "a\n"


def test_a_bind_finds_its_place(run, place):
    done = run(
        "--overlay", "e", "-B", f"{place}/b:/no/such/place", script="cat /no/such/place/both"
    )
    assert (done.stdout, done.stderr) == ("b\n", "")
    assert not (place / "e/upper/no").exists()


def test_many(run, place):
    names = [f"many{number:02}" for number in range(15)]
    for name in names:
        (place / name).mkdir()
        (place / name / name).touch()
        (place / name).chmod(0o755)
    words = [word for name in names for word in ("--overlay", f"{name}:ro")]
    done = run(*words, script="echo /many*")
    assert done.stdout.split() == [f"/{name}" for name in names], done.stderr


REFUSED = {
    "two": (
        ["--overlay", "e", "--overlay", "b"],
        "while loading overlay images: you can't specify more than one writable overlay, "
        "{place}/e contains a writable overlay, requires to use '--overlay {place}/b:ro'",
    ),
    "memory": (
        ["--overlay", "e", "--writable-tmpfs"],
        "while loading overlay images: you can't specify --writable-tmpfs with another writable "
        "overlay image ({place}/e)",
    ),
    "missing": (
        ["--overlay", "/nonexist"],
        "while loading overlay images: failed to open overlay image /nonexist: failed to retrieve "
        "path for /nonexist: lstat /nonexist: no such file or directory",
    ),
    "no image": (
        ["--overlay", "/etc/hostname"],
        "while loading overlay images: failed to open overlay image /etc/hostname: image format "
        "not recognized",
    ),
    "writable": (["--overlay", "e", "-w"], "cannot use --overlay in conjunction with --writable"),
    "too many": (
        [word for _ in range(17) for word in ("--overlay", "a:ro")],
        "while loading overlay images: there are more than 16 of them",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be(run, place, name):
    words, said = REFUSED[name]
    tree = images.small_tree(images.shared_folder())
    done = run(*words, image=tree)
    assert done.returncode == 255
    assert done.stderr.splitlines()[0] == f"FATAL:   {said.format(place=place)}"
    assert list(place.glob("*/upper")) == [place / "a/upper"]  # nothing was made


def test_the_administrator_can_forbid_overlays(own, run):
    own.configure("enable overlay = no")
    done = run("--overlay", "a:ro")
    assert done.returncode == 255
    assert "--overlay requires 'enable overlay', but set to 'no' by administrator" in done.stderr


def test_an_overlay_partition_that_is_left_out_is_told(own, sif, user_tmp):
    image = user_tmp / "with_overlay.sif"
    shutil.copy(sif, image)
    os.chown(image, own.user.pw_uid, own.user.pw_gid)
    assert own.run("overlay", "create", "--sparse", image).returncode == 0
    own.configure("enable overlay = no")
    done = own.run("exec", image, "true")
    assert done.returncode == 0
    assert f"The overlay partition of {image} is left out: 'enable overlay'" in done.stderr
