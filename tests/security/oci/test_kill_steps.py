"""SIGKILL before and after every numbered step: list, state and delete recover; nothing is left."""

from __future__ import annotations

import json
import signal

import pytest

from tests.own_install import eventually
from tests.security.oci.killing import (
    BEGIN,
    DIED,
    END,
    FLOWS,
    NUMBERS,
    WITHOUT_END,
    Ground,
    Scene,
    by_signal,
    number_of,
    rows,
)

# In these the container is there already, and goes on whoever dies.
GOES_ON = ("exec",)
# Well, with its own word, or as a killed payload; a first process of a pid namespace traps.
ENDS = (0, 1, 255, 128 + signal.SIGKILL, 128 + signal.SIGILL)


def status_of(scene: Scene) -> str:
    show = scene.ground.place / f"{scene.name}.state"
    assert scene.call("state", scene.name, out=show) == 0, show.read_bytes()
    text = show.read_text()
    show.unlink()
    return str(json.loads(text)["status"])


@pytest.mark.parametrize(("flow", "name", "end"), rows())
def test_killed_at_a_step(ground: Ground, flow: str, name: str, end: int) -> None:
    with ground.scene(flow) as scene:
        status = scene.run(f"{number_of(name)}:-1:{end}")
        if (name, end) == ("OP_CONSOLE", END):
            assert status == 1  # what it says goes to the terminal
        else:
            eventually(lambda: DIED in scene.said(), f"somebody died: {scene.said()!r}, {status}")
        if flow in GOES_ON:
            assert status_of(scene) == "running"
        if flow.startswith("create") and status == 1:
            # Who is left to clean up does so by itself.
            assert not (ground.state / scene.name).exists(), scene.said()
        assert status in ENDS or by_signal(status), (status, scene.said())
        scene.recover()


@pytest.mark.parametrize("flow", list(FLOWS))
def test_flow_works_when_nobody_dies(ground: Ground, flow: str) -> None:
    """Otherwise a kill would prove nothing."""
    fails = flow in ("create labelled", "create failing")
    with ground.scene(flow) as scene:
        status = scene.run("")
        assert status == (1 if fails else 0), scene.said()
        scene.recover()


def test_every_number_is_covered() -> None:
    wanted = {(number, end) for number in NUMBERS.values() for end in (BEGIN, END)}
    killed = {(number_of(name), end) for _, name, end in rows()}
    # After these comes another program, whose own steps, or whose payload, are killed.
    killed |= {(number_of(name), END) for name in WITHOUT_END}
    assert killed == wanted


def test_no_installed_program_has_such_a_hook(ground: Ground) -> None:
    libexec, prefix = ground.program.parent, ground.program.parents[2]
    for name in ("starter-steps", "starter-init-steps", "apptainer-py-oci-steps"):
        assert b"APY_TEST_DIE" in (libexec / name).read_bytes()
    installed = [path for path in prefix.rglob("*") if path.is_file()]
    assert len(installed) > 100
    for path in installed:
        if not path.name.endswith(("-steps", "-steps-suid")):
            content = path.read_bytes()
            assert b"APY_TEST_" not in content, path
            assert b"a process dies here" not in content, path
