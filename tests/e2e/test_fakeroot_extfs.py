"""ext3 images that `--fakeroot` writes to: owners are those of the container's user namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, fixtures, images
from tests.e2e.subids import both, launch, range_of
from tests.own_install import Installation

ONE_ID = ("-u", "--ignore-subuid", "--ignore-fakeroot-command")
DEGREES = {"setuid": (), "userns": ("-u",), "one": ONE_ID}
OWNERS = "umask 022; echo x >/new; touch /n2; chown 5:6 /n2; stat -c '%u:%g %n' /new /n2"


own = fixtures.own()


@pytest.fixture(scope="module")
def sif(own) -> Path:
    return images.own_sif(images.shared_folder())


@pytest.fixture
def place(own) -> Iterator[Path]:
    """A directory of the user's."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-extfs-", dir="/var/tmp"))
    made.chmod(0o755)
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=list(DEGREES))
def degree(request) -> str:
    return str(request.param)


def of_user(own: Installation, image: Path) -> Path:
    os.chown(image, own.user.pw_uid, own.user.pw_gid)
    return image


def run(own: Installation, degree: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["exec", "-f", *DEGREES[degree], "--no-mount", "tmp", *words]
    return launch(own, *command, files=both(range_of(own)))


def owner_of(image: Path, path: str) -> tuple[int, int]:
    """Return who owns a file, as the image itself has it."""
    line = f"stat {path}"
    said = subprocess.run(
        ["/usr/sbin/debugfs", "-R", line, image], capture_output=True, text=True, check=True
    ).stdout
    words = said.split()
    return int(words[words.index("User:") + 1]), int(words[words.index("Group:") + 1])


def check_owners(image: Path, top: str, done, degree: str) -> None:
    many = degree != "one"
    assert done.returncode == 0 or not many, done.stderr
    assert done.stdout == f"0:0 /new\n{'5:6' if many else '0:0'} /n2\n", done.stderr
    assert owner_of(image, f"{top}/new") == (0, 0)
    assert owner_of(image, f"{top}/n2") == ((5, 6) if many else (0, 0))
    assert extfs_images.is_clean(image)


def test_an_overlay(own, sif, place, degree):
    image = of_user(own, extfs_images.extfs(place / "overlay.img"))
    check_owners(image, "/upper", run(own, degree, "--overlay", image, sif, "sh", "-c", OWNERS),
                 degree)  # fmt: skip
    script = "cat /new; rm /new /etc/test-release; ls /new /etc/test-release"
    if degree == "one":  # the mark of what is gone takes another id
        script = "cat /new; rm /new; ls /new"
    done = run(own, degree, "--overlay", image, sif, "sh", "-c", script)
    assert done.stdout == "x\n", done.stderr
    assert "Value too large" not in done.stderr
    assert extfs_images.is_clean(image)


def test_an_overlay_that_the_user_owns_outside(own, sif, place, degree):
    """Made without --fakeroot, it belongs to an id that only ranges have inside."""
    image = of_user(own, extfs_images.extfs(place / "overlay.img", owner=own.user.pw_uid))
    done = run(own, degree, "--overlay", image, sif, "sh", "-c", "touch /new && echo made")
    if degree == "one":
        assert done.returncode == 255
        assert "/upper is not writable" in done.stderr
        assert f"--overlay {image}:ro" in done.stderr
    else:
        assert done.stdout == "made\n", done.stderr
    assert extfs_images.is_clean(image)


def test_a_root(own, place, degree):
    tree = images.small_tree(images.shared_folder())
    image = of_user(own, extfs_images.extfs(place / "root.img", tree))
    done = run(own, degree, "-w", image, "sh", "-c", OWNERS)
    check_owners(image, "", done, degree)
    done = run(own, degree, image, "sh", "-c", "cat /new; touch /no")
    assert done.stdout == "x\n"
    assert done.returncode != 0


@pytest.mark.parametrize("kind", ["root", "overlay"])
def test_other_ids_of_the_range_write_too(own, sif, place, kind):
    """Package managers become somebody else to fetch."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nsix:x:5:6::/:/bin/sh\n")
    os.chown(tree / "bin/busybox", 0, 0)
    (tree / "bin/su").symlink_to("busybox")
    (tree / "bin/busybox").chmod(0o755)
    script = "chmod 1777 /tmp; su six -c 'id -u; echo y >/tmp/y'; cat /tmp/y"
    if kind == "root":
        image = of_user(own, extfs_images.extfs(place / "root.img", tree))
        done = run(own, "setuid", "-w", image, "sh", "-c", script)
    else:
        image = of_user(own, extfs_images.extfs(place / "overlay.img"))
        done = run(own, "setuid", "--overlay", image, tree, "sh", "-c", script)
    assert done.stdout == "5\ny\n", done.stderr
    assert owner_of(image, "/tmp/y" if kind == "root" else "/upper/tmp/y")[0] == 5


def test_what_is_bound_from_an_image(own, sif, place, degree):
    data = place / "data"
    data.mkdir()
    image = of_user(own, extfs_images.extfs(place / "data.img", data))
    done = run(own, degree, "-B", f"{image}:/d:image-src=/", sif, "sh", "-c", "echo z > /d/z")
    assert (done.returncode, done.stderr.count("FATAL")) == (0, 0), done.stderr
    assert owner_of(image, "/z") == (0, 0)
    assert extfs_images.is_clean(image)


@pytest.mark.parametrize("options", [("-u",), (), ("-f",)])
@pytest.mark.parametrize("value", ["yes", "no"])
def test_what_is_written_at_once(own, sif, place, options, value):
    own.configure(f"sync writable extfs = {value}")
    try:
        owner = 0 if "-f" in options else own.user.pw_uid
        image = of_user(own, extfs_images.extfs(place / "overlay.img", owner=owner))
        script = "echo x >/x && cat /proc/self/mounts"
        done = launch(own, "exec", *options, "--overlay", image, sif, "sh", "-c", script,
                      files=both(range_of(own)))  # fmt: skip
    finally:
        own.configure()
    root = next(line for line in done.stdout.splitlines() if line.split()[1] == "/")
    assert ("sync" in root.split()[3].split(",")) == (value == "yes"), done.stderr
