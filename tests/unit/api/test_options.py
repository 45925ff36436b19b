"""Keyword arguments are the options of the table, by the same names and kinds."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from apptainer_py.api import options
from apptainer_py.base.errors import NotSupported
from apptainer_py.cli import table
from apptainer_py.cli.parse import parse
from apptainer_py.model.request import ActionRequest


def parsed(**keywords: object) -> ActionRequest:
    outer, inner = options.global_words("exec", keywords)
    found = parse([*outer, "exec", *inner, "--", "/image", "true"], {})
    assert isinstance(found, ActionRequest)
    return found


@pytest.mark.parametrize(
    ("keyword", "value", "field"),
    [
        ("nv", True, True),
        ("nv", False, False),
        ("cpu_shares", 7, 7),
        ("hostname", "box", "box"),
        ("workdir", pathlib.Path("/w"), "/w"),
        ("bind", "/a,/b:/c", ("/a,/b:/c",)),
        ("bind", ["/a", pathlib.Path("/b")], ("/a", "/b")),
        ("scratch", ["/a,b", 'q"r', "plain"], ("/a,b", 'q"r', "plain")),
        ("no_home", None, False),
        ("workdir", "-B", "-B"),
    ],
)
def test_a_keyword_is_what_the_option_is(keyword, value, field):
    assert getattr(parsed(**{keyword: value}), keyword) == field


@pytest.mark.parametrize(
    "text", ["", "plain", "a,b", "x=y", 'say "hi"', '"quoted"', "two words", "a=b,c=d", "line\nend"]
)
def test_a_variable_reaches_the_parser_as_it_is(text):
    assert set(parsed(env={"NAME": text, "OTHER": "1"}).env) == {("NAME", text), ("OTHER", "1")}


def test_global_options_stand_before_the_command():
    assert parsed(debug=True).message_level == 5
    assert parsed(trace="/t").trace_file == "/t"


def test_a_misspelt_keyword_names_the_nearest():
    with pytest.raises(TypeError) as error:
        parsed(bindd="/a")
    assert str(error.value) == (
        "exec() got an unexpected keyword argument 'bindd'; did you mean 'bind'?"
    )
    with pytest.raises(TypeError, match=r"start\(\) got an unexpected keyword argument 'xyzzy'$"):
        options.global_words("instance start", {"xyzzy": 1})


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("nv", 1), ("nv", "yes"), ("cpu_shares", "1"), ("cpu_shares", True), ("hostname", 3),
        ("bind", [3]), ("bind", b"/a"), ("env", "A=B"), ("env", {"A": 1}), ("bind", {"/a": "/b"}),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_a_type_error(keyword, value):
    with pytest.raises(TypeError, match=keyword):
        parsed(**{keyword: value})


def test_what_the_command_line_refuses_is_refused_here():
    refused = [row for row in table.options_of("instance start") if row[6] == table.REFUSED]
    for row in refused:
        value = {table.BOOL: True, table.INT: 7}.get(row[2], "x")
        with pytest.raises(NotSupported, match="not supported yet"):
            options.global_words("instance start", {row[0].replace("-", "_"): value})


def test_values_are_those_of_a_parser_that_was_told_nothing():
    found = options.values("inspect", {"all": True})
    assert found == {row[0]: row[3] for row in table.options_of("inspect")} | {"all": True}


def test_the_stub_is_made_of_the_table(repository):
    argv = [sys.executable, "-B", repository / "tools/gen_api.py"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert text == (repository / "apptainer_py/api/keywords.pyi").read_text()
    for row in table.options_of("exec"):
        if row[0] not in table.SYNONYMS:
            assert f"    {row[0].replace('-', '_')}: " in text
