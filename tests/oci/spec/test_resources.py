"""Control groups: where the container is, and what its limits are, read on the host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.oci import bed as beds

V1 = "memory" in beds.hierarchies()
pytestmark = pytest.mark.skipif(not V1, reason="did not run: written for cgroup v1")


def group(bed, controller: str) -> Path:
    """Return the cgroup that `limited` has asked for."""
    return beds.cgroup_folder(controller, f"/apytest/{bed.ids[0]}")


@pytest.fixture(autouse=True)
def no_parent_left():
    yield
    for place in set(beds.hierarchies().values()):
        folder = Path(place) / "apytest"
        if folder.is_dir():
            folder.rmdir()


def limited(bed, bundle, **resources):
    """Start a sleeping container with limits in a cgroup of its own."""
    bundle.linux["cgroupsPath"] = f"/apytest/{bed.name()}"
    bundle.linux["resources"].update(resources)
    return bed.sleeping(bundle)


def test_an_absolute_cgroups_path(bed, bundle):
    container = limited(bed, bundle)
    for controller in ("memory", "cpu", "pids", "devices", "freezer"):
        text = (group(bed, controller) / "cgroup.procs").read_text()
        assert str(container.pid) in text.split(), controller


def test_without_a_cgroups_path(bed, bundle):
    container = bed.sleeping(bundle)
    path = (Path(f"/proc/{container.pid}/cgroup")).read_text()
    assert container.id in path


def test_a_cgroups_path_of_another_container_in_use(bed, bundle):
    container = limited(bed, bundle)
    other = bed.bundle()
    other.linux["cgroupsPath"] = bundle.linux["cgroupsPath"]
    assert "container's cgroup is not empty" in bed.refused(other)
    assert container.status() == "running"


def test_a_frozen_cgroup(bed, bundle):
    """Whoever joins one stops for ever; no other hierarchy has the group."""
    folder = beds.cgroup_folder("freezer", "/apytest/frozen")
    folder.mkdir(parents=True)
    try:
        (folder / "freezer.state").write_text("FROZEN")
        bundle.linux["cgroupsPath"] = "/apytest/frozen"
        assert "container's cgroup unexpectedly frozen" in bed.refused(bundle)
    finally:
        (folder / "freezer.state").write_text("THAWED")
        folder.rmdir()


def test_a_cgroup_that_was_there_before(bed, bundle):
    """Resources that the runtime did not make: the limits are set all the same."""
    container = limited(bed, bundle, pids={"limit": 11})
    assert (group(bed, "pids") / "pids.max").read_text() == "11\n"
    assert container.status() == "running"


@pytest.mark.parametrize(
    "path", ["/../../../apytest/{}", "/apytest/../apytest/{}", "apytest/../../../{}"]
)
def test_a_cgroups_path_with_dots_stays_below(bed, bundle, path):
    name = bed.name()
    bundle.linux["cgroupsPath"] = path.format(name)
    container = bed.sleeping(bundle)
    for line in Path(f"/proc/{container.pid}/cgroup").read_text().splitlines():
        assert ".." not in line
    container.delete("--force")
    assert not beds.cgroups_named(name)


NUMBERS = {
    "memory limit": ({"memory": {"limit": 1 << 26}}, "memory", "memory.limit_in_bytes", "67108864"),
    "memory reservation": (
        {"memory": {"reservation": 1 << 25}},
        "memory",
        "memory.soft_limit_in_bytes",
        "33554432",
    ),
    "memory swappiness": ({"memory": {"swappiness": 7}}, "memory", "memory.swappiness", "7"),
    "oom killer": (
        {"memory": {"disableOOMKiller": True}},
        "memory",
        "memory.oom_control",
        "oom_kill_disable 1",
    ),
    "cpu shares": ({"cpu": {"shares": 512}}, "cpu", "cpu.shares", "512"),
    "cpu quota": ({"cpu": {"quota": 50000}}, "cpu", "cpu.cfs_quota_us", "50000"),
    "cpu period": ({"cpu": {"period": 50000}}, "cpu", "cpu.cfs_period_us", "50000"),
    "cpu burst": (
        {"cpu": {"quota": 50000, "period": 100000, "burst": 1000}},
        "cpu",
        "cpu.cfs_burst_us",
        "1000",
    ),
    "cpu idle": ({"cpu": {"idle": 1}}, "cpu", "cpu.idle", "1"),
    "cpuset cpus": ({"cpu": {"cpus": "0"}}, "cpuset", "cpuset.cpus", "0"),
    "cpuset mems": ({"cpu": {"mems": "0"}}, "cpuset", "cpuset.mems", "0"),
    "pids limit": ({"pids": {"limit": 42}}, "pids", "pids.max", "42"),
    "pids unlimited": ({"pids": {"limit": -1}}, "pids", "pids.max", "max"),
    "blkio read": (
        {"blockIO": {"throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 1048576}]}},
        "blkio",
        "blkio.throttle.read_bps_device",
        "7:0 1048576",
    ),
    "blkio write": (
        {"blockIO": {"throttleWriteBpsDevice": [{"major": 7, "minor": 0, "rate": 1048576}]}},
        "blkio",
        "blkio.throttle.write_bps_device",
        "7:0 1048576",
    ),
    "blkio read iops": (
        {"blockIO": {"throttleReadIOPSDevice": [{"major": 7, "minor": 0, "rate": 10}]}},
        "blkio",
        "blkio.throttle.read_iops_device",
        "7:0 10",
    ),
    "blkio write iops": (
        {"blockIO": {"throttleWriteIOPSDevice": [{"major": 7, "minor": 0, "rate": 10}]}},
        "blkio",
        "blkio.throttle.write_iops_device",
        "7:0 10",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_limit(bed, bundle, name):
    resources, controller, file, value = NUMBERS[name]
    limited(bed, bundle, **resources)
    assert value in (group(bed, controller) / file).read_text().splitlines()


def test_memory_and_swap(bed, bundle):
    limited(bed, bundle, memory={"limit": 1 << 26, "swap": 1 << 27})
    path = group(bed, "memory") / "memory.memsw.limit_in_bytes"
    if path.exists():
        assert path.read_text() == f"{1 << 27}\n"


def test_memory_without_a_limit(bed, bundle):
    limited(bed, bundle, memory={"limit": -1})
    assert int((group(bed, "memory") / "memory.limit_in_bytes").read_text()) > 1 << 60


@pytest.mark.parametrize(
    "resources",
    [
        {"memory": {"swappiness": 101}},
        {"cpu": {"cpus": "4095"}},
        {"cpu": {"cpus": "a"}},
        {"cpu": {"quota": 1}},
        {"cpu": {"period": 1}},
        {"unified": {"memory.max": "1"}},
        {"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]},
        {"rdma": {"unheard0": {"hcaHandles": 3}}},
    ],
    ids=["swappiness", "cpus", "cpus text", "quota", "period", "unified", "hugepage", "rdma"],
)
def test_a_limit_that_cannot_be(bed, bundle, resources):
    bundle.linux["cgroupsPath"] = f"/apytest/{bed.name()}"
    bundle.linux["resources"].update(resources)
    bed.refused(bundle)


def test_the_limit_of_memory_holds(bed, bundle):
    bundle.linux["cgroupsPath"] = f"/apytest/{bed.name()}"
    bundle.linux["resources"]["memory"] = {"limit": 20 << 20, "swap": 20 << 20}
    done = bed.run(bundle.args(beds.PROBE, "fill", "100"))
    assert done.returncode == 128 + 9
    assert done.stdout == ""


def test_the_limit_of_processes_holds(bed, bundle):
    bundle.linux["resources"]["pids"] = {"limit": 3}
    done = bed.run(bundle.shell("sleep 1 & sleep 1 & sleep 1 & sleep 1 & echo all"))
    assert "fork" in done.stderr


DENY = {"allow": False, "access": "rwm"}
FUSE = {"allow": True, "type": "c", "major": 10, "minor": 229}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([DENY], "1 1"),
        ([{"allow": True, "access": "rwm"}], "0 0"),
        ([DENY, FUSE | {"access": "r"}], "0 1"),
        ([DENY, FUSE | {"access": "rw"}], "0 0"),
        ([DENY, {"allow": True, "type": "c", "access": "rw"}], "0 0"),
        ([FUSE | {"access": "rw"}, DENY], "1 1"),
    ],
    ids=["none", "all", "read", "both", "any", "order"],
)
def test_device_rules(bed, bundle, rules, expected):
    """/dev/fuse, 10:229, is in no default list: may it be read, and be written?"""
    bundle.linux["resources"]["devices"] = rules
    bundle.linux["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
    script = "(: </dev/fuse) 2>/dev/null; a=$?; (: >/dev/fuse) 2>/dev/null; echo $a $?"
    assert bed.output(bundle.shell(script)).strip() == expected


def test_default_devices_stay_allowed(bed, bundle):
    bundle.linux["resources"]["devices"] = [{"allow": False, "access": "rwm"}]
    script = "for n in null zero full random urandom; do : </dev/$n || exit 1; done"
    bed.output(bundle.shell(script))


def test_a_device_rule_without_access(bed, bundle):
    bundle.linux["resources"]["devices"] = [{"allow": True, "type": "c"}]
    assert "access" in bed.refused(bundle)


def test_kernel_memory_is_ignored_with_a_warning(bed, bundle):
    bundle.linux["resources"]["memory"] = {"kernel": 1 << 26}
    done = bed.run(bundle.args("true"))
    assert done.returncode == 0, done.stderr


def test_delete_removes_the_cgroups(bed, bundle):
    container = limited(bed, bundle)
    made = group(bed, "memory")
    assert made.is_dir()
    container.delete("--force")
    assert not made.exists()


# ---- changes while it runs ----


def test_pause_and_resume(bed, bundle):
    container = limited(bed, bundle)
    bed.good("pause", container.id)
    assert container.status() == "paused"
    assert (group(bed, "freezer") / "freezer.state").read_text() == "FROZEN\n"
    assert "paused" in bed.bad("start", container.id)
    bed.good("resume", container.id)
    assert container.status() == "running"
    assert (group(bed, "freezer") / "freezer.state").read_text() == "THAWED\n"


def test_resume_of_what_is_not_paused(bed, bundle):
    container = bed.sleeping(bundle)
    assert "container not paused" in bed.bad("resume", container.id)


def test_exec_in_a_paused_container(bed, bundle):
    container = bed.sleeping(bundle)
    bed.good("pause", container.id)
    done = container.exec("true")
    assert done.returncode != 0
    assert "cannot exec in a paused container" in done.stderr
    bed.good("resume", container.id)


def test_delete_by_force_of_a_paused_container(bed, bundle):
    container = bed.sleeping(bundle)
    bed.good("pause", container.id)
    container.delete("--force")
    assert container.wait() == 128 + 9


UPDATES = {
    "memory": (["--memory", "64m"], "memory", "memory.limit_in_bytes", "67108864"),
    "reservation": (
        ["--memory-reservation", "1m"],
        "memory",
        "memory.soft_limit_in_bytes",
        "1048576",
    ),
    "shares": (["--cpu-share", "100"], "cpu", "cpu.shares", "100"),
    "quota": (["--cpu-quota", "30000"], "cpu", "cpu.cfs_quota_us", "30000"),
    "period": (["--cpu-period", "90000"], "cpu", "cpu.cfs_period_us", "90000"),
    "cpus": (["--cpuset-cpus", "0"], "cpuset", "cpuset.cpus", "0"),
    "mems": (["--cpuset-mems", "0"], "cpuset", "cpuset.mems", "0"),
    "pids": (["--pids-limit", "10"], "pids", "pids.max", "10"),
    "no pids": (["--pids-limit", "-1"], "pids", "pids.max", "max"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_update_by_an_option(bed, bundle, name):
    flags, controller, file, value = UPDATES[name]
    container = limited(bed, bundle, pids={"limit": 20})
    bed.good("update", *flags, container.id)
    assert (group(bed, controller) / file).read_text() == value + "\n"


def test_update_from_standard_input(bed, bundle):
    container = limited(bed, bundle)
    text = '{"memory": {"limit": 33554432}, "pids": {"limit": 9}, "cpu": {"shares": 200}}'
    bed.good("update", "--resources", "-", container.id, input=text)
    assert (group(bed, "memory") / "memory.limit_in_bytes").read_text() == "33554432\n"
    assert (group(bed, "pids") / "pids.max").read_text() == "9\n"
    assert (group(bed, "cpu") / "cpu.shares").read_text() == "200\n"


def test_update_from_a_file(bed, bundle):
    container = limited(bed, bundle)
    (bundle.path / "resources").write_text('{"pids": {"limit": 8}}')
    bed.good("update", "--resources", bundle.path / "resources", container.id)
    assert (group(bed, "pids") / "pids.max").read_text() == "8\n"


def test_update_with_something_wrong(bed, bundle):
    container = limited(bed, bundle)
    bed.bad("update", "--memory", "many", container.id)
    bed.bad("update", "--cpuset-cpus", "4095", container.id)
    assert container.status() == "running"


def test_exec_joins_the_cgroups(bed, bundle):
    container = limited(bed, bundle)
    done = container.exec("cat", "/proc/self/cgroup")
    assert done.returncode == 0, done.stderr
    own = Path(f"/proc/{container.pid}/cgroup").read_text()
    memory = [line for line in own.splitlines() if ":memory:" in line]
    assert memory[0] in done.stdout


def test_events_of_one_moment(bed, bundle):
    import json

    container = limited(bed, bundle, pids={"limit": 42})
    found = json.loads(bed.good("events", "--stats", container.id).stdout)
    assert (found["type"], found["id"]) == ("stats", container.id)
    data = found["data"]
    assert data["pids"]["current"] == 1
    assert data["pids"]["limit"] == 42
    assert data["memory"]["usage"]["usage"] > 0
    assert data["cpu"]["usage"]["total"] > 0


def test_ps_as_json(bed, bundle):
    import json

    container = bed.sleeping(bundle)
    assert json.loads(bed.good("ps", "--format", "json", container.id).stdout) == [container.pid]


def test_ps_as_a_table(bed, bundle):
    container = bed.sleeping(bundle)
    lines = bed.good("ps", container.id).stdout.splitlines()
    assert lines[0].split()[1] == "PID"
    assert [line.split()[1] for line in lines[1:]] == [str(container.pid)]


def test_ps_with_options_of_ps(bed, bundle):
    container = bed.sleeping(bundle)
    lines = bed.good("ps", container.id, "-o", "pid,comm").stdout.splitlines()
    assert lines[1].split() == [str(container.pid), "sleep"]


def test_the_initial_affinity_is_not_the_callers(bed, bundle):
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        pytest.skip("did not run: one processor")
    os.sched_setaffinity(0, {0})
    try:
        found = bed.facts(bundle)["cpus"]
    finally:
        os.sched_setaffinity(0, own)
    assert found == sorted(own)
