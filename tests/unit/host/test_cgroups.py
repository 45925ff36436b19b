"""Control groups: trees, rules for devices, formulas, and the drivers on plain directories."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path

import pytest

from apptainer_py.host.cgroups import driver, mounting, values
from apptainer_py.host.cgroups.devices import ANY, DEFAULTS, Rules, read_rules, wanted_rules
from apptainer_py.host.cgroups.devices_bpf import device_program
from apptainer_py.host.cgroups.driver import CgroupError, Disabled
from apptainer_py.host.cgroups.stats_v1 import read_list
from apptainer_py.host.cgroups.tree import clean_path, parse_tree
from apptainer_py.host.cgroups.v1 import V1
from apptainer_py.host.cgroups.v2 import V2
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import CgroupWish

SPEC = importlib.util.spec_from_file_location("bpf_run", Path(__file__).with_name("bpf_run.py"))
assert SPEC and SPEC.loader
bpf_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bpf_run)

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 31 0:31 /box /other/mem\\040ory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
38 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
HYBRID_OWN = "4:memory:/box/me\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n"
UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"


def wish(path: str = "/box", **more: object) -> CgroupWish:
    return CgroupWish(**{"path": path, "resources": {}, **more})


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("a", "/a"),
        ("/a//b/./c/", "/a/b/c"),
        ("../../a", "/a"),
        ("/a/../../b", "/b"),
        ("", "/"),
        ("/..", "/"),
    ],
)
def test_no_path_leads_above_the_hierarchy(path, clean):
    assert clean_path(path) == clean


def test_a_hybrid_tree():
    tree = parse_tree(HYBRID, HYBRID_OWN)
    assert not tree.unified_only
    assert tree.unified == "/sys/fs/cgroup/unified"
    assert tree.new_paths("/box") == {
        "memory": "/sys/fs/cgroup/memory/box",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/box",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/box",
        "name=systemd": "/sys/fs/cgroup/systemd/box",
        "": "/sys/fs/cgroup/unified/box",
    }
    below = tree.new_paths("box")
    assert below["memory"] == "/sys/fs/cgroup/memory/box/me/box"
    assert below["cpu"] == "/sys/fs/cgroup/cpu,cpuacct/box"
    assert tree.new_paths("/../..")["memory"] == "/sys/fs/cgroup/memory"
    known = tree.known_paths(["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/cpu,cpuacct/a"])
    assert known["cpuacct"] == "/sys/fs/cgroup/cpu,cpuacct/a"
    assert set(known) == {"memory", "cpu", "cpuacct"}


def test_a_tree_of_cgroup2_alone():
    tree = parse_tree(UNIFIED, "0::/user.slice/session.scope\n")
    assert tree.unified_only
    assert tree.new_paths("/box") == {"": "/sys/fs/cgroup/box"}
    assert tree.new_paths("box") == {"": "/sys/fs/cgroup/user.slice/box"}


def test_the_mount_of_a_part_and_escaped_names():
    (line,) = [line for line in HYBRID.splitlines() if "/other" in line]
    tree = parse_tree(line, HYBRID_OWN)
    assert tree.new_paths("/x") == {"memory": "/other/mem ory/x"}
    assert tree.new_paths("x") == {"memory": "/other/mem ory/me/x"}


def test_no_tree_at_all():
    with pytest.raises(CgroupError, match="no cgroup mount found"):
        parse_tree("", HYBRID_OWN)


def rule(allow: bool, access: str, **more: object) -> dict[str, object]:
    return {"allow": allow, "access": access, **more}


def test_the_usual_rules_are_a_list_of_what_is_allowed():
    rules = wanted_rules([rule(False, "rwm")])
    assert not rules.default_allow
    assert rules.exceptions == dict(DEFAULTS)
    lines = Rules(default_allow=True).transition(rules)
    assert lines[0] == (False, "a")
    assert (True, "c 1:3 rwm") in lines
    assert (True, "c 136:* rwm") in lines
    assert len(lines) == 1 + len(DEFAULTS)


def test_the_kernel_text_of_rules_comes_back():
    rules = wanted_rules([rule(True, "rw", type="b", major=8)])
    text = "".join(
        line + "\n" for allow, line in Rules(default_allow=True).transition(rules) if allow
    )
    assert read_rules(text) == rules
    assert read_rules("a *:* rwm\n") == Rules(default_allow=True)


def test_only_what_differs_is_written():
    old = wanted_rules([rule(True, "r", type="c", major=7, minor=7)])
    new = wanted_rules([rule(True, "w", type="c", major=7, minor=7)])
    assert old.transition(new) == [(False, "c 7:7 r"), (True, "c 7:7 w")]
    assert old.transition(old) == []


def test_everything_allowed_but_some():
    rules = wanted_rules([rule(True, "rwm"), rule(False, "w", type="c", major=7, minor=7)])
    assert rules.default_allow
    assert rules.exceptions == {("c", 7, 7): "w"}
    assert Rules().transition(rules) == [(True, "a"), (False, "c 7:7 w")]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([rule(True, "")], "device access at 0 field cannot be empty"),
        ([rule(True, "rx")], 'invalid device access "rx" at 0'),
        ([rule(True, "r", type="x")], 'invalid device type "x"'),
        ([rule(True, "r", type="c", major=-2)], "invalid device major number -2"),
        (
            [rule(True, "rw", type="c", major=7), rule(False, "r", type="c", major=7, minor=7)],
            "cannot punch hole in existing wildcard rule",
        ),
    ],
)
def test_wrong_rules(entries, text):
    with pytest.raises(CgroupError) as caught:
        wanted_rules(entries)
    assert text in str(caught.value)


def allowed(rules: Rules, kind: str, access: str, major: int, minor: int) -> bool:
    number = {"b": 1, "c": 2}[kind]
    mask = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    return bool(bpf_run.run_device(device_program(rules), number, mask, major, minor))


def expected(rules: Rules, kind: str, access: str, major: int, minor: int) -> bool:
    for (of_kind, of_major, of_minor), letters in rules.exceptions.items():
        if of_kind == kind and of_major in (major, ANY) and of_minor in (minor, ANY):
            hit = [letter in letters for letter in access]
            if all(hit) if not rules.default_allow else any(hit):
                return not rules.default_allow
    return rules.default_allow


@pytest.mark.parametrize(
    "entries",
    [
        [rule(False, "rwm")],
        [rule(True, "rwm")],
        [rule(False, "rwm"), rule(True, "r", type="b", major=8, minor=0)],
        [rule(True, "rwm"), rule(False, "w", type="b", major=8), rule(False, "m", type="c")],
    ],
)
def test_the_device_program_means_the_rules(entries):
    rules = wanted_rules(entries)
    every = product("bc", ("r", "w", "m", "rw", "rwm"), (1, 5, 8, 136), (0, 3, 7))
    for kind, access, major, minor in every:
        answer = allowed(rules, kind, access, major, minor)
        assert answer == expected(rules, kind, access, major, minor), (kind, access, major, minor)


@pytest.mark.parametrize(
    ("shares", "weight"),
    [(0, 0), (1, 1), (2, 1), (1024, 100), (262144, 10000), (1 << 40, 10000)],
)
def test_cpu_weight(shares, weight):
    assert values.cpu_weight(shares) == weight


def test_io_weight():
    assert [values.io_weight(n) for n in (0, 10, 500, 1000)] == [0, 1, 4950, 10000]


@pytest.mark.parametrize(
    ("memory", "writes"),
    [
        ({}, []),
        ({"limit": 10}, [("memory.max", "10")]),
        ({"limit": -1}, [("memory.swap.max", "max"), ("memory.max", "max")]),
        ({"limit": 10, "swap": 10}, [("memory.swap.max", "0"), ("memory.max", "10")]),
        ({"limit": 10, "swap": 30}, [("memory.swap.max", "20"), ("memory.max", "10")]),
        ({"swap": -1}, [("memory.swap.max", "max")]),
        ({"reservation": 5}, [("memory.low", "5")]),
    ],
)
def test_memory_writes(memory, writes):
    assert values.memory_writes(memory) == writes


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        ({"swap": 5}, "unable to set swap limit without memory limit"),
        ({"limit": 9, "swap": 5}, "memory+swap limit should be >= memory limit"),
        ({"limit": -1, "swap": 5}, "invalid memory value: -1"),
        ({"swap": -2}, "invalid memory swap value: -2"),
    ],
)
def test_memory_that_contradicts_itself(memory, text):
    with pytest.raises(CgroupError) as caught:
        values.memory_writes(memory)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("cpu", "text"),
    [
        ({}, ""),
        ({"quota": 5000}, "5000 100000"),
        ({"quota": -1}, "max 100000"),
        ({"period": 5000}, "max 5000"),
        ({"quota": 5, "period": 6}, "5 6"),
    ],
)
def test_cpu_max(cpu, text):
    assert values.cpu_max(cpu) == text


def test_lists_of_numbers():
    assert read_list("0-2,7\n") == [0, 1, 2, 7]
    assert read_list("\n") == []
    with pytest.raises(CgroupError):
        read_list("a-b")


def group(tmp_path: Path, name: str, *files: str) -> str:
    place = tmp_path / name
    place.mkdir(parents=True)
    for file in files:
        text = {"cpu.shares": "512", "memory.limit_in_bytes": "100"}.get(file, "")
        (place / file).write_text(text)
    return str(place)


V1_FILES = {
    "memory": (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.soft_limit_in_bytes",
        "memory.oom_control",
        "memory.swappiness",
    ),
    "cpu": (
        "cpu.shares",
        "cpu.cfs_period_us",
        "cpu.cfs_quota_us",
        "cpu.cfs_burst_us",
        "cpu.idle",
        "cpu.rt_period_us",
        "cpu.rt_runtime_us",
    ),
    "cpuset": ("cpuset.cpus", "cpuset.mems"),
    "pids": ("pids.max",),
    "blkio": (
        "blkio.bfq.weight",
        "blkio.bfq.weight_device",
        "blkio.throttle.read_bps_device",
    ),
    "hugetlb": ("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.rsvd.limit_in_bytes"),
    "net_cls": ("net_cls.classid",),
    "net_prio": ("net_prio.ifpriomap",),
    "rdma": ("rdma.max",),
}


def v1(tmp_path: Path) -> V1:
    paths = {name: group(tmp_path, name, *files) for name, files in V1_FILES.items()}
    return V1(wish(), paths, rootless=False)


RESOURCES = {
    "memory": {
        "limit": 200,
        "swap": 300,
        "reservation": 50,
        "disableOOMKiller": True,
        "swappiness": 7,
        "kernel": 1,
    },
    "cpu": {
        "shares": 512,
        "quota": 5000,
        "period": 10000,
        "burst": 100,
        "idle": 1,
        "cpus": "0-1",
        "mems": "0",
        "realtimePeriod": 1000,
        "realtimeRuntime": 900,
    },
    "pids": {"limit": 20},
    "blockIO": {
        "weight": 100,
        "weightDevice": [{"major": 8, "minor": 0, "weight": 20}],
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 99}],
    },
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4096}],
    "network": {"classID": 7, "priorities": [{"name": "lo", "priority": 3}]},
    "rdma": {"mlx5": {"hcaHandles": 3, "hcaObjects": 4}},
}


def test_every_file_of_v1(tmp_path):
    v1(tmp_path).apply(RESOURCES)
    written = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "memory.limit_in_bytes": "200",
        "memory.memsw.limit_in_bytes": "300",
        "memory.soft_limit_in_bytes": "50",
        "memory.oom_control": "1",
        "memory.swappiness": "7",
        "cpu.shares": "512",
        "cpu.cfs_period_us": "10000",
        "cpu.cfs_quota_us": "5000",
        "cpu.cfs_burst_us": "100",
        "cpu.idle": "1",
        "cpu.rt_period_us": "1000",
        "cpu.rt_runtime_us": "900",
        "cpuset.cpus": "0-1",
        "cpuset.mems": "0",
        "pids.max": "20",
        "blkio.bfq.weight": "100",
        "blkio.bfq.weight_device": "8:0 20",
        "blkio.throttle.read_bps_device": "8:0 99",
        "hugetlb.2MB.limit_in_bytes": "4096",
        "hugetlb.2MB.rsvd.limit_in_bytes": "4096",
        "net_cls.classid": "7",
        "net_prio.ifpriomap": "lo 3",
        "rdma.max": "mlx5 hca_handle=3 hca_object=4",
    }


@pytest.mark.parametrize(
    ("memory", "order"),
    [
        ({"limit": 90, "swap": 300}, ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
        ({"limit": 90, "swap": 95}, ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
        ({"limit": 200, "swap": -1}, ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
        ({"limit": -1}, ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
    ],
)
def test_memory_is_never_more_than_memory_with_swap(tmp_path, monkeypatch, memory, order):
    written = []
    monkeypatch.setattr(
        "apptainer_py.host.cgroups.v1.write_file", lambda path, name, value: written.append(name)
    )
    v1(tmp_path).apply({"memory": memory})
    assert written == order


@pytest.mark.parametrize(("limit", "text"), [(5, "5"), (-1, "max"), (0, "max")])
def test_limit_of_processes(tmp_path, limit, text):
    v1(tmp_path).apply({"pids": {"limit": limit}})
    assert (tmp_path / "pids/pids.max").read_text() == text


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({"unified": {"a.b": "1"}}, "invalid configuration: cannot use unified on cgroup v1"),
        ({"memory": {"swappiness": 101}}, "valid range is 0-100"),
        ({"cpu": {"shares": 512}}, "cannot set cpu limit: container could not join"),
        ({"hugepageLimits": [{"pageSize": "1GB", "limit": 1}]}, "no such file or directory"),
    ],
)
def test_what_v1_refuses(tmp_path, resources, text):
    manager = v1(tmp_path)
    del manager.paths["cpu"]
    with pytest.raises(CgroupError) as caught:
        manager.apply(resources)
    assert text in str(caught.value)


V2_FILES = """
memory.max memory.swap.max memory.low pids.max io.weight io.max cpu.weight cpu.max cpu.max.burst
cpu.idle cpuset.cpus cpuset.mems hugetlb.2MB.max hugetlb.2MB.rsvd.max rdma.max memory.high
cgroup.controllers cgroup.events
""".split()


def v2(tmp_path: Path, rootless: bool = False) -> V2:
    path = group(tmp_path, "box", *V2_FILES)
    return V2(wish(), {"": path}, rootless=rootless, top=str(tmp_path))


def test_every_file_of_v2(tmp_path):
    v2(tmp_path).apply({**RESOURCES, "unified": {"memory.high": "77"}}, devices=False)
    written = {path.name: path.read_text() for path in (tmp_path / "box").iterdir()}
    assert written == {
        "memory.max": "200",
        "memory.swap.max": "100",
        "memory.low": "50",
        "memory.high": "77",
        "pids.max": "20",
        "io.weight": "910",
        "io.max": "8:0 rbps=99",
        "cpu.weight": "59",
        "cpu.max": "5000 10000",
        "cpu.max.burst": "100",
        "cpu.idle": "1",
        "cpuset.cpus": "0-1",
        "cpuset.mems": "0",
        "hugetlb.2MB.max": "4096",
        "hugetlb.2MB.rsvd.max": "4096",
        "rdma.max": "mlx5 hca_handle=3 hca_object=4",
        "cgroup.controllers": "",
        "cgroup.events": "",
    }


@pytest.mark.parametrize(
    ("unified", "text"),
    [
        ({"a/b": "1"}, 'unified resource "a/b" must be a file name (no slashes)'),
        ({"ab": "1"}, 'unified resource "ab" must be in the form CONTROLLER.PARAMETER'),
        ({"no.thing": "1"}, 'unified resource "no.thing" can\'t be set: controller "no" not'),
    ],
)
def test_wrong_unified_resources(tmp_path, unified, text):
    with pytest.raises(CgroupError) as caught:
        v2(tmp_path).apply({"unified": unified}, devices=False)
    assert str(caught.value).startswith(text)


def test_a_check_before_an_update(tmp_path):
    manager = v2(tmp_path)
    (tmp_path / "box/memory.current").write_text("500\n")
    with pytest.raises(CgroupError, match="rejecting memory limit 200 <= usage 500"):
        manager.apply({"memory": {"limit": 200, "checkBeforeUpdate": True}}, devices=False)


def test_controllers_are_handed_down_to_all_but_the_last(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("")
    manager = V2(wish("/a/b"), {"": f"{tmp_path}/a/b"}, rootless=False, top=str(tmp_path))
    manager.create()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (tmp_path / "a/b").is_dir()
    manager.remove()
    assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a/b").exists()


def test_a_group_in_use_is_refused(tmp_path):
    manager = v2(tmp_path)
    (tmp_path / "box/cgroup.procs").write_text("12\n13\n")
    with pytest.raises(CgroupError, match="not empty: 2 process"):
        manager.create()


@pytest.mark.parametrize("resources", [{}, {"pids": {"limit": 3}}])
def test_without_rights_only_a_container_without_limits_goes_on(tmp_path, monkeypatch, resources):
    (tmp_path / "cgroup.controllers").write_text("pids\n")

    def denied(path: str) -> bool:
        raise CgroupError(text=f"mkdir {path}: permission denied", errno=13)

    monkeypatch.setattr(driver, "make_directory", denied)
    asked = wish("box", resources=resources)
    manager = V2(asked, {"": f"{tmp_path}/box"}, rootless=True, top=str(tmp_path))
    if resources:
        with pytest.raises(CgroupError, match="rootless needs no limits"):
            manager.create()
    else:
        manager.create()
        assert manager.directories() == []
        manager.apply({})


def test_disabled():
    manager = Disabled(wish(), {}, rootless=False)
    manager.create()
    manager.apply(RESOURCES)
    assert (manager.join_rows(), manager.enter_fd(), manager.pids()) == ([], -1, [])
    assert manager.directories() == []
    with pytest.raises(CgroupError):
        manager.freeze(True)
    manager.remove()


def test_rows_to_join(tmp_path):
    manager = V1(wish(), {"cpu": "/c/x", "cpuacct": "/c/x", "": "/u/x"}, rootless=False)
    (row,) = manager.join_rows()
    assert (row.op, row.first) == (protocol.OP_CGROUP, b"/c/x/tasks")
    assert manager.directories() == ["/c/x", "/u/x"]


@pytest.mark.parametrize("private", [False, True])
def test_rows_of_a_mount(monkeypatch, private):
    monkeypatch.setattr(mounting, "find_tree", lambda: parse_tree(HYBRID, HYBRID_OWN))
    paths = {"memory": "/sys/fs/cgroup/memory/box"}
    rows = mounting.rows_for(paths, "/sys/fs/cgroup", ["ro"], private_namespace=private)
    ops = [row.op for row in rows]
    assert ops[:4] == [protocol.OP_FS, protocol.OP_FSOPT, protocol.OP_ATTR, protocol.OP_PLACE]
    placed = [row.first for row in rows if row.op == protocol.OP_PLACE]
    assert placed[1:] == [
        b"/sys/fs/cgroup/cpu,cpuacct",
        b"/sys/fs/cgroup/memory",
        b"/sys/fs/cgroup/systemd",
    ]
    links = [(row.first, row.second) for row in rows if row.op == protocol.OP_LINK]
    assert links == [
        (b"cpu,cpuacct", b"/sys/fs/cgroup/cpu"),
        (b"cpu,cpuacct", b"/sys/fs/cgroup/cpuacct"),
    ]
    trees = [row.first for row in rows if row.op == protocol.OP_TREE]
    options = [(row.first, row.second) for row in rows if row.op == protocol.OP_FSOPT]
    if private:
        assert trees == []
        assert (b"name", b"systemd") in options
    else:
        assert trees[1] == b"/sys/fs/cgroup/memory/box"
    assert ops[-1] == protocol.OP_REMOUNT


def test_who_may_make_no_group_is_shown_his_own(monkeypatch, tmp_path):
    monkeypatch.setattr(mounting, "find_tree", lambda: parse_tree(HYBRID, HYBRID_OWN))
    monkeypatch.setattr(driver.os, "access", lambda path, mode: path == str(tmp_path))
    paths = {"memory": f"{tmp_path}/box", "cpu": "/proc/box", "cpuacct": "/proc/box"}
    rows = V1(wish(), paths, rootless=True).mount_rows("/x", [], private_ns=False)
    trees = [row.first.decode() for row in rows if row.op == protocol.OP_TREE]
    assert trees[0] == "/sys/fs/cgroup/cpu,cpuacct"
    assert trees[1] == f"{tmp_path}/box"


def test_rows_of_a_mount_of_cgroup2(monkeypatch):
    monkeypatch.setattr(mounting, "find_tree", lambda: parse_tree(UNIFIED, "0::/me\n"))
    rows = mounting.rows_for({"": "/sys/fs/cgroup/box"}, "/x", [], private_namespace=True)
    assert (rows[0].first, rows[-1].first) == (b"cgroup2", b"/x")
    rows = mounting.rows_for({}, "/x", [], private_namespace=False)
    assert rows[0].first == b"/sys/fs/cgroup"


def test_a_users_own_groups_are_not_his_containers_to_write(monkeypatch, tmp_path):
    monkeypatch.setattr(mounting, "find_tree", lambda: parse_tree(UNIFIED, "0::/me\n"))
    manager = V2(wish(), {"": str(tmp_path)}, rootless=True, top="/sys/fs/cgroup")
    rows = manager.mount_rows("/x", ["rw"], private_ns=False)
    assert [row.numbers[0] & 1 for row in rows if row.op == protocol.OP_ATTR] == [1]
    rows = manager.mount_rows("/x", ["rw"], private_ns=True)
    assert [row.numbers[0] & 1 for row in rows if row.op == protocol.OP_ATTR] == [0]


def test_statistics_of_v2(tmp_path):
    path = tmp_path / "box"
    path.mkdir()
    files = {
        "cpu.stat": "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 1\n",
        "cpu.pressure": "some avg10=0.00 avg60=1.50 avg300=0.00 total=9\n",
        "memory.stat": "file 7\nanon 8\n",
        "memory.current": "10",
        "memory.max": "max",
        "memory.swap.max": "5",
        "cgroup.procs": "4\n5\n",
        "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n",
        "hugetlb.2MB.current": "6",
        "hugetlb.2MB.events": "max 3",
    }
    for name, text in files.items():
        (path / name).write_text(text)
    stats = V2(wish(), {"": str(path)}, rootless=False, top=str(tmp_path)).stats()
    assert stats["cpu"] == {
        "usage": {"total": 5000, "kernel": 2000, "user": 3000},
        "throttling": {"periods": 1},
        "psi": {"some": {"avg10": 0, "avg60": 1.5, "avg300": 0, "total": 9}},
    }
    unlimited = (1 << 64) - 1
    assert stats["memory"]["cache"] == 7
    assert stats["memory"]["usage"] == {"limit": unlimited, "usage": 10, "failcnt": 0}
    assert stats["memory"]["swap"] == {"limit": unlimited, "usage": 10, "failcnt": 0}
    assert stats["pids"] == {"current": 2}
    assert stats["hugetlb"] == {"2MB": {"usage": 6, "failcnt": 3}}
    served = stats["blkio"]["ioServicedRecursive"]
    assert served == [
        {"major": 8, "op": "Read", "value": 3},
        {"major": 8, "op": "Write", "value": 4},
    ]
