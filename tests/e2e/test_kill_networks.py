"""SIGKILL before and after each step and operation of a launch with a CNI network, and of others.

Of whoever is killed no interface, rule, reserved address, process or mount is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.model import protocol
from tests.cni_host import PLUGINS, Host
from tests.e2e import steps
from tests.own_install import HostState, Household, assert_nothing_left, eventually, household

pytestmark = pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check")
WORDS = ("-p", "--net", "--network", "bridge,ptp", "--network-args", "portmap=8080:8000/tcp")
FLOWS = {"user's": False, "root's": True}
ROWS = [
    (flow, name, end)
    for flow in FLOWS
    for name in steps.NETWORK_STEPS
    for end in (steps.BEGIN, steps.END)
]
# The janitor of a user's launch has nobody to tell.
TELLS_NOBODY = ("user's", "ADD_NETWORKS")


@pytest.fixture(scope="module")
def shared_host(installed, sif) -> Iterator[Host]:
    made = Host(installed, sif)
    yield made
    made.end()


@pytest.fixture
def host(shared_host: Host, world, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The host, with the two flows for it."""
    name = shared_host.installed.user.pw_name
    allowed = f"allow net users = {name}\nallow net networks = bridge, ptp"
    for flow in FLOWS:
        monkeypatch.setitem(steps.FLOWS, flow, (steps.words(*WORDS), allowed, "sif", []))
    monkeypatch.setattr(steps, "ROOT_FLOWS", ("root's",))
    yield shared_host
    shared_host.installed.restore()


def start(world, host: Host, flow: str, home: Household, **how):
    who = () if FLOWS[flow] else host.as_user[:-4]
    return home.adopt(steps.launch(world, flow, before=[*host.inside, *who], **how))


def assert_as_before(host: Host, home: Household, state: HostState) -> None:
    assert_nothing_left(home, state, 20)
    eventually(lambda: host.traces() == [], "nothing is left of the network")


@pytest.mark.parametrize(("flow", "name", "end"), ROWS)
def test_killed_at_a_step(world, host: Host, flow: str, name: str, end: int) -> None:
    with household() as home:
        state = HostState(world.own.session, world.place)
        process = start(world, host, flow, home, die=f"{steps.number_of(name)}:-1:{end}")
        status, out, err = steps.finish(process)
        assert_as_before(host, home, state)
    assert (flow, name) == TELLS_NOBODY or b"STEPS:   a process dies here" in err, err
    assert status in steps.ends(), (status, err)
    assert (status != 0, out) == (True, b""), (status, err)
    assert steps.told(status, err), (status, err)


@pytest.mark.parametrize("flow", FLOWS)
def test_flow_works_when_nobody_dies(world, host: Host, flow: str) -> None:
    """Otherwise a kill would prove nothing."""
    with household() as home:
        state = HostState(world.own.session, world.place)
        done = steps.finish(start(world, host, flow, home))
        assert_as_before(host, home, state)
    assert done[:2] == (0, b"ran\n"), done


def kill_one(world, host: Host, flow: str, place: str, done: set[str]) -> str:
    """Launch, wait at a step, kill one who is not yet done; returns its role, or "" if all are."""
    with household() as home, steps.gate() as stop:
        state = HostState(world.own.session, world.place)
        how = {"wait": f"{place}:{stop.fd}", "inherited": [stop.fd]}
        process = start(world, host, flow, home, **how)
        eventually(lambda: stop.reached() or process.poll() is not None, "a process waits there")
        assert stop.reached(), steps.finish(process)
        others = steps.settled(home)
        others.pop(stop.waiting(), None)
        victim = next((role for role in others if role not in done), "")
        if victim:
            os.kill(others[victim], signal.SIGKILL)
            steps.settled(home)
        stop.open()
        status, out, err = steps.finish(process)
        assert_as_before(host, home, state)
    assert (status == 0) == (out == b"ran\n"), (victim, status, out, err)
    assert steps.told(status, err), (victim, status, err)
    return victim


