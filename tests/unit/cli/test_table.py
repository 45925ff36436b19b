"""The table keeps its own rules, and knows what Apptainer knows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest

from apptainer_py.cli import table
from apptainer_py.cli.help import full as help_of
from apptainer_py.cli.help_texts import EXAMPLES
from apptainer_py.cli.parse import parse
from apptainer_py.model.request import ActionRequest

KINDS = {table.BOOL, table.STRING, table.LIST, table.REPEAT, table.INT, table.MAP}
# Apptainer reads CPU_SHARES for both; it means --cpu-shares.
CORRECTED = {"cpus"}


def test_options_are_sorted_by_name() -> None:
    names = [row[0] for row in table.OPTIONS]
    assert names == sorted(names)


def test_commands_are_sorted_and_unique() -> None:
    paths = [row[0] for row in table.COMMANDS]
    assert paths == sorted(set(paths))


@pytest.mark.parametrize("path", ["", *(row[0] for row in table.COMMANDS)])
def test_names_and_letters_of_a_command_are_unique(path: str) -> None:
    rows = table.options_of(path)
    names = [row[0] for row in rows]
    letters = [row[1] for row in rows if row[1]]
    assert len(set(names)) == len(names)
    assert len(set(letters)) == len(letters)
    assert "h" not in letters
    assert "help" not in names


@pytest.mark.parametrize("row", table.OPTIONS, ids=lambda row: row[0])
def test_a_row_has_its_form(row: table.Option) -> None:
    name, letter, kind, default, keys, commands, status, text = row
    assert re.fullmatch("[a-z][a-z0-9-]+", name)
    assert len(letter) <= 1
    assert kind in KINDS
    defaults = {table.BOOL: bool, table.STRING: str, table.INT: int}
    assert type(default) is defaults.get(kind, tuple)
    assert all(re.fullmatch("[A-Z][A-Z0-9_]+", key) for key in keys)
    assert commands
    assert status in (table.SUPPORTED, table.REFUSED, table.FETCHING, table.OCI_ONLY)
    assert text
    assert not text.endswith(".")


def test_each_supported_action_option_is_a_field_of_the_request() -> None:
    fields = set(ActionRequest._fields)
    for row in table.OPTIONS:
        if row[6] in (table.SUPPORTED, table.OCI_ONLY) and set(row[5]) & set(table.ACTIONS):
            name = table.SYNONYMS.get(row[0], row[0])
            assert name.replace("-", "_") in fields


def test_side_tables_name_known_options() -> None:
    names = {row[0] for row in table.OPTIONS}
    assert names >= table.HIDDEN
    assert names >= set(table.DEPRECATED)
    assert names >= {*table.SYNONYMS, *table.SYNONYMS.values(), *table.ADDING}
    assert names >= {name for one, others in table.IMPLIED for name in (one, *others)}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("image.sif", ""),
        ("/a/b:c", ""),
        ("foo:bar", ""),
        ("docker:x", "docker"),
        ("docker://x", "docker"),
        ("foo://x", "foo"),
        ("://x", ""),
        (":", ""),
        ("instance://x", "instance"),
        ("a:b://c", ""),
    ],
)
def test_transport(image: str, expected: str) -> None:
    assert table.transport(image) == expected


def _real_options(command: str) -> dict[str, tuple[str, str]]:
    shown = subprocess.run(
        ["apptainer", *command.split(), "--help"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^ {2}(?:-(\w), | {4})--([a-z0-9-]+)(?: (\w+))? ", shown, re.MULTILINE)
    return {name: (letter, kind or "bool") for letter, name, kind in found if name != "help"}


@pytest.mark.parity
@pytest.mark.parametrize(
    "command", ["exec", "run", "shell", "test", "inspect", "config global", "completion bash"]
)
def test_every_option_of_the_real_one_is_in_the_table(command: str) -> None:
    if not shutil.which("apptainer"):
        pytest.skip("Apptainer is not installed")
    ours = {row[0]: (row[1], row[2]) for row in table.options_of(command)}
    real = _real_options(command)
    assert real
    assert {name: ours.get(name) for name in real} == real


@pytest.mark.parity
def test_every_command_of_the_real_one_is_in_the_table() -> None:
    if not shutil.which("apptainer"):
        pytest.skip("Apptainer is not installed")
    for group in ("", "sif", "config", "completion"):
        argv = ["apptainer", *group.split(), "--help"]
        shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        listed = shown.partition("Available Commands:\n")[2].partition("\n\n")[0]
        names = [line.split()[0] for line in listed.splitlines()]
        assert names
        for name in names:
            assert table.command_row(f"{group} {name}".strip())


@pytest.mark.parametrize("path", [row[0] for row in table.COMMANDS])
def test_help_fits_a_terminal_and_says_what_a_command_does(path: str) -> None:
    text = help_of(path)
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert all(f" {path} [" in line for line in wide)  # a synopsis stays one line
    bare = path.startswith("oci ") or path in (*table.HIDDEN_COMMANDS, "completion powershell")
    assert bare or "\nDescription:\n" in text


@pytest.mark.parametrize("example", [line for rows in EXAMPLES.values() for line in rows])
def test_examples_are_commands_that_the_parser_takes(example: str) -> None:
    parse(shlex.split(example.partition(" >")[0]), {})
