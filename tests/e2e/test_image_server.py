"""What the image server is made of: it, and no other process, has our object to unpack with."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base.errors import ImageGone
from tests import fixtures, images
from tests.own_install import descendants, eventually, read_until

FLOWS = {"setuid": (), "userns": ("-u",)}
ALONE = ("unpack.so", "libdeflate.so.0")
# Our own writer's images are zstd.
KINDS = {"gzip": (images.bare_squashfs, set(ALONE)), "zstd": (images.own_sif, {"unpack.so"})}


own = fixtures.own(None, needs=("open_fuse",))


@pytest.fixture(params=list(FLOWS))
def flow(request) -> tuple[str, ...]:
    return FLOWS[request.param]


def loaded(pid: int) -> set[str]:
    """Return the base names of the files that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6]
    return {Path(path).name for path in paths}


def name_of(pid: int) -> str:
    """Return a process's name; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def runs(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_payloads_own_end_is_no_fault_of_its(own, home, flow, number):
    image = images.own_sif(images.shared_folder())
    for _ in range(5):
        process = home.adopt(
            own.start(
                "exec", *flow, image, "sh", "-c", f"kill -{number} $$", stderr=subprocess.PIPE
            )
        )
        said = process.communicate(timeout=60)[1]
        assert process.returncode == -number
        assert said == b""


def waiting(own, home, *options: str, ends: str = "") -> tuple[subprocess.Popen, int]:
    """Start a payload that waits for a line; return its keeper, and its image server."""
    image = images.own_sif(images.shared_folder())
    words = ["exec", *options, image, "sh", "-c", f"echo on; read line; {ends}"]
    process = home.adopt(own.start(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE))
    read_until(process.stdout.fileno(), b"on\n")
    (server,) = [pid for pid in descendants(process.pid) if name_of(pid) == "squashfuse_ll"]
    return process, server


def assert_told(process: subprocess.Popen, *statuses: int) -> None:
    """Assert how it ended, and that its user was told why."""
    assert process.wait(20) in statuses
    said = process.stderr.read().decode()
    assert said.splitlines() == [f"FATAL:   {ImageGone()}"]


def test_its_end_is_told(own, home, flow):
    """The payload is killed, or comes upon a page that nobody brings before that."""
    process, server = waiting(own, home, *flow)
    os.kill(server, signal.SIGKILL)
    assert_told(process, -signal.SIGKILL, -signal.SIGBUS)


@pytest.mark.parametrize("shim", [(), ("-p",)], ids=["plain", "shim"])
def test_a_bus_error_is_told_by_its_reason(own, home, flow, shim):
    """Keeper hears of it and of the server's end at once, in an order that is chance."""
    process, server = waiting(own, home, *flow, *shim, ends="kill -BUS $$")
    inside = [pid for pid in descendants(process.pid) if name_of(pid) in ("sh", "appinit")]
    assert len(inside) == 1 + len(shim)
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    process.stdin.write(b"\n")
    process.stdin.flush()
    eventually(lambda: not any(map(runs, inside)), "payload and shim end")
    os.kill(process.pid, signal.SIGCONT)
    assert_told(process, 128 + signal.SIGBUS if shim else -signal.SIGBUS)


def test_a_bus_error_of_the_payloads_own_is_its_own(own, home, flow):
    process, _ = waiting(own, home, *flow, ends="kill -BUS $$")
    said = process.communicate(b"\n", timeout=20)[1]
    assert (process.returncode, said) == (-signal.SIGBUS, b"")


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_alone_unpacks_with_our_object(own, home, flow, kind):
    """Whatever the caller has asked the loader for."""
    make, wanted = KINDS[kind]
    image = make(images.shared_folder())
    env = own.environment({"LD_PRELOAD": "/nonexistent.so", "LD_LIBRARY_PATH": "/nonexistent"})
    words = ["exec", *flow, image, "sh", "-c", "echo ready; exec sleep 1000"]
    process = home.adopt(own.start(*words, env=env))
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"ready\n")
    found = {}
    for pid in [process.pid, *descendants(process.pid)]:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        found.setdefault(name, set()).update(loaded(pid).intersection(ALONE))
        if name == "squashfuse_ll":
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert environment == f"LD_PRELOAD={own.libexec}/bin/unpack.so\0".encode()
    assert found.pop("squashfuse_ll") == wanted
    assert found
    assert not any(found.values()), found


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF broken"])
def test_serves_without_the_object(own, flow, content):
    """An image needs it no more than the loader does."""
    sif = images.own_sif(images.shared_folder())
    placed, aside = own.libexec / "bin/unpack.so", own.place / "unpack.so"
    placed.rename(aside)
    try:
        if content is not None:
            placed.write_bytes(content)
        done = own.run("exec", *flow, sif, "sh", "-c", "echo served")
    finally:
        placed.unlink(missing_ok=True)
        aside.rename(placed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")
