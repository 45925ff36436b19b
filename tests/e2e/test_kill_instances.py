"""SIGKILL at the steps of an instance's start and of a join: the name is free, and nothing is left.

An instance goes on when its command has ended, so that each kill may come to one that runs: then it
is stopped as ever.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from apptainer_py.model import protocol
from tests import own_install
from tests.e2e.steps import ends, finish, number_of
from tests.own_install import HostState, assert_nothing_left, household

NAME = "apy-steps"
REQUEST_INSTANCE = 2
FLOWS = {"setuid": protocol.FLOW_SETUID, "userns": protocol.FLOW_USERNS}
STARTING = (
    "DETACH", "DROP_WAITER", "FORK_MASTER", "DROP_MASTER", "FORK_CONTAINER", "DROP_RPC", "SEALED",
    "RPC_DONE", "DROP_KEEPER", "GO", "DROP_SHIM", "DROP_STAGE2", "PIVOT",
)  # fmt: skip
JOINING = (
    "FORK_JOINER",
    "JOIN_SPACES",
    "DROP_JOINER",
    "DROP_MASTER",
    "CONTAINER",
    "DROP_KEEPER",
    "GO",
)
ENDS = (0, 1)


def number(name: str) -> int:
    return getattr(protocol, f"STEP_{name}", 0) or number_of(name)


def launch(
    world, flow: str, *words: str, die: str = "", instance: bool = False
) -> subprocess.Popen[bytes]:
    """Start the starter with steps as the launcher does."""
    own = world.own
    trace = os.open("/dev/null", os.O_WRONLY)
    content = own_install.request_bytes(
        world.build_id, ["apptainer-py", *words], own.environment(), flow=FLOWS[flow], cwd="/",
        trace_fd=trace, flags=REQUEST_INSTANCE if instance else 0,
    )  # fmt: skip
    request = own_install.sealed(content)
    title = f"Apptainer instance: {own.user.pw_name} [{NAME}]"
    os.set_inheritable(trace, True)
    try:
        return subprocess.Popen(
            [title if instance else "Apptainer runtime parent", str(request)],
            executable=world.suid if flow == "setuid" else world.plain,
            pass_fds=(request, trace), env={"APY_TEST_DIE": die, "APY_TEST_WAIT": ""}, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, **own.identity(),
        )  # fmt: skip
    finally:
        os.close(request)
        os.close(trace)


def listed(world) -> list[str]:
    done = world.own.run("instance", "list", "--json")
    return [one["instance"] for one in json.loads(done.stdout)["instances"]]


def stop(world) -> None:
    world.own.run("instance", "stop", "--force", NAME)


@pytest.fixture
def place(world) -> Iterator[HostState]:
    world.own.configure("")
    stop(world)
    yield HostState(world.own.session, world.place)
    stop(world)


def start(world, flow: str, die: str = "") -> tuple[int, bytes, bytes]:
    return finish(
        launch(world, flow, "instance", "start", str(world.sandbox), NAME, die=die, instance=True)
    )


@pytest.mark.parametrize("flow", FLOWS)
def test_it_works_when_nobody_dies(world, place, flow):
    with household() as home:
        status, _, err = start(world, flow)
        assert (status, listed(world)) == (0, [NAME]), err
        joined = launch(world, flow, "exec", f"instance://{NAME}", "sh", "-c", "echo ran")
        assert finish(joined)[:2] == (0, b"ran\n")
        stop(world)
        assert_nothing_left(home, place)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", STARTING)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_start_is_killed(world, place, flow, name, end):
    with household() as home:
        status, _, err = start(world, flow, f"{number(name)}:-1:{end}")
        assert status in ends(), (status, err)
        assert b"Traceback" not in err
        running = listed(world)
        # The first process may have gone once the payload was there, and the caller been told.
        if status == 0 and (name, end) != ("RPC_DONE", 1):
            assert running == [NAME], err
        stop(world)
        assert_nothing_left(home, place)
        assert start(world, flow)[0] == 0
        stop(world)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_join_is_killed(world, place, flow, name, end):
    with household() as home:
        assert start(world, flow)[0] == 0
        before = set(home.alive())
        words = ("exec", f"instance://{NAME}", "sh", "-c", "echo ran")
        status, out, err = finish(launch(world, flow, *words, die=f"{number(name)}:-1:{end}"))
        assert b"a process dies here" in err, (status, err)
        assert status in ends(), (status, err)
        assert (status == 0) <= (out == b"ran\n"), (status, out, err)
        own_install.eventually(lambda: set(home.alive()) <= before, "nothing is left of the join")
        again = launch(world, flow, *words)
        assert finish(again)[:2] == (0, b"ran\n")
        stop(world)
        assert_nothing_left(home, place)
