"""Every checker's warning is an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def complaints(argv: list[str], folder: Path) -> str:
    """Return what a checker printed if it failed, else nothing."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-6000:] or "failed silently"


def test_lint(tool, repository):
    assert not complaints([tool("ruff"), "check", "--quiet", "."], repository)


def test_format(tool, repository):
    assert not complaints([tool("ruff"), "format", "--check", "."], repository)


def test_types(tool, repository):
    assert not complaints(
        [tool("mypy"), "--no-error-summary", "--cache-dir", "/dev/null", "apptainer_py"], repository
    )


def test_layers(tool, repository, tmp_path):
    checker = [tool("lint-imports"), "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        checker, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]


def test_cppcheck(tool, repository):
    argv = [tool("cppcheck"), "--quiet", "--enable=warning,portability,performance"]
    argv += ["--error-exitcode=1", "--inline-suppr", "--std=c11", "--suppress=missingIncludeSystem"]
    # cppcheck reads no system header, so it has to be told of the one macro it stumbles over.
    argv += ["-D__x86_64__", "-DPy_STRINGIFY(x)=#x", "-I", "starter", "starter"]
    assert not complaints(argv, repository)


@pytest.mark.long
def test_analyzer(tool, repository, tmp_path):
    folder = repository / "build/package/starter"
    includes = ["-D_GNU_SOURCE=", "-I", str(folder), "-I", str(folder / "generated")]
    includes += ["-isystem", "/usr/include/python3.11"]
    found = []
    for source in sorted(folder.glob("*.c")):
        argv = [tool("gcc"), "-std=gnu11", "-O2", "-fanalyzer", "-Werror", *includes]
        argv += ["-c", str(source), "-o", str(tmp_path / "object.o")]
        found.append(complaints(argv, repository))
    assert found
    assert not "".join(found)
