"""The systemd driver: units as data, and a manager of our own on a private bus."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.host.cgroups import systemd
from apptainer_py.host.cgroups.driver import CgroupError
from apptainer_py.host.cgroups.tree import Hierarchy, Tree
from apptainer_py.host.cgroups.v2 import V2
from apptainer_py.host.dbus import DbusError, Systemd
from apptainer_py.model.oci_plan import CgroupWish

INFINITY = (1 << 64) - 1


def wish(path: str = "box", **more: object) -> CgroupWish:
    return CgroupWish(**{"path": path, "resources": {}, "scope_prefix": "runc", **more})


@pytest.mark.parametrize(
    ("path", "prefix", "name"),
    [("box", "runc", "runc-box.scope"), ("a.slice", "x", "a.slice"), ("box", "", "box.scope")],
)
def test_names_of_units(path, prefix, name):
    assert systemd.unit_name(wish(path, scope_prefix=prefix)) == name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("test.slice", "/test.slice"),
        ("test-a-b.slice", "/test.slice/test-a.slice/test-a-b.slice"),
        ("-.slice", ""),
    ],
)
def test_slices(name, path):
    assert systemd.expand_slice(name) == path


@pytest.mark.parametrize("name", [".slice", "a", "a/b.slice", "a--b.slice", "-a.slice", ""])
def test_what_is_no_slice(name):
    with pytest.raises(CgroupError, match="invalid slice name"):
        systemd.expand_slice(name)


RESOURCES = {
    "devices": [{"allow": True, "access": "rwm"}],
    "memory": {"limit": 100, "swap": 150, "reservation": 50},
    "cpu": {"shares": 1024, "quota": 5050, "period": 10000, "cpus": "0,2", "mems": "0"},
    "pids": {"limit": -1},
    "blockIO": {"weight": 10},
}


def test_properties_on_v1():
    assert systemd.v1_properties(RESOURCES, 252) == [
        ("DevicePolicy", ("s", "auto")),
        ("DeviceAllow", ("a(ss)", [])),
        ("MemoryLimit", ("t", 100)),
        ("CPUShares", ("t", 1024)),
        ("CPUQuotaPeriodUSec", ("t", 10000)),
        ("CPUQuotaPerSecUSec", ("t", 510000)),
        ("BlockIOWeight", ("t", 10)),
        ("TasksMax", ("t", INFINITY)),
        ("AllowedCPUs", ("ay", b"\x05")),
        ("AllowedMemoryNodes", ("ay", b"\x01")),
    ]


def test_properties_on_v2():
    resources = {
        **RESOURCES,
        "unified": {"memory.high": "max", "cpu.max": "max 5000", "cpuset.cpus": "8", "x.y": "1"},
    }
    assert systemd.v2_properties(resources, 252)[2:] == [
        ("MemoryMax", ("t", 100)),
        ("MemoryLow", ("t", 50)),
        ("MemorySwapMax", ("t", 50)),
        ("CPUWeight", ("t", 100)),
        ("CPUQuotaPeriodUSec", ("t", 10000)),
        ("CPUQuotaPerSecUSec", ("t", 510000)),
        ("TasksMax", ("t", INFINITY)),
        ("AllowedCPUs", ("ay", b"\x05")),
        ("AllowedMemoryNodes", ("ay", b"\x01")),
        ("MemoryHigh", ("t", INFINITY)),
        ("CPUQuotaPeriodUSec", ("t", 5000)),
        ("CPUQuotaPerSecUSec", ("t", INFINITY)),
        ("AllowedCPUs", ("ay", b"\x00\x01")),
    ]


def test_an_old_systemd_is_asked_for_less():
    names = [name for name, _ in systemd.v1_properties(RESOURCES, 240)]
    assert not {"CPUQuotaPeriodUSec", "AllowedCPUs"} & set(names)


def test_devices_in_systemds_words():
    resources = {"devices": [{"allow": False, "access": "rwm"}]}
    policy, empty, allowed = systemd.v2_properties(resources, 252)
    assert policy == ("DevicePolicy", ("s", "strict"))
    assert empty == ("DeviceAllow", ("a(ss)", []))
    entries = dict(allowed[1][1])
    assert entries["char-*"] == "m"
    assert entries["block-*"] == "m"
    assert entries["char-pts"] == "rwm"


def test_a_value_that_is_none():
    with pytest.raises(CgroupError, match="value conversion error"):
        systemd.unified_property("pids.max", "many", 252)


@pytest.fixture
def bus(tmp_path) -> Iterator[str]:
    address = f"unix:path={tmp_path}/bus"
    argv = ["dbus-daemon", "--session", "--nofork", "--print-address", f"--address={address}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout
        daemon.stdout.readline()
        script = Path(__file__).with_name("fake_systemd.py")
        argv = ["/usr/bin/python3", "-I", str(script), address, f"{tmp_path}/log", f"{tmp_path}/cg"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as fake:
            assert fake.stdout
            assert fake.stdout.readline() == b"ready\n"
            yield address
            fake.kill()
        daemon.kill()


def calls(tmp_path: Path) -> list[tuple[str, list[object]]]:
    return [tuple(json.loads(line)) for line in (tmp_path / "log").read_text().splitlines()]


@pytest.fixture
def unit(bus, tmp_path) -> systemd.Unit:
    top = tmp_path / "cg"
    top.mkdir()
    (top / "cgroup.controllers").write_text("")
    (top / "cgroup.subtree_control").write_text("")
    paths = {"": f"{top}/system.slice/runc-box.scope"}
    inner = V2(wish(), paths, rootless=False, top=str(top))
    return systemd.Unit(inner, is_v2=True, address=bus)


def test_a_unit_from_start_to_stop(unit, tmp_path):
    unit.create(os.getpid())
    assert os.path.isdir(unit.directories()[0])
    assert unit.unit() == "runc-box.scope"
    (tmp_path / "cg/system.slice/runc-box.scope/pids.max").write_text("")
    unit.apply({"pids": {"limit": 5}}, devices=False)
    unit_path = tmp_path / "cg/system.slice/runc-box.scope"
    assert (unit_path / "pids.max").read_text() == "5"
    (unit_path / "pids.max").unlink()
    unit.remove()
    assert not unit_path.exists()
    made = calls(tmp_path)
    (start,) = [body for member, body in made if member == "StartTransientUnit"]
    assert start[:2] == ["runc-box.scope", "replace"]
    properties = {name: value for name, (_, value) in start[2]}
    assert properties["Slice"] == "system.slice"
    assert properties["Delegate"] is True
    assert properties["PIDs"] == [os.getpid()]
    (change,) = [body for member, body in made if member == "SetUnitProperties"]
    assert change[:2] == ["runc-box.scope", True]
    assert ["TasksMax", ["t", 5]] in change[2]
    assert [member for member, _ in made][-2:] == ["StopUnit", "ResetFailedUnit"]


def test_properties_of_annotations(bus, tmp_path):
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg/cgroup.controllers").write_text("")
    (tmp_path / "cg/cgroup.subtree_control").write_text("")
    own = wish(properties=(("TimeoutStopUSec", ("t", 5)),))
    inner = V2(
        own,
        {"": f"{tmp_path}/cg/system.slice/runc-box.scope"},
        rootless=False,
        top=f"{tmp_path}/cg",
    )
    systemd.Unit(inner, is_v2=True, address=bus).create(os.getpid())
    (start,) = [body for member, body in calls(tmp_path) if member == "StartTransientUnit"]
    assert start[2][-1] == ["TimeoutStopUSec", ["t", 5]]


def test_an_update_leaves_devices_alone(unit, tmp_path):
    unit.create(os.getpid())
    (tmp_path / "cg/system.slice/runc-box.scope/pids.max").write_text("")
    unit.apply({"pids": {"limit": 6}}, devices=False)
    (change,) = [body for member, body in calls(tmp_path) if member == "SetUnitProperties"]
    assert [name for name, _ in change[2]] == ["TasksMax"]


def test_a_unit_that_exists_is_known_by_its_group():
    one = Hierarchy(controllers=("",), target="/sys/fs/cgroup", root="/", own="/me")
    tree = Tree(hierarchies=(one,), unified="/sys/fs/cgroup", unified_only=True)
    path = "/sys/fs/cgroup/a.slice/a-b.slice/x-box.scope"
    found = systemd.open_unit(tree, wish(""), [path], rootless=False)
    assert (found.unit(), found.directories()) == ("x-box.scope", [path])


def test_a_failed_unit_of_that_name_is_put_aside(bus, tmp_path):
    manager = Systemd(bus)
    manager.start_unit("twice.scope", [])
    manager.close()
    members = [member for member, _ in calls(tmp_path)]
    assert members == ["Subscribe", "StartTransientUnit", "ResetFailedUnit", "StartTransientUnit"]


def test_a_unit_that_does_not_start(bus):
    manager = Systemd(bus)
    with pytest.raises(DbusError, match=r"creating systemd unit `broken.scope`: got `failed`"):
        manager.start_unit("broken.scope", [])
    assert manager.version() == 252
    manager.close()


def test_a_process_that_only_the_manager_may_move(bus, tmp_path):
    manager = Systemd(bus)
    manager.attach("box.scope", [7, 8])
    manager.close()
    assert calls(tmp_path) == [("AttachProcessesToUnit", ["box.scope", "", [7, 8]])]


def test_no_bus_at_all(tmp_path):
    with pytest.raises(DbusError, match="unable to connect to systemd"):
        Systemd(f"unix:path={tmp_path}/none")


def test_where_units_are(monkeypatch):
    monkeypatch.setattr(systemd.os.path, "isdir", lambda path: True)
    one = Hierarchy(controllers=("",), target="/sys/fs/cgroup", root="/", own="/me")
    tree = Tree(hierarchies=(one,), unified="/sys/fs/cgroup", unified_only=True)
    found = systemd.find_unit(tree, wish(slice_parent="a-b.slice"), rootless=False)
    assert found.directories() == ["/sys/fs/cgroup/a.slice/a-b.slice/runc-box.scope"]
    monkeypatch.setattr(systemd, "_manager_group", lambda address: "/user.slice/user@7.service")
    found = systemd.find_unit(tree, wish(), rootless=True)
    path = "/sys/fs/cgroup/user.slice/user@7.service/user.slice/runc-box.scope"
    assert found.directories() == [path]


def test_a_machine_without_systemd(monkeypatch):
    monkeypatch.setattr(systemd.os.path, "isdir", lambda path: False)
    tree = Tree(hierarchies=(), unified="", unified_only=False)
    with pytest.raises(CgroupError, match="systemd support for managing cgroups is not available"):
        systemd.find_unit(tree, wish(), rootless=False)
