"""Directories for one command: held, fresh, somebody else's, abandoned."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apptainer_py.base import held


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that nothing has been written to for long."""
    made = tmp_path / "kind-1"
    made.mkdir()
    os.utime(made, (0, 0))
    return made


def abandoned(folder: Path) -> list[str]:
    return held.abandoned(str(folder), "kind-")


def test_what_nobody_holds_is_abandoned(old: Path, tmp_path: Path) -> None:
    (tmp_path / "other-1").mkdir()
    os.utime(tmp_path / "other-1", (0, 0))
    assert abandoned(tmp_path) == [str(old)]


def test_what_is_held_is_not(old: Path, tmp_path: Path) -> None:
    fd = held.hold(str(old))
    assert held.is_held(str(old))
    assert not abandoned(tmp_path)
    os.close(fd)
    assert not held.is_held(str(old))
    assert abandoned(tmp_path) == [str(old)]


def test_what_has_just_been_made_is_not(tmp_path: Path) -> None:
    (tmp_path / "kind-1").mkdir()
    assert not abandoned(tmp_path)


def test_neither_links_nor_files_nor_nothing(old: Path, tmp_path: Path) -> None:
    (tmp_path / "kind-2").symlink_to(old)
    (tmp_path / "kind-3").touch()
    os.utime(tmp_path / "kind-3", (0, 0))
    assert abandoned(tmp_path) == [str(old)]
    assert held.abandoned(f"{tmp_path}/none", "kind-") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory away")
def test_what_is_another_users_is_not(old: Path, tmp_path: Path) -> None:
    os.chown(old, 12345, 12345)
    assert not abandoned(tmp_path)


def test_a_directory_for_a_block_takes_what_was_abandoned(old: Path, tmp_path: Path) -> None:
    with held.Directory(str(tmp_path), "kind-") as made:
        assert held.is_held(made)
        (Path(made) / "file").touch()
        os.utime(made, (0, 0))
        assert [str(path) for path in tmp_path.iterdir()] == [made]
        with held.Directory(str(tmp_path), "kind-"):
            assert os.listdir(made) == ["file"]
    assert not list(tmp_path.iterdir())
