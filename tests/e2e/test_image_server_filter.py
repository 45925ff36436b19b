"""The image server's seccomp filters: what it may not ask of the kernel is its end (T-I02)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.own_install import Household, Installation, descendants, read_until

SERVER = "squashfuse_ll"
FLOWS = {"setuid": (), "userns": ("-u",)}
# Numbers of x86-64.
FORBIDDEN = {
    "socket": 41, "clone": 56, "fork": 57, "execve": 59, "kill": 62, "ptrace": 101, "openat": 257,
    "execveat": 322, "io_uring_setup": 425, "pidfd_getfd": 438, "open of x32": 0x40000002,
}  # fmt: skip
COMPRESSIONS = ("gzip", "lz4", "lzo", "xz", "zstd")
PTRACE_CONT, PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS = 7, 9, 12, 13
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
RAX, RDX, RSI, RDI, ORIG_RAX, RIP = 10, 12, 13, 14, 15, 16
O_CREAT = 0o100

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may trace a server"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86-64"),
]
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


own = fixtures.own(None, needs=("open_fuse",))


def ptrace(request: int, pid: int, data: object = None) -> None:
    if libc.ptrace(request, pid, None, data) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")


def set_call(pid: int, number: int, *arguments: int) -> None:
    """Stop a waiting server before a system call of ours."""
    ptrace(PTRACE_SEIZE, pid)
    ptrace(PTRACE_INTERRUPT, pid)
    os.waitpid(pid, 0)
    registers = (ctypes.c_ulonglong * 27)()
    ptrace(PTRACE_GETREGS, pid, registers)
    registers[RAX], registers[ORIG_RAX] = number, ctypes.c_ulonglong(-1).value
    registers[RIP] -= 2  # the instruction that it waits in
    for place, value in zip((RDI, RSI, RDX), arguments, strict=False):
        registers[place] = value
    ptrace(PTRACE_SETREGS, pid, registers)


def have_it_call(pid: int, number: int, *arguments: int) -> int:
    """Have a waiting server make one system call; return the signal that ends it."""
    set_call(pid, number, *arguments)
    ptrace(PTRACE_CONT, pid)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def answer_to(pid: int, number: int, *arguments: int) -> int:
    """Have a waiting server make one system call; return the error that it gets, then end it."""
    set_call(pid, number, *arguments)
    ptrace(PTRACE_SINGLESTEP, pid)
    assert os.WSTOPSIG(os.waitpid(pid, 0)[1]) == signal.SIGTRAP
    registers = (ctypes.c_ulonglong * 27)()
    ptrace(PTRACE_GETREGS, pid, registers)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -ctypes.c_longlong(registers[RAX]).value


def served(own: Installation, home: Household, *options: str) -> tuple[subprocess.Popen, int]:
    """Start a container that waits; return it and its image server."""
    image = images.bare_squashfs(images.shared_folder())
    words = ["exec", *options, image, "sh", "-c", "echo on; read line; cat /etc/passwd"]
    process = home.adopt(own.start(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE))
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"on\n")
    found = [pid for pid in descendants(process.pid) if name_of(pid) == SERVER]
    assert len(found) == 1
    return process, found[0]


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def status_of(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize("flow", list(FLOWS))
def test_two_filters_in_each_flow(own, home, flow):
    _, server = served(own, home, *FLOWS[flow])
    assert (status_of(server, "Seccomp"), status_of(server, "Seccomp_filters")) == ("2", "2")


@pytest.mark.parametrize("name", list(FORBIDDEN))
def test_a_forbidden_call_is_its_end(own, home, name):
    process, server = served(own, home)
    assert have_it_call(server, FORBIDDEN[name]) == signal.SIGSYS
    assert process.wait(20) in (-signal.SIGKILL, -signal.SIGBUS)


@pytest.fixture(scope="module")
def bare(own) -> Iterator[Installation]:
    """An installation whose server has no object to load, and the first filter alone."""
    placed, aside = own.libexec / "bin/unpack.so", own.place / "unpack.so"
    placed.rename(aside)
    yield own
    aside.rename(placed)


@pytest.mark.parametrize(("name", "arguments"), [
    ("socket", ()), ("clone", ()), ("ptrace", ()), ("execve", ()), ("openat", (0, 0, O_CREAT)),
])  # fmt: skip
def test_the_first_filter_by_itself(bare, home, name, arguments):
    """From before the server's first instruction; a program's name is worth nothing afterwards."""
    _, server = served(bare, home)
    assert status_of(server, "Seccomp_filters") == "1"
    assert have_it_call(server, FORBIDDEN[name], *arguments) == signal.SIGSYS


@pytest.mark.parametrize(("flags", "error"), [
    (os.O_RDONLY, errno.EFAULT),  # the filter lets it pass: the path is nowhere
    (os.O_WRONLY, errno.EACCES), (os.O_RDWR, errno.EACCES),
    (os.O_WRONLY | os.O_RDWR, errno.EACCES),
])  # fmt: skip
def test_the_first_filter_refuses_to_open_for_writing(bare, home, flags, error):
    """A file of its user's stays what it is, before and after the first question."""
    _, server = served(bare, home)
    assert answer_to(server, FORBIDDEN["openat"], 0, 0, flags) == error


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_compression_is_served(own, home, compression):
    """A file of many blocks, whole; links and a listing."""
    folder = images.shared_folder()
    packed, tree = folder / f"{compression}.sqfs", images.small_tree(folder)
    words = ["mksquashfs", tree, packed, "-comp", compression, "-quiet", "-no-progress"]
    subprocess.run(words, check=True, capture_output=True)
    process = home.adopt(
        own.start("exec", packed, "sh", "-c", "ls -l /bin /etc >/dev/null; cat /bin/busybox")
    )
    assert process.communicate(timeout=60)[0] == Path("/bin/busybox").read_bytes()
    assert process.returncode == 0
