"""Commands on one container from many processes at once, and in the middle of each other."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Sequence

import pytest

from tests.e2e.steps import gate
from tests.own_install import eventually
from tests.security.oci.killing import DEADLINE_S, Ground, Scene, number_of

AT_ONCE, ROUNDS = 6, 4


def all_of(scene: Scene, commands: Sequence[tuple[str, ...]]) -> list[tuple[int, str]]:
    """Start commands at once; returns status and words of each, in their order."""
    started = []
    for number, words in enumerate(commands):
        out = scene.ground.place / f"{scene.name}.{number}.at-once"
        started.append((scene.home.adopt(scene.ground.start(*words, out=out)), out))

    def ended() -> bool:
        scene.home.alive()
        return all(process.poll() is not None for process, _ in started)

    eventually(ended, "all commands end", DEADLINE_S)
    found = []
    for process, out in started:
        text = out.read_text()
        out.unlink()
        assert "Traceback" not in text
        assert "internal error" not in text
        assert process.returncode in (0, 1, 255) or process.returncode == -signal.SIGKILL, text
        found.append((process.returncode, text))
    return found


def create(scene: Scene) -> tuple[str, ...]:
    return ("create", "--bundle", str(scene.bundle.path), scene.name)


def is_a_program(pid: int) -> bool:
    """Return whether a process has a program still: one that has been killed has none."""
    try:
        return bool(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def statuses(results: list[tuple[int, str]]) -> list[int]:
    return sorted(status for status, _ in results)


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_one_of_many_creates_wins(ground: Ground, turn: int) -> None:
    with ground.scene("start") as scene:
        results = all_of(scene, [create(scene)] * AT_ONCE)
        assert statuses(results) == [0] + [1] * (AT_ONCE - 1), results
        for status, text in results:
            assert status == 0 or "already exists" in text
        assert scene.call("start", scene.name) == 0
        scene.recover()


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_one_of_many_starts_wins(ground: Ground, turn: int) -> None:
    with ground.scene("start") as scene:
        assert scene.call(*create(scene)) == 0
        results = all_of(scene, [("start", scene.name)] * AT_ONCE)
        assert statuses(results) == [0] + [1] * (AT_ONCE - 1), results
        for status, text in results:
            assert status == 0 or "already running" in text
        scene.recover()


@pytest.mark.parametrize("flow", ["kill", "delete", "start"])
def test_many_forced_deletes_all_succeed(ground: Ground, flow: str) -> None:
    with ground.scene(flow) as scene:
        if flow == "start":
            assert scene.call(*create(scene)) == 0
        results = all_of(scene, [("delete", "--force", scene.name)] * AT_ONCE)
        assert statuses(results) == [0] * AT_ONCE, results
        scene.recover()


def test_one_of_many_deletes_wins(ground: Ground) -> None:
    with ground.scene("delete") as scene:
        results = all_of(scene, [("delete", scene.name)] * AT_ONCE)
        assert statuses(results) == [0] + [1] * (AT_ONCE - 1), results
        for status, text in results:
            assert status == 0 or "does not exist" in text, text
        scene.recover()


def test_delete_during_create(ground: Ground) -> None:
    with ground.scene("delete creating") as scene:
        (status, text), *_ = all_of(scene, [("delete", scene.name)])
        assert (status, "that is not stopped: creating" in text) == (1, True)
        show = ground.place / "creating"
        assert scene.call("state", scene.name, out=show) == 0
        assert json.loads(show.read_text())["status"] == "creating"
        show.unlink()
        assert statuses(all_of(scene, [create(scene)])) == [1]
        assert statuses(all_of(scene, [("exec", scene.name, "true")])) == [255]
        assert statuses(all_of(scene, [("start", scene.name), ("delete", "-f", scene.name)])) in (
            [0, 1],
            [0, 0],
        )
        scene.recover()


@pytest.mark.parametrize("turn", range(2 * ROUNDS))
def test_create_and_delete_at_once(ground: Ground, turn: int) -> None:
    """Whoever wins: in the end there is one container, or none and nothing of it."""
    with ground.scene("start") as scene:
        deletes = [("delete", "--force", scene.name)] * (1 + turn % 3)
        order = [create(scene), *deletes]
        random.Random(turn).shuffle(order)
        all_of(scene, order)
        if (ground.state / scene.name).exists():
            show = ground.place / "shown"
            assert scene.call("state", scene.name, out=show) == 0, show.read_text()
            assert json.loads(show.read_text())["status"] in ("created", "stopped")
            show.unlink()
        else:
            scene.assert_nothing_left()
        scene.recover()


@pytest.mark.parametrize(
    ("name", "end"),
    [("OP_JOIN", 0), ("OP_JOIN", 1), ("OP_SPACES", 1), ("OP_MAPPED", 0), ("OP_PROCESS", 1),
     ("EXEC_PAYLOAD", 0)],
)  # fmt: skip
def test_delete_while_exec_joins(ground: Ground, name: str, end: int) -> None:
    """Who joins is in the container's groups and namespaces, or finds no container any more."""
    with ground.scene("exec") as scene, gate() as stop:
        words = ("exec", scene.name, "sleep", "600")
        wait = f"{number_of(name)}:-1:{end}:{stop.fd}"
        started = ground.start(*words, wait=wait, out=scene.out, inherited=[stop.fd])
        joins = scene.home.adopt(started)
        eventually(lambda: stop.reached() or joins.poll() is not None, "it stands there")
        assert stop.reached(), scene.said()
        shown = ground.place / f"{scene.name}.delete"
        deletes = scene.home.adopt(ground.start("delete", "--force", scene.name, out=shown))
        # Its end waits for that of who joins, if that is in its namespace already.
        first = [pid for pid, (_, _, name) in scene.home.alive().items() if name == "sleep"]
        eventually(lambda: not any(map(is_a_program, first)), "the payload has been killed")
        stop.open()

        def ended() -> bool:
            scene.home.alive()
            return joins.poll() is not None and deletes.poll() is not None

        eventually(ended, "both end", DEADLINE_S)
        assert deletes.returncode == 0, shown.read_text()
        assert joins.returncode != 0, scene.said()
        assert b"Traceback" not in scene.said()
        shown.unlink()
        scene.recover()


