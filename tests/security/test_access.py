"""What the user can get at in the setuid flow: nothing of ours, and all of the payload."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security import forge

# Runs as the user: tries everything on each process and prints one line for each attempt.
PROBE = r"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
libc.syscall.restype = ctypes.c_long
SEIZE, DETACH, PIDFD_GETFD = 0x4206, 17, 438

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

def seize(pid):
    return libc.ptrace(SEIZE, pid, None, None)

def descriptors(pid):
    handle = os.pidfd_open(pid)
    result = -1
    for fd in range(64):
        taken = libc.syscall(PIDFD_GETFD, handle, fd, 0)
        if taken >= 0:
            return taken
        if ctypes.get_errno() != errno.EBADF:
            return -1
    return result

def memory(pid):
    space = ctypes.create_string_buffer(8)
    own = Vector(ctypes.addressof(space), 8)
    other = Vector(int(sys.argv[2], 16), 8)
    return libc.process_vm_readv(pid, ctypes.byref(own), 1, ctypes.byref(other), 1, 0)

def opened(name):
    def attempt(pid):
        try:
            if name in ("root", "cwd", "exe"):
                os.readlink(f"/proc/{pid}/{name}")
                inside = "" if name == "exe" else "/."
                os.close(os.open(f"/proc/{pid}/{name}{inside}", os.O_PATH))
            elif name == "fd":
                os.listdir(f"/proc/{pid}/fd")
            else:
                os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
            return 0
        except OSError as error:
            ctypes.set_errno(error.errno)
            return -1
    return attempt

attempts = {name: opened(name) for name in ("mem", "environ", "maps", "fd", "root", "cwd", "exe")}
for number in range(64):
    attempts[f"fd/{number}"] = opened(f"fd/{number}")
attempts |= {"pidfd_getfd": descriptors, "process_vm_readv": memory, "ptrace": seize}
pid = int(sys.argv[1])
for name, attempt in attempts.items():
    ctypes.set_errno(0)
    result = attempt(pid)
    print(name, "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()])
"""
REFUSALS = {"EPERM", "EACCES"}


@pytest.fixture(autouse=True, scope="module")
def orphans(require_root):
    forge.adopt_orphans()


def probe(as_user, pid: int) -> dict[str, str]:
    """What the user may do to a process; run as the user, from outside."""
    mapping = Path(f"/proc/{pid}/maps").read_text().splitlines()[0].split("-")[0]
    done = as_user(["/usr/bin/python3", "-I", "-c", PROBE, str(pid), mapping])
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def assert_refused(as_user, pid: int, what: str) -> None:
    results = probe(as_user, pid)
    assert {"ptrace", "pidfd_getfd", "process_vm_readv", "mem", "environ", "fd"} <= set(results)
    assert set(results.values()) <= REFUSALS, (what, results)


def sleeping(product, user, image, *options):
    words = ["exec", *options, str(image), "sh", "-c", "echo up; exec cat"]
    env = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "USER": user.pw_name}
    process = forge.start(product.program, words, user=user, env=env)
    assert forge.read_line(process.stdout) == b"up\n"
    return process


@pytest.fixture(params=["setuid", "userns"])
def running(request, product, user, demo_sif):
    """A sleeping container with a process namespace, in both flows of an ordinary user."""
    process = sleeping(
        product, user, demo_sif, "-p", *(["-u"] if request.param == "userns" else [])
    )
    yield process.pid
    forge.finish(process)
    assert forge.left_behind() == []


