"""Programs of users are type-checked as they are written."""

from __future__ import annotations

import os
import subprocess

import pytest

GOOD = """\
from pathlib import Path

import apptainer_py


def work(folder: Path) -> int:
    image: apptainer_py.Image = apptainer_py.build(folder / "a.sif", "a.def", force=True)
    done = apptainer_py.exec(
        image, ["true"], bind=["/a", Path("/b")], env={"A": "b"}, nv=True, cpu_shares=3, timeout=1.5
    )
    text: str = done.raise_for_status().text
    labels: str = image.labels["a"] + image.inspect().runscript
    with apptainer_py.Instance.start(image, "web", memory="1G") as web:
        count: int = web.usage().pids + web.exec(["true"]).returncode
    with apptainer_py.stream(image, ["cat"]) as running:
        for line in running.lines():
            text += line
    try:
        apptainer_py.pull("docker://a", force=True)
    except apptainer_py.ApptainerError as error:
        text += str(error)
    return count + len(text + labels)
"""
BAD = {
    "misspelt": 'apptainer_py.exec("a", ["b"], bindd="/a")',
    "kind": 'apptainer_py.exec("a", ["b"], nv="yes")',
    "number": 'apptainer_py.exec("a", ["b"], cpu_shares="1")',
    "command": 'apptainer_py.build("a", "b", containall=True)',
    "result": 'apptainer_py.exec("a", ["b"]).returncode.upper()',
    "frozen": 'apptainer_py.exec("a", ["b"]).returncode = 1',
    "absent": "apptainer_py.nothing()",
}


@pytest.fixture(scope="module")
def complaints(tool, repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("callers")
    (folder / "good.py").write_text(GOOD)
    for name, line in BAD.items():
        (folder / f"bad_{name}.py").write_text(f"import apptainer_py\n\n{line}\n")
    argv = [tool("mypy"), "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache")]
    (folder / "mypy.ini").write_text("[mypy]\n")
    argv += ["--config-file", "mypy.ini", "--hide-error-context", "--follow-imports=silent"]
    argv += ["--python-version=3.11", *sorted(str(path) for path in folder.glob("*.py"))]
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [line.rpartition("/")[2] for line in done.stdout.splitlines() if ": error:" in line]


def test_a_typical_program_is_accepted(complaints):
    assert [line for line in complaints if not line.startswith("bad_")] == []


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_seen(name, complaints):
    assert [line for line in complaints if line.startswith(f"bad_{name}.py:3: error:")]
