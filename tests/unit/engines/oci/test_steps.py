"""Who opens the source of a bind: init, or its maker when the container has ids of its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from apptainer_py.engines.oci import steps
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import Row
from tests.oci_config import SPACES, edited, plan_of, rows, short, spaces

MAPS = [{"containerID": 0, "hostID": 7, "size": 3}]
WITH_USER = (
    ("linux/namespaces", spaces(*SPACES, "user")),
    ("linux/uidMappings", MAPS),
    ("linux/gidMappings", MAPS),
)
BINDS = [
    {"destination": "/a", "source": "/s", "options": ["rbind", "ro"]},
    {"destination": "/b", "source": "/s", "options": ["rbind", "ridmap"]},
]


class FakeNest:
    def __init__(self) -> None:
        self.rows: list[tuple[Row, bool]] = []
        self.settled: list[int] = []

    def row(self, row: Row, fd: int = -1) -> None:
        self.rows.append((row, fd >= 0))

    def settle(self) -> None:
        self.settled.append(len(self.rows))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []

    def tree_in(_space: int, path: bytes, flags: int) -> int:
        made.append(("tree", path, flags & ~os.O_CLOEXEC))
        return os.open("/dev/null", os.O_RDONLY)

    def mount_setattr(_fd: int, path: bytes, flags: int, **rest: int) -> None:
        made.append(("setattr", path, flags, rest["attr_set"], rest["userns_fd"] >= 0))

    monkeypatch.setattr(steps._container, "tree_in", tree_in)
    monkeypatch.setattr(steps._container, "mount_setattr", mount_setattr)
    monkeypatch.setattr(steps._container, "make_userns", lambda *_: os.dup(2))
    return made


def sent(config: dict[str, Any], *, reaches_more: bool) -> FakeNest:
    nest = FakeNest()
    plan = plan_of(config)
    passed = steps.Passed(plan, os.getpid(), reaches_more=reaches_more)
    for row in plan.assemble:
        passed.send(nest, row)  # type: ignore[arg-type] # what it needs of a Nest
    passed.close()
    return nest


def test_init_opens_them_without_ids_of_its_own(calls: list[tuple[Any, ...]]) -> None:
    nest = sent(edited(("mounts", BINDS[:1])), reaches_more=True)
    assert not calls
    assert short(nest.rows[0][0]) == ("TREE", 1, (), "/s")


def test_init_opens_them_if_its_maker_can_no_more(calls: list[tuple[Any, ...]]) -> None:
    sent(edited(*WITH_USER, ("mounts", BINDS[:1])), reaches_more=False)
    assert not calls


def test_its_maker_opens_and_maps_them(calls: list[tuple[Any, ...]]) -> None:
    nest = sent(edited(*WITH_USER, ("mounts", BINDS)), reaches_more=True)
    assert calls == [
        ("tree", b"/s", 1 | 0x8000),
        ("tree", b"/s", 1 | 0x8000),
        ("setattr", b"", 0x1000 | 0x8000, 0x100000, True),
    ]
    shown = [(short(row), fd) for row, fd in nest.rows[:5]]
    assert shown == [
        (("TREE", 0, ()), True),
        (("ATTR", 0, (1, 0x20000E, 0)), False),
        (("PLACE", 0, (0,), "/a"), False),
        (("TREE", 0, ()), True),
        (("PLACE", 0, (0,), "/b"), False),
    ]
    # What lies before a source may be part of its path.
    assert nest.settled == [0, 3]


def test_failure_is_told_as_that_of_a_row(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_space: int, path: bytes, _flags: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(steps._container, "tree_in", missing)
    with pytest.raises(steps.StartFailed) as caught:
        sent(edited(*WITH_USER, ("mounts", BINDS[:1])), reaches_more=True)
    assert str(caught.value) == (
        "unable to start container process: error during container init: failed to fulfil mount"
        " request: open /s: no such file or directory"
    )
    assert not calls


def test_no_descriptor_is_left(calls: list[tuple[Any, ...]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sent(edited(*WITH_USER, ("mounts", BINDS)), reaches_more=True)
    assert len(os.listdir("/proc/self/fd")) == before
    plan = plan_of(edited(*WITH_USER, ("mounts", BINDS)))
    passed = steps.Passed(plan, os.getpid(), reaches_more=True)
    tree = rows(plan.assemble, protocol.OP_TREE)[0]
    passed.send(FakeNest(), tree)  # type: ignore[arg-type] # what it needs of a Nest
    passed.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert calls
