"""Control groups of a launch: limits that bite, refusals in a line, groups that are gone after."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.own_install import Installation, eventually

GROUPS = Path("/sys/fs/cgroup")
NO_SYSTEMD = (
    "FATAL:   container creation failed: while applying cgroups config: cannot use cgroups - "
    "cannot use systemd cgroups manager, systemd not running as init on this host"
)
pytestmark = pytest.mark.skipif(
    not (GROUPS / "pids").is_dir() or Path("/run/systemd/system").is_dir(),
    reason="these tests know cgroup v1 without systemd; tests/lab has the others",
)


def left() -> set[Path]:
    """Return the groups of our launches that there are anywhere."""
    return {Path(place) for place, _, _ in os.walk(GROUPS) if "/apptainer-py-" in place}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = left()
    yield
    eventually(lambda: left() <= before, "the groups are gone")


def group_files(pid: int, controller: str) -> Path:
    """Return the directory of the group that a process is in."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return GROUPS / controller / path.lstrip("/")
    raise AssertionError(f"no {controller}")


def test_the_number_of_processes_is_limited(installed: Installation, sif: Path) -> None:
    for more in ((), ("-p",)):
        script = "for i in 1 2 3 4 5 6; do sleep 1 & done; wait; echo all"
        done = installed.run("exec", *more, "--pids-limit", "4", sif, "sh", "-c", script, root=True)
        assert "fork" in done.stderr
        assert "all" not in done.stdout
        done = installed.run(
            "exec", *more, "--pids-limit", "40", sif, "sh", "-c", script, root=True
        )
        assert (done.returncode, done.stdout) == (0, "all\n")


def test_memory_is_limited(installed: Installation, sif: Path) -> None:
    greedy = ("sh", "-c", "head -c 60000000 /dev/zero | tail >/dev/null; echo $?")
    done = installed.run("exec", "--memory", "20m", sif, *greedy, root=True)
    assert done.stdout.strip() == "137"
    assert installed.run("exec", "--memory", "200m", sif, *greedy, root=True).stdout.strip() == "0"


