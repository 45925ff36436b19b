"""Rules about the files of this repository."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

# Written in halves, so that this file is no finding of its own.
MACHINE_PATHS = re.compile(r"(?<![\w.])/wor" r"k/|/far" r"m/|/tmp/bash_" r"jobs|/root/\." r"pyenv")
REGISTRIES = re.compile(r"deb\." r"debian\.org|pypi\." r"org|registry\." r"npmjs")
PROMISES = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b(?!XX)")
VAGUE_NAMES = re.compile(r"(^|_)(util|utils|helper|helpers|common|manager|misc|legacy|temporary)$")
GENERATED = {
    "apptainer_py/api/keywords.pyi",
    "apptainer_py/base/build.py",
    "apptainer_py/model/protocol.py",
    "apptainer_py/model/directive_table.py",
    "apptainer_py/kernel/_container.c",
    "apptainer_py/kernel/_starter.c",
}


@pytest.fixture(scope="module")
def texts(tracked_files):
    """The text files of the tree with their content."""
    found = {}
    for path in tracked_files:
        content = path.read_bytes()
        if b"\0" not in content:
            found[path] = content.decode("utf-8", "replace")
    return found


def lines_with(texts, pattern):
    return [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRIES, PROMISES])
def test_no_line_names_this_machine_or_promises_something(texts, pattern):
    assert not lines_with(texts, pattern)


def test_names_of_files_say_what_is_in_them(tracked_files):
    assert not [str(path) for path in tracked_files if VAGUE_NAMES.search(path.stem)]


def test_generated_files_are_not_committed(tracked_files, repository):
    names = {str(path.relative_to(repository)) for path in tracked_files}
    assert not names & GENERATED
    kinds = {".o", ".so", ".pyc"}
    assert not [
        name
        for name in names
        if name.startswith("starter/generated/") or PurePosixPath(name).suffix in kinds
    ]


def test_readme_is_short(repository):
    assert len((repository / "README.md").read_text().splitlines()) <= 120


def test_modules_keep_types_out_of_the_run_path(tracked_files, repository):
    package = repository / "apptainer_py"
    without = [
        str(path)
        for path in tracked_files
        if path.is_relative_to(package)
        and path.suffix == ".py"
        and len(path.read_text().splitlines()) > 3
        and "from __future__ import annotations" not in path.read_text()
    ]
    assert not without


def test_c_lines_fit(texts, repository):
    wide = re.compile(r"^.{101,}$")
    programs = {
        path: text
        for path, text in texts.items()
        if path.is_relative_to(repository / "starter") and path.suffix in (".c", ".h", ".def")
    }
    assert not lines_with(programs, wide)
