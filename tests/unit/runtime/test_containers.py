"""Containers on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apptainer_py.model.record_frame import PHASE_CREATED, PHASE_CREATING, RecordData
from apptainer_py.runtime.containers import (
    FIFO,
    ContainerError,
    NoContainer,
    StateDir,
    check_id,
    created_text,
    start_time,
)


def record(**fields: object) -> RecordData:
    own = os.getpid()
    facts: dict[str, object] = {
        "container_id": "c",
        "phase": PHASE_CREATED,
        "creator_pid": own,
        "creator_start": start_time(own),
        "init_pid": own,
        "init_start": start_time(own),
        "state": (b"{", b",", b"}"),
    }
    return RecordData(**{**facts, **fields})  # type: ignore[arg-type]


def test_ids() -> None:
    assert check_id("a.b_c-D+1") == "a.b_c-D+1"
    for wrong in (".", "..", "a/b", "a b", "é"):
        with pytest.raises(ContainerError, match="invalid container ID format"):
            check_id(wrong)
    with pytest.raises(ContainerError, match="cannot be empty"):
        check_id("")


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    StateDir.make(str(tmp_path / "root"), "c", sticky=False)
    assert (tmp_path / "root").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "root/c").stat().st_mode & 0o7777 == 0o711
    with pytest.raises(ContainerError, match="already exists"):
        StateDir.make(str(tmp_path / "root"), "c", sticky=False)
    with pytest.raises(NoContainer):
        StateDir.open(str(tmp_path / "root"), "d")


def test_status_is_derived(tmp_path: Path) -> None:
    state = StateDir.make(str(tmp_path), "c", sticky=False)
    with pytest.raises(NoContainer):
        state.read_record()
    state.write_record(record())
    assert state.read_record() == record()
    assert state.status(record()) == "running"
    os.close(state.make_fifo(os.geteuid(), os.getegid()))
    assert (tmp_path / "c" / FIFO).stat().st_mode & 0o7777 == 0o622
    assert state.status(record()) == "created"
    assert state.status(record(init_start=1)) == "stopped"
    assert state.status(record(phase=PHASE_CREATING)) == "creating"
    assert state.status(record(phase=PHASE_CREATING, creator_start=1)) == "stopped"
    freezer = tmp_path / "freezer.state"
    freezer.write_text("FROZEN\n")
    assert state.status(record(freezer=str(freezer))) == "paused"


def test_removal_and_the_lock(tmp_path: Path) -> None:
    state = StateDir.make(str(tmp_path), "c", sticky=False)
    other = StateDir.open(str(tmp_path), "c")
    assert not other.lock(wait=False)
    state.write("x", b"1")
    state.remove()
    state.unlock()
    assert not (tmp_path / "c").exists()
    with pytest.raises(NoContainer):
        other.lock()


def test_times() -> None:
    assert created_text(1_500_000_000) == "1970-01-01T00:00:01.5Z"
    assert created_text(2_000_000_000) == "1970-01-01T00:00:02Z"
    assert start_time(os.getpid()) > 0
    assert start_time(0x7FFFFFFF) == 0
