"""SIGKILL of each process of a call while one of them stands at a numbered step."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.steps import gate
from tests.own_install import eventually
from tests.security.oci.killing import BEGIN, DEADLINE_S, END, Ground, number_of, rows

MOST_PROCESSES = 6
# One of each kind, for every run: half made, inside, waiting, and with the payload at hand.
SAMPLE = [
    ("create", "GROUPS_MADE", END),
    ("create", "OP_SPACES", END),
    ("create", "OP_MAPPED", BEGIN),
    ("create", "OP_PLACE", END),
    ("create", "OP_ENTER", BEGIN),
    ("create", "OP_PROCESS", END),
    ("create", "GO", BEGIN),
    ("create", "TOLD_PID", BEGIN),
    ("start", "OPEN_FIFO", END),
    ("delete running", "REMOVE_GROUPS", BEGIN),
    ("run", "WATCHED", BEGIN),
    ("exec", "OP_JOIN", END),
    ("exec", "OP_SPACES", END),
    ("exec", "OP_PROCESS", END),
]
# These two have ended, or run elsewhere, where the process that waits would have to be.
ALL = [row for row in rows() if row not in SAMPLE and row[1] != "OP_CONSOLE"]


def kill_one(ground: Ground, flow: str, place: str, which: int) -> bool:
    """Wait at a step and kill one process; False if there are not so many."""
    with ground.scene(flow) as scene, gate() as stop:
        before = set(scene.home.alive())
        *first, last = scene.words()
        process = None
        for words in [*first, last]:
            wait = f"{place}:{stop.fd}"
            started = ground.start(*words, wait=wait, out=scene.out, inherited=[stop.fd])
            process = scene.home.adopt(started)
            eventually(
                lambda process=process: stop.reached() or process.poll() is not None,
                "a process waits there",
            )
            if stop.reached():
                break
        assert process is not None
        assert stop.reached(), scene.said()
        victims = sorted(set(scene.home.alive()) - before)
        if which < len(victims):
            os.kill(victims[which], signal.SIGKILL)
            eventually(
                lambda: scene.home.alive().get(victims[which], (0, "Z", ""))[1] == "Z",
                "it is dead",
            )
        stop.open()

        def ended() -> bool:
            scene.home.alive()
            return process.poll() is not None

        # A payload in the foreground stays: what was started for it has nobody to end it.
        if flow != "start":
            eventually(ended, "the command ends", DEADLINE_S)
        scene.recover()
        return which < len(victims)


def kill_each(ground: Ground, flow: str, name: str, end: int) -> None:
    for which in range(MOST_PROCESSES):
        if not kill_one(ground, flow, f"{number_of(name)}:-1:{end}", which):
            assert which > 0, "there was nobody to kill"
            return
    raise AssertionError("there are more processes than a call has")


@pytest.mark.parametrize(("flow", "name", "end"), SAMPLE)
def test_others_are_killed_at_a_step(ground: Ground, flow: str, name: str, end: int) -> None:
    kill_each(ground, flow, name, end)


@pytest.mark.long
@pytest.mark.parametrize(("flow", "name", "end"), ALL)
def test_others_are_killed_at_every_step(ground: Ground, flow: str, name: str, end: int) -> None:
    kill_each(ground, flow, name, end)
