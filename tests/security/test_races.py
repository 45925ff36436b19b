"""A name that changes while we look: never does a launch reach what its user could not read."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import fixtures, images, own_install
from tests.own_install import Installation, files

AT_FDCWD, RENAME_EXCHANGE = -100, 2
CANARY = "canary that nobody else may read"
SHORT, LONG = 20, 200
FLOWS = {"setuid": (), "userns": ("-u",)}
_libc = ctypes.CDLL(None, use_errno=True)


own = fixtures.own("allow setuid-mount squashfs = no")


@pytest.fixture
def world(own) -> Iterator[SimpleNamespace]:
    """A directory of root's alone with a canary and an image, and a playground of the user's."""
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-races-", dir="/var/tmp"))
    place.chmod(0o755)
    victim, play = place / "victim", place / "play"
    victim.mkdir(mode=0o700)
    (victim / "canary").write_text(CANARY)
    (victim / "canary").chmod(0o600)
    play.mkdir()
    sif = images.own_sif(images.shared_folder())
    secret = images.described_tree(images.shared_folder())
    shutil.copytree(secret, victim / "box", symlinks=True)
    (victim / "box/canary").write_text(CANARY)
    shutil.copy(sif, victim / "i.sif")
    sandbox = play / "box"
    shutil.copytree(secret, sandbox, symlinks=True)
    subprocess.run(["chown", "-hR", str(own.user.pw_uid), play], check=True)
    yield SimpleNamespace(own=own, place=place, victim=victim, play=play, sif=sif, box=sandbox)
    shutil.rmtree(place)


@contextmanager
def swapping(own: Installation, one: Path, other: Path) -> Iterator[None]:
    """Exchange two names without end, in a process of the user's."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(own.user.pw_gid)
        os.setuid(own.user.pw_uid)
        first, second = os.fsencode(one), os.fsencode(other)
        while _libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0:
            pass
        os._exit(1)
    try:
        yield
        # It must have been at it all the time, or nothing was tried.
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def give(own: Installation, *paths: Path) -> None:
    for path in paths:
        os.chown(path, own.user.pw_uid, own.user.pw_gid, follow_symlinks=False)


def bind_source(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good = w.play / "source"
    good.mkdir()
    (good / "mine").write_text("mine")
    bad = w.play / "link"
    bad.symlink_to(w.victim)
    give(w.own, good, bad)
    look = "ls /mnt; cat /mnt/canary; echo looked"
    return good, bad, ["exec", *flow, "-B", f"{good}:/mnt", str(w.sif), "sh", "-c", look]


def bind_file(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good, bad = w.play / "file", w.play / "file-link"
    good.write_text("mine")
    bad.symlink_to(w.victim / "canary")
    give(w.own, good, bad)
    return good, bad, ["exec", *flow, "-B", f"{good}:/etc/given", str(w.sif), "sh", "-c",
                       "cat /etc/given; echo looked"]  # fmt: skip


def parent_of_source(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good = w.play / "parent"
    (good / "box").mkdir(parents=True)
    bad = w.play / "parent-link"
    bad.symlink_to(w.victim)
    give(w.own, good, good / "box", bad)
    return good, bad, ["exec", *flow, "-B", f"{good}/box:/mnt", str(w.sif), "sh", "-c",
                       "cat /mnt/canary; echo looked"]  # fmt: skip


def bind_target(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    """The target in a sandbox becomes a link that leads out of it, to the host's /etc."""
    good, bad = w.box / "target", w.box / "target-link"
    good.mkdir()
    bad.symlink_to("../../../../../../../../etc")
    give(w.own, good, bad)
    return good, bad, ["exec", *flow, "-B", f"{w.play}:/target", str(w.box), "sh", "-c",
                       "cat /canary; echo looked"]  # fmt: skip


def absolute_target(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good, bad = w.box / "absolute", w.box / "absolute-link"
    good.mkdir()
    bad.symlink_to(w.victim)
    give(w.own, good, bad)
    return good, bad, ["exec", *flow, "-w", "-B", f"{w.play}:/absolute", str(w.box), "sh", "-c",
                       "cat /absolute/canary; echo looked"]  # fmt: skip


def image_directory(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    bad = w.play / "box-link"
    bad.symlink_to(w.victim / "box")
    give(w.own, bad)
    return w.box, bad, ["exec", *flow, str(w.box), "sh", "-c", "cat /canary; echo looked"]


def image_file(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good, bad = w.play / "i.sif", w.play / "i-link.sif"
    shutil.copy(w.sif, good)
    bad.symlink_to(w.victim / "i.sif")
    give(w.own, good, bad)
    return good, bad, ["exec", *flow, str(good), "sh", "-c", "echo looked"]


def working_directory(w: SimpleNamespace, flow: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    good = w.play / "cwd"
    (good / "box").mkdir(parents=True)
    bad = w.play / "cwd-link"
    bad.symlink_to(w.victim)
    give(w.own, good, good / "box", bad)
    return good, bad, ["exec", *flow, str(w.sif), "sh", "-c",
                       f"cat canary {good}/canary {good}/box/canary; echo looked"]  # fmt: skip


CASES: list[Callable[..., tuple[Path, Path, list[str]]]] = [
    bind_source, bind_file, parent_of_source, bind_target, absolute_target, image_directory,
    image_file, working_directory,
]  # fmt: skip


def race(world: SimpleNamespace, case: Callable[..., tuple[Path, Path, list[str]]],
         flow: tuple[str, ...], times: int) -> None:  # fmt: skip
    own = world.own
    good, bad, words = case(world, flow)
    before = files(world.victim), own_install.mounts()
    started, refused = 0, 0
    with swapping(own, good, bad):
        for _ in range(times):
            # The directory in which the caller stands is given by descriptor: no name to follow.
            here = world.play / "cwd/box" if case is working_directory else Path("/")
            try:
                done = own.run(*words, cwd=here, timeout_s=20)
            except (PermissionError, FileNotFoundError, NotADirectoryError):
                continue  # the test itself met the link
            assert CANARY not in done.stdout + done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            started += "looked" in done.stdout
            refused += "looked" not in done.stdout
            if "looked" not in done.stdout:
                assert done.returncode == 255, (done.returncode, done.stderr)
    assert started + refused > times // 4
    after = files(world.victim), own_install.mounts()
    assert after == before


@pytest.mark.parametrize("flow", list(FLOWS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_swapped(world, case, flow):
    race(world, case, FLOWS[flow], SHORT)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_swapped_for_long(world, case):
    race(world, case, FLOWS["setuid"], LONG)


@pytest.mark.parametrize("flow", list(FLOWS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_without_a_race_the_link_is_refused(world, case, flow):
    """And without one the good name works: otherwise the race would prove nothing."""
    own = world.own
    good, bad, words = case(world, FLOWS[flow])
    here = world.play / "cwd/box" if case is working_directory else Path("/")
    done = own.run(*words, cwd=here)
    assert "looked" in done.stdout, done.stderr
    _libc.renameat2(AT_FDCWD, os.fsencode(good), AT_FDCWD, os.fsencode(bad), RENAME_EXCHANGE)
    if case is not working_directory:
        done = own.run(*words, cwd="/")
    assert CANARY not in done.stdout + done.stderr
