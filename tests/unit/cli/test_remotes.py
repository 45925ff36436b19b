"""What the command line keeps from others, and asks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apptainer_py.cli import images
from apptainer_py.cli.complete import script
from apptainer_py.cli.table import COMMANDS, HIDDEN_COMMANDS, SUPPORTED


@pytest.mark.parametrize(("typed", "kept"), [
    (["exec", "--docker-password", "pw", "-C"], ["exec", "--docker-password", "-", "-C"]),
    (["exec", "--docker-password=pw", "-C"], ["exec", "--docker-password=-", "-C"]),
    (["exec", "--env", "pw", "-C"], ["exec", "--env", "pw", "-C"]),
    (["pw", "--docker-password", "pw"], ["pw", "--docker-password", "-"]),
])  # fmt: skip
def test_a_password_is_not_handed_on(typed: Sequence[str], kept: list[str]) -> None:
    assert images._without_password(typed, "pw") == kept


def test_powershell_knows_every_command() -> None:
    text, bare = script("powershell"), script("powershell", descriptions=False)
    assert text.count("{") == text.count("}")
    assert text.count("'") % 2 == 0
    for row in COMMANDS:
        if row[4] == SUPPORTED and row[0] not in HIDDEN_COMMANDS:
            assert f"\n        '{row[0]}' = @(" in text, row[0]
            assert row[5].replace("'", "''") in text
            assert f"'{row[0].rpartition(' ')[2]}'" in bare
