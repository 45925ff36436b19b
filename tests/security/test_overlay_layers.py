"""What a user lays over an image gives no right that the user has not, and obeys each limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, fixtures, images
from tests.own_install import Installation

SECRET = "for the eyes of one"


own = fixtures.own()


@pytest.fixture
def place(own) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-overlays-", dir="/var/tmp"))
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def give(own: Installation, *paths: Path) -> None:
    for path in paths:
        os.chown(path, own.user.pw_uid, own.user.pw_gid, follow_symlinks=False)


def launch(own: Installation, flow: tuple[str, ...], *words: str | Path):
    return own.run("exec", *flow, *words)


@pytest.fixture(params=[(), ("-u",)], ids=["setuid", "userns"])
def flow(request) -> tuple[str, ...]:
    return request.param


@pytest.mark.parametrize("option", ["", ":ro"])
@pytest.mark.parametrize("name", ["upper", "work"])
def test_no_link_leads_elsewhere(own, place, flow, name, option):
    """Nor does the directory that a link leads to get anything."""
    (place / "secret").mkdir(mode=0o700)
    (place / "secret/letter").write_text(SECRET)
    (place / "o").mkdir()
    (place / "o" / name).symlink_to(place / "secret")
    give(own, place / "o", place / "o" / name)
    sif = images.own_sif(images.shared_folder())
    done = launch(own, flow, "--overlay", f"{place}/o{option}", sif, "cat", "/letter")
    assert done.returncode != 0
    assert SECRET not in done.stdout
    assert os.listdir(place / "secret") == ["letter"]


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_foreign_upper_is_not_written(own, place, flow, mode):
    for name in ("o/upper", "o/work"):
        (place / name).mkdir(parents=True)
        (place / name).chmod(mode)
    (place / "o").chmod(0o755)
    (place / "o/upper/letter").write_text(SECRET)
    sif = images.own_sif(images.shared_folder())
    done = launch(own, flow, "--overlay", place / "o", sif, "sh", "-c", "echo x > /new")
    assert done.returncode == 255
    assert f"setup of overlay upper dir failed: {place}/o/upper is not writable" in done.stderr
    assert os.listdir(place / "o/upper") == ["letter"]
    assert os.listdir(place / "o/work") == []


def test_a_closed_directory_in_an_own_upper_stays_closed(own, place, flow):
    """The mount has no right to pass what its user may not."""
    for name in ("o", "o/upper", "o/work", "o/upper/closed"):
        (place / name).mkdir()
    (place / "o/upper/closed/letter").write_text(SECRET)
    (place / "o/upper/closed").chmod(0o700)
    give(own, place / "o", place / "o/upper", place / "o/work")
    sif = images.own_sif(images.shared_folder())
    for script in ("cat /closed/letter", "echo x > /closed/new", "rm -r /closed", "mv /closed /o"):
        done = launch(own, flow, "--overlay", place / "o", sif, "sh", "-c", script)
        assert done.returncode != 0
        assert SECRET not in done.stdout
    assert os.listdir(place / "o/upper/closed") == ["letter"]


@pytest.mark.parametrize("letter", ["/closed/letter", "/closed/deep/letter"])
def test_an_own_directory_opens_nothing_below(own, place, flow, letter):
    """One that is merged with a directory of the image that is closed to the user."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "closed/deep").mkdir(parents=True)
    (tree / "closed/letter").write_text(SECRET)
    (tree / "closed/deep/letter").write_text(SECRET)
    (tree / "closed").chmod(0o700)
    own_ones = [place / name for name in ("o", "o/upper", "o/work", "o/upper/closed")]
    for made in (*own_ones, place / "o/upper/closed/deep"):
        made.mkdir()
        give(own, made)
    done = launch(own, flow, "--overlay", place / "o", tree, "cat", letter)
    assert done.returncode != 0
    assert SECRET not in done.stdout