def kill_others(world, host: Host, flow: str, name: str, end: int) -> None:
    place, done = f"{steps.number_of(name)}:-1:{end}", set()
    while victim := kill_one(world, host, flow, place, done):
        done.add(victim)
        assert len(done) < 14
    assert {"MASTER", "STAGE2", "RPC"} <= done
    assert ("HOST_HELPER 2" in done) == (name != "NETWORK")  # the twin


@pytest.mark.long
@pytest.mark.parametrize(
    ("flow", "name", "end"),
    [
        ("user's", "NETWORK", 1),
        ("user's", "JANITOR", 1),
        ("user's", "ADD_NETWORKS", 0),
        ("user's", "ADD_NETWORKS", 1),
        ("root's", "ADD_NETWORKS", 1),
    ],
)
def test_others_are_killed_at_a_step(world, host: Host, flow: str, name: str, end: int) -> None:
    kill_others(world, host, flow, name, end)


def janitors(home: Household) -> list[int]:
    """Return the janitor's twin, which is its parent, and the janitor."""
    alive = home.alive().items()
    return sorted(p for p, (_, state, name) in alive if name == "HOST_HELPER" and state != "Z")


@pytest.fixture
def connected(world, host: Host) -> Iterator[SimpleNamespace]:
    """A user's container that has a network, and whose payload waits."""
    with household() as home:
        state = HostState(world.own.session, world.place)
        process = start(world, host, "user's", home, script="echo ran; exec sleep 600")
        eventually(lambda: steps.has_spoken(process) or process.poll() is not None, "it runs")
        assert process.poll() is None, steps.finish(process)
        assert len(host.traces()) > 4
        yield SimpleNamespace(home=home, process=process, janitors=janitors(home))
        with suppress(ProcessLookupError):
            process.terminate()
        steps.finish(process)
        assert_as_before(host, home, state)


@pytest.mark.parametrize("which", [0, 1], ids=["its twin", "the janitor"])
def test_of_the_janitor_and_its_twin_one_is_enough(connected: SimpleNamespace, which: int) -> None:
    assert len(connected.janitors) == 2
    os.kill(connected.janitors[which], signal.SIGKILL)


def kill_both(connected: SimpleNamespace) -> None:
    for pid in connected.janitors:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not janitors(connected.home), "nobody undoes it")


def test_what_is_left_when_both_are_killed_the_next_launch_undoes(
    world, host: Host, connected: SimpleNamespace
) -> None:
    kill_both(connected)
    connected.process.terminate()
    steps.finish(connected.process)
    assert len(host.traces()) > 2
    with household() as home:
        assert steps.finish(start(world, host, "root's", home))[:2] == (0, b"ran\n")
    assert host.traces() == []


def test_nobody_undoes_the_network_of_a_container_that_runs(
    world, host: Host, connected: SimpleNamespace
) -> None:
    kill_both(connected)
    before = host.traces()
    words = ["--net", "--network", "bridge", host.sif, "true"]
    assert host.run(*words, user=True)[::2] == (0, "")
    assert host.traces() == before
    connected.process.terminate()
    steps.finish(connected.process)
    assert host.run(*words, user=True)[::2] == (0, "")
    assert host.traces() == []


