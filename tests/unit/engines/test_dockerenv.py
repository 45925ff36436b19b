"""The file that Apptainer makes of an OCI image's variables."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from apptainer_py.engines.apptainer import dockerenv

TEXT = some.text(
    some.characters(exclude_characters="\0\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029",
                    exclude_categories=("Cs",)),
    max_size=20,
)  # fmt: skip


def escaped(value: str) -> str:
    """Escape as Apptainer 1.4 does, twice."""
    once = "".join(f"\\{c}" if c in '\\"`$' else c for c in value)
    twice = "".join(f"\\{c}" if c in '\\"' else c for c in once)
    return twice.replace("\n", "\\n")


def file(**values: str) -> str:
    lines = [f'export {name}="${{{name}:-"{escaped(value)}"}}"' for name, value in values.items()]
    return "\n".join(["#!/bin/sh", 'export PATH="/usr/bin:/bin"', *lines])


@settings(max_examples=80, deadline=None)
@given(TEXT)
def test_a_shell_reads_the_value_that_was_meant(value: str) -> None:
    text = dockerenv.rewritten(file(X=value, FORCED="\\"))
    assert text is not None
    done = subprocess.run(
        ["/bin/sh", "-c", f'{text}\nprintf %s "$X"; printf .'], capture_output=True, check=True
    )
    assert done.stdout.decode() == value + "."


def test_a_value_that_is_there_already_is_kept() -> None:
    text = dockerenv.rewritten(file(X="`", Y="\\"))
    done = subprocess.run(
        ["/bin/sh", "-c", f"X=before\n{text}\necho $X; env"], capture_output=True, text=True,
        check=True, env={},
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "before"
    assert {"X=before", "Y=\\", "PATH=/usr/bin:/bin"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    "text",
    [
        "", "#!/bin/sh\n", file(X="plain"), 'export X="${X:-"a\\\\\\\\b"}"\n',
        "#!/bin/sh\nexport X='a\\\\b'\n", '#!/bin/sh\nexport X="${X:-"a\\"b"}"\n',
        '#!/bin/sh\nexport X="${X:-"a\\$b"}"\n', '#!/bin/sh\nexport X="${Y:-"\\\\\\\\"}"\n',
        '#!/bin/sh\nexport 1X="${1X:-"\\\\\\\\"}"\n',
        '#!/bin/sh\nexport X="${X:-"\\\\\\\\"}"; id\n',
        '#!/bin/sh\nexport X="${X:-"$(id)\\\\\\\\"}"\n', "#!/bin/sh\nexport X=\\\\\n",
        '#!/bin/sh\nexport A-B="${A-B:-"\\\\\\\\"}"\n',
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_left_alone(text: str) -> None:
    assert dockerenv.rewritten(text) is None


def test_the_assignment_holds_any_text() -> None:
    line = dockerenv.assignment("it's\n`$(id)\"\\")
    done = subprocess.run(
        ["/bin/sh", "-c", f'{line}\nprintf %s "$__docker"'], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "it's\n`$(id)\"\\"


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        (r"a\tb\r", "a\tb\r"),
        (r"\u2028", "\u2028"),
        (r"\xff\x7f", "\udcff\x7f"),
        (r"\U0001f600", "😀"),
    ],
)
def test_what_else_a_go_string_escapes(body, meant):
    assert dockerenv._value(body) == meant


@pytest.mark.parametrize("body", [r"\q", r"\x1", r"\u20", r"\x00", r"\U00110000", r"\xFG", "\\"])
def test_no_such_escape(body):
    assert dockerenv._value(body) is None
