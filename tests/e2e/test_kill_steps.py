"""SIGKILL before and after every numbered step: nothing is left, and the command returns."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.steps import (
    AFTER_PAYLOAD,
    BEGIN,
    BESIDE_PAYLOAD,
    COVERED_IN_LONG,
    END,
    FLOWS,
    FROM_OUTSIDE,
    HARMLESS,
    HERE,
    MAY_GO_ON,
    NETWORK_STEPS,
    OPERATIONS,
    STEPS,
    UNTRACED,
    ends,
    finish,
    launch,
    number_of,
    rows,
    told,
)
from tests.own_install import HostState, assert_nothing_left, eventually, household


def orphaned_groups() -> list[str]:
    """Return the control groups of launches that have ended (engines/apptainer/limits.py)."""
    tops = [
        *Path("/sys/fs/cgroup").glob("apptainer-py-*"),
        *Path("/sys/fs/cgroup").glob("*/apptainer-py-*"),
    ]
    return [str(top) for top in tops if not Path("/proc", top.name.rpartition("-")[2]).exists()]


def kill_at(world, flow: str, name: str, end: int) -> None:
    with household() as home:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow, die=f"{number_of(name)}:-1:{end}"))
        status, out, err = finish(process)
        assert b"STEPS:   a process dies here" in err, (status, out, err)
        assert_nothing_left(home, host)
        eventually(lambda: not orphaned_groups(), "the control groups are gone")
    # The command ends as the killed one, or with its own word for it, or had done its work.
    assert status in ends(), (status, err)
    if name in HARMLESS:
        assert (status, out) == (0, b"ran\n")
    assert (status == 0) <= ((name, end) in MAY_GO_ON), (status, out, err)
    assert out in (b"", b"ran\n")
    if name in AFTER_PAYLOAD:
        assert out == b"ran\n"
    elif (name, end) not in BESIDE_PAYLOAD:
        assert (status == 0) == (out == b"ran\n"), (status, out, err)
    assert (status == 0) <= (out == b"ran\n"), (status, out, err)
    assert told(status, err), (status, err)


@pytest.mark.parametrize(("flow", "name", "end"), HERE)
def test_killed_at_a_step(world, flow, name, end):
    kill_at(world, flow, name, end)


@pytest.mark.long
@pytest.mark.parametrize(("flow", "name", "end"), rows(COVERED_IN_LONG))
def test_killed_at_a_step_in_the_other_flow(world, flow, name, end):
    kill_at(world, flow, name, end)


@pytest.mark.parametrize("flow", list(FLOWS))
def test_flow_works_when_nobody_dies(world, flow):
    """Otherwise a kill would prove nothing."""
    with household() as home:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow))
        status, out, err = finish(process)
        assert_nothing_left(home, host)
    assert (status, out) == (0, b"ran\n"), err


def test_payload_killed_at_its_first_moment(world):
    """The far end of EXEC_PAYLOAD."""
    with household() as home:
        host = HostState(world.own.session)
        done = world.own.run("exec", "-p", world.sif, "sh", "-c", "kill -KILL $$")
        assert done.returncode == 128 + signal.SIGKILL, done.stderr
        assert_nothing_left(home, host)


def test_image_server_killed_once_it_runs(world):
    """The far end of EXEC_SERVER."""
    with household() as home:
        host = HostState(world.own.session)
        words = ["exec", world.sif, "sh", "-c", "while :; do ls /bin; done"]
        process = home.adopt(world.own.start(*words, stdout=subprocess.DEVNULL))

        def servers() -> list[int]:
            found = home.alive().items()
            return [pid for pid, (_, _, name) in found if name == "squashfuse_ll"]

        eventually(servers, "the image server runs")
        os.kill(servers()[0], signal.SIGKILL)
        assert process.wait(timeout=15) != 0
        assert_nothing_left(home, host)


@pytest.mark.parametrize("flow", ["not allowed", "engine gives up"])
def test_plain_starter_killed_at_its_first_moment(world, flow):
    """The far end of PLAIN_STARTER, step and operation: the program that it becomes."""
    with household() as home:
        host = HostState(world.own.session)
        process = home.adopt(launch(world, flow))
        link = Path(f"/proc/{process.pid}/exe")
        plain = world.own.libexec / "starter"

        def became_plain() -> bool:
            return process.poll() is not None or os.readlink(link) == str(plain)

        eventually(became_plain, "the plain starter runs")
        process.kill()
        finish(process)
        assert_nothing_left(home, host)


def test_every_number_is_covered():
    numbers = [*STEPS.values(), *OPERATIONS.values()]
    wanted = {(number, end) for number in numbers for end in (BEGIN, END)}
    killed = {(number_of(name), end) for _, name, end in HERE}
    killed |= {(number_of(name), end) for name, end in FROM_OUTSIDE}
    killed |= {(number_of(name), end) for _, name, end in rows({"": NETWORK_STEPS})}
    assert killed == wanted


def test_trace_prints_every_number(world):
    """What a flow of the table kills at, the trace of that flow shows."""
    import json

    own = world.own
    trace = own.place / "trace"
    for flow, (_, _, _, names) in FLOWS.items():
        trace.unlink(missing_ok=True)
        finish(launch(world, flow, trace=trace))
        shown = {
            line["number"]
            for line in map(json.loads, trace.read_text().splitlines())
            if line["event"] in ("step", "operation")
        }
        # The process has become another program before it could tell of this one.
        silent = ("OP_PLAIN_STARTER", *UNTRACED)
        told = {number_of(name) for name in names if name not in silent}
        assert told <= shown, flow
    trace.unlink()


def test_installed_starter_has_no_such_hook(world):
    assert b"APY_TEST_DIE" in world.suid.read_bytes()
    for program in (world.own.suid, world.own.libexec / "starter"):
        assert b"APY_TEST_DIE" not in program.read_bytes()
        assert b"a process dies here" not in program.read_bytes()
