"""`overlay create`: images that containers write to, as files and inside SIF files."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, images
from tests.e2e.three_flows import Do, doing_at, good
from tests.own_install import Installation, descendants, eventually

MIB = 1 << 20


@pytest.fixture
def home(require_root: None) -> Iterator[Path]:
    user = images.ordinary_user()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-overlay-", dir="/var/tmp"))
    os.chown(made, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def own_sif(home: Path, sif: Path) -> Path:
    user = images.ordinary_user()
    shutil.copy(sif, home / "own.sif")
    os.chown(home / "own.sif", user.pw_uid, user.pw_gid)
    return home / "own.sif"


@pytest.fixture
def do(installed: Installation, home: Path) -> Do:
    return doing_at(home, installed.program)


def listed(image: Path, folder: str) -> dict[str, tuple[str, int, int]]:
    """Return mode, user and group of what debugfs(8) finds in a directory of an image."""
    done = subprocess.run(
        ["/sbin/debugfs", "-R", f"ls -l {folder}", image],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    return {row[-1]: (row[1], int(row[3]), int(row[4])) for row in rows}


@pytest.mark.parametrize("sparse", [False, True])
def test_a_file(do: Do, home: Path, sparse: bool) -> None:
    words = ["--sparse"] if sparse else []
    good(do("overlay", "create", *words, "--size", "65", "--create-dir", "/a/b,c", "o.img"))
    facts = (home / "o.img").stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_size) == (0o600, 65 * MIB)
    assert (facts.st_blocks * 512 < 20 * MIB) == sparse
    user = images.ordinary_user()
    mine = ("40755", user.pw_uid, user.pw_gid)
    assert {name: listed(home / "o.img", "/")[name] for name in ("upper", "work")} == {
        "upper": mine,
        "work": mine,
    }
    assert listed(home / "o.img", "/upper")["a"] == listed(home / "o.img", "/upper")["c"] == mine
    assert listed(home / "o.img", "/upper/a")["b"] == mine
    assert sorted(path.name for path in home.iterdir()) == ["o.img"]


def test_for_root_of_a_container(do: Do, home: Path) -> None:
    good(do("overlay", "create", "--fakeroot", "--create-dir", "q x", "o.img"))
    assert listed(home / "o.img", "/")["upper"] == ("40755", 0, 0)
    assert [row for name, row in listed(home / "o.img", "/upper").items() if name == "x"] == [
        ("40755", 0, 0)
    ]


def test_a_container_keeps_what_it_writes(do: Do, home: Path, own_sif: Path) -> None:
    good(do("overlay", "create", "o.img"))
    good(do("exec", "--overlay", "o.img", own_sif, "sh", "-c", "echo kept > /kept"))
    assert good(do("exec", "--overlay", "o.img:ro", own_sif, "cat", "/kept")) == "kept\n"


def test_inside_a_sif_file(do: Do, own_sif: Path) -> None:
    own_sif.chmod(0o755)
    good(do("overlay", "create", own_sif))
    good(do("exec", "-w", own_sif, "sh", "-c", "echo kept > /kept"))
    assert good(do("exec", own_sif, "cat", "/kept")) == "kept\n"
    done = do("overlay", "create", own_sif)
    assert done.returncode == 255
    assert "a writable overlay partition already exists" in done.stderr
    if images.have_real_apptainer():
        assert "FS (Ext3/Overlay/amd64)" in good(
            do("sif", "list", own_sif, program="/usr/bin/apptainer")
        )


def test_where_every_file_has_a_name(do: Do, home: Path, tmp_path: Path) -> None:
    """As on NFS; a file that is open stays there when it is removed, under another name."""
    if shutil.which("fuse2fs") is None:
        pytest.skip("did not run: fuse2fs is not installed")
    disk, place = extfs_images.extfs(tmp_path / "disk", mib=128), home / "place"
    place.mkdir()
    subprocess.run(["fuse2fs", "-o", "fakeroot,allow_other", disk, place], check=True)
    try:
        place.chmod(0o777)
        before = {path.name for path in place.iterdir()}
        good(do("overlay", "create", "--sparse", place / "o.img"))
        assert {path.name for path in place.iterdir()} - before == {"o.img"}
        assert extfs_images.is_clean(place / "o.img")
    finally:
        subprocess.run(["umount", place], check=True)


def test_who_is_killed_leaves_nothing(do: Do, installed: Installation, home: Path) -> None:
    """All of it at once, while the file system is made; the tree for it goes with the next one."""
    many = ",".join(f"d{number}" for number in range(800))
    process = begin(installed, home, "overlay", "create", "--create-dir", many, "o.img")

    def tools() -> list[str]:
        return [name for _, _, name in descendants(process.pid).values()]

    eventually(lambda: "mke2fs" in tools(), "the file system is being made")
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    (left,) = home.iterdir()
    assert left.name.startswith("apptainer-py-overlay-")
    os.utime(left, (0, 0))
    good(do("overlay", "create", "o.img", TMPDIR=str(home)))
    assert [path.name for path in home.iterdir()] == ["o.img"]


def begin(installed: Installation, home: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start a command as the ordinary user, in a process group of its own."""
    user = images.ordinary_user()
    return subprocess.Popen(
        [installed.program, *words],
        cwd=home,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "TMPDIR": str(home)},
        start_new_session=True,
    )


@pytest.mark.parametrize(("words", "said"), [
    (("--size", "63", "o.img"), "must be equal or greater than 64 MiB"),
    (("--size", "99999999999", "o.img"), "must be equal or less than"),
    (("--create-dir", "../x", "o.img"), "outside of overlay layout"),
    (("--create-dir", "a/../../x", "o.img"), "outside of overlay layout"),
    (("there.img",), "EXT3 overlay image there.img already exists"),
    (("folder",), "destination image must be SIF image"),
    (("text",), "while opening image file text: image format not recognized"),
    (("none/o.img",), "no such file or directory"),
    (("dangling",), "while opening image file dangling"),
])  # fmt: skip
def test_what_is_refused(do: Do, home: Path, words: tuple[str, ...], said: str) -> None:
    if "there.img" in words:
        good(do("overlay", "create", "there.img"))
    (home / "text").write_text("x")
    (home / "folder").mkdir()
    (home / "dangling").symlink_to("none")
    before = sorted(path.name for path in home.iterdir())
    done = do("overlay", "create", *words)
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:") and said in done.stderr, done.stderr
    assert sorted(path.name for path in home.iterdir()) == before


def test_a_signed_file_is_left_as_it_is(do: Do, home: Path, own_sif: Path) -> None:
    (home / "some").write_text("x")
    good(
        do(
            "sif",
            "add",
            "--datatype",
            "5",
            "--signhash",
            "1",
            "--signentity",
            "ab" * 20,
            own_sif,
            "some",
        )
    )
    before = own_sif.read_bytes()
    done = do("overlay", "create", own_sif)
    assert done.returncode == 255
    assert "is signed: could not add writable overlay" in done.stderr
    assert own_sif.read_bytes() == before
