"""Each line that proves a row of "what works in which flow", in each flow (tests/flows.toml)."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run

ROWS = tomllib.loads((Path(__file__).parent.parent / "flows.toml").read_text())["row"]
PROBES = [
    pytest.param(row, line, wanted, flow, id=f"{flow}-{line[:50]}")
    for row in ROWS
    for line, wanted in row.get("probes", ())
    for flow in FLOWS
]


@pytest.fixture(scope="module")
def names(installed) -> Iterator[dict[str, str]]:
    folder = images.shared_folder()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-flows-", dir="/var/tmp"))
    made.chmod(0o755)
    sandbox, data = made / "sandbox", made / "data"
    shutil.copytree(images.described_tree(folder), sandbox, symlinks=True)
    data.mkdir()
    (data / "file").write_text("content\n")
    (data / "env").write_text("FROM_FILE='from a file'\n")
    for path in (sandbox, data, *sandbox.rglob("*"), *data.rglob("*")):
        os.chown(path, installed.user.pw_uid, installed.user.pw_gid, follow_symlinks=False)
    yield {
        "sif": str(images.own_sif(folder)),
        "squash": str(images.bare_squashfs(folder)),
        "sandbox": str(sandbox),
        "data": str(data),
    }
    shutil.rmtree(made)


@pytest.mark.parametrize(("row", "line", "wanted", "flow"), PROBES)
def test_a_row_holds(installed, names, row, line, wanted, flow):
    words = [word.format(**names) if "{" in word else word for word in shlex.split(line)]
    done = run(installed.program, flow, words, env={"OUTSIDE": "outside"})
    if row[flow] == "no":
        assert done.returncode == 255
        assert len(done.stderr.splitlines()) == 1
        return
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