@contextmanager
def running(
    installed: Installation, sif: Path, *words: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yield a launch as root, and the number of its payload, which has begun."""
    line = [str(installed.program), "exec", *words, str(sif), "sleep", "60"]
    started = subprocess.Popen(line, env=installed.environment())
    try:
        eventually(lambda: payload_of(started.pid), "the payload runs")
        yield started, payload_of(started.pid)
    finally:
        started.kill()
        started.wait(20)


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except FileNotFoundError:
            continue
    return found


def payload_of(pid: int) -> int:
    """Return the descendant that is the payload by now, 0 if none is."""
    for one in family(pid):
        try:
            words = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        if words[0].endswith(b"sleep") and words[1:2] == [b"60"]:
            return one
    return 0


FLAGS = ("--memory", "64m", "--memory-reservation", "32m", "--pids-limit", "30", "--cpus", "0.5",
         "--cpu-shares", "512", "--cpuset-cpus", "0", "--cpuset-mems", "0")  # fmt: skip
FILES = {
    ("memory", "memory.limit_in_bytes"): str(64 << 20),
    ("memory", "memory.soft_limit_in_bytes"): str(32 << 20),
    ("pids", "pids.max"): "30",
    ("cpu", "cpu.cfs_quota_us"): "50000",
    ("cpu", "cpu.cfs_period_us"): "100000",
    ("cpu", "cpu.shares"): "512",
    ("cpuset", "cpuset.cpus"): "0",
    ("cpuset", "cpuset.mems"): "0",
}
TOML = """
[memory]
limit = 67108864
reservation = 33554432
[pids]
limit = 30
[cpu]
quota = 50000
period = 100000
shares = 512
cpus = "0"
mems = "0"
"""


@pytest.mark.parametrize("how", ["flags", "file", "flags in a pid namespace"])
def test_the_kernel_has_the_limits(
    installed: Installation, sif: Path, tmp_path: Path, how: str
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(TOML)
    words = ("--apply-cgroups", str(file)) if how == "file" else FLAGS
    more = ("-p",) if "pid" in how else ()
    with running(installed, sif, *words, *more) as (_, payload):
        found = {
            (controller, name): (group_files(payload, controller) / name).read_text().strip()
            for controller, name in FILES
        }
    assert found == FILES


def test_who_joins_an_instance_is_limited_too(installed: Installation, sif: Path) -> None:
    started = installed.run("instance", "start", "--pids-limit", "30", sif, "joined", root=True)
    assert started.returncode == 0, started.stderr
    try:
        script = "cat /proc/1/cgroup /proc/self/cgroup"
        done = installed.run("exec", "instance://joined", "sh", "-c", script, root=True)
        assert done.returncode == 0, done.stderr
        first, own = (line for line in done.stdout.splitlines() if ":pids:" in line)
        assert first == own
        assert "apptainer-py-" in own
    finally:
        installed.run("instance", "stop", "joined", root=True)


def test_devices_of_a_file(installed: Installation, sif: Path, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    rule = 'type = "c"\nmajor = 10\nminor = 229\naccess = "rwm"\n'
    script = "(: </dev/fuse) 2>/dev/null && echo fuse; (: </dev/null) && echo null"
    for allow, expected in (("true", ["fuse", "null"]), ("false", ["null"])):
        file.write_text(f"[[devices]]\nallow = {allow}\n{rule}")
        done = installed.run("exec", "--apply-cgroups", file, sif, "sh", "-c", script, root=True)
        assert done.stdout.split() == expected


def test_whoever_is_killed_the_groups_go(installed: Installation, sif: Path) -> None:
    with running(installed, sif, "--pids-limit", "30", "-p") as (started, payload):
        group = group_files(payload, "pids")
        assert group.is_dir()
        assert group.name.startswith("apptainer-py-")
        session = os.getsid(started.pid)
        # All but the janitor and the image server, which have sessions of their own.
        for pid in family(started.pid):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not group.exists(), "the group is gone")


def test_a_process_in_the_background_keeps_its_group(installed: Installation, sif: Path) -> None:
    script = "sleep 60 >/dev/null 2>&1 & echo $!"
    done = installed.run("exec", "--pids-limit", "30", sif, "sh", "-c", script, root=True)
    pid = int(done.stdout)
    group = group_files(pid, "pids")
    assert (group / "pids.max").read_text().strip() == "30"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not group.exists(), "the group is gone")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--memory", "bad"), "FATAL:   invalid memory value: invalid size: 'bad'"),
        (("--cpus", "99999"), "FATAL:   cpus value must be in range 0.01 - "),
        (("--pids-limit", "-2"), "FATAL:   invalid pids-limit: -2"),
        (("--blkio-weight", "5"), "FATAL:   blkio-weight must be in range 10-1000"),
        (("--apply-cgroups", "/nope"), "FATAL:   open /nope: no such file or directory"),
        (("--memory", "1m", "--apply-cgroups", "/nope"),
         "FATAL:   cannot apply a cgroups TOML file while using limit flags"),
        (("--cpuset-cpus", "99999"), "FATAL:   container creation failed: while applying cgroups"),
        (("--memory", "64m", "--memory-swap", "32m"),
         "FATAL:   container creation failed: while applying cgroups"),
    ],
)  # fmt: skip
def test_a_wrong_limit_is_one_line(
    installed: Installation, sif: Path, words: tuple[str, ...], text: str
) -> None:
    done = installed.run("exec", *words, sif, "true", root=True)
    assert done.returncode == 255
    assert done.stderr.startswith(text)
    assert len(done.stderr.splitlines()) == 1


def test_keys_and_types_of_a_file(installed: Installation, sif: Path, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[cpu]\nquotas = 1\n[magic]\n")
    done = installed.run("exec", "--apply-cgroups", file, sif, "echo", "ran", root=True)
    assert done.stdout == "ran\n"
    assert [line.partition(": ")[2].strip() for line in done.stderr.splitlines()] == [
        f"{file}: cpu.quotas is unknown and ignored", f"{file}: magic is unknown and ignored",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[memory]\nlimit = "much"',
            "memory.limit is a string, and has to be of type whole number",
        ),
        ("[cpu]\nshares = -1", "cpu.shares is a number -1, and has to be of type number from 0 on"),
        ("[[devices]]\nallow = 1", "devices.allow is a number, and has to be of type boolean"),
        ("memory = 5", "memory is a number, and has to be of type table"),
        ("devices = 5", "devices is a number, and has to be of type array"),
    ],
)
def test_a_wrong_type_is_told_in_words_of_the_files(
    installed: Installation, sif: Path, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    done = installed.run("exec", "--apply-cgroups", file, sif, "true", root=True)
    assert (done.returncode, done.stderr) == (255, f"FATAL:   {file}: {said}\n")


def test_keys_count_in_any_case(installed: Installation, sif: Path, tmp_path: Path) -> None:
    """As with Apptainer; that none of them is called unknown is as important."""
    file = tmp_path / "limits.toml"
    file.write_text("[Pids]\nLIMIT = 1\n")
    words = ("--apply-cgroups", file, sif, "sh", "-c", "true | true")
    done = installed.run("exec", *words, root=True)
    assert done.returncode != 0
    assert "unknown" not in done.stderr
    assert "fork" in done.stderr


@pytest.mark.parametrize("more", [(), ("-u",)])
def test_users_need_systemd(installed: Installation, sif: Path, more: tuple[str, ...]) -> None:
    done = installed.run("exec", *more, "--memory", "64m", sif, "true")
    assert (done.returncode, done.stderr) == (255, NO_SYSTEMD + "\n")


def test_root_in_a_namespace_of_its_own_has_none(installed: Installation, sif: Path) -> None:
    done = installed.run("exec", "-u", "--memory", "64m", sif, "true", root=True)
    assert (done.returncode, done.stderr) == (255, NO_SYSTEMD + "\n")


def test_a_variable_asks_too(installed: Installation, sif: Path) -> None:
    done = installed.run("exec", sif, "true", root=True, env={"APPTAINER_MEMORY": "bad"})
    assert "invalid memory value" in done.stderr
