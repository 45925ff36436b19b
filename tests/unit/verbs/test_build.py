"""Where a build may put its image."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.verbs import build


@pytest.mark.parametrize(
    ("flags", "says"), [(0, "no permission to write in"), (os.ST_RDONLY, "a read-only file system")]
)
def test_why_a_folder_cannot_be_written(
    flags: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=flags))
    request = build.Request(target=str(tmp_path / "x.sif"), spec="", environ={})
    with pytest.raises(build.TargetRefused, match=says):
        build._check_target(request)
