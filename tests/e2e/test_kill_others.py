"""SIGKILL of each other process while one stands at a numbered step: nothing is left of any."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.steps import (
    COVERED_IN_LONG,
    HARMLESS_DEATHS,
    HERE,
    ROOT_FLOWS,
    ends,
    finish,
    gate,
    has_spoken,
    launch,
    number_of,
    rows,
    settled,
    told,
)
from tests.own_install import HostState, assert_nothing_left, eventually, household

MOST_PROCESSES = 14
# One of each kind, for every run: begun early, half made, sealed, and with the payload at hand.
SAMPLE = [
    ("setuid", "LOAD_MASTER", 0),
    ("setuid", "DROP_RPC", 1),
    ("setuid", "SERVE_IMAGE", 1),
    ("setuid", "PIVOT", 0),
    ("setuid", "GO", 0),
    ("setuid", "EXEC_PAYLOAD", 0),
    ("no shim", "EXEC_PAYLOAD", 0),
    ("granted", "ASK_BEARER", 0),
    ("granted", "EXEC_PAYLOAD", 0),
    ("early", "SEALED", 1),
    ("userns", "ROOT_FUSE", 1),
    ("engine", "FORK_METHODS", 1),
    ("host image", "FUSE_DEVICE", 1),
]
# Root's janitor undoes what the others made, whoever is killed: it alone must live.
ALL = [
    row for row in [*HERE, *rows(COVERED_IN_LONG)] if row not in SAMPLE and row[0] not in ROOT_FLOWS
]
# What an image without its server looks like from inside.
NO_REASONS = (b"executable file not found", b"internal error", b"doesn't exist in container")
_seen: set[str] = set()
_rows: set[tuple[str, str, int]] = set()


def kill_one(world, flow: str, place: str, done: set[str]) -> str:
    """Launch, wait at a step, kill one who is not yet done; returns its role, or "" if all are."""
    with household() as home, gate() as stop:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow, wait=f"{place}:{stop.fd}", inherited=[stop.fd]))
        eventually(lambda: stop.reached() or process.poll() is not None, "a process waits there")
        assert stop.reached(), finish(process)
        waits, others = stop.waiting(), settled(home)
        others.pop(waits, None)
        victim = next((role for role in others if role not in done), "")
        spoken = has_spoken(process)
        if victim:
            pid = others[victim]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: home.alive().get(pid, (0, "Z", ""))[1] == "Z", "it is dead")
            if victim != "KEEPER":
                settled(home)  # who has to see it, has; of keeper's death the payload must know
        stop.open()
        status, out, err = finish(process)
        assert_nothing_left(home, host)
    seen = (waits, victim, status, spoken, out, err)
    if not victim or victim in HARMLESS_DEATHS:
        assert (status, out) == (0, b"ran\n"), seen
    # It ends as the killed one, or with its own word for it, or can do without.
    assert status in ends(), seen
    # A payload that had run before the kill has said so; and one runs beside post_start_host, whose
    # failure ends it. Any other speaks where the launch succeeds, and nowhere else.
    if not spoken and victim != "HOST_HELPER":
        assert (status == 0) == (out == b"ran\n"), seen
    assert spoken <= (out == b"ran\n"), seen
    assert (status == 0) <= (out == b"ran\n"), seen
    assert out in (b"", b"ran\n"), seen
    assert told(status, err), seen
    if victim == "IMAGE_SERVER":
        assert not any(text in err for text in NO_REASONS), seen
        assert err.count(b"FATAL") <= 1, seen
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
    assert wanted | {"BEARER", "HOST_HELPER", "HOST_HELPER 2"} <= _seen, wanted - _seen
