"""The Cython module's types for Python are those of the module."""

from __future__ import annotations

import ast
import re

import pytest

FUNCTION = re.compile(r"^def (\w+)\((.*?)\):", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def stub(repository) -> ast.Module:
    return ast.parse((repository / "apptainer_py/kernel/_starter.pyi").read_text())


@pytest.fixture(scope="module")
def source(repository) -> str:
    files = ("_starter.pyx", "_config.pxi")
    return "".join((repository / "apptainer_py/kernel" / name).read_text() for name in files)


def parameters(text: str) -> list[str]:
    """Return the names in a parameter list, whatever type C or Python gives them."""
    found = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        name = part.split("=")[0].replace(" not None", "").split()[-1]
        found.append(name.lstrip("*"))
    return [name for name in found if name]


def test_functions_and_their_parameters(stub, source):
    written = {name: parameters(text) for name, text in FUNCTION.findall(source)}
    typed = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            known = [*node.args.args, *node.args.kwonlyargs]
            more = [node.args.vararg] if node.args.vararg else []
            typed[node.name] = [argument.arg for argument in [*known, *more]]
    assert len(typed) > 10
    public = {name: names for name, names in written.items() if not name.startswith("_")}
    assert typed == public


def test_fields_of_the_stage(stub, source):
    (info,) = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    typed = [node.target.id for node in info.body if isinstance(node, ast.AnnAssign)]
    text = source[source.index("def stage():") : source.index("def run_hook(")]
    assert typed == re.findall(r'"(\w+)":', text)
