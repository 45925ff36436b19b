"""JSON as Go writes it."""

from __future__ import annotations

import json

import pytest

from apptainer_py.model.json_out import dumps, quoted

VALUES = [
    {},
    [],
    {"a": [1, -2, {"b": None, "c": True, "d": False}], "e": {}, "f": []},
    ["", "plain", 'q"\\', "\n\t\x01", "é€😀", "<&>"],
]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_reads_back(value: object) -> None:
    assert json.loads(dumps(value)) == value
    assert json.loads(dumps(value, "  ")) == value


def test_the_layout_is_that_of_go() -> None:
    assert dumps({"a": [1, {}], "b": ""}, "  ") == json.dumps({"a": [1, {}], "b": ""}, indent=2)
    assert dumps({"a": [1, 2]}) == '{"a":[1,2]}'


def test_what_html_would_read_is_escaped() -> None:
    assert quoted("<a&b>") == '"\\u003ca\\u0026b\\u003e"'
    assert quoted("\udcff") == '"\\ufffd"'
