"""Stage 2 evaluates an example while it waits: what comes of it, and what it leaves alone."""

from __future__ import annotations

import os

import pytest

from apptainer_py.engines.apptainer import payload, start
from apptainer_py.engines.apptainer.message import pack


def _message(action: bytes = b"exec", app: tuple[bytes, ...] = ()) -> bytes:
    lists = {
        b"action": [action],
        b"app": list(app),
        b"environment": [b"PATH=/bin"],
        b"forwarded": [b"TERM=dumb"],
        b"values": [b""],
        b"paths": [b""],
    }
    return pack(lists)


def test_the_example_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that gives up at the first line would not be any faster for it."""
    found: list[dict[str, str]] = []
    original = payload.environment

    def environment(*arguments: object) -> dict[str, str]:
        found.append(original(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(payload, "environment", environment)
    start.rehearse(_message())
    assert [entry["TERM"] for entry in found] == ["dumb"]
    assert "EXAMPLE" not in found[0]
    assert "EXAMPLE_PATH" not in found[0]


@pytest.mark.parametrize("message", [_message(b"shell"), _message(app=(b"an-app",))])
def test_what_is_left_to_the_shell_is_not_rehearsed(
    monkeypatch: pytest.MonkeyPatch, message: bytes
) -> None:
    monkeypatch.setattr(payload, "environment", None)
    start.rehearse(message)


def test_nothing_outside_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's tree is still there."""
    for name in ("open", "stat", "lstat", "access", "listdir", "chdir", "getcwd"):
        monkeypatch.setattr(os, name, None)
    start.rehearse(_message())