def test_set_user_id_gives_nothing(own, place, flow):
    """Neither a file of root's in a layer, nor one that the payload makes, changes who runs it."""
    for name in ("o", "o/upper", "o/work", "r"):
        (place / name).mkdir()
        give(own, place / name)
    for name in ("o/upper/busybox", "r/busybox"):
        shutil.copy("/bin/busybox", place / name)
        (place / name).chmod(0o6755)
    tree = images.small_tree(images.shared_folder())
    for overlay in (place / "o", f"{place}/r:ro"):
        done = launch(own, flow, "--overlay", overlay, tree, "/busybox", "id", "-u")
        assert done.stdout == f"{own.user.pw_uid}\n", done.stderr


LIMITS = {
    "limit container owners = root": "not owned by required user(s)",
    "limit container groups = root": "not owned by required group(s)",
    "limit container paths = /opt": "not in an allowed configured path",
    "allow container dir = no": "configuration disallows users from running sandbox containers",
}


@pytest.mark.parametrize("limit", list(LIMITS))
def test_a_limit_holds_for_an_overlay_too(own, place, limit):
    (place / "o").mkdir()
    give(own, place / "o")
    sif = shutil.copy(images.own_sif(images.shared_folder()), own.place / "limited.sif")
    own.configure(limit)
    try:
        plain = own.run("exec", sif, "/bin/true")
        done = own.run("exec", "--overlay", f"{place}/o:ro", sif, "/bin/true")
    finally:
        own.configure()
        Path(sif).unlink()
    assert plain.returncode == 0, plain.stderr
    assert done.returncode == 255
    assert LIMITS[limit] in done.stderr


def test_nothing_of_the_making_is_left(own, place, flow):
    """No namespace of the child's survives, and no mount is seen outside."""
    (place / "o").mkdir()
    give(own, place / "o")
    before = Path("/proc/self/mountinfo").read_text()
    sif = images.own_sif(images.shared_folder())
    script = "readlink /proc/self/ns/user; readlink /proc/self/ns/mnt"
    done = launch(own, flow, "--overlay", place / "o", sif, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    if not flow:
        assert done.stdout.splitlines()[0] == os.readlink("/proc/self/ns/user")
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_file_system_larger_than_its_file_is_refused(own, place, flow):
    """Its server would write behind it, where a SIF file has something else."""
    image = extfs_images.extfs(place / "o.img", owner=own.user.pw_uid)
    give(own, image)
    with image.open("r+b") as file:
        file.seek(1024 + 4)
        file.write((1 << 20).to_bytes(4, "little"))
    sif = images.own_sif(images.shared_folder())
    for option in ("", ":ro"):
        done = launch(own, flow, "--overlay", f"{image}{option}", sif, "true")
        assert done.returncode == 255
        assert "does not fit into its" in done.stderr


@pytest.mark.parametrize("at", [1024 + 24, 1024 + 40, 2048, 2048 + 8, 8192])
def test_a_damaged_file_system_ends_in_an_error(own, place, flow, at):
    """And neither hangs nor takes anything down but its own launch."""
    image = extfs_images.extfs(place / "o.img", owner=own.user.pw_uid)
    give(own, image)
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 16)
    sif = images.own_sif(images.shared_folder())
    done = launch(own, flow, "--overlay", image, sif, "sh", "-c", "ls / > /list")
    assert "internal error" not in done.stderr
    assert own.run("exec", *flow, sif, "true").returncode == 0


@pytest.mark.parametrize("limit", list(LIMITS)[:3])
@pytest.mark.parametrize("use", ["overlay", "bind"])
def test_a_limit_holds_for_every_image(own, place, limit, use):
    image = extfs_images.extfs(place / "o.img", owner=own.user.pw_uid)
    give(own, image)
    sif = shutil.copy(images.own_sif(images.shared_folder()), own.place / "limited.sif")
    words = {"overlay": ("--overlay", image), "bind": ("-B", f"{image}:/mnt:image-src=/")}[use]
    own.configure(limit)
    try:
        done = own.run("exec", *words, sif, "/bin/true")
    finally:
        own.configure()
        Path(sif).unlink()
    assert done.returncode == 255
    assert LIMITS[limit] in done.stderr


