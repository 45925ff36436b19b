"""The drivers of control groups on this machine's own kernel, in groups made for the test."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.host.cgroups import find_manager, open_manager
from apptainer_py.host.cgroups.devices import wanted_rules
from apptainer_py.host.cgroups.devices_bpf import attach_rules
from apptainer_py.host.cgroups.driver import CgroupError, Manager
from apptainer_py.host.cgroups.tree import find_tree
from apptainer_py.host.cgroups.v2 import V2
from apptainer_py.kernel import _container
from apptainer_py.model.oci_plan import CgroupWish

pytestmark = pytest.mark.usefixtures("require_root")
DENY = [{"allow": False, "access": "rwm"}]


@pytest.fixture
def name() -> str:
    return f"/apyhost-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def manager(name) -> Iterator[Manager]:
    found = find_manager("cgroupfs", CgroupWish(path=name, resources={}), rootless=False)
    yield found
    found.kill(signal.SIGKILL)
    found.remove()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_life(manager, sleeper, name):
    manager.create()
    assert all(os.path.isdir(path) for path in manager.directories())
    manager.add(sleeper.pid)
    assert manager.pids() == [sleeper.pid]
    lines = Path(f"/proc/{sleeper.pid}/cgroup").read_text().splitlines()
    assert all(line.endswith(name) for line in lines)
    manager.apply({"devices": DENY, "pids": {"limit": 9}, "memory": {"limit": 1 << 26}})
    stats = manager.stats()
    assert stats["pids"] == {"current": 1, "limit": 9}
    assert stats["memory"]["usage"]["limit"] == 1 << 26
    again = open_manager("cgroupfs", manager.wish, manager.directories())
    assert again.paths == manager.paths
    again.freeze(on=True)
    assert manager.frozen()
    again.freeze(on=False)
    assert not manager.frozen()
    again.kill(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
    again.remove()
    assert not any(os.path.exists(path) for path in manager.directories())


def test_a_group_in_use_is_refused_and_nothing_new_stays(manager, sleeper):
    manager.create()
    manager.add(sleeper.pid)
    second = find_manager("cgroupfs", manager.wish, rootless=False)
    with pytest.raises(CgroupError, match="not empty: 1 process"):
        second.create()
    assert manager.pids() == [sleeper.pid]


def test_what_the_container_has_made_goes_with_it(manager):
    manager.create()
    for path in manager.directories():
        os.makedirs(f"{path}/inner/most")
    manager.remove()
    assert not any(os.path.exists(path) for path in manager.directories())


def test_devices(manager):
    manager.create()
    path = manager.paths["devices"]
    manager.apply({"devices": DENY})
    assert opens(path, "/dev/null")
    assert not opens(path, "/dev/loop-control")
    manager.apply({"devices": [*DENY, {"allow": True, "access": "r", "type": "c"}]})
    assert opens(path, "/dev/loop-control")


def opens(group: str, device: str) -> bool:
    """Return whether a process of a group may open a device for reading."""
    script = f"echo $$ > {group}/cgroup.procs; : < {device}"
    return subprocess.run(["/bin/sh", "-c", script], stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def unified(name) -> Iterator[V2]:
    """A driver of cgroup2 whose whole world is a group below the machine's."""
    top = find_tree().unified
    if not top:
        pytest.skip("no cgroup2 here")
    world = Path(f"{top}{name}")
    world.mkdir()
    wish = CgroupWish(path="/a/b", resources={})
    found = V2(wish, {"": f"{world}/a/b"}, rootless=False, top=str(world))
    yield found
    found.kill(signal.SIGKILL)
    found.remove()
    for path in (world / "a", world):
        if path.exists():
            path.rmdir()


def test_a_life_in_cgroup2(unified, sleeper):
    unified.create()
    unified.add(sleeper.pid)
    assert unified.pids() == [sleeper.pid]
    unified.freeze(on=True)
    assert unified.frozen()
    unified.freeze(on=False)
    assert not unified.frozen()
    with pytest.raises(CgroupError, match='controller "memory" not available'):
        unified.apply({"unified": {"memory.max": "1"}}, devices=False)
    unified.kill(signal.SIGKILL)
    assert sleeper.wait(10) == -signal.SIGKILL
    unified.remove()
    assert not os.path.exists(unified.path)


def test_the_kernel_takes_the_device_program(unified):
    unified.create()
    try:
        attach_rules(unified.path, wanted_rules(DENY))
    except CgroupError as error:
        pytest.skip(str(error))
    assert not opens(unified.path, "/dev/loop-control")
    attach_rules(unified.path, wanted_rules([*DENY, {"allow": True, "access": "rw", "type": "c"}]))
    assert opens(unified.path, "/dev/loop-control")
    fd = os.open(unified.path, os.O_RDONLY)
    assert len(_container.bpf_query(fd, 6)) == 1
    os.close(fd)


def test_user_namespaces_with_maps():
    fd = _container.make_userns(b"0 1000 1\n", b"0 1000 1\n")
    assert _container.ns_type(fd) == 0x10000000
    os.close(fd)
