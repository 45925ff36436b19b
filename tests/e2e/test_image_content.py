"""What an image holds comes out of the image server as it went in, in whatever order it is read.

Files are read without being opened there first, and the server is asked for attributes only where
the image has some (starter/unpack_fuse.c).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.own_install import Household, descendants, read_until

FILES = 40  # more than the image server keeps at hand
BLOCK = 131072
FLOWS = {"setuid": (), "userns": ("-u",)}


def content_of(number: int) -> bytes:
    """Return what the file of that number holds: nothing, a part of a block, or some blocks."""
    seed = hashlib.sha256(str(number).encode()).hexdigest().encode() + b"\n"
    return (seed * 6000)[: number * number * 300]


own = fixtures.own(None, needs=("open_fuse",))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("content") / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    for number in range(FILES):
        folder = tree / f"data/{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}").write_bytes(content_of(number))
    (tree / "data/link").symlink_to("0/00")
    return tree


def pack(tree: Path, name: str, *options: str) -> Path:
    """Pack a tree as somebody else does who keeps extended attributes."""
    image = images.shared_folder() / f"{name}.{os.getpid()}.squashfs"
    argv = ["mksquashfs", str(tree), str(image), "-noappend", "-quiet", "-no-progress", *options]
    subprocess.run(argv, check=True, capture_output=True)
    image.chmod(0o644)
    return image


@pytest.fixture(scope="module")
def plain(tree: Path) -> Iterator[Path]:
    image = pack(tree, "plain", "-no-xattrs", "-b", str(BLOCK))
    yield image
    image.unlink()


@pytest.fixture(scope="module")
def attributed(tree: Path) -> Iterator[Path]:
    os.setxattr(tree / "data/0/00", "user.told", b"kept")
    image = pack(tree, "attributed", "-xattrs")
    os.removexattr(tree / "data/0/00", "user.told")
    yield image
    image.unlink()


@pytest.mark.parametrize("flow", list(FLOWS))
def test_files_links_and_directories(own, plain, flow):
    """All files, more than are kept at hand, to and fro, and what was let go once more."""
    script = (
        "cd /data; cat ?/??; tail -c 9 3/39; head -c 200000 2/38 | tail -c 100; cat 0/04 link;"
        "ls 3 3; readlink link; readlink link"
    )
    done = own.run("exec", *FLOWS[flow], plain, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    order = sorted(range(FILES), key=lambda number: (number % 4, number))
    parts = [content_of(number) for number in order]
    parts += [content_of(39)[-9:], content_of(38)[199900:200000], content_of(4), content_of(0)]
    names = "".join(f"{number:02}\n" for number in range(3, FILES, 4))
    listed = f"3:\n{names}\n3:\n{names}" + "0/00\n" * 2
    assert done.stdout == b"".join(parts).decode() + listed


def root_of_payload(own, home: Household, image: Path) -> Path:
    """Start a payload that waits; return its root directory as root can see it."""
    words = ["exec", image, "sh", "-c", "echo ready; read line"]
    process = home.adopt(own.start(*words, stdin=subprocess.PIPE))
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"ready\n")
    payload = [pid for pid in descendants(process.pid) if name_of(pid) == "sh"]
    assert len(payload) == 1
    return Path(f"/proc/{payload[0]}/root")


def name_of(pid: int) -> str:
    """Return a process's name."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_attributes_are_there(own, home, attributed):
    root = root_of_payload(own, home, attributed)
    assert os.getxattr(root / "data/0/00", "user.told") == b"kept"
    with pytest.raises(OSError) as caught:
        os.getxattr(root / "data/1/01", "user.told")
    assert caught.value.errno == errno.ENODATA


def test_an_image_without_attributes_says_so(own, home, plain):
    root = root_of_payload(own, home, plain)
    for name in ("data/0/00", "data/1/01"):
        with pytest.raises(OSError) as caught:
            os.getxattr(root / name, "user.told")
        assert caught.value.errno in {errno.ENODATA, errno.EOPNOTSUPP}
        assert os.listxattr(root / name) == []
