"""Limits for an ordinary user, whose systemd has groups of cgroup v2 to give; and for root."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.own_install import eventually

OURS = str(Path(os.environ["OCI_OURS"]).with_name("apptainer-py"))
USER = "labuser"
TOP = Path("/sys/fs/cgroup")
FLOWS = {
    "setuid": (USER, ()),
    "userns": (USER, ("-u",)),
    "fakeroot": (USER, ("-f",)),
    "root": ("root", ()),
}
LIMITS = ("--memory", "64m", "--pids-limit", "55", "--cpus", "0.5", "--cpu-shares", "512")
VALUES = {
    "memory.max": str(64 << 20), "pids.max": "55", "cpu.max": "50000 100000", "cpu.weight": "59",
}  # fmt: skip
FILE = """
[memory]
limit = 67108864
[pids]
limit = 33
[unified]
"memory.high" = "50331648"
"""


@pytest.fixture(scope="module", autouse=True)
def user() -> None:
    for file in ("/etc/subuid", "/etc/subgid"):
        text = Path(file).read_text()
        if f"{USER}:" not in text:
            Path(file).write_text(f"{text}{USER}:4000000:65536\n")
    os.chmod("/dev/fuse", 0o666)


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A sandbox of the machine's busybox."""
    top = Path("/var/tmp/lab-image")
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "home", "root", "var/tmp"):
        (top / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", top / "bin")
    for name in ("sh", "cat", "sleep", "true", "dd", "wc"):
        (top / "bin" / name).symlink_to("busybox")
    (top / ".singularity.d/actions").mkdir(parents=True)
    start = top / ".singularity.d/actions/start"
    start.write_text("#!/bin/sh\nexec sleep 1000\n")
    start.chmod(0o755)
    yield top
    shutil.rmtree(top)


def run(
    who: str, *words: str | Path, program: str = OURS, without: str = ""
) -> subprocess.CompletedProcess[str]:
    entry = pwd.getpwnam(who)
    folder = f"/run/user/{entry.pw_uid}"
    env = {
        "PATH": os.environ["PATH"], "HOME": entry.pw_dir, "XDG_RUNTIME_DIR": folder,
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={folder}/bus",
    }  # fmt: skip
    env.pop(without, None)
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False, timeout=120,
        user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], cwd=entry.pw_dir, env=env,
    )  # fmt: skip


def group_of(who: str, name: str, program: str = OURS) -> Path:
    found = json.loads(run(who, "instance", "list", "--json", program=program).stdout)
    (pid,) = [one["pid"] for one in found["instances"] if one["instance"] == name]
    line = Path(f"/proc/{pid}/cgroup").read_text().strip()
    return TOP / line.removeprefix("0::/")


def values(group: Path, *names: str) -> dict[str, str]:
    return {name: (group / name).read_text().strip() for name in names}


@pytest.mark.parametrize("flow", FLOWS)
def test_an_instance(image, flow):
    who, options = FLOWS[flow]
    name = f"limited-{flow}"
    done = run(who, "instance", "start", *options, *LIMITS, image, name)
    assert done.returncode == 0, done.stderr
    group = group_of(who, name)
    try:
        assert values(group, *VALUES) == VALUES
        part = "system.slice" if who == "root" else f"user@{pwd.getpwnam(who).pw_uid}.service"
        assert part in group.parts
        inside = run(who, "exec", f"instance://{name}", "cat", "/proc/self/cgroup")
        assert inside.stdout.strip() == f"0::/{group.relative_to(TOP)}", inside.stderr
        shown = run(who, "instance", "stats", "--json", "--no-stream", name)
        assert shown.returncode == 0, shown.stderr
        memory = json.loads(shown.stdout)["memory_stats"]["usage"]
        assert memory["limit"] == 64 << 20
        assert 0 < memory["usage"] < 64 << 20
    finally:
        run(who, "instance", "stop", name)
    eventually(lambda: not group.exists(), "the group goes with the instance")


@pytest.mark.parametrize("flow", FLOWS)
def test_a_payload_is_bound(image, flow):
    who, options = FLOWS[flow]
    line = "cat /proc/self/cgroup; for i in 1 2 3 4 5 6 7 8 9; do sleep 3 & done"
    done = run(who, "exec", *options, "--pids-limit", "6", image, "sh", "-c", line)
    assert "fork" in done.stderr, (done.stdout, done.stderr)
    group = TOP / done.stdout.split()[0].removeprefix("0::/")
    eventually(lambda: not group.exists(), "the group goes with the payload")


@pytest.mark.parametrize("flow", FLOWS)
def test_too_much_memory(image, flow):
    who, options = FLOWS[flow]
    limits = ("--memory", "32m", "--memory-swap", "32m")
    line = ("dd", "if=/dev/zero", "of=/dev/null", "bs=134217728", "count=1")
    done = run(who, "exec", *options, *limits, image, *line)
    assert done.returncode == -9, (done.returncode, done.stderr)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_file(image, flow):
    who, options = FLOWS[flow]
    file = Path("/var/tmp/lab-limits.toml")
    file.write_text(FILE)
    name = f"file-{flow}"
    done = run(who, "instance", "start", *options, "--apply-cgroups", file, image, name)
    assert done.returncode == 0, done.stderr
    wanted = {"memory.max": "67108864", "pids.max": "33", "memory.high": "50331648"}
    try:
        assert values(group_of(who, name), *wanted) == wanted
    finally:
        run(who, "instance", "stop", name)


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"])
def test_nobody_to_ask(image, variable):
    done = run(USER, "exec", "--memory", "64m", image, "true", without=variable)
    assert done.returncode == 255
    assert variable in done.stderr


def test_a_limit_that_cannot_be_set(image):
    """The user's manager has no such controller to give."""
    done = run(USER, "exec", "--cpuset-cpus", "7", image, "true")
    assert (done.returncode, done.stdout) == (255, ""), done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("FATAL")]) == 1


def test_as_apptainer_does(image):
    """The values that the real one sets from the same options."""
    real = shutil.which("apptainer")
    if real is None or real == OURS:
        pytest.skip("did not run: Apptainer is not installed here")
    done = run(USER, "instance", "start", *LIMITS, image, "real", program=real)
    assert done.returncode == 0, done.stderr
    try:
        assert values(group_of(USER, "real", real), *VALUES) == VALUES
    finally:
        run(USER, "instance", "stop", "real", program=real)
