"""The Cython module's types for Python are those of the module."""

from __future__ import annotations

import ast
import re

import pytest

FUNCTION = re.compile(r"^def (\w+)\((.*?)\):", re.MULTILINE | re.DOTALL)


SOURCES = {"_starter": ("_starter.pyx", "_config.pxi"), "_container": ("_container.pyx",)}


def stub(repository, module: str) -> ast.Module:
    return ast.parse((repository / f"apptainer_py/kernel/{module}.pyi").read_text())


def source(repository, module: str) -> str:
    folder = repository / "apptainer_py/kernel"
    return "".join((folder / name).read_text() for name in SOURCES[module])


def parameters(text: str) -> list[str]:
    """Return the names in a parameter list, whatever type C or Python gives them."""
    found = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        name = part.split("=")[0].replace(" not None", "").split()[-1]
        found.append(name.lstrip("*"))
    return [name for name in found if name]


@pytest.mark.parametrize("module", SOURCES)
def test_functions_and_their_parameters(repository, module):
    found = FUNCTION.findall(source(repository, module))
    written = {name: parameters(text) for name, text in found}
    typed = {}
    for node in stub(repository, module).body:
        if isinstance(node, ast.FunctionDef):
            known = [*node.args.args, *node.args.kwonlyargs]
            more = [node.args.vararg] if node.args.vararg else []
            typed[node.name] = [argument.arg for argument in [*known, *more]]
    assert len(typed) > 10
    public = {name: names for name, names in written.items() if not name.startswith("_")}
    assert typed == public


def test_fields_of_the_stage(repository):
    body = stub(repository, "_starter").body
    (info,) = [node for node in body if isinstance(node, ast.ClassDef)]
    typed = [node.target.id for node in info.body if isinstance(node, ast.AnnAssign)]
    text = source(repository, "_starter")
    text = text[text.index("def stage():") : text.index("def run_hook(")]
    assert typed == re.findall(r'"(\w+)":', text)
