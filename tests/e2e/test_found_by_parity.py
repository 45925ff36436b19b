"""What the parity table has found: a launch once did otherwise than the real one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images


@pytest.fixture
def place(own) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-found-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_root_binds_what_is_closed_to_others(own, sif, place):
    """As the real one: root's mounts are opened with root's rights."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("closed to others\n")
    os.chown(closed, own.user.pw_uid, own.user.pw_gid)
    done = own.run("exec", "-B", f"{closed}:/mnt", sif, "cat", "/mnt/file", root=True)
    assert (done.returncode, done.stdout) == (0, "closed to others\n"), done.stderr


def test_root_writes_over_an_image_of_others(own, place):
    """A file of the image is copied up as its owner's."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    os.chown(tree / "opt", 65534, 65534)
    script = "echo w >/opt/w && cat /opt/w; stat -c %u /opt"
    done = own.run("exec", "--writable-tmpfs", tree, "sh", "-c", script, root=True)
    assert (done.returncode, done.stdout) == (0, "w\n65534\n"), done.stderr


@pytest.mark.parametrize("home", ["relative", "./relative"])
def test_home_is_an_absolute_path(own, sif, home):
    done = own.run("exec", "-H", home, sif, "true")
    assert done.returncode == 255
    assert "is not an absolute path" in done.stderr


def test_home_that_is_a_file(own, sif):
    done = own.run("exec", "-H", "/etc/passwd", sif, "true")
    assert done.returncode == 255
    assert "home /etc/passwd is a file, not a directory" in done.stderr


@pytest.mark.parametrize("options", [("-w", "--writable-tmpfs"), ("-w", "--compat")])
def test_writable_wins_over_memory(own, place, options):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    done = own.run("exec", *options, tree, "touch", "/opt/written", root=True)
    assert done.returncode == 0, done.stderr
    assert "Disabling --writable-tmpfs flag, mutually exclusive with --writable" in done.stderr
    assert (tree / "opt/written").exists()


def test_a_variable_without_a_name_is_named(own, sif):
    done = own.run("exec", "--env", "=x", sif, "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "WARNING: Ignore environment variable =x: variable name missing\n"