def split(keeper: int) -> tuple[dict[str, int], int]:
    """The processes of a sleeping container: ours by name, and the payload."""
    ours = {"keeper": keeper}
    payload = 0
    for pid in forge.children(keeper):
        below = forge.children(pid)
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if below:
            ours["shim"], payload = pid, below[0]
        elif os.stat(f"/proc/{pid}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino:
            payload = pid
        else:
            ours["image server" if name == "squashfuse_ll" else "master"] = pid
    return ours, payload


def test_the_user_cannot_get_at_our_processes(running, as_user):
    ours, _ = split(running)
    assert set(ours) == {"keeper", "master", "shim", "image server"}
    for name, pid in ours.items():
        assert_refused(as_user, pid, name)


def test_the_payload_is_the_users_own(product, user, as_user, demo_sif):
    process = sleeping(product, user, demo_sif, "-p")
    try:
        results = probe(as_user, split(process.pid)[1])
        allowed = {name for name, result in results.items() if result == "allowed"}
        # Opening one of its streams asks the stream's own mode, which is the test's.
        allowed -= {"fd/0", "fd/1", "fd/2"}
        wanted = {"mem", "environ", "maps", "fd", "root", "cwd", "exe"}
        assert wanted | {"pidfd_getfd", "process_vm_readv", "ptrace"} == allowed
    finally:
        forge.finish(process)
    assert forge.left_behind() == []


@pytest.mark.parametrize("options", [[], ["-p"], ["-u"]], ids=["shared", "pid", "userns"])
def test_the_payload_holds_none_of_our_descriptors(product, user, demo_sif, options):
    process = sleeping(product, user, demo_sif, *options)
    try:
        payload = split(process.pid)[1]
        held = {entry.name: os.readlink(entry) for entry in Path(f"/proc/{payload}/fd").iterdir()}
    finally:
        forge.finish(process)
    assert set(held) == {"0", "1", "2"}
    assert all(target.startswith("pipe:") for target in held.values()), held


STEPS = (
    "KEEPER_START FORK_MASTER DROP_MASTER LOAD_MASTER FORK_CONTAINER FORK_RPC DROP_RPC FORK_SERVER "
    "EXEC_SERVER FORK_STAGE2 DROP_STAGE2 SEALED RPC_DONE DROP_KEEPER GO"
).split()


def stop_all(everyone: list[int]) -> None:
    """Stop the only process of a list and everything below it, which the list then has too."""
    for pid in everyone:
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            continue
        everyone += [one for one in forge.children(pid) if one not in everyone]


@pytest.fixture
def hold_at(product, user, demo_sif, user_tmp):
    """Stops a launch when its trace says that a step begins, and shows its processes to a check."""
    fifo = user_tmp / "trace"
    os.mkfifo(fifo)
    os.chown(fifo, user.pw_uid, user.pw_gid)

    def hold(step, options, check):
        env = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "USER": user.pw_name}
        words = ["--trace", str(fifo), "exec", *options, str(demo_sif), "true"]
        with open(fifo, "r+b", buffering=0) as pipe:
            process = forge.start(product.program, words, user=user, env=env)
            everyone = [process.pid]
            try:
                while f'"{step}"'.encode() not in forge.read_line(pipe):
                    pass
                stop_all(everyone)
                check(everyone)
            finally:
                for pid in reversed(everyone):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                done = forge.finish(process)
        assert done.status == 0, done.err
        assert forge.left_behind() == []

    return hold


@pytest.mark.parametrize("options", [["-p"], ["-u", "-p"]], ids=["setuid", "userns"])
def test_no_process_before_the_payload_can_be_got_at(product, hold_at, as_user, options):
    """Stopped at each step of a launch: keeper, master, rpc, server, shim, stage 2."""
    host = os.stat("/proc/self/ns/mnt").st_ino
    seen: set[tuple[str, str]] = set()

    def check(everyone: list[int]) -> None:
        for pid in everyone:
            try:
                program = os.readlink(f"/proc/{pid}/exe")
                inside = os.stat(f"/proc/{pid}/ns/mnt").st_ino != host
            except OSError:
                continue  # it has ended
            # Without the bit keeper is the user's own until it has made itself non-dumpable; the
            # payload, once it runs, always is.
            if not program.startswith(product.libexecdir) or (
                "-u" in options and pid == everyone[0]
            ):
                continue
            holds = int(forge.status(pid)["CapPrm"], 16) != 0
            seen.add(("inside" if inside else "outside", "with" if holds else "without"))
            assert_refused(as_user, pid, program)

    for step in STEPS:
        hold_at(step, options, check)
    # The image server of the other flow, forked in the new namespace, may be met before its drop.
    wanted = {("inside", "with"), ("inside", "without"), ("outside", "without")}
    more = {("outside", "with")}
    assert wanted <= seen <= wanted | more if "-u" in options else seen == wanted | more


def test_the_probe_sees_what_is_allowed(as_user, user):
    """Refusals above would mean nothing from a probe that never succeeds."""
    argv = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(
        ["/usr/bin/python3", *argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **forge.identity(user),
        cwd="/",
    ) as process:
        assert forge.read_line(process.stdout) == b"up\n"
        results = probe(as_user, process.pid)
        process.communicate(b"\n")
    assert results["ptrace"] == results["pidfd_getfd"] == results["mem"] == "allowed"
    assert results["process_vm_readv"] == "allowed"
    assert errno.errorcode[errno.ENOENT] == results["fd/63"]
