"""One of many does the work, whoever is killed."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from apptainer_py.base import held
from apptainer_py.cache import lease
from apptainer_py.cache.store import Cache, CacheError, folder_of

KEY = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(str(tmp_path / "cache"))
    made.prepare()
    return made


def test_where_it_is(tmp_path: Path) -> None:
    assert folder_of({"HOME": "/h"}) == "/h/.apptainer/cache"
    assert folder_of({"HOME": "/h", "APPTAINER_CONFIGDIR": "/c"}) == "/c/cache"
    assert folder_of({"HOME": "/h", "APPTAINER_CACHEDIR": "/x"}) == "/x/cache"


def test_an_entry_is_made_once_and_named(cache: Cache) -> None:
    made = []

    def make(path: str) -> None:
        made.append(path)
        Path(path).write_text("content")

    for _ in range(2):
        path = cache.get("oci-tmp", KEY, "docker://x", make)
    assert Path(path).read_text() == "content"
    assert len(made) == 1
    (entry,) = cache.entries()
    assert (entry.kind, entry.source, entry.size_bytes) == ("oci-tmp", "docker://x", 7)
    cache.remove(entry)
    assert not list(cache.entries())


def test_a_failure_leaves_no_entry_and_no_lease(cache: Cache) -> None:
    def fail(path: str) -> None:
        Path(path).write_text("a part")
        raise ValueError

    with pytest.raises(ValueError):
        cache.get("oci-tmp", KEY, "", fail)
    assert not list(cache.entries())
    assert not [name for name in os.listdir(f"{cache.folder}/oci-tmp") if "lease" in name]
    found = []
    cache.get("oci-tmp", KEY, "", lambda path: found.append(Path(path).read_text()))
    assert found == ["a part"]


@pytest.mark.parametrize("key", ["", "../x", "a/b", "xyz", "sha256:ab"])
def test_a_key_is_a_number(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError):
        cache.path("oci-tmp", key)


def test_twenty_at_once(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = []
    for _ in range(20):
        if child := os.fork():
            children.append(child)
            continue
        try:
            cache.get("oci-tmp", KEY, "", lambda path: _slow(path, log))
            os._exit(0)
        finally:
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 20
    assert log.read_text() == "made\n"


def _slow(path: str, log: Path) -> None:
    with log.open("a") as file:
        file.write("made\n")
    time.sleep(0.2)
    Path(path).write_text("whole")


def test_a_killed_maker_blocks_nobody(cache: Cache) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:

        def stay(path: str) -> None:
            os.write(writing, b"x")
            time.sleep(100)

        cache.get("oci-tmp", KEY, "", stay)
        os._exit(1)
    assert os.read(reading, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun = time.monotonic()
    cache.get("oci-tmp", KEY, "", lambda path: Path(path).touch() or None)
    assert time.monotonic() - begun < lease.STALE_S / 2


def test_a_holder_of_another_machine_is_waited_for_until_it_is_silent(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.3)
    Path(f"{cache.path('oci-tmp', KEY)}.lease").write_text("elsewhere x 1 2 3\n")
    begun = time.monotonic()
    cache.get("oci-tmp", KEY, "", lambda path: Path(path).touch() or None)
    assert time.monotonic() - begun >= 0.3


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="not a directory"):
        Cache(f"{tmp_path}/file/cache").prepare()


def test_what_was_left_is_swept(cache: Cache) -> None:
    left = Path(f"{cache.path('blob', KEY)}.part.0")
    left.touch()
    cache.sweep(100)
    assert left.exists()
    os.utime(left, (0, 0))
    cache.sweep(100)
    assert not left.exists()


def test_who_was_only_slow_changes_nothing_of_what_took_its_place(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.3)
    monkeypatch.setattr(lease.Lease, "_touch", lambda self: None)

    def other(path: str) -> None:
        assert Path(path).read_bytes() == b"first"
        Path(path).write_bytes(b"good")

    def slow(path: str) -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(b"first")
            # A holder of another machine, for all that the other one can see of it.
            monkeypatch.setattr(lease, "_is_dead", lambda text: True)
            cache.get("oras", KEY, "", other)
            os.pwrite(file.fileno(), b"evil", 0)

    path = cache.get("oras", KEY, "", slow)
    assert Path(path).read_bytes() == b"good"
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_a_full_disk_is_told_and_left(cache: Cache) -> None:
    def make(path: str) -> None:
        Path(path).write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match="no space left"):
        cache.get("net", KEY, "", make)
    assert not os.listdir(f"{cache.folder}/net")


def test_what_nobody_goes_on_with_goes_one_day(cache: Cache) -> None:
    left = Path(f"{cache.path('net', '1' * 64)}.part.0")
    left.touch()
    os.utime(left, (1, 1))
    cache.get("net", KEY, "", lambda path: Path(path).touch() or None)
    assert not left.exists()


def test_a_cache_of_another_user_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chmod(folder, 0o777)
    with pytest.raises(CacheError, match="every user may write"):
        Cache(str(folder)).prepare()
    os.chmod(folder, 0o700)
    if os.geteuid():
        pytest.skip("did not run: gives a directory to another user")
    os.chown(folder, 12345, 12345)
    with pytest.raises(CacheError, match="another user"):
        Cache(str(folder)).prepare()
    assert not os.listdir(folder)


def test_the_folder_of_a_killed_conversion_is_swept(cache: Cache) -> None:
    old, busy = (Path(f"{cache.path('oci-tmp', KEY)}.part.{name}.build-temp") for name in "12")
    for folder in (old, busy):
        (folder / "rootfs").mkdir(parents=True)
        (folder / "squashfs").touch()
        os.utime(folder / "rootfs", (0, 0))
        os.utime(folder, (0, 0))
    os.utime(old / "squashfs", (0, 0))
    cache.sweep(100)
    assert not old.exists()
    assert busy.exists()


def test_the_folder_of_a_conversion_that_works_deep_below_is_not(cache: Cache) -> None:
    folder = Path(f"{cache.path('oci-tmp', KEY)}.part.1.build-temp")
    folder.mkdir(parents=True)
    lock = held.hold(str(folder))
    os.utime(folder, (0, 0))
    cache.sweep(100)
    assert folder.exists()
    os.close(lock)
    cache.sweep(100)
    assert not folder.exists()
