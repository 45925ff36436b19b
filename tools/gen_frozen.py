"""Put the package, compiled, into one C file that becomes part of stagehost.so.

A stage imports some fifty modules. Found and read one by one that takes longer than running them,
so they are frozen (PyImport_FrozenModules): no search, no file, nothing that could be replaced.
Those that every launch needs come as one bundle a stage, in the order in which they would be
imported: unmarshalled in one piece, where equal names are stored once, and run without the import
system (starter/stagehost_bundle.c). What only a reader or a type checker needs is left out of the
bytecode: docstrings, annotations of functions, the branches under TYPE_CHECKING, and the names of
errors and of the numbers in protocol.def.

    gen_frozen.py TREE TARGET     TREE holds apptainer_py/ and starter/stage_*.py
"""

from __future__ import annotations
import __future__

import ast
import errno
import marshal
import runpy
import struct
import sys
from collections.abc import Sequence
from encodings import utf_8
from pathlib import Path
from types import CodeType

# It runs isolated, and the other half of it lies beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import code_image

_LINE_BYTES = 32
_PROTOCOL = "apptainer_py.model.protocol"
# The modules with which each stage begins, what they import included.
_BUNDLES = {
    "master": (
        "os",
        "apptainer_py.cli.stage",
        "apptainer_py.cli.report",
        "apptainer_py.cli.parse",
        "apptainer_py.engines.apptainer",
        "apptainer_py.engines.apptainer.prepare",
        "apptainer_py.runtime.bearer",
        "apptainer_py.runtime.mounting",
        "apptainer_py.engines.apptainer.create",
    ),
    # For an image that is a file; the bundle before it is there already.
    "image": ("apptainer_py.image.sif",),
    # The oci engine: what all of it begins with, and behind that `exec`, or `create` and `run`.
    "oci": (
        "os",
        "apptainer_py.cli.stage",
        "apptainer_py.cli.oci.stage",
        "apptainer_py.engines.oci",
        "apptainer_py.runtime.nest",
        "apptainer_py.engines.oci.compile",
        "apptainer_py.engines.oci.terminal",
        "apptainer_py.model.record_frame",
    ),
    "oci_exec": ("apptainer_py.engines.oci.tenant",),
    "oci_create": (
        "apptainer_py.engines.oci.create",
        "apptainer_py.host.cgroups.v1",
        "apptainer_py.host.cgroups.mounting",
        "apptainer_py.host.cgroups.devices",
    ),
    "start": (
        "os",
        "apptainer_py.cli.stage",
        "apptainer_py.engines.apptainer",
        "apptainer_py.engines.apptainer.start",
    ),
}


# Bundles that are run when another one has been.
_BEHIND = {"image": "master", "oci_exec": "oci", "oci_create": "oci"}