@pytest.mark.parametrize(("name", "word"), [("OP_PLACE", "KILL"), ("OP_PLACE", "TERM"),
                                            ("OP_MAPPED", "KILL"), ("OP_GO", "KILL"),
                                            ("STATE_DONE", "KILL")])  # fmt: skip
def test_kill_while_create(ground: Ground, name: str, word: str) -> None:
    with ground.scene("create") as scene, gate() as stop:
        wait = f"{number_of(name)}:-1:0:{stop.fd}"
        started = ground.start(*create(scene), wait=wait, out=scene.out, inherited=[stop.fd])
        creates = scene.home.adopt(started)
        eventually(lambda: stop.reached() or creates.poll() is not None, "it stands there")
        assert stop.reached(), scene.said()
        (status, text), *_ = all_of(scene, [("kill", scene.name, word)])
        assert status in (0, 1), text
        stop.open()

        def ended() -> bool:
            scene.home.alive()
            return creates.poll() is not None

        eventually(ended, "create ends", DEADLINE_S)
        assert b"Traceback" not in scene.said()
        if creates.returncode == 1:
            assert not (ground.state / scene.name).exists()
        scene.recover()


def test_everything_at_once(ground: Ground) -> None:
    """Any order of any commands leaves what `delete --force` can undo."""
    for turn in range(ROUNDS):
        with ground.scene("start") as scene:
            verbs: list[tuple[str, ...]] = [
                create(scene), create(scene), ("start", scene.name), ("start", scene.name),
                ("kill", scene.name, "KILL"), ("kill", scene.name, "TERM"),
                ("delete", scene.name), ("delete", "--force", scene.name),
                ("state", scene.name), ("list",), ("exec", "--detach", scene.name, "true"),
                ("exec", scene.name, "true"),
            ]  # fmt: skip
            random.Random(turn).shuffle(verbs)
            all_of(scene, verbs)
            scene.recover()


def test_a_payload_that_goes_as_it_is_deleted(ground: Ground) -> None:
    """`kill` and `delete` race for the last moment of a payload."""
    with ground.scene("kill") as scene:
        commands = [("kill", scene.name, "KILL"), *[("delete", "--force", scene.name)] * 3]
        results = all_of(scene, commands)
        assert [status for status, _ in results[1:]] == [0, 0, 0], results
        scene.recover()


def test_the_lock_goes_with_its_holder(ground: Ground) -> None:
    """Whoever holds a container and is killed, or stopped by its user, does not keep it."""
    with ground.scene("delete creating") as scene:
        holders = [pid for pid, (_, _, name) in scene.home.alive().items() if name == "MASTER"]
        assert len(holders) == 1
        os.kill(holders[0], signal.SIGSTOP)
        (status, text), *_ = all_of(scene, [("delete", "--force", scene.name)])
        assert status == 0, text
        scene.recover()


def test_a_full_disk_leaves_nothing(ground: Ground) -> None:
    """State that cannot be written is state that is not there."""
    with ground.scene("start") as scene:
        small = ground.place / "small"
        small.mkdir()
        options = ["-t", "tmpfs", "-o", "size=4k", "small", str(small)]
        subprocess.run(["mount", *options], check=True)
        try:
            for _ in range(3):
                assert scene.call("--root", str(small), *create(scene)) == 1
                assert b"no space left" in scene.said()
                assert os.listdir(small) == []
        finally:
            subprocess.run(["umount", small], check=True)
            small.rmdir()
        scene.recover()
