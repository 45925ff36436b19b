"""Help of runc's command line: every command and every flag is described."""

from __future__ import annotations

import re

import pytest

from apptainer_py.cli.oci import help as texts
from apptainer_py.cli.oci import help_texts
from apptainer_py.cli.oci.table import COMMANDS, GLOBAL, flags_of


def names(words: str) -> set[str]:
    return {word.rstrip("=*#").partition(",")[0] for word in words.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_described(command):
    text = texts.command_help(command)
    assert text.startswith(f"NAME:\n   apptainer-py-oci {command} - ")
    for name in names(COMMANDS[command][0]):
        line = next(line for line in text.splitlines() if line.startswith(f"   --{name}"))
        assert len(line.split("  ")) > 2, line


def test_the_programs_own_flags_are_described():
    text = texts.program_help()
    assert names(GLOBAL) == set(help_texts.GLOBAL)
    for said in help_texts.GLOBAL.values():
        assert said in text


def test_nothing_is_described_that_is_not_there():
    known = {name for words, *_ in COMMANDS.values() for name in names(words)}
    assert set(help_texts.FLAGS) == known
    assert set(help_texts.DETAILS) == set(COMMANDS)
    for command, flag in help_texts.OF_COMMANDS:
        assert flag in names(COMMANDS[command][0])


def test_an_unknown_command_gets_the_programs_help():
    assert texts.command_help("nothing") == texts.program_help()


@pytest.fixture
def scanner(repository):
    return (repository / "starter/lean_scan.c").read_text()


def flags_in_c(scanner: str, table: str) -> set[tuple[str, bool]]:
    rows = scanner.split(f"{table}_flags[] = {{")[1].split("};")[0]
    return {(name, kind == "true") for name, kind in re.findall(r'{"([^"]+)", \w+, (\w+)}', rows)}


@pytest.mark.parametrize("command", ["delete", "kill"])
def test_the_launcher_knows_the_same_flags(scanner, command):
    words, least, most, _ = COMMANDS[command]
    known = {(name, bool(takes)) for name, (_, takes) in flags_of(words).items()}
    assert flags_in_c(scanner, command) == known
    assert re.search(rf'"{command}", LEAN_\w+, {least}, {most},', scanner)


def test_the_launcher_knows_the_programs_flags(scanner):
    known = {(name, bool(takes)) for name, (_, takes) in flags_of(GLOBAL).items()}
    assert flags_in_c(scanner, "global") <= known
    # These two are for the interpreter to answer.
    assert known - flags_in_c(scanner, "global") <= {
        (name, False) for name in ("help", "h", "version", "v")
    }
