"""Files in a sandbox directory, whose links are the image's own and may point anywhere."""

from __future__ import annotations

import os

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import sandbox


@pytest.fixture
def root(tmp_path):
    """A sandbox with, beside it, a file that must not be reached."""
    (tmp_path / "secret").write_text("host")
    top = tmp_path / "root"
    (top / "etc").mkdir(parents=True)
    (top / "a/b").mkdir(parents=True)
    (top / "etc/file").write_text("inside")
    (top / "secret").write_text("image")
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    yield top, fd
    os.close(fd)


def read(fd, path, limit=100):
    before = len(os.listdir("/proc/self/fd"))
    try:
        return sandbox.read_file(fd, path, limit_bytes=limit)
    finally:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("etc/file", b"inside"),
        ("/etc/file", b"inside"),
        ("../../../../../secret", b"image"),
        ("/../secret", b"image"),
        ("a/../../secret", b"image"),
        ("a/b/../../etc/./file", b"inside"),
        ("/secret", b"image"),
        ("nothing", None),
        ("etc", None),
        ("/proc/self/root/etc/passwd", None),
        ("etc/file/x", None),
    ],
)
def test_links_stay_inside(root, link, expected):
    top, fd = root
    (top / "link").symlink_to(link)
    (top / "a/b/deep").symlink_to("../../link")
    assert read(fd, "/link") == expected
    assert read(fd, "a/b/deep") == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/file", b"inside"),
        ("//etc//./file", b"inside"),
        ("../secret", b"image"),
        ("/", None),
        ("", None),
        ("x\0y", None),
        ("x" * 5000, None),
    ],
)
def test_paths(root, path, expected):
    assert read(root[1], path) == expected


def test_a_linked_directory(root):
    top, fd = root
    (top / "conf").symlink_to("/etc")
    assert read(fd, "/conf/file") == b"inside"
    assert sandbox.list_directory(fd, "/conf") == ("file",)
    assert sandbox.is_directory(fd, "/conf")
    assert not sandbox.is_directory(fd, "/conf/file")
    assert not sandbox.is_directory(fd, "/conf/none")


def test_loops_end(root):
    top, fd = root
    (top / "loop").symlink_to("loop")
    (top / "x").symlink_to("/y/../x")
    (top / "long").symlink_to("/long/long/long")
    assert [read(fd, name) for name in ("/loop", "/x", "/long")] == [None, None, None]


def test_only_regular_files_are_opened(root):
    top, fd = root
    os.mkfifo(top / "fifo")
    (top / "null").symlink_to("/dev/null")
    assert read(fd, "/fifo") is None
    assert read(fd, "/null") is None


def test_reading_is_bounded(root):
    _, fd = root
    assert read(fd, "/etc/file", limit=6) == b"inside"
    with pytest.raises(ImageError, match="larger than 5 bytes"):
        read(fd, "/etc/file", limit=5)


def test_listing(root, monkeypatch):
    _, fd = root
    assert sandbox.list_directory(fd, "/") == ("a", "etc", "secret")
    assert sandbox.list_directory(fd, "/none") == ()
    assert sandbox.list_directory(fd, "/secret") == ()
    monkeypatch.setattr(sandbox, "MAX_ENTRIES", 2)
    with pytest.raises(ImageError, match="more than 2 entries"):
        sandbox.list_directory(fd, "/")
