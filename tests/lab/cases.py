"""What only the lab's virtual machine can show: cgroup v2 with every controller, AppArmor."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.oci.bed import eventually

TOP = Path("/sys/fs/cgroup")
PROFILE = """
profile lab_deny flags=(attach_disconnected) {
  file, capability, network, mount, signal, ptrace, umount, pivot_root,
  deny /secret r,
}
"""


@pytest.fixture
def group(bed, bundle) -> Path:
    """Where the bundle's container will be."""
    name = bed.name()
    bundle.linux["cgroupsPath"] = f"/{name}"
    return TOP / name


def value(group: Path, file: str) -> str:
    return (group / file).read_text().strip()


RESOURCES = {
    "memory": ({"memory": {"limit": 64 << 20}}, "memory.max", str(64 << 20)),
    "reservation": ({"memory": {"reservation": 32 << 20}}, "memory.low", str(32 << 20)),
    "swap": ({"memory": {"limit": 64 << 20, "swap": 96 << 20}}, "memory.swap.max", str(32 << 20)),
    "pids": ({"pids": {"limit": 55}}, "pids.max", "55"),
    "no pids": ({"pids": {"limit": -1}}, "pids.max", "max"),
    "quota": ({"cpu": {"quota": 50000, "period": 100000}}, "cpu.max", "50000 100000"),
    "burst": ({"cpu": {"quota": 50000, "period": 100000, "burst": 1000}}, "cpu.max.burst", "1000"),
    "weight": ({"cpu": {"shares": 1024}}, "cpu.weight", "100"),
    "idle": ({"cpu": {"idle": 1}}, "cpu.idle", "1"),
    "cpus": ({"cpu": {"cpus": "0", "mems": "0"}}, "cpuset.cpus", "0"),
    "io": ({"blockIO": {"weight": 100}}, "io.weight", "default 910"),
    "unified": ({"unified": {"memory.high": "33554432"}}, "memory.high", "33554432"),
    "unified last": (
        {"pids": {"limit": 5}, "unified": {"pids.max": "66"}}, "pids.max", "66",
    ),
    "hugepages": (
        {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}]}, "hugetlb.2MB.max", "4194304",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESOURCES)
def test_a_limit(bed, bundle, group, name):
    resources, file, wanted = RESOURCES[name]
    bundle.linux["resources"].update(resources)
    box = bed.sleeping(bundle)
    if not (group / file).exists():
        pytest.skip(f"did not run: this kernel has no {file}")
    # Earlier versions of runc have another formula for shares.
    assert value(group, file) in (wanted, "39" if name == "weight" else wanted)
    assert str(box.pid) in value(group, "cgroup.procs").split()
    box.finish()
    assert not group.exists()


def test_an_unknown_unified_key(bed, bundle, group):
    bundle.linux["resources"]["unified"] = {"nothing.max": "1"}
    assert "nothing" in bed.refused(bundle)
    assert not group.exists()


def test_update(bed, bundle, group):
    box = bed.sleeping(bundle)
    bed.good("update", "--pids-limit", "44", "--memory", "50m", "--cpu-quota", "20000", box.id)
    assert value(group, "pids.max") == "44"
    assert value(group, "memory.max") == str(50 << 20)
    assert value(group, "cpu.max") == "20000 100000"
    box.finish()


