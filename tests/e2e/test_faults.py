"""A system call fails where none should: the launch ends, or its payload is what it always is.

Each call by which a process of the launch gives something up, or makes or flags a mount, is made to
fail in one process at a time, by a tracer that comes where the process begins.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.e2e.steps import BEGIN, finish, gate, launch, number_of, processes
from tests.own_install import HostState, assert_nothing_left, eventually, household, read_until

IDENTITY = "setgroups setresgid setresuid setfsgid setfsuid capset prctl keyctl".split()
MOUNTS = """mount umount2 pivot_root fsopen fsconfig fsmount move_mount open_tree mount_setattr
    openat2 chdir fchdir sethostname""".split()
REST = "close_range setsid clone execve prlimit64".split()
# Where the tracer comes to each process.
BEGINS = {
    "keeper": "KEEPER_START",
    "master": "DROP_MASTER",
    "container": "FORK_RPC",
    "rpc": "DROP_RPC",
    "stage 2": "DROP_STAGE2",
    "image server": "DROP_SERVER",
}
# All of what a payload is that a failure could change.
SCRIPT = (
    "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Sig[BI])' /proc/self/status; umask; hostname; "
    "while read a b c d e f g; do echo $d $e $f; done < /proc/self/mountinfo; ls /; "
    "ls /proc/self/fd | wc -l"
)


def traced(world, place: str, options: list[str], log: Path) -> SimpleNamespace:
    """Launch, with a tracer on the process that comes to a step; return how it ended."""
    with household() as home, gate() as stop:
        host = HostState(world.own.session, world.place)
        wait = f"{number_of(place)}:-1:{BEGIN}:{stop.fd}"
        process = home.adopt(launch(world, "early", wait=wait, inherited=[stop.fd], script=SCRIPT))
        eventually(stop.reached, "a process waits there")
        pid = processes(home)[stop.waiting()]
        argv = ["strace", "-p", str(pid), "-o", str(log), *options]
        tracer = home.adopt(
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
        read_until(tracer.stderr.fileno(), b"attached")
        stop.open()
        status, out, err = finish(process)
        tracer.wait(timeout=10)
        assert_nothing_left(home, host)
    return SimpleNamespace(status=status, out=out, err=err, log=log.read_text())


def chosen(log: str) -> list[tuple[str, int]]:
    """Return calls by name and number: of each kind all of a few, the first and the last of many.

    A kind is what prctl is asked for, and any other call as a whole. What comes after an execve is
    another program's.
    """
    log = re.sub(r"(?m)(^execve\(.*\n)(?s:.*)", r"\1", log)
    counts: Counter[str] = Counter()
    numbers: dict[str, list[tuple[str, int]]] = {}
    for name, first in re.findall(r"^(\w+)\((\w*)", log, re.MULTILINE):
        counts[name] += 1
        kind = first if name == "prctl" else name
        numbers.setdefault(kind, []).append((name, counts[name]))
    return [pick for found in numbers.values() for pick in dict.fromkeys([*found[:3], *found[-3:]])]


# Without an overlay the image's entries are mounts of their own, on a root that holds nothing else.
UNDERLAY = re.compile(rb"(/\S+) \1 ro,nosuid,nodev,relatime|/underlay / ro,nosuid,nodev,relatime")
WITHOUT_PROC = b"Skipping mount proc"


def is_identity(line: bytes) -> bool:
    return re.match(rb"Uid|Gid|Groups|Cap|NoNewPrivs|Sig", line) is not None


def what_is_wrong(call: str, done: SimpleNamespace, usual: SimpleNamespace) -> str:
    """Return what a launch in which a call has failed must not do, or ""."""
    lines, known = done.out.splitlines(), usual.out.splitlines()
    if b"Traceback" in done.err or b"internal error" in done.err:
        return "an accident"
    if done.status == 255:
        return "" if not done.out and b"FATAL" in done.err else "no payload, and no reason"
    if done.status != 0:
        return "a status of its own"
    if done.out == usual.out:
        return ""
    if call not in MOUNTS:
        return "another payload"
    if WITHOUT_PROC in done.err:  # it cannot look at itself, and nothing else is missing
        return "" if lines[-1:] == [b"0"] and set(lines[:-1]) <= set(known) else "more than usual"
    new = [line for line in lines if line not in known]
    gone = [line for line in known if line not in lines]
    if not all(map(UNDERLAY.fullmatch, new)):
        return f"more than usual: {new}"
    if any(map(is_identity, gone)):
        return f"another identity: {gone}"
    # Whatever is missing, the user is told of, or it is there in another way.
    return "" if new or b"WARNING" in done.err else f"less than usual: {gone}"


@pytest.mark.long
@pytest.mark.parametrize("role", BEGINS)
def test_a_call_that_fails_gives_nobody_more(world, role):
    place, wrong, ended, tried = BEGINS[role], [], 0, 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        log = Path(folder) / "calls"
        names = ",".join([*IDENTITY, *MOUNTS, *REST])
        usual = traced(world, place, ["-e", f"trace={names}"], log)
        assert usual.status == 0, usual.err
        assert b"NoNewPrivs:\t1" in usual.out
        assert b"nosuid" in usual.out
        for name, number in chosen(usual.log):
            fault = f"inject={name}:error=EPERM:when={number}"
            done = traced(world, place, ["-e", fault, "-e", f"trace={name}"], log)
            tried += "(INJECTED)" in done.log
            ended += done.status != 0
            if why := what_is_wrong(name, done, usual):
                wrong.append((name, number, why, done.status, done.err))
    assert not wrong, os.linesep.join(map(str, wrong))
    # Were nothing hit, or nothing of weight, this would say little.
    assert (tried > 5, ended > 1) == (True, True), (tried, ended)
