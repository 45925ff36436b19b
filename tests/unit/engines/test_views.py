"""Master's view of a container: by its root alone, and not of what differs for each process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.engines.apptainer import payload
from apptainer_py.engines.apptainer.views import NotSeen, Outside


class Bearer:
    """Stands for a lean stage 2: answers from a table, and keeps what it is asked."""

    def __init__(self, places: dict[bytes, tuple[int, bytes]]) -> None:
        self.places = places
        self.asked: list[bytes] = []
        self.executed: list[tuple[bytes, int]] = []
        self.number = 0

    def ask_place(self, directory: bytes) -> None:
        self.asked.append(directory)

    def place(self) -> tuple[int, bytes]:
        return self.places[self.asked[-1]]

    def execute(self, path: bytes, _arguments: object, _entries: object, umask: int) -> int:
        self.executed.append((path, umask))
        return self.number


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "proc").mkdir()
    program = tmp_path / "bin/tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "bin/plain").write_text("")
    (tmp_path / "out").symlink_to("/etc/passwd")
    (tmp_path / "up").symlink_to("../../../../../../bin/tool")
    return tmp_path


def view(root: Path, bearer: Bearer | None = None) -> Outside:
    return Outside(os.open(root, os.O_PATH), bearer or Bearer({}), 0o027)  # type: ignore[arg-type]


@pytest.fixture
def outside(tree: Path) -> Iterator[Outside]:
    yield view(tree)


def test_a_link_stays_below_the_root(outside: Outside) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        outside.stat("/out")
    assert outside.stat(b"/up").st_mode == outside.stat("/bin/tool").st_mode
    assert outside.stat("/out", follow=False).st_size == len("/etc/passwd")


def test_what_may_be_executed(outside: Outside) -> None:
    assert payload.is_program(outside, b"/bin/tool")
    assert not payload.is_program(outside, b"/bin/plain")
    assert not payload.is_program(outside, b"/bin")
    assert not payload.is_program(outside, b"/none")
    assert sorted(outside.names("/bin")) == ["plain", "tool"]


def test_a_relative_path_is_below_the_payloads_directory(outside: Outside) -> None:
    outside.directory = b"/bin"
    assert payload.find(outside, b"./tool", b"", b"/bin") == b"/bin/tool"
    assert payload.find(outside, b"tool", b":/nowhere", b"/bin") == b"./tool"
    outside.directory = b"/"
    with pytest.raises(payload.NotStarted, match="not found"):
        payload.find(outside, b"tool", b":/nowhere", b"/")


def test_proc_shows_everybody_something_else() -> None:
    """The host's, for a container's is a mount too."""
    host = view(Path("/"))
    for path in ("/proc/version", "/proc/self/status", "/proc"):
        with pytest.raises(NotSeen):
            host.stat(path)
    with pytest.raises(NotSeen):
        host.open("/proc/self/exe")
    with pytest.raises(NotSeen):
        payload.find(host, b"/proc/self/exe", b"", b"/")
    with pytest.raises(NotSeen):
        payload.find(host, b"sh", b"/proc/self/cwd:/bin", b"/")
    assert payload.may_be_program(host, b"/proc/self/exe")
    assert host.stat("/etc/passwd").st_size > 0


def test_a_loop_of_links_is_no_program(tree: Path, outside: Outside) -> None:
    (tree / "loop").symlink_to("loop")
    assert payload.find(outside, b"tool", b"/loop:/bin", b"/") == b"/bin/tool"


def test_a_directory_called_proc_is_none(outside: Outside) -> None:
    assert outside.stat("/proc").st_nlink > 0


def test_the_directory_is_where_stage_2_says(tree: Path) -> None:
    bearer = Bearer({b"/link": (0, b"/real"), b"/none": (2, b""), b"/gone": (0, b"")})
    there = view(tree, bearer)
    there.ask_to_enter(b"/link")
    assert there.directory == b"/link"
    assert there.enter(b"/link") == there.directory == b"/real"
    assert bearer.asked == [b"/link"]  # once
    with pytest.raises(FileNotFoundError):
        there.enter(b"/none")
    assert there.directory == b"/real"
    assert there.enter(b"/gone") == b"/gone"  # it has no name


def test_an_execve_that_fails_says_why(tree: Path) -> None:
    bearer = Bearer({})
    there = view(tree, bearer)
    assert there.execute(b"/bin/tool", [b"tool"], []) is None
    bearer.number = 8
    error = there.execute(b"/bin/tool", [b"tool"], [])
    assert error is not None
    assert (error.errno, error.strerror) == (8, "Exec format error")
    assert bearer.executed == [(b"/bin/tool", 0o027)] * 2
