"""Programs of ours without one of their checks: a test that cannot fail proves nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.own_install import REPOSITORY
from tests.security.oci.killing import Ground

FLAGS = ("-D_GNU_SOURCE=", "-std=gnu11", "-O1", "-w", "-static", "-DAPY_TEST_STEPS")
PARTS = {
    "starter-init-steps": ("init*.c", "wire.c", "report.c", "process.c", "hook.c", "steps.c"),
    "apptainer-py-oci-steps": (
        "lean*.c",
        "launcher_request.c",
        "hook.c",
        "record.c",
        "relay.c",
        "steps.c",
    ),
    "starter-steps": ("*.c",),
}
# setup.py: what is not the starter's.
OTHERS = (
    *("launcher", "stagehost", "unpack", "lean", "init", "process", "hook", "record", "relay"),
    "monitor",
)


def _build_facts(ground: Ground) -> str:
    """Return build.h as it is for the programs of the ground."""
    text = (REPOSITORY / "starter/generated/build.h").read_text()
    facts = ground.facts()
    lines = []
    for line in text.splitlines():
        name = line.removeprefix("#define APY_").split(" ")[0]
        value = facts.get(name)
        lines.append(f'#define APY_{name} "{value}"' if isinstance(value, str) else line)
    return "\n".join([*lines, ""])


@contextmanager
def weakened(ground: Ground, name: str, *edits: tuple[str, str, str]) -> Iterator[None]:
    """Have a program of the ground lack what the edits (file, text, instead) take out."""
    tree = ground.place / "weak"
    shutil.copytree(REPOSITORY / "starter", tree, symlinks=True)
    try:
        for file, text, instead in edits:
            source = (tree / file).read_text()
            assert text in source, f"{file} holds no {text!r} any more"
            (tree / file).write_text(source.replace(text, instead))
        (tree / "generated/build.h").write_text(_build_facts(ground))
        _compile(tree, name)
        with _replaced(ground.program.parent / name, tree / name):
            yield
    finally:
        shutil.rmtree(tree)


def _compile(tree: Path, name: str) -> None:
    files = sorted({path for part in PARTS[name] for path in tree.glob(part)})
    if name == "starter-steps":
        files = [path for path in files if not path.stem.startswith(OTHERS)]
    # The starter loads libraries.
    flags = [flag for flag in FLAGS if name != "starter-steps" or flag != "-static"]
    names: Sequence[str] = [path.name for path in files]
    argv = ["gcc", *flags, "-I.", "-Igenerated", *names, "-o", name, "-ldl"]
    subprocess.run(argv, cwd=tree, check=True)


@contextmanager
def _replaced(installed: Path, other: Path) -> Iterator[None]:
    kept = installed.with_suffix(".kept")
    installed.rename(kept)
    try:
        shutil.copy(other, installed)
        yield
    finally:
        kept.replace(installed)