HOLDS = """
import fcntl, os, struct, sys, time
os.makedirs("/run/apptainer-py-networks", 0o700, exist_ok=True)
for at in range(int(sys.argv[2]), int(sys.argv[3])):
    name = f"/run/apptainer-py-networks/{sys.argv[1]}.{at}"
    held = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.fcntl(held, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0))
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(host: Host, first: int) -> Iterator[None]:
    """The records of one user from there on belong to containers."""
    numbers = [str(host.installed.user.pw_uid), str(first), str(protocol.LIMIT_USER_NETWORKS)]
    line = [*host.inside, "/usr/bin/python3", "-c", HOLDS, *numbers]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield
        finally:
            holder.kill()


def assert_too_many(host: Host) -> None:
    status, out, err = host.run("--net", host.sif, "echo", "ran", user=True)
    assert (status, out) == (255, "")
    assert len(err.splitlines()) == 1, err
    assert "as many containers of this user have networks as one user's may" in err


def test_a_user_has_so_many_networks_and_no_more(host: Host, world) -> None:
    """Those are counted, too, that are undone after their launch was killed."""
    host.installed.configure(steps.FLOWS["user's"][1])
    with held(host, 0):
        assert_too_many(host)
        assert host.run("--net", host.sif, "echo", "ran") == (0, "ran\n", "")
    assert host.run("--net", host.sif, "echo", "ran", user=True) == (0, "ran\n", "")
    assert host.traces() == []


def test_whom_only_what_is_left_keeps_from_a_network_has_one_next(
    host: Host, connected: SimpleNamespace
) -> None:
    kill_both(connected)
    connected.process.terminate()
    steps.finish(connected.process)
    assert len(host.traces()) > 2
    with held(host, 1):
        assert_too_many(host)
        assert host.traces() == []
        assert host.run("--net", host.sif, "echo", "ran", user=True) == (0, "ran\n", "")


def test_a_record_without_anything_to_undo_is_of_no_version(host: Host, world) -> None:
    """Otherwise another version's would count for as long as the host runs."""
    host.installed.configure(steps.FLOWS["user's"][1])
    assert host.run("--net", host.sif, "echo", "ran", user=True) == (0, "ran\n", "")
    name = f"/run/apptainer-py-networks/{host.installed.user.pw_uid}.0"
    assert host.sh(f"od -An -tu4 -N4 {name}").split() == ["0"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "read-only file system"), ("size=16k", "no space left on device"),
     ("mode=0755,nr_inodes=1", "no space left on device")],
)  # fmt: skip
def test_where_nothing_can_be_written_down_root_alone_has_networks(
    host: Host, world, options: str, reason: str
) -> None:
    host.installed.configure(steps.FLOWS["user's"][1])
    host.sh(f"mount -t tmpfs -o {options} none /run")
    try:
        status, out, err = host.run("--net", host.sif, "echo", "ran", user=True)
        assert (status, out) == (255, "")
        assert len(err.splitlines()) == 1, err
        assert f"what must be undone cannot be written down in /run: {reason}" in err
        assert host.run("--net", host.sif, "echo", "ran") == (0, "ran\n", "")
    finally:
        host.sh("umount /run")
    assert host.traces() == []


GROUPS = Path("/sys/fs/cgroup/unified")


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group in which this test, and what it starts, is killed at once."""
    top = GROUPS if GROUPS.is_dir() else GROUPS.parent
    if not (top / "cgroup.procs").exists():
        pytest.skip("did not run: no control groups of version 2")
    made = top / f"apy-net-{os.getpid()}"
    made.mkdir()
    if not (made / "cgroup.kill").exists():
        made.rmdir()
        pytest.skip("did not run: this kernel kills no control group")
    before = next(
        line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
    )
    (made / "cgroup.procs").write_text("0")
    yield made
    (top / before.lstrip("/") / "cgroup.procs").write_text("0")
    eventually(lambda: not (made / "cgroup.procs").read_text(), "nobody is left in it")
    made.rmdir()


def test_who_kills_the_callers_control_group_leaves_no_network(
    group: Path, connected: SimpleNamespace
) -> None:
    """A batch system does; so can a user to whom systemd has given the group."""
    top = group.parent / "cgroup.procs"
    members = (group / "cgroup.procs").read_text().split()
    assert str(connected.process.pid) in members
    assert not {str(pid) for pid in connected.janitors} & {*members}
    top.write_text(str(os.getpid()))
    (group / "cgroup.kill").write_text("1")
    eventually(lambda: connected.process.poll() is not None, "the launch is killed")
