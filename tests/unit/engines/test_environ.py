"""What is forwarded, what is injected, and that no value can leave its quotes."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from apptainer_py.engines.apptainer import environ
from apptainer_py.model.request import ActionRequest

TEXT = some.text(some.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)
SET = '__set() { command eval "$1=$2; export $1" 2>/dev/null || echo bad; }\n'


def action(**options: object) -> ActionRequest:
    return ActionRequest(command="exec", image="/i.sif", **options)  # type: ignore[arg-type]


def shell(script: str) -> str:
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, env={}, check=False)
    return done.stdout.decode("utf-8", "surrogateescape")


def test_the_hosts_variables_are_forwarded_but_for_some() -> None:
    host = {"A": "1", "HOME": "/h", "PATH": "/p", "LD_LIBRARY_PATH": "/l", "APPTAINER_X": "x",
            "SINGULARITY_X": "x"}  # fmt: skip
    found = environ.collect(action(), host)
    assert found.forwarded == {"A": "1", "USER_PATH": "/p"}
    assert (found.injected, found.path_edits) == ({}, {})


def test_a_clean_environment() -> None:
    host = {"A": "1", "TERM": "t", "http_proxy": "p", "NO_PROXY": "n", "PATH": "/p", "LANG": "x"}
    found = environ.collect(action(cleanenv=True), host)
    assert found.forwarded == {"TERM": "t", "http_proxy": "p", "NO_PROXY": "n", "LANG": "C"}


def test_prefixed_variables_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    host = {"APPTAINERENV_A": "new", "SINGULARITYENV_A": "old", "SINGULARITYENV_B": "b",
            "APPTAINERENV_HOME": "/x", "APPTAINERENV_PREPEND_PATH": "/pre",
            "APPTAINERENV_LD_LIBRARY_PATH": "/l", "APPTAINERENV_UID": "0",
            "APPTAINERENV_1X": "no", "APPTAINERENV_": "no"}  # fmt: skip
    found = environ.collect(action(env=(("C", "c"), ("B", "cli"))), host)
    libraries = "/l:/.singularity.d/libs"
    assert found.injected == {"A": "new", "B": "cli", "C": "c", "LD_LIBRARY_PATH": libraries}
    assert found.path_edits == {"PREPEND_PATH": "/pre"}
    said = capsys.readouterr().err
    assert "Skipping environment variable [SINGULARITYENV_A=old]" in said
    assert "Overriding HOME environment variable with APPTAINERENV_HOME is not permitted" in said


@pytest.mark.parametrize("name", ["A", "_", "a1", "A_B"])
def test_names(name: str) -> None:
    assert environ.is_name(name)


@pytest.mark.parametrize("name", ["1A", "A-B", "A.B", "É", "BASH_FUNC_f%%", "UID", "PPID", "A B"])
def test_no_names(name: str) -> None:
    assert not environ.is_name(name)


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_a_value_that_is_not_evaluated_arrives(value: str) -> None:
    found = environ.Environment()
    found.injected["X"] = value
    lines = environ.injection(found, evaluate=False)
    assert shell(f'{SET}{lines}\nprintf %s "$X"; printf .') == value + "."


@settings(max_examples=60, deadline=None)
@given(some.text(some.characters(exclude_characters="\0$`", exclude_categories=("Cs",)),
                 max_size=30))  # fmt: skip
def test_an_evaluated_value_stays_one_word(value: str) -> None:
    found = environ.Environment()
    found.injected["X"] = value
    lines = environ.injection(found, evaluate=True)
    after = shell(f"{SET}{lines}\nprintf done")
    assert after == "done"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("$(echo in)", "in"),
        ("`echo tick`", "tick"),
        ("${UNSET-none}", "none"),
        ('say "hi"', 'say "hi"'),
        (r"\$HOME", "$HOME"),
        ("a\\", "a\\"),
        (r"\"", '"'),
        ("two\nlines", "two\nlines"),
    ],
)
def test_evaluation(value: str, expected: str) -> None:
    found = environ.Environment()
    found.injected["X"] = value
    lines = environ.injection(found, evaluate=True)
    assert shell(f'{SET}{lines}\nprintf %s "$X"') == expected


@pytest.mark.parametrize("value", ["`", "$(", "${", "$((", "$(("])
def test_a_broken_value_takes_nothing_with_it(value: str) -> None:
    found = environ.Environment()
    found.injected.update(X=value, Y="fine")
    lines = environ.injection(found, evaluate=True)
    assert shell(f'{SET}{lines}\nprintf "%s" "${{X-unset}} $Y"') == "bad\nunset fine"


@pytest.mark.parametrize(
    ("edits", "path"),
    [
        ({}, "/bin"),
        ({"PREPEND_PATH": "/a"}, "/a:/bin"),
        ({"APPEND_PATH": "/b"}, "/bin:/b"),
        ({"PREPEND_PATH": "/a", "APPEND_PATH": "/b"}, "/a:/bin:/b"),
        ({"PATH": "/only:$PATH", "PREPEND_PATH": "/a"}, "/only:/a:/bin"),
        ({"PATH": ""}, "/bin"),
    ],
)
def test_path(edits: dict[str, str], path: str) -> None:
    found = environ.Environment()
    found.path_edits.update(edits)
    lines = environ.path_lines(found, evaluate=True)
    assert shell(f"PATH=/bin\n{SET}{lines}\necho $PATH") == path + "\n"
