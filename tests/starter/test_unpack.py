"""What the image server unpacks with, against the libraries it stands in for, hostile streams too.

Each question is asked of a process that has loaded the object as the image server does, before the
libraries; a second opinion comes from the library itself. The target ends at a closed page.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
FLAGS = """
-std=gnu11 -D_GNU_SOURCE= -O2 -Wall -Wextra -Werror -Wconversion -Wshadow -Wstrict-prototypes
-Wmissing-prototypes -Wvla -Wformat=2 -Wundef -Wwrite-strings -Wcast-qual -fPIC -shared
-ftls-model=initial-exec
""".split()

ASKING = r"""
import ctypes, mmap, random, struct, sys, zlib

libc = ctypes.CDLL(None, use_errno=True)
libz, libzstd = ctypes.CDLL("libz.so.1"), ctypes.CDLL("libzstd.so.1")
for library in (libc, libzstd):
    library.ZSTD_decompress.restype = ctypes.c_size_t
libzstd.ZSTD_compress.restype = ctypes.c_size_t
MOST, PAGE, EDGE = 131072, 4096, b"\xa5" * 64

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
region = libc.mmap(None, MOST + 2 * PAGE, 3, 0x22, -1, 0)
closed = region + MOST + PAGE
assert libc.mprotect(closed, PAGE, 0) == 0


def target_of(size):
    ctypes.memmove(closed - size - len(EDGE), EDGE, len(EDGE))
    return closed - size


def edge_is_whole(size):
    return ctypes.string_at(closed - size - len(EDGE), len(EDGE)) == EDGE


def by_zlib(library, stream, size):
    target, got = target_of(size), ctypes.c_ulong(size)
    code = library.uncompress(
        ctypes.c_void_p(target), ctypes.byref(got), stream, ctypes.c_ulong(len(stream))
    )
    assert edge_is_whole(size)
    return (code, ctypes.string_at(target, got.value) if code == 0 else b"")


def by_zstd(library, stream, size):
    target = target_of(size)
    args = (ctypes.c_void_p(target), ctypes.c_size_t(size), stream, ctypes.c_size_t(len(stream)))
    got = library.ZSTD_decompress(*args)
    assert edge_is_whole(size)
    good = got <= MOST
    return (0 if good else got, ctypes.string_at(target, got) if good else b"")


def zstd(content, level=15):
    out = ctypes.create_string_buffer(len(content) + 4096)
    size = libzstd.ZSTD_compress(out, ctypes.c_size_t(len(out)), content,
                                 ctypes.c_size_t(len(content)), level)
    return out.raw[:size]


def deflated(content, level, window):
    maker = zlib.compressobj(level, zlib.DEFLATED, window)
    return maker.compress(content) + maker.flush()


def contents(chance):
    program = open(sys.executable, "rb").read(MOST)
    yield from (b"", b"a", bytes(MOST), program, program[:8192], program[:5000])
    yield chance.randbytes(MOST)
    yield bytes(chance.choice(b"abcdefgh") for _ in range(20000))


def broken(stream, chance):
    for cut in {0, 1, 2, 5, 6, 7, len(stream) // 2, *range(max(0, len(stream) - 9), len(stream))}:
        yield stream[:cut]
    for _ in range(60):
        bad = bytearray(stream)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        yield bytes(bad)
    for first in range(0, 256, 7):
        yield bytes([first]) + stream[1:]
        yield stream[:1] + bytes([first]) + stream[2:]
    yield stream[:2] + chance.randbytes(300)
    yield stream + b"\0" * 40
    yield stream + stream
    yield chance.randbytes(500)


def ask(name, judge, makers):
    chance, asked = random.Random(name), 0
    for content in contents(chance):
        for stream in (make(content) for make in makers):
            sizes = {MOST, 8192, len(content), max(0, len(content) - 1), 1, 0}
            for trial in (stream, *broken(stream, chance)):
                for size in sizes if trial is stream else {MOST, 8192}:
                    ours, theirs = judge(libc, trial, size), judge(library, trial, size)
                    codes = ours[0], theirs[0]
                    assert ours == theirs, (name, len(content), len(trial), size, codes)
                    assert ours == judge(libc, trial, size), "remembered as something else"
                    asked += 1
            good = judge(libc, stream, MOST)
            assert good == (0, content), (name, len(content), good[0])
    return asked


what = sys.argv[1]
library = libz if what == "zlib" else libzstd
if what == "zlib":
    makers = [lambda c, l=l, w=w: deflated(c, l, w) for l, w in ((9, 15), (1, 9), (0, 15))]
    asked = ask(what, by_zlib, makers)
    plain = zlib.compress(b"x" * 99)
    for stream in (plain[2:], deflated(b"x" * 99, 9, 31), b"\x78\xbb" + plain[2:]):
        assert by_zlib(libc, stream, MOST) == by_zlib(libz, stream, MOST)
else:
    asked = ask(what, by_zstd, [zstd, lambda c: zstd(c, 1), lambda c: zstd(c[:99]) + zstd(c[99:])])
maps = open("/proc/self/maps").read()
print(asked, "deflate" if "/libdeflate.so" in maps else "without deflate")
"""


@pytest.fixture(scope="module")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpack") / "unpack.so"
    subprocess.run(["gcc", *FLAGS, str(TREE / "starter/unpack.c"), "-o", str(target)], check=True)
    return target


def asked(unpack: Path, what: str, libraries: str = "") -> tuple[int, str]:
    """Ask everything in a process of its own; return how often, and what it had loaded."""
    environment = {"LD_PRELOAD": f"{unpack} libz.so.1 libzstd.so.1", "LD_LIBRARY_PATH": libraries}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ASKING, what],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    count, loaded = done.stdout.strip().split(" ", 1)
    return int(count), loaded


def test_answers_as_zlib_does(unpack):
    count, loaded = asked(unpack, "zlib")
    assert count > 4000
    assert loaded == "deflate"


def test_answers_as_zlib_does_where_libdeflate_is_not(unpack, tmp_path):
    (tmp_path / "libdeflate.so.0").write_bytes(b"not a library")
    count, loaded = asked(unpack, "zlib", str(tmp_path))
    assert count > 4000
    assert loaded == "without deflate"


def test_answers_as_zstd_does(unpack):
    """Contexts are kept from block to block: what follows a bad one is unpacked all the same."""
    count, loaded = asked(unpack, "zstd")
    assert count > 4000
    assert loaded == "without deflate"
