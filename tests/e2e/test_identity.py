"""Each process's identity in each flow: from the trace, and from outside while a payload sleeps."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.e2e.identities import FLOWS, PAYLOAD_BIRTH, expected, hooks_of, seen, table, traced
from tests.security import forge


@pytest.fixture(autouse=True, scope="module")
def orphans(require_root):
    forge.adopt_orphans()


@pytest.fixture(params=list(FLOWS))
def flow(request) -> str:
    return request.param


@contextmanager
def sleeping(product, who, flow, image, *options, trace=None) -> Iterator[SimpleNamespace]:
    """A container whose payload waits for its stdin to end."""
    words = ["--trace", str(trace)] if trace else []
    words += ["exec", *FLOWS[flow], *options, str(image), "sh", "-c", "echo up; exec cat"]
    env = {"PATH": "/usr/bin:/bin", "HOME": who.pw_dir, "USER": who.pw_name}
    user = None if who.pw_uid == 0 else who
    process = forge.start(product.program, words, user=user, env=env)
    try:
        assert forge.read_line(process.stdout) == b"up\n"
        yield SimpleNamespace(
            keeper=process.pid, all=[process.pid, *forge.descendants(process.pid)]
        )
    finally:
        done = forge.finish(process)
    assert (done.status, forge.left_behind()) == (0, []), done.err


def caller(flow: str, user: pwd.struct_passwd) -> pwd.struct_passwd:
    return pwd.getpwuid(0) if flow == "root" else user


def read_trace(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def trace(flow, product, user, demo_sif, user_tmp) -> list[dict[str, object]]:
    """The trace of a launch with a process namespace, of an image that has to be mounted."""
    file = user_tmp / "trace"
    with sleeping(product, caller(flow, user), flow, demo_sif, "-p", trace=file):
        pass
    return read_trace(file)


def test_every_process_has_the_identity_of_the_table(flow, user, trace):
    rows, who = table(flow), caller(flow, user)
    events = [event for event in trace if event["event"] == "process"]
    keeper = [event for event in events if event["process"] == "KEEPER"]
    assert traced(keeper[0]) == expected(rows["KEEPER"], who, set())
    assert traced(keeper[-1]) == expected(rows["dropped"], who, set())
    assert len(keeper) == 2
    others = {event["process"]: traced(event) for event in events if event["process"] != "KEEPER"}
    server = {"IMAGE_SERVER", "READER"} if flow != "root" else set()
    if flow.startswith("fakeroot"):  # nothing is begun early, so nothing is read ahead
        server -= {"READER"}
    assert set(others) == {"MASTER", "RPC", "SHIM", "STAGE2"} | server
    for name, found in others.items():
        assert found == expected(rows[name], who, {"mnt", "pid"}), name


def test_every_hook_runs_as_its_stage(flow, user, trace):
    rows, who = table(flow), caller(flow, user)
    hooks = [event for event in trace if event["event"] == "hook"]
    for process, names in hooks_of(flow).items():
        mine = [event for event in hooks if event["process"] == process]
        assert [event["name"] for event in mine] == names
        for event in mine:
            assert traced(event) == expected(rows[process], who, {"mnt", "pid"}), event["name"]
    assert {event["process"] for event in hooks} == set(hooks_of(flow))
    births = [event for event in trace if event.get("name") == PAYLOAD_BIRTH]
    assert [traced(event) for event in births] == [expected(rows["STAGE2"], who, {"mnt", "pid"})]


def test_operations_run_with_no_more_than_their_process(flow, user, trace):
    rows, who = table(flow), caller(flow, user)
    operations = [event for event in trace if event["event"] == "operation"]
    assert {event["process"] for event in operations} == {"KEEPER", "RPC"}
    for event in operations:
        row = expected(rows[event["process"]], who, {"mnt", "pid"})
        assert event["uid"] == row["uid"]
        assert event["gid"] == row["gid"]


def by_role(run: SimpleNamespace, trace: Path) -> dict[str, list[int]]:
    """The running processes by role: the trace knows the host's, the tree shows the others."""
    named = {event["pid"]: event["process"] for event in read_trace(trace)}
    roles: dict[str, list[int]] = {"KEEPER": [run.keeper]}
    here = os.stat("/proc/self/ns/mnt").st_ino
    for pid in forge.children(run.keeper):
        below = forge.children(pid)
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino == here:
            roles.setdefault(named.get(pid, "TRACER"), []).append(pid)
        elif below:
            roles |= {"SHIM": [pid], "payload": below}
        else:
            roles["payload"] = [pid]
    return roles


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["shared", "pid-namespace"])
def test_from_outside_while_the_payload_sleeps(flow, options, product, user, demo_sif, user_tmp):
    who, rows, file = caller(flow, user), table(flow), user_tmp / "trace"
    differing = {"mnt", "pid"} if options else {"mnt"}
    with sleeping(product, who, flow, demo_sif, *options, trace=file) as run:
        roles = by_role(run, file)
        found = {role: [seen(pid) for pid in pids] for role, pids in roles.items()}
    wanted = {"KEEPER", "MASTER", "TRACER", "payload"}
    wanted |= {"SHIM"} if options else set()
    wanted |= {"IMAGE_SERVER"} if flow != "root" else set()
    assert set(found) == wanted
    assert sum(len(pids) for pids in roles.values()) == len(run.all)
    for role, identities in found.items():
        # The writer of the trace was forked before any namespace, and has nothing but its ids.
        row = rows[{"KEEPER": "dropped"}.get(role, role)] if role != "TRACER" else None
        for identity in identities:
            if row is None:
                assert identity["uid"] == [who.pw_uid] * 4
                assert identity["caps"][:3] == [0, 0, 0]
                continue
            want = expected(row, who, differing, outside=True)
            if role == "payload" and who.pw_uid != 0:
                want["dumpable"] = 1
            assert identity == want, role


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["shared", "pid-namespace"])
def test_no_process_holds_privilege_while_the_payload_sleeps(
    options, product, user, demo_sif, user_tmp
):
    with sleeping(product, user, "setuid", demo_sif, *options) as run:
        facts = {pid: forge.status(pid) for pid in run.all}
    assert len(facts) >= 4  # keeper, master, image server, payload
    for pid, status in facts.items():
        assert status["Uid"].split() == [str(user.pw_uid)] * 4, pid
        assert status["Gid"].split() == [str(user.pw_gid)] * 4, pid
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, (pid, name)
        assert status["NoNewPrivs"] == "1", pid


def test_root_that_asks_for_a_user_namespace_gets_one(product, demo_sif):
    words = ["exec", "-u", str(demo_sif), "cat", "/proc/self/uid_map", "/proc/self/status"]
    done = forge.finish(forge.start(product.program, words, env={"HOME": "/root"}))
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["0", "0", "1"]
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert f"CapPrm:\t{(2 << last) - 1:016x}" in lines  # the namespace's, as the real one gives
