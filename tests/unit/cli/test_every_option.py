"""What each option of each command does with a value that is missing, wrong or repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from apptainer_py.cli.options import BadVariable, CommandLineWrong
from apptainer_py.cli.parse import parse
from apptainer_py.cli.table import BOOL, COMMANDS, INT, LIST, MAP, OPTIONS, REFUSED, REPEAT
from apptainer_py.model.request import ActionRequest

if TYPE_CHECKING:
    from apptainer_py.cli.table import Option

PATHS = sorted({path for row in OPTIONS for path in row[5] if path})
LEAST = {row[0]: row[2] for row in COMMANDS}


def words(path: str, *given: str) -> list[str]:
    return [*path.split(), *given, *["x"] * LEAST[path]]


def rows_of(path: str) -> list[Option]:
    return [row for row in OPTIONS if path in row[5] and row[6] != REFUSED]


def value_of(path: str, row: Option, *given: str) -> object:
    parsed = parse(words(path, *given), {})
    if isinstance(parsed, ActionRequest):
        return getattr(parsed, str(row[0]).replace("-", "_"), None)
    return parsed.options[row[0]]


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_cannot_be(path: str) -> None:
    bad = {BOOL: ["=", "=maybe", "=2"], INT: ["=", "=x", "=1x", "=1e3"], MAP: ["=", "=x"]}
    for row in rows_of(path):
        flag = f"--{row[0]}"
        for value in bad.get(str(row[2]), ()):
            with pytest.raises(CommandLineWrong) as caught:
                parse(words(path, flag + value), {})
            said = str(caught.value)
            assert said.startswith(f'Error for command "{path.split()[-1]}": invalid argument ')
            assert flag in said
            assert "\n" not in said
            assert caught.value.exit_code == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_is_missing(path: str) -> None:
    for row in rows_of(path):
        if row[2] == BOOL:
            continue
        with pytest.raises(CommandLineWrong, match=f"flag needs an argument: --{row[0]}"):
            parse([*path.split(), f"--{row[0]}"], {})
        if row[1]:
            with pytest.raises(CommandLineWrong, match="flag needs an argument: '"):
                parse([*path.split(), f"-{row[1]}"], {})


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_is_given_twice(path: str) -> None:
    """The last one counts, but for lists, which have both."""
    for row in rows_of(path):
        flag = f"--{row[0]}"
        if row[2] == BOOL:
            assert value_of(path, row, flag) == value_of(path, row, flag, flag)
            off = f"{flag}=false"
            assert value_of(path, row, flag, off) == value_of(path, row, off)
            continue
        one, two = ("1", "2") if row[2] == INT else ("A=1", "B=2")
        found = value_of(path, row, flag, one, flag, two)
        if row[2] in (LIST, REPEAT) and found is not None:
            assert found == ("A=1", "B=2")
        elif row[2] != MAP:
            assert found == value_of(path, row, flag, two)


@pytest.mark.parametrize("path", PATHS)
def test_a_variable_that_cannot_be(path: str) -> None:
    """An empty one is as if it were not there; a wrong one is refused."""
    for row in rows_of(path):
        for key in row[4]:
            assert parse(words(path), {f"APPTAINER_{key}": ""}) == parse(words(path), {})
            if row[2] in (BOOL, INT):
                with pytest.raises(BadVariable, match=f"unable to set flag {row[0]} to value x:"):
                    parse(words(path), {f"APPTAINER_{key}": "x"})
