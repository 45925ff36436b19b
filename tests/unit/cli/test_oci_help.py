"""Help of runc's command line: every command and every flag is described."""

from __future__ import annotations

import pytest

from apptainer_py.cli.oci import help as texts
from apptainer_py.cli.oci import help_texts
from apptainer_py.cli.oci.table import COMMANDS, GLOBAL


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
