"""Each directive about images holds for every image of a launch, whatever it is there for."""

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

LIMITS = {
    "owners": ("limit container owners = root", "not owned by required user(s)"),
    "groups": ("limit container groups = root", "not owned by required group(s)"),
    "paths": ("limit container paths = {root}", "not in an allowed configured path"),
}
KINDS = {
    "sqfs": ("squashfs", "squashFS containers"),
    "ext3": ("extfs", "extFS containers"),
    "sif": ("sif", "unencrypted SIF containers"),
    "dir": ("dir", "sandbox containers"),
}
# What an image is there for, as options; {x} is the image beside the root.
USES = {
    "overlay": ("--overlay", "{x}:ro"),
    "overlay, written": ("--overlay", "{x}"),
    "bind": ("-B", "{x}:/mnt:image-src=/"),
    "mount": ("--mount", "type=bind,source={x},destination=/mnt,image-src=/"),
    "id": ("-B", "{x}:/mnt:image-src=/,id=3"),
}
FITS = {
    "sqfs": ("overlay", "bind", "mount"),
    "ext3": ("overlay", "overlay, written", "bind"),
    "sif": ("overlay", "bind", "id"),
    "dir": ("overlay", "overlay, written"),
}
CASES = [(kind, use) for kind, uses in FITS.items() for use in uses]


own = fixtures.own()


@pytest.fixture(scope="module")
def place(own) -> Iterator[Path]:
    """One image of each kind that is the user's, and roots that are root's in a place of theirs."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-images-", dir="/var/tmp"))
    made.chmod(0o755)
    shared = images.shared_folder()
    (made / "root").mkdir()
    for name, source in (("root.sif", images.own_sif), ("root.sqfs", images.bare_squashfs)):
        shutil.copy(source(shared), made / "root" / name)
    for name, source in (("x.sqfs", images.bare_squashfs), ("x.sif", images.own_sif)):
        shutil.copy(source(shared), made / name)
    extfs_images.extfs(made / "x.ext3", owner=own.user.pw_uid)
    for name in ("upper", "work"):
        (made / "x.dir" / name).mkdir(parents=True)
    for path in (*made.glob("x.*"), *(made / "x.dir").iterdir()):
        os.chown(path, own.user.pw_uid, own.user.pw_gid)
    for kind in ("4", "3"):  # an overlay, and data
        command = ["apptainer", "sif", "add", "--datatype", "4", "--parttype", kind]
        command += ["--partfs", "1", "--partarch", "2", "--groupid", "1", made / "x.sif"]
        subprocess.run([*command, made / "x.sqfs"], check=True, capture_output=True)
    os.chown(made / "x.sif", own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(made)


def launch(own: Installation, place: Path, kind: str, use: str, *, root: str = "root.sif"):
    words = [word.format(x=place / f"x.{kind}") for word in USES[use]]
    return own.run("exec", *words, place / "root" / root, "/bin/true")


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("kind", "use"), CASES)
def test_a_limit(own, place, kind, use, limit):
    line, said = LIMITS[limit]
    own.configure(line.format(root=place / "root"))
    plain = own.run("exec", place / "root/root.sif", "/bin/true")
    done = launch(own, place, kind, use)
    own.configure()
    assert plain.returncode == 0, plain.stderr
    assert (done.returncode, said in done.stderr) == (255, True), done.stderr
    assert done.stderr.count("FATAL") == 1


@pytest.mark.parametrize(("kind", "use"), CASES)
def test_a_kind(own, place, kind, use):
    key, said = KINDS[kind]
    root = "root.sqfs" if kind == "sif" else "root.sif"
    own.configure(f"allow container {key} = no")
    plain = own.run("exec", place / "root" / root, "/bin/true")
    done = launch(own, place, kind, use, root=root)
    own.configure()
    assert plain.returncode == 0, plain.stderr
    assert (done.returncode, said in done.stderr) == (255, True), done.stderr


@pytest.mark.parametrize(("kind", "use"), CASES)
def test_what_is_permitted(own, place, kind, use):
    """Or the refusals above would show nothing."""
    done = launch(own, place, kind, use)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("-f",), ("--unsquash",), ("-f", "--unsquash")], ids=" ".join)
def test_no_way_round_a_limit(own, place, words):
    """With --fakeroot, and where the image becomes a directory first."""
    own.configure(f"limit container paths = {place}/root")
    done = own.run("exec", *words, place / "x.sif", "/bin/true")
    own.configure()
    assert done.returncode == 255, done.stderr


@pytest.mark.parametrize("use", ["overlay", "bind"])
def test_an_instance(own, place, use):
    words = [word.format(x=place / "x.sqfs") for word in USES[use]]
    own.configure(f"limit container paths = {place}/root")
    done = own.run("instance", "start", *words, place / "root/root.sif", "limited")
    own.configure()
    assert done.returncode == 255, done.stderr
    assert "not in an allowed configured path" in done.stderr
