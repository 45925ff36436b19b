"""SIGKILL of each other process while one stands at a numbered step: nothing is left of any."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e.steps import (
    COVERED_IN_LONG,
    HARMLESS_DEATHS,
    HERE,
    finish,
    gate,
    launch,
    number_of,
    rows,
    settled,
)
from tests.own_install import HostState, assert_nothing_left, eventually, household

DEADLINE_S = 1.0
MOST_PROCESSES = 12
# One of each kind, for every run: begun early, half made, sealed, and with the payload at hand.
SAMPLE = [
    ("setuid", "LOAD_MASTER", 0),
    ("setuid", "DROP_RPC", 1),
    ("setuid", "SERVE_IMAGE", 1),
    ("setuid", "PIVOT", 0),
    ("setuid", "GO", 0),
    ("no shim", "EXEC_PAYLOAD", 0),
    ("early", "SEALED", 1),
    ("userns", "ROOT_FUSE", 1),
    ("engine", "FORK_METHODS", 1),
]
ALL = [row for row in [*HERE, *rows(COVERED_IN_LONG)] if row not in SAMPLE]
_seen: set[str] = set()
_rows: set[tuple[str, str, int]] = set()


def kill_one(world, flow: str, place: str, done: set[str]) -> str:
    """Launch, wait at a step, kill one who is not yet done; returns its role, or "" if all are."""
    with household() as home, gate() as stop:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow, wait=f"{place}:{stop.fd}", inherited=[stop.fd]))
        eventually(lambda: stop.reached() or process.poll() is not None, "a process waits there")
        assert stop.reached(), finish(process)
        others = settled(home)
        others.pop(stop.waiting(), None)
        victim = next((role for role in others if role not in done), "")
        if victim:
            os.kill(others[victim], signal.SIGKILL)
        begun = time.monotonic()
        stop.open()
        status, out, err = finish(process)
        if victim and out != b"ran\n":
            assert time.monotonic() - begun < DEADLINE_S, (victim, "the launch ends too late")
        assert_nothing_left(home, host)
    assert b"Traceback" not in err, (victim, err)
    if not victim or victim in HARMLESS_DEATHS:
        assert (status, out) == (0, b"ran\n"), (victim, others, err)
    # It ends as the killed one, or with its own word for it, or can do without.
    assert status in (0, 255, -signal.SIGKILL, 128 + signal.SIGKILL), (victim, status, err)
    assert status != 0 or out == b"ran\n", (victim, status, out, err)
    return victim


def kill_others(world, flow: str, name: str, end: int) -> None:
    place, done = f"{number_of(name)}:-1:{end}", set()
    while victim := kill_one(world, flow, place, done):
        done.add(victim)
        assert len(done) < MOST_PROCESSES
    _seen.update(done)
    _rows.add((flow, name, end))


@pytest.mark.parametrize(("flow", "name", "end"), SAMPLE)
def test_others_are_killed_at_a_step(world, flow, name, end):
    kill_others(world, flow, name, end)


@pytest.mark.long
@pytest.mark.parametrize(("flow", "name", "end"), ALL)
def test_others_are_killed_at_every_step(world, flow, name, end):
    kill_others(world, flow, name, end)


def test_every_role_was_killed():
    """Runs behind the sample, whose steps are chosen so that each process is there once.

    But the reader, which reads and ends, and stands nowhere but at its own steps.
    """
    if not set(SAMPLE) <= _rows:
        return  # a part was selected
    wanted = {"KEEPER", "MASTER", "RPC", "STAGE2", "SHIM", "IMAGE_SERVER", "TRACER", "METHODS"}
    assert wanted | {"HOST_HELPER", "HOST_HELPER 2"} <= _seen, wanted - _seen
