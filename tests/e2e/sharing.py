"""Containers that share an image, and what can be seen of it from outside."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.own_install import Household, descendants, eventually, read_until

SCRIPT = ("sh", "-c", "echo on; read line; ls / >/dev/null && echo still")
_OPEN_TREE, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 430, 431, 432
_CREATE, _CLONE, _EMPTY_PATH = 6, 1, 0x1000


def need_copies() -> None:
    """Skip where the kernel copies no mount that is not attached (before Linux 6.15)."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    made = call(_FSOPEN, b"tmpfs", 1)
    call(_FSCONFIG, made, _CREATE, None, None, 0)
    mount = call(_FSMOUNT, made, 1, 0)
    copy = call(_OPEN_TREE, mount, b"", _CLONE | _EMPTY_PATH)
    for fd in (made, mount, copy):
        if fd >= 0:
            os.close(fd)
    if mount >= 0 > copy:
        pytest.skip("did not run: this kernel copies no mount that is not attached")


def hold(own: Any, home: Household, *words: str | Path, **how: Any) -> subprocess.Popen[bytes]:
    """Start a container that has looked around, and waits for a line."""
    process = home.adopt(own.start("exec", *words, *SCRIPT, stdin=subprocess.PIPE, **how))
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"on\n")
    return process


def tell(process: subprocess.Popen[bytes]) -> bytes:
    """Have a container that is held look again, and end; return what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    return process.stdout.read()


def master_of(process: subprocess.Popen[bytes]) -> int:
    """Return the child of keeper that is no payload."""
    for pid, (parent, _, name) in descendants(process.pid).items():
        if parent == process.pid and name.startswith("starter"):
            return pid
    raise AssertionError("there is no master")


def servers(home: Household) -> list[int]:
    """Return the image servers that live."""
    found = [pid for pid, (_, state, name) in home.alive().items()
             if name == "squashfuse_ll" and state != "Z"]  # fmt: skip
    return sorted(found)


def offered() -> dict[str, int]:
    """Return the names under which mounts are offered, with the inodes of the sockets."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    found = [re.fullmatch(r"\S+ \S+ \S+ 00010000 0005 01 +(\d+) (@apptainer-py image \d+)", line)
             for line in lines]  # fmt: skip
    return {one[2]: int(one[1]) for one in found if one}


def take(name: str) -> list[int]:
    """As whoever this process is: connect, and return the descriptors that come."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(10)
        peer.connect("\0" + name[1:])
        return list(socket.recv_fds(peer, 1, 8)[1])


def offers(pid: int) -> list[str]:
    """Return the names under which a process offers a mount."""
    folder = f"/proc/{pid}/fd"
    held = set()
    for fd in os.listdir(folder):
        try:
            held.add(os.readlink(f"{folder}/{fd}"))
        except FileNotFoundError:
            continue
    return [name for name, inode in offered().items() if f"socket:[{inode}]" in held]


def is_offered(process: subprocess.Popen[bytes]) -> bool:
    """Return whether keeper hands out the mount of its image."""
    return bool(offers(process.pid))


@contextmanager
def another_group() -> Iterator[None]:
    """Be in a control group of one's own for a while."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = {words[words.index("-") + 1]: words[4] for words in mounts}
    here = next((line[3:] for line in lines if line.startswith("0::")), None)
    if "cgroup2" not in kinds or here is None:
        pytest.skip("did not run: there is no unified control group hierarchy")
    top = Path(kinds["cgroup2"])
    place = top / f"sharing-{os.getpid()}"
    place.mkdir()
    (place / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (top / here.strip("/") / "cgroup.procs").write_text("0")
        eventually(lambda: _removed(place), "the group is empty")


def _removed(place: Path) -> bool:
    try:
        place.rmdir()
    except OSError:
        return False
    return True
