"""Who waits for a payload, and answers meanwhile those that come to its container."""

from __future__ import annotations

import pytest

from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.runtime.contexts import MonitorContext

KEEPER = 7


class Met:
    """A meeting at which the payload ends soon, or late."""

    def __init__(self, done: list[str], *, soon: bool) -> None:
        self.done = done
        self.soon = soon

    def until(self, fd: int, seconds: float = -1.0) -> bool:
        assert fd == KEEPER
        self.done.append("answer" if seconds < 0 else "answer a while")
        return seconds < 0 or self.soon


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done in turn, where the payload ends with the status 3."""
    steps: list[str] = []
    monkeypatch.setattr(_starter, "release_code", lambda fd: steps.append(f"release {fd}"))
    ended = (protocol.EVENT_PAYLOAD_ENDED, 0, 3 << 8)
    monkeypatch.setattr(_starter, "receive_event", lambda _fd: ended)
    return steps


def test_who_comes_at_once_does_not_wait_for_the_release_of_code(done: list[str]) -> None:
    assert MonitorContext(KEEPER, 0).wait(Met(done, soon=False)) == 3 << 8  # type: ignore[arg-type]
    assert done == ["answer a while", "release -1", "answer"]


def test_a_short_payload_gives_no_code_back(done: list[str]) -> None:
    assert MonitorContext(KEEPER, 0).wait(Met(done, soon=True)) == 3 << 8  # type: ignore[arg-type]
    assert done == ["answer a while", "answer"]


def test_alone_the_channel_tells_how_long_it_is(done: list[str]) -> None:
    assert MonitorContext(KEEPER, 0).wait() == 3 << 8
    assert done == [f"release {KEEPER}"]
