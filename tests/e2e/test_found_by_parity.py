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


def mounted(own, *words, cwd="/"):
    """Return where what is mounted, as source path and target, in order."""
    done = own.run("exec", *words, "cat", "/proc/self/mountinfo", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [tuple(line.split()[3:5]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("cwd", ["/tmp", "/srv"])
def test_a_bind_over_the_current_directory_is_what_is_seen_there(own, sif, place, cwd):
    shown = mounted(own, "-B", f"{place}:{cwd}", sif, cwd=cwd)
    assert [source for source, target in shown if target == cwd][-1] == str(place)


@pytest.mark.parametrize("link", [("var/tmp", "../tmp"), ("tmp", "var/tmp")])
def test_an_image_with_one_tmp_has_the_hosts_tmp_there(own, place, link):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / link[0]).rmdir()
    (tree / link[0]).symlink_to(link[1])
    shown = [source for source, target in mounted(own, tree) if target in ("/tmp", "/var/tmp")]
    assert shown == ["/tmp"]


def test_a_list_of_binds_may_have_blanks(own, sif, place):
    shown = mounted(own, "-B", f"{place}: /mnt: ro, {place}:/opt", sif)
    assert {(str(place), "/mnt"), (str(place), "/opt")} <= {*shown}


def test_a_closed_directory_is_bound_and_stays_closed(own, sif, place):
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    done = own.run("exec", "-B", f"{closed}:/mnt", sif, "sh", "-c", "stat -c %a /mnt; ls /mnt")
    assert done.stdout == "700\n", done.stderr
    assert "ermission denied" in done.stderr
    assert "FATAL" not in done.stderr


def test_a_home_that_is_not_there_is_an_empty_directory(own, sif):
    script = "cd && pwd && touch new && ls -A"
    done = own.run("exec", "-H", "/nonexistent/home", sif, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "/nonexistent/home\nnew\n"), done.stderr
    assert "Not mounting home directory /nonexistent/home: it does not exist" in done.stderr


def test_a_home_wins_over_an_empty_tmp(own, sif, place):
    (place / "file").write_text("of the home\n")
    done = own.run("exec", "-c", "-H", f"{place}:/tmp", sif, "cat", "/tmp/file")
    assert (done.returncode, done.stdout) == (0, "of the home\n"), done.stderr