def test_extfs_can_be_forbidden(own, place, flow):
    image = extfs_images.extfs(place / "o.img", owner=own.user.pw_uid)
    give(own, image)
    sif = images.own_sif(images.shared_folder())
    own.configure("allow container extfs = no")
    try:
        done = launch(own, flow, "--overlay", image, sif, "true")
    finally:
        own.configure()
    assert done.returncode == 255
    assert "configuration disallows users from running extFS containers" in done.stderr


def test_the_kernel_reads_extfs_only_where_it_may(own, place):
    image = extfs_images.extfs(place / "o.img", owner=own.user.pw_uid)
    give(own, image)
    sif = images.own_sif(images.shared_folder())
    words = ("exec", "-B", f"{image}:/mnt:image-src=/", sif, "cat", "/proc/self/mountinfo")
    plain = own.run(*words)
    own.configure("allow setuid-mount extfs = yes")
    try:
        allowed = own.run(*words)
        bound = own.run(*words, "/mnt/upper")
    finally:
        own.configure()
    of = [[line for line in done.stdout.splitlines() if " /mnt " in line] for done in
          (plain, allowed)]  # fmt: skip
    assert " - fuse fuse2fs " in of[0][0]
    assert " - ext3 /dev/loop" in of[1][0] or " - ext4 /dev/loop" in of[1][0], allowed.stderr
    assert bound.returncode != 0


@pytest.fixture
def covered(place) -> Iterator[Path]:
    """A root file system with a letter that everybody may read, beneath a mount that nobody may."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "data").mkdir()
    (tree / "data/letter").write_text(SECRET)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0000", "none", tree / "data"], check=True)
    yield tree
    subprocess.run(["umount", tree / "data"], check=True)


@pytest.mark.parametrize("kind", ["overlay", "sandbox", "writable"])
def test_nothing_beneath_a_mount_is_uncovered(own, place, flow, covered, kind):
    """Overlay sees through mounts, which an administrator may have made to hide something."""
    sif = images.own_sif(images.shared_folder())
    words = {
        "overlay": ("--overlay", f"{covered}:ro", sif),
        "sandbox": ("-B", "/etc/hostname:/none/x", covered),
        "writable": ("--writable-tmpfs", covered),
    }[kind]
    done = launch(own, flow, *words, "cat", "/data/letter")
    assert done.returncode != 0
    assert SECRET not in done.stdout


@pytest.mark.parametrize("words", [(), ("-p",), ("-C",)])
def test_an_overlay_with_processes_of_its_own(own, place, flow, words):
    """Whose numbers are those of a namespace: no map is written by one."""
    (place / "o").mkdir()
    give(own, place / "o")
    sif = images.own_sif(images.shared_folder())
    done = launch(own, flow, *words, "--overlay", place / "o", sif, "sh", "-c", "echo kept > /new")
    assert done.returncode == 0, done.stderr
    assert (place / "o/upper/new").read_text() == "kept\n"


@pytest.mark.parametrize("name", ["tmp", "var_tmp"])
def test_no_link_in_a_work_directory_is_followed(own, place, name):
    """Root's launch with a user's --workdir changes the mode of nothing else."""
    (place / "secret").mkdir(mode=0o700)
    (place / "w").mkdir()
    (place / "w" / name).symlink_to(place / "secret")
    give(own, place / "w", place / "w" / name)
    sif = images.own_sif(images.shared_folder())
    done = own.run("exec", "--contain", "--workdir", place / "w", sif, "true", root=True)
    assert done.returncode == 255
    assert str(place / "w" / name) in done.stderr
    assert (place / "secret").stat().st_mode & 0o7777 == 0o700
