"""Rows that no master of ours would send: starter-init refuses them, and stays in its container."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.starter import init_driver as d
from tests.starter.init_driver import Init, RowFailedError

pytestmark = pytest.mark.usefixtures("require_root")
# Of each row: its strings, how many numbers, which flags.
SHAPES = {
    "PROPAGATION": ("", 1, 0),
    "FS": ("12", 0, 0),
    "FSOPT": ("12", 0, 0),
    "TREE": ("1", 0, 3),
    "ATTR": ("", 4, 1),
    "COPYUP": ("1", 0, 0),
    "PLACE": ("1", 1, 15),
    "REMOUNT": ("1", 2, 1),
    "MKNOD": ("12", 4, 1),
    "LINK": ("12", 0, 1),
    "NETDEV": ("1", 0, 0),
    "ENTER": ("1", 2, 0),
    "ROOT_READONLY": ("", 0, 0),
    "NAME": ("1", 0, 1),
    "SYSCTL": ("12", 0, 0),
    "READONLY_PATH": ("1", 0, 0),
    "MASK_PATH": ("1", 0, 0),
}
INSIDE = ("ROOT_READONLY", "NAME", "SYSCTL", "READONLY_PATH", "MASK_PATH", "REMOUNT")
OUTSIDE = ("FS", "FSOPT", "TREE", "ATTR", "COPYUP", "PLACE", "REMOUNT", "MKNOD", "LINK", "ENTER")
WORDS = (
    b"", b"/", b".", b"..", b"/..", b"//", b"/proc", b"/proc/sys/x", b"/sys", b"/dev/null",
    b"a/" * 2000, b"x" * 300, b"/" + b"y" * 255 + b"/z", b"/loop", b"/link/made", b"tmpfs",
    b"proc", b"mode", b"size=1", b"lo", b"net/ipv4/ip_forward", b"\xff\n", b"/" * 4095,
    b"overlay", b"fuse.x",
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 4, 8, 0x20, 0x70, 0o20666, 1 << 20, 1 << 32 | 3, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return d.compile_init(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def root(readable_tmp: Path) -> Iterator[Path]:
    place = readable_tmp / f"rows-{os.getpid()}-{os.urandom(4).hex()}/rootfs"
    for name in ("proc", "sys", "dev", "etc"):
        (place / name).mkdir(parents=True)
    (place / "loop").symlink_to("loop")
    (place / "link").symlink_to("../../etc")
    yield place
    subprocess.run(["rm", "-rf", "--one-file-system", place.parent], check=True)


def send_any(container: Init, chance: random.Random, names: tuple[str, ...]) -> None:
    name = chance.choice(names)
    strings, count, mask = SHAPES[name]
    first, second = (chance.choice(WORDS) if n in strings else None for n in "12")
    nums = [chance.choice(NUMBERS) for _ in range(count)]
    flags = chance.randrange(16) & mask
    if chance.random() < 0.02:
        flags, second = chance.choice(NUMBERS) & 0xFFFFFFFF, chance.choice(WORDS)
    fd = os.open("/dev/null", os.O_RDONLY) if chance.random() < 0.05 else -1
    try:
        container.row(name, first, second, *nums, flags=flags, fd=fd)
    finally:
        if fd >= 0:
            os.close(fd)


def misuse(program: Path, root: Path, chance: random.Random) -> tuple[int, str]:
    """Send rows until one ends the launch; return how many were done, and what was said."""
    done = 0
    with Init(program) as c:
        c.root(root)
        inside = chance.random() < 0.3
        if inside:
            c.mount("proc", "/proc")
            c.enter()
        with suppress(RowFailedError, EOFError):
            while done < 20:
                send_any(c, chance, INSIDE if inside else OUTSIDE)
                done += 1
        c.socket.close()
        assert c.forerunner.stderr is not None
        return done, c.forerunner.stderr.read().decode()


@pytest.mark.parametrize("seed", range(4))
def test_any_rows(program: Path, root: Path, seed: int) -> None:
    chance = random.Random(seed)
    total = 0
    for _ in range(60):
        done, said = misuse(program, root, chance)
        total += done
        # No sanitizer had anything to say.
        assert said == "" or said.startswith("FATAL:   a row "), said
    assert total > 20


def test_rows_out_of_order(program: Path, root: Path) -> None:
    for name in ("FS", "PLACE", "ENTER", "MASK_PATH", "SYSCTL"):
        with Init(program) as c:
            c.born()
            with pytest.raises(EOFError):
                c.row(name, "tmpfs")
    with Init(program) as c:
        c.root(root)
        with pytest.raises(EOFError):
            c.row("PLACE", "/etc")
