"""The one table of numbers, and the generator that shows it to Python."""

from __future__ import annotations

import importlib.util
import runpy

import pytest


@pytest.fixture(scope="module")
def generator(repository):
    spec = importlib.util.spec_from_file_location(
        "gen_protocol", repository / "tools/gen_protocol.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(generator, tmp_path):
    """Returns the names that a table's module defines."""

    def made(text: str) -> dict[str, object]:
        path = tmp_path / "protocol.py"
        path.write_text(generator.python_module(text))
        return {name: value for name, value in runpy.run_path(str(path)).items() if name.isupper()}

    return made


def test_rows_become_numbers_names_and_texts(names):
    table = """
    /* OP(COMMENT, 9) */ // OP(TOO, 8)
    #ifndef OP
    #define OP(name, number, \\
               phase)
    #endif
    OP(BIND, 1, SETUP, MANY)
    OP(MOVE, 0x2u, SETUP, ONCE)
    ERR(REFUSED, 40, "the administrator's file (say, /etc/x) "
        "forbids it // really")
    LIMIT(FRAME_BYTES, 64 * 1024)
    LIMIT(TAIL_BYTES, LIMIT_FRAME_BYTES)
    """
    assert names(table) == {
        "OP_BIND": 1,
        "OP_MOVE": 2,
        "ERR_REFUSED": 40,
        "LIMIT_FRAME_BYTES": 65536,
        "LIMIT_TAIL_BYTES": 65536,
        "OP_NAMES": {1: "BIND", 2: "MOVE"},
        "ERR_NAMES": {40: "REFUSED"},
        "ERR_TEXTS": {40: "the administrator's file (say, /etc/x) forbids it // really"},
    }


def test_rows_without_a_number_are_kept(names):
    assert names('FIELD(image, "path")') == {"FIELD_ROWS": (("image", "path"),)}


@pytest.mark.parametrize(
    "table", ["OP(A, 1)\nOP(A, 2)", "OP(A, 1)\nOP(B, 1)", "OP(A, 1", 'OP(A, 1, "x)']
)
def test_ambiguous_or_broken_rows_are_refused(generator, table):
    with pytest.raises(generator.BadRow):
        generator.python_module(table)


def test_the_generated_module_is_that_of_the_table(generator, repository):
    table = (repository / "starter/protocol.def").read_text()
    made = (repository / "apptainer_py/model/protocol.py").read_text()
    assert generator.python_module(table) == made