def test_devices_by_a_program(bed, bundle, group):
    """No capability is asked for at these two, so what refuses is the control group."""
    allow = {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"}
    bundle.linux["resources"]["devices"] = [{"allow": False, "access": "rwm"}, allow]
    nodes = {"fuse": 229, "mapper": 236}
    bundle.linux["devices"] = [
        {"path": f"/dev/{name}", "type": "c", "major": 10, "minor": minor}
        for name, minor in nodes.items()
    ]
    box = bed.sleeping(bundle)
    opened = box.exec("sh", "-c", "exec 3</dev/fuse")
    assert opened.returncode == 0, opened.stderr
    for refused in ("exec 3<>/dev/fuse", "exec 3</dev/mapper"):
        done = box.exec("sh", "-c", refused)
        assert "Operation not permitted" in done.stderr, (refused, done.stderr)
    assert box.exec("sh", "-c", "exec 3</dev/null 4</dev/zero").returncode == 0
    bed.good("update", "--pids-limit", "99", box.id)
    assert box.exec("sh", "-c", "exec 3</dev/fuse").returncode == 0
    box.finish()


def test_pause(bed, bundle, group):
    box = bed.sleeping(bundle)
    bed.good("pause", box.id)
    assert box.status() == "paused"
    assert "frozen 1" in value(group, "cgroup.events")
    bed.good("resume", box.id)
    assert box.status() == "running"
    box.finish()


def test_the_end_of_all(bed, bundle, group):
    """Without a pid namespace, others outlive the first process, but not the container."""
    bundle.without_space("pid")
    box = bed.started(bundle.shell("sleep 600 & sleep 600"))
    eventually(lambda: len(value(group, "cgroup.procs").split()) >= 2, "both processes are there")
    bed.good("kill", box.id, "KILL")
    box.wait()
    beds.reap()
    bed.good("delete", "--force", box.id)
    beds.reap()
    assert not group.exists()


def test_exec_in_a_group_below(bed, bundle, group):
    bundle.space("cgroup")
    box = bed.sleeping(bundle)
    (group / "below").mkdir()
    done = box.exec("cat", "/proc/self/cgroup", flags=("--cgroup", "below"))
    assert done.stdout.strip().endswith("/below"), done.stderr
    box.finish()


def test_statistics(bed, bundle, group):
    box = bed.sleeping(bundle)
    import json

    shown = json.loads(bed.good("events", "--stats", box.id).stdout)["data"]
    assert shown["memory"]["usage"]["usage"] > 0
    assert shown["pids"]["current"] >= 1
    box.finish()


def test_the_mount_of_its_own_namespace(bed, bundle, group):
    bundle.space("cgroup")
    done = bed.output(bundle.shell("cat /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs"))
    assert done.split() == ["0::/", "/sys/fs/cgroup/cgroup.procs"]


def test_too_much_memory(bed, bundle, group):
    bundle.linux["resources"]["memory"] = {"limit": 32 << 20, "swap": 32 << 20}
    done = bed.run(bundle.args("probe", "fill", "128"))
    assert done.returncode == 137


@pytest.fixture
def profile(bundle) -> str:
    parser = f"{os.environ['LAB_FOLDER']}/root/sbin/apparmor_parser"
    subprocess.run([parser, "-r", "-K"], input=PROFILE, text=True, check=True)
    (bundle.rootfs / "secret").write_text("word\n")
    return "lab_deny"


SHOWN = "cat /proc/self/attr/current; cat /secret"


def test_a_profile_of_the_configuration(bed, bundle, profile):
    bundle.process["apparmorProfile"] = profile
    done = bed.run(bundle.shell(SHOWN))
    assert "lab_deny (enforce)" in done.stdout, (done.stdout, done.stderr)
    assert "Permission denied" in done.stderr


def test_a_profile_of_exec(bed, bundle, profile):
    box = bed.sleeping(bundle)
    done = box.exec("sh", "-c", SHOWN, flags=("--apparmor", profile))
    assert "lab_deny (enforce)" in done.stdout, (done.stdout, done.stderr)
    assert "Permission denied" in done.stderr
    assert box.exec("sh", "-c", SHOWN).stdout.endswith("word\n")
    box.finish()


def test_a_profile_that_is_not_loaded(bed, bundle):
    bundle.process["apparmorProfile"] = "no_such_profile"
    said = bed.refused(bundle)
    assert "apparmor failed to apply profile" in said


def test_more_open_files_than_we_may(bed, bundle):
    """With all capabilities a hard limit can be raised."""
    limit = {"type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1048576}
    bundle.process["rlimits"] = [limit]
    assert bed.output(bundle.shell("ulimit -n")) == "1048576\n"


def test_a_lower_oom_score(bed, bundle):
    bundle.process["oomScoreAdj"] = -500
    assert bed.output(bundle.shell("cat /proc/self/oom_score_adj")) == "-500\n"
