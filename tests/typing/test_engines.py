"""A type checker accepts the good engine and sees each bad one reach beyond its stage."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.typing.engines import GOOD, REACHES, bad_engine


@pytest.fixture(scope="module")
def complaints(tool, repository, tmp_path_factory):
    """What mypy says of all the engines, by file."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "good.py").write_text(GOOD.read_text())
    for hook in REACHES:
        (folder / f"bad_{hook}.py").write_text(bad_engine(hook)[0])
    argv = [tool("mypy"), "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache")]
    argv += ["--config-file", str(repository / "pyproject.toml"), "--hide-error-context"]
    done = subprocess.run(
        [*argv, *sorted(str(path) for path in folder.glob("*.py"))],
        cwd=repository,
        env={**os.environ, "MYPYPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found: dict[str, list[tuple[int, str]]] = {}
    for line in done.stdout.splitlines():
        file, number, text = re.fullmatch(r"(?:.*/)?([\w.]+):(\d+): error: (.*)", line).groups()
        found.setdefault(file, []).append((int(number), text))
    return found


def test_the_good_engine_is_accepted(complaints):
    assert complaints.get("good.py", []) == []


def test_only_the_engines_are_blamed(complaints):
    assert set(complaints) == {f"bad_{hook}.py" for hook in REACHES}


@pytest.mark.parametrize("hook", REACHES)
def test_a_hook_that_reaches_beyond_its_stage_is_rejected(hook, complaints):
    _, line = bad_engine(hook)
    found = complaints[f"bad_{hook}.py"]
    assert [number for number, _ in found] == [line]
    assert found[0][1].endswith("[attr-defined]")
