"""Each command line of the table, by the real Apptainer and by ours."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.engines.apptainer import shellenv
from tests import images
from tests.parity import sample
from tests.parity.place import make_place
from tests.parity.table import GROUPS, USERNS, Case

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
    ),
]


@pytest.fixture(scope="module")
def place(user: pwd.struct_passwd, open_fuse: None) -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="parity-", dir="/var/lib"))
    folder.chmod(0o755)
    yield make_place(folder, user)
    shutil.rmtree(folder)


def _filled(text: str, place: dict[str, str]) -> str:
    for name, path in place.items():
        text = text.replace("{" + name + "}", path)
    return text


def run(
    program: str, case: Case, flow: str, place: dict[str, str], user: pwd.struct_passwd
) -> dict[str, object]:
    """Return what can be compared of one run."""
    words = [_filled(word, place) for word in shlex.split(case.line)]
    if flow == USERNS:
        words.insert(2 if words[0].startswith("-") else 1, "-u")
    plain = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": user.pw_dir, "USER": user.pw_name}
    done = subprocess.run(
        [program, *words],
        env={**plain, **{name: _filled(value, place) for name, value in case.env.items()}},
        cwd=_filled(case.cwd, place),
        input=case.stdin,
        umask=case.umask,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    stdout: object = done.stdout.replace("apptainer-py", "apptainer")
    if case.form == "env":
        stdout = sample.variables(done.stdout)
    elif case.form == "mounts":
        stdout = sample.mounts(done.stdout.splitlines())
    return {"status": done.returncode, "stdout": stdout, "said": sample.said(done.stderr)}


def explained(
    case: Case, ours: dict[str, object], real: dict[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return both without what is meant to differ in this case, and in every table of mounts."""
    if case.form == "mounts" and isinstance(ours["stdout"], dict):
        rest = sample.unexplained(ours["stdout"], real["stdout"])  # type: ignore[arg-type]
        ours = {**ours, "stdout": {point: pair[0] for point, pair in rest.items()}}
        real = {**real, "stdout": {point: pair[1] for point, pair in rest.items()}}
    left = [aspect for aspect in ours if aspect not in case.differs]
    return {aspect: ours[aspect] for aspect in left}, {aspect: real[aspect] for aspect in left}


def _rows() -> Iterator[object]:
    for group, cases in GROUPS.items():
        for number, case in enumerate(cases):
            for flow in case.flows:
                yield pytest.param(case, flow, id=f"{group}-{number}-{flow}-{case.line[:60]}")


@pytest.mark.parametrize(("case", "flow"), list(_rows()))
def test_same(
    case: Case,
    flow: str,
    place: dict[str, str],
    product: SimpleNamespace,
    user: pwd.struct_passwd,
) -> None:
    real = run(str(images.REAL_APPTAINER), case, flow, place, user)
    ours = run(product.program, case, flow, place, user)
    stale = [aspect for aspect in case.differs if ours[aspect] == real[aspect]]
    assert not stale, "these do not differ any more: take them out of the table"
    mine, theirs = explained(case, ours, real)
    assert mine == theirs


def test_the_file_for_apps_is_known() -> None:
    tree = images.real_sandbox(images.shared_folder())
    text = (tree / ".singularity.d/env/95-apps.sh").read_text()
    assert "SINGULARITY_APPNAME" in text
    assert shellenv._is_for_apps(text)
