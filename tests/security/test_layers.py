"""What lies over an image opens nothing that its user could not open; a limit cannot be served."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.security import elsewhere

SECRET = "for the eyes of one"
BUSYBOX = "/bin/busybox"


own = fixtures.own()


@pytest.fixture
def tree(own) -> Iterator[Path]:
    """A directory that everybody may use as a sandbox, with one in it that is closed to others."""
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-layers-", dir="/var/tmp"))
    place.chmod(0o755)
    for name in ("b", "bin", "etc", "closed", "closed/deep", "play"):
        (place / name).mkdir()
    (place / "closed/letter").write_text(SECRET)
    (place / "closed/deep/letter").write_text(SECRET)
    (place / "closed/letter").chmod(0o644)
    shutil.copy(BUSYBOX, place / "b/busybox")
    (place / "closed").chmod(0o700)
    os.chown(place / "play", own.user.pw_uid, own.user.pw_gid)
    yield place
    shutil.rmtree(place)


LAYERS = [(), ("--writable-tmpfs",), ("--underlay",)]


@pytest.mark.parametrize("flow", [(), ("-u",)], ids=["setuid", "userns"])
@pytest.mark.parametrize("layer", LAYERS, ids=["overlay", "writable", "underlay"])
@pytest.mark.parametrize("target", ["/closed/x", "/closed/deep/x"])
@pytest.mark.parametrize("letter", ["/closed/letter", "/closed/deep/letter"])
def test_a_target_in_a_closed_directory_does_not_open_it(own, tree, flow, layer, target, letter):
    words = [*flow, *layer, "--no-mount", "tmp,cwd,home", "-B", f"{tree}/play:{target}"]
    done = own.run("exec", *words, tree, "/b/busybox", "cat", letter)
    assert SECRET not in done.stdout
    assert done.returncode != 0


def test_the_same_directory_is_open_to_its_owner(own, tree):
    os.chown(tree / "closed", own.user.pw_uid, own.user.pw_gid)
    done = own.run(
        "exec", "--no-mount", "tmp,cwd,home", tree, "/b/busybox", "cat", "/closed/letter"
    )
    assert done.stdout == SECRET


def test_a_writable_layer_takes_writes_and_loses_them(own, tree):
    script = "echo new > /fresh && cat /fresh"
    done = own.run("exec", "--writable-tmpfs", tree, "/b/busybox", "sh", "-c", script)
    assert done.stdout == "new\n", done.stderr
    assert not (tree / "fresh").exists()


# A name of the mount that looks like an option of root's, for whoever reads the table carelessly.
@pytest.fixture(params=["plain", "user_id=0\\,x", "x\\,user_id=0\\,x"])
def served(request, own, tree, open_fuse) -> Iterator[Path]:
    """An image in a file system that the user serves, in which everything seems to be root's."""
    inner = images.bare_squashfs(images.shared_folder())
    outer, mount = tree / "outer.sqfs", tree / "play/mnt"
    packed = tree / "packed"
    packed.mkdir()
    shutil.copy(inner, packed / "inner.sqfs")
    command = ["mksquashfs", packed, outer, "-quiet", "-no-progress", "-all-root"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    mount.mkdir()
    os.chown(mount, own.user.pw_uid, own.user.pw_gid)
    how = own.identity()
    named = ["-o", f"fsname={request.param}"]
    subprocess.run(["squashfuse", *named, outer, mount], check=True, **how)
    yield mount / "inner.sqfs"
    subprocess.run(["fusermount3", "-u", "-z", mount], check=True, **how)


@pytest.mark.parametrize("limit", ["owners = root", "groups = root"])
def test_a_limit_is_not_met_by_what_the_user_serves(own, served, limit):
    own.configure(f"limit container {limit}")
    done = own.run("exec", served, "/bin/true")
    assert done.returncode == 255
    assert done.stderr.count("FATAL") == 1
    own.configure()


@pytest.mark.parametrize("limit", ["owners = root", "groups = root"])
@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_a_limit_is_not_met_by_an_overlay_of_what_the_user_serves(own, tree, served, limit):
    """In a namespace of the user's own: there the file system is the kernel's, owners are not."""
    script = """ls -l {mount} >/dev/null
    mkdir {play}/empty {play}/over
    mount -t overlay overlay -o lowerdir={mount}:{play}/empty {play}/over
    test -r {play}/over/inner.sqfs"""
    places = {"mount": served.parent, "play": tree / "play"}
    own.configure(f"limit container {limit}\nallow setuid-mount squashfs = no")
    with elsewhere.namespace(own, script.format(**places)) as root:
        image = Path(f"{root}{tree}/play/over/inner.sqfs")
        done = own.run("exec", image, "/bin/true")
    own.configure()
    assert done.returncode == 255
    assert done.stderr.count("FATAL") == 1
    assert "the image is not owned by a permitted user or group" in done.stderr


def test_a_limit_is_met_by_what_root_serves(own, tree):
    folder, outer, mount = tree / "packed", tree / "outer.sqfs", tree / "mnt"
    folder.mkdir()
    shutil.copy(images.bare_squashfs(images.shared_folder()), folder / "inner.sqfs")
    command = ["mksquashfs", folder, outer, "-quiet", "-no-progress", "-all-root"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    mount.mkdir()
    subprocess.run(["squashfuse", "-o", "allow_other", outer, mount], check=True)
    own.configure("limit container owners = root\nallow setuid-mount squashfs = no")
    done = own.run("exec", mount / "inner.sqfs", "/bin/true")
    subprocess.run(["fusermount3", "-u", "-z", mount], check=True)
    own.configure()
    assert done.returncode == 0, done.stderr


def test_a_limit_on_file_sizes_cuts_no_record(own):
    sink = own.place / "cut.log"
    own.configure(f"audit log = {sink}")
    sif = images.own_sif(images.shared_folder())
    assert own.run("exec", sif, "/bin/true").returncode == 0
    with sink.open("ab") as log:
        log.write(b'{"padding":"' + b"x" * (2 << 20) + b'"}\n')
    size = sink.stat().st_size
    how = own.identity()
    limits = (size + 60, size + 60)
    how["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = subprocess.run(
        [own.program, "exec", sif, "/bin/true"], capture_output=True, text=True, check=False, **how
    )
    assert done.returncode == 255
    assert sink.stat().st_size == size
    assert own.run("exec", sif, "/bin/true").returncode == 0
    assert json.loads(sink.read_bytes().splitlines()[-1])["program"] == "apptainer-py"
    sink.unlink()
    own.configure()