class _Lean(ast.NodeTransformer):
    """Drops what the interpreter would carry without ever using it."""

    def __init__(self, numbers: dict[str, object]) -> None:
        self.numbers = numbers

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        """Drop imports that have had their effect when the bytecode exists."""
        if node.module == "__future__":
            return None
        if node.module == "apptainer_py.model":
            node.names = [alias for alias in node.names if alias.name != "protocol"]
        return node if node.names else None

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        """Drop a module whose numbers are put for their names."""
        node.names = [alias for alias in node.names if alias.name != "errno"]
        return node if node.names else None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Put a number for its name; whatever else of the protocol is wanted is imported then."""
        if not (isinstance(node.value, ast.Name) and node.value.id in ("protocol", "errno")):
            self.generic_visit(node)
            return node
        table = self.numbers if node.value.id == "protocol" else vars(errno)
        value = table[node.attr]
        if isinstance(value, int):
            return ast.copy_location(ast.Constant(value), node)
        if node.attr == "CAPABILITIES":
            return ast.copy_location(ast.parse(repr(value), mode="eval").body, node)
        late = ast.parse(f"__import__({_PROTOCOL!r}, fromlist=['*']).{node.attr}", mode="eval").body
        return ast.copy_location(late, node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Import the protocol where it is wanted whole."""
        if node.id != "protocol" or not isinstance(node.ctx, ast.Load):
            return node
        whole = ast.parse(f"__import__({_PROTOCOL!r}, fromlist=['*'])", mode="eval").body
        return ast.copy_location(whole, node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Keep only the branch that runs."""
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or ast.copy_location(ast.Pass(), node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Drop the annotations of a function; those of a class make Records what they are."""
        self.generic_visit(node)
        node.returns = None
        words = node.args
        for argument in (*words.posonlyargs, *words.args, *words.kwonlyargs):
            argument.annotation = None
        for rest in (words.vararg, words.kwarg):
            if rest:
                rest.annotation = None
        return node


class _LateClasses(ast.NodeTransformer):
    """Has a class made when it is first named: most are errors that no good launch raises.

    `class C` becomes a function `_late_C` that makes C once, and each C in an expression a call.
    """

    def __init__(self, name: str, classes: dict[str, set[str]]) -> None:
        self.classes = classes
        self.late = set(classes[name])

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """Transform the module, then give its classes to those who ask it by name."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom):
                self._rename(inner)
        own = [part.name for part in node.body if isinstance(part, ast.ClassDef)]
        node.body = [
            self._function(part) if isinstance(part, ast.ClassDef) else self.visit(part)
            for part in node.body
        ]
        if own:
            node.body += ast.parse(
                "def __getattr__(name):\n"
                "    late = globals().get('_late_' + name)\n"
                "    if late is None:\n"
                "        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')\n"
                "    return late()\n"
            ).body
        return node

    def _rename(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name in self.classes.get(node.module or "", ()):
                self.late.add(alias.name)
                alias.name = f"_late_{alias.name}"

    def _function(self, node: ast.ClassDef) -> ast.AST:
        name = node.name
        made = ast.parse(
            f"def _late_{name}():\n"
            f"    global {name}\n"
            f"    if {name!r} in globals():\n"
            f"        return {name}\n"
            f"    return {name}\n"
        ).body[0]
        assert isinstance(made, ast.FunctionDef)
        made.body.insert(2, self.generic_visit(node))
        return made

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Leave the annotation alone, which is never evaluated."""
        if node.value:
            node.value = self.visit(node.value)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Put a call for the name of a class."""
        if node.id not in self.late or not isinstance(node.ctx, ast.Load):
            return node
        function = ast.Name(f"_late_{node.id}", ast.Load())
        return ast.copy_location(ast.Call(function, [], []), node)


class Tree:
    """The modules of a source tree, lean and compiled."""

    def __init__(self, tree: Path) -> None:
        self.sources = {
            "encodings": (tree / "starter/stage_encodings.py", True),
            "encodings.utf_8": (Path(utf_8.__file__), False),
            "os": (tree / "starter/stage_os.py", False),
            "struct": (Path(struct.__file__), False),
            "__future__": (Path(__future__.__file__), False),
        }
        for source in sorted((tree / "apptainer_py").rglob("*.py")):
            parts = source.relative_to(tree).with_suffix("").parts
            package = parts[-1] == "__init__"
            self.sources[".".join(parts[:-1] if package else parts)] = (source, package)
        self.numbers = runpy.run_path(str(self.sources[_PROTOCOL][0]))
        self.classes = {
            name: {
                node.name
                for node in ast.parse(source.read_text()).body
                if isinstance(node, ast.ClassDef)
            }
            for name, (source, _) in self.sources.items()
        }

    def parse(self, name: str) -> ast.Module:
        """Return the lean syntax tree of a module."""
        text = self.sources[name][0].read_text()
        tree = _Lean(self.numbers).visit(ast.parse(text))
        return ast.fix_missing_locations(_LateClasses(name, self.classes).visit(tree))

    def code(self, name: str) -> CodeType:
        """Return the code object of a module."""
        flags = annotations.compiler_flag
        tree = self.parse(name)
        code = compile(tree, f"<frozen {name}>", "exec", flags, dont_inherit=True, optimize=2)
        assert isinstance(code, CodeType)
        return code

    def imports(self, name: str) -> list[str]:
        """Return the modules that this one imports when it is run, in order."""
        found = []
        for node in self.parse(name).body:
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append(node.module)
                found += [f"{node.module}.{alias.name}" for alias in node.names]
        return [module for module in found if module in self.sources]

    def bundle(self, wanted: tuple[str, ...], present: list[str]) -> list[str]:
        """Return the modules to run, each after those that it needs, but for those `present`."""
        order: list[str] = []
        begun: set[str] = set()

        def add(name: str) -> None:
            if name in begun:
                return
            begun.add(name)
            above = name.rpartition(".")[0]
            if above:
                add(above)
            for needed in self.imports(name):
                add(needed)
            order.append(name)

        for name in wanted:
            add(name)
        return [name for name in order if name not in present]


def literal(data: bytes) -> str:
    """Return bytes as C string literals, some a line."""
    lines = []
    for start in range(0, len(data), _LINE_BYTES):
        part = data[start : start + _LINE_BYTES]
        lines.append('"' + "".join(f"\\{byte:03o}" for byte in part) + '"')
    return "\n".join(lines)


def marshalled(stage: str, rows: tuple[tuple[str, bool, CodeType], ...]) -> tuple[str, str]:
    """Return a bundle in C: its arrays, and its row in the table of bundles."""
    data = marshal.dumps(rows)
    fields = f".data = {stage}, .size = {len(data)}"
    return f"static const char {stage}[] =\n{literal(data)};", fields


def image(stage: str, rows: tuple[tuple[str, bool, CodeType], ...]) -> tuple[str, str]:
    """Return the same, laid out as CPython has it in memory."""
    made = code_image.Image()
    names = set().union(*(code_image.names_of(code) for _, _, code in rows))
    root = made.add(rows, names)
    gaps = made.gaps()
    lines = [
        f"static const char {stage}_data[] =\n{literal(bytes(made.data))};",
        f"static const uint16_t {stage}_gaps[] = {{{numbers(gaps)}}};",
        f"static const uint32_t {stage}_names[] = {{{numbers(made.names)}}};",
        f"static const struct image_set {stage}_sets[] = {{"
        + numbers([f"{{{slot}, {items}}}" for slot, items in made.sets] or ["{0}"])
        + "};",
        f"static const struct image {stage} = {{.data = {stage}_data, .size = {len(made.data)}, "
        f".root = {root}, .slot_count = {len(gaps)}, .name_count = {len(made.names)}, "
        f".set_count = {len(made.sets)}, .gaps = {stage}_gaps, .names = {stage}_names, "
        f".sets = {stage}_sets}};",
    ]
    return "\n".join(lines), f".image = &{stage}"


def numbers(values: Sequence[object]) -> str:
    """Return what an array holds, some a line."""
    lines = [
        ", ".join(map(str, values[start : start + _LINE_BYTES])) + ","
        for start in range(0, len(values), _LINE_BYTES)
    ]
    return "\n".join(["", *lines, ""])


def generate(tree: Tree) -> str:
    """Return the C text: one array a module and a bundle, and the tables of both."""
    parts = [
        "/* Generated by tools/gen_frozen.py. */",
        "#include <Python.h>",
        '#include "frozen.h"',
    ]
    modules, bundles = [], []
    for number, (name, (_, package)) in enumerate(tree.sources.items()):
        data = marshal.dumps(tree.code(name))
        parts.append(f"static const unsigned char code_{number}[] =\n{literal(data)};")
        modules.append(
            f'    {{.name = "{name}", .code = code_{number}, .size = {len(data)}, '
            f".is_package = {int(package)}}},"
        )
    for stage, wanted in _BUNDLES.items():
        first = _BEHIND.get(stage)
        names = tree.bundle(wanted, tree.bundle(_BUNDLES[first], []) if first else [])
        rows = tuple((name, tree.sources[name][1], tree.code(name)) for name in names)
        text, fields = image(stage, rows) if code_image.possible() else marshalled(stage, rows)
        parts.append(text)
        bundles.append(f"    [BUNDLE_{stage.upper()}] = {{{fields}}},")
    parts += ["const struct _frozen frozen_modules[] = {", *modules, "    {.name = NULL},", "};"]
    parts += ["const struct bundle bundles[] = {", *bundles, "};", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(generate(Tree(Path(sys.argv[1]))))
