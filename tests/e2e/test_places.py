"""A bind finds its place below another mount too; where it cannot, the user is told what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import three_flows
from tests.own_install import Installation


@pytest.fixture(params=three_flows.FLOWS)
def flow(request) -> str:
    return str(request.param)


@pytest.fixture
def place(own: Installation, user_tmp: Path, flow: str) -> Iterator[Path]:
    """Directories of who runs the flow: `other`, with a file, `data` and `work`, empty."""
    for name in ("other", "data", "work"):
        (user_tmp / name).mkdir()
    (user_tmp / "other/file").write_text("found\n")
    if flow != "root":
        for path in (user_tmp, *user_tmp.rglob("*")):
            os.chown(path, own.user.pw_uid, own.user.pw_gid)
    yield user_tmp
    shutil.rmtree(user_tmp, ignore_errors=True)


@pytest.fixture
def run(own, flow, place, sandbox):
    def launch(*words: str, read: str):
        line = ["exec", *words, sandbox, "cat", read]
        return three_flows.run(own.program, flow, line, cwd=place)

    return launch


@pytest.fixture(scope="module")
def sandbox() -> Path:
    from tests import images

    return images.small_tree(images.shared_folder())


BELOW = {
    "scratch": (["-S", "/scr", "-B", "{place}/other:/scr/a/b"], "/scr/a/b/file"),
    "file": (["-S", "/scr", "-B", "{place}/other/file:/scr/f"], "/scr/f"),
    "kept scratch": (["-W", "work", "-S", "/scr", "-B", "{place}/other:/scr/a"], "/scr/a/file"),
    "underlay": (["--underlay", "-S", "/scr", "-B", "{place}/other:/scr/a"], "/scr/a/file"),
    "bind": (["-B", "data:/data", "-B", "{place}/other:/data/a/b"], "/data/a/b/file"),
    "read-only bind": (["-B", "data:/data:ro", "-B", "{place}/other:/data/a"], "/data/a/file"),
    "third": (
        ["-B", "data:/d,work:/d/w,{place}/other:/d/w/x/y"],
        "/d/w/x/y/file",
    ),
    "own /tmp": (["-c", "-B", "{place}/other:/tmp/a/b"], "/tmp/a/b/file"),
}


@pytest.mark.parametrize("name", list(BELOW))
def test_below_another_mount(run, place, name):
    words, read = BELOW[name]
    done = run(*[word.format(place=place) for word in words], read=read)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_a_link_leads_nowhere_else(run, place):
    """Inside it means another place, and nothing is made where it leads outside."""
    (place / "data/link").symlink_to(place / "work")
    done = run("-B", "data:/data", "-B", f"{place}/other:/data/link/a", read="/data/link/a/file")
    assert done.returncode == 255
    assert not list((place / "work").iterdir())


def test_what_cannot_be_made(run, place, flow):
    if flow == "root":
        pytest.skip("root can make it")
    (place / "data").chmod(0o555)
    done = run("-B", "data:/data", "-B", f"{place}/other:/data/a", read="/data/a/file")
    assert done.returncode == 255
    failure, advice = [x for x in done.stderr.splitlines() if not x.startswith("WARNING")]
    assert failure.endswith("destination /data/a doesn't exist in container")
    assert advice == (
        f"INFO:    /data/a lies in /data, which shows {place}/data, and could not be made there "
        "(permission denied): make it yourself, or bind to a place outside of /data"
    )
    assert not list((place / "data").iterdir())


def test_without_a_layer(run, own, place):
    own.configure("enable overlay = no\nenable underlay = no")
    done = run("-B", f"{place}/other:/new/a", read="/new/a/file")
    assert done.returncode == 255
    assert "INFO:    make /new/a in the image, or let it have an overlay" in done.stderr
