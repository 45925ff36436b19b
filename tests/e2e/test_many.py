"""Many launches, in a row and at once, leave the host's counts where they were."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import images, own_install
from tests.own_install import HostState, eventually

FLOWS = {"setuid": (), "userns": ("-u",), "shim": ("-p",)}
IN_A_ROW, AT_ONCE = 500, 50


class Counts:
    """What could add up: of the host, and of this process, which is every orphan's parent."""

    def __init__(self, own, home) -> None:
        self.host = HostState(own.session, own.prefix, Path(own.user.pw_dir))
        self.fuse = own_install.fuse_connections()
        self.descriptors = set(os.listdir("/proc/self/fd"))
        self.home = home
        self.shared = set(os.listdir("/dev/shm"))
        self.temporary = _of(own.user.pw_uid)

    def left(self, own) -> list[str]:
        """Return what is not as it was."""
        found = [*self.host.differences(), *map(str, self.home.alive().values())]
        found += [f"fuse {name}" for name in own_install.fuse_connections() - self.fuse]
        found += [f"/dev/shm {name}" for name in set(os.listdir("/dev/shm")) - self.shared]
        found += [f"temporary {name}" for name in _of(own.user.pw_uid) - self.temporary]
        return found


def _of(uid: int) -> set[str]:
    found = set()
    for folder in ("/tmp", "/var/tmp"):
        for entry in os.scandir(folder):
            try:
                if (
                    entry.stat(follow_symlinks=False).st_uid == uid
                    and "apptainer" not in entry.name
                ):
                    found.add(entry.path)
            except FileNotFoundError:
                continue
    return found


def assert_as_before(own, counts: Counts) -> None:
    try:
        eventually(lambda: not counts.left(own), "nothing is left")
    except AssertionError:
        raise AssertionError(str(counts.left(own))) from None
    assert set(os.listdir("/proc/self/fd")) == counts.descriptors


@pytest.mark.long
@pytest.mark.parametrize("flow", list(FLOWS))
def test_in_a_row(own, sif, home, flow):
    counts = Counts(own, home)
    for number in range(IN_A_ROW):
        done = own.run("exec", *FLOWS[flow], sif, "sh", "-c", f"exit {number % 7}")
        assert done.returncode == number % 7, (number, done.stderr)
    assert_as_before(own, counts)


@pytest.mark.parametrize(
    ("flow", "kind"),
    [
        ("setuid", "sif"),
        *(
            pytest.param(flow, kind, marks=pytest.mark.long)
            for flow in FLOWS
            for kind in ("sif", "sandbox")
            if (flow, kind) != ("setuid", "sif")
        ),
    ],
)
def test_at_once(own, sif, home, flow, kind):
    """All payloads live at the same time: each waits for the end of its stdin."""
    image = sif if kind == "sif" else images.described_tree(images.shared_folder())
    counts = Counts(own, home)
    words = ("exec", *FLOWS[flow], image, "sh", "-c", "echo here; cat >/dev/null; exit 3")
    running = [
        own.start(*words, stdin=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(AT_ONCE)
    ]
    said = [own_install.read_until(process.stdout.fileno(), b"\n", 120) for process in running]
    assert set(said) == {b"here\n"}
    for process in running:
        process.stdin.close()
    assert {process.wait(timeout=60) for process in running} == {3}
    for process in running:
        process.stdout.close()
    assert_as_before(own, counts)
