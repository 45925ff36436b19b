"""What ./install does with a name that somebody else may have taken."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def installer(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return importlib.import_module("installer")


def placed(installer: ModuleType, place: Path) -> tuple[Path, set[str]]:
    """Make the link; return it, and what the list names."""
    installation = installer.Installation(str(place / "prefix"), str(place / "etc"))
    link = place / "prefix/lib/python3/dist-packages/apptainer_py"
    installation.place_link(f"{place}/prefix/lib/apptainer-py/apptainer_py", str(link))
    return link, set(installation.now.files)


def test_a_link_is_made_and_made_again(installer, tmp_path):
    for _ in range(2):
        link, listed = placed(installer, tmp_path)
        assert link.readlink() == Path("../../apptainer-py/apptainer_py")
        assert listed == {str(link)}


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_somebody_elses_name_stays(installer, tmp_path, capsys, kind):
    link, _ = placed(installer, tmp_path)
    link.unlink()
    if kind == "file":
        link.write_text("theirs")
    else:
        link.symlink_to("/nonexistent" if kind == "dangling" else tmp_path)
    before = link.lstat().st_ino
    assert placed(installer, tmp_path) == (link, set())
    assert link.lstat().st_ino == before
    assert "is not ours; it stays as it is" in capsys.readouterr().out
