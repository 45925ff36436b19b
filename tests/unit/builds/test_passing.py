"""The directory of a command that keeps nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from apptainer_py.builds.passing import Folder, NoPlace


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoPlace, match="no such file or directory"):
        Folder(str(tmp_path / "missing"))


def test_it_goes_with_what_is_in_it(tmp_path: Path) -> None:
    with Folder(str(tmp_path)) as path:
        Path(path, "file").touch()
    assert not list(tmp_path.iterdir())
