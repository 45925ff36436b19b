"""Each command line of the table, by the real Apptainer and by ours."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.engines.apptainer import shellenv
from tests import images
from tests.parity import sample, tally
from tests.parity.place import make_place, shared_names
from tests.parity.rows import ALL, PAYLOAD, ROOT, USERNS, Case
from tests.parity.table import EVERYWHERE, GROUPS, QUICK, RESTRICTIONS, WITHOUT_CONTAINER

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
    ),
]
WORKERS = max(2, os.cpu_count() or 1)
TRIES = 5
Sample = dict[str, object]


class Field:
    """Runs lines on as many processors as there are, each in a place of its own."""

    def __init__(self, folder: Path, ours: str, user: pwd.struct_passwd) -> None:
        self.folder, self.ours, self.user = folder, ours, user
        self.shared = shared_names(folder, user)
        self.pool = ThreadPoolExecutor(WORKERS)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.begun: dict[tuple[int, str], Future[tuple[Sample, Sample]]] = {}

    def begin(self, case: Case, flow: str) -> Future[tuple[Sample, Sample]]:
        """Return what will be the real one's sample and ours."""
        key = (id(case), flow)
        if key not in self.begun:
            self.begun[key] = self.pool.submit(self._both, case, flow)
        return self.begun[key]

    def _place(self) -> dict[str, str]:
        if not hasattr(self.local, "names"):
            # Names of one length, all alike but for the last letter.
            with self.lock:
                home = Path(tempfile.mkdtemp(prefix="place-", dir=self.folder))
                home.chmod(0o755)
                self.local.names = make_place(home, self.shared, self.user)
        names: dict[str, str] = self.local.names
        return names

    def _both(self, case: Case, flow: str) -> tuple[Sample, Sample]:
        names = self._place()
        for _ in range(TRIES):
            real = run(str(images.REAL_APPTAINER), case, flow, names, self.user)
            # Its language's runtime gives up now and then where a filter takes a call from it.
            if real["status"] != -signal.SIGABRT:
                break
        return real, run(self.ours, case, flow, names, self.user)

    def close(self) -> None:
        """Begin no more lines, and remove all places."""
        self.pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def field(
    request: pytest.FixtureRequest,
    product: SimpleNamespace,
    user: pwd.struct_passwd,
    open_fuse: None,
) -> Iterator[Field]:
    folder = Path(tempfile.mkdtemp(prefix="parity-", dir="/var/lib"))
    folder.chmod(0o755)
    made = Field(folder, product.program, user)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_same":
            made.begin(item.callspec.params["case"], item.callspec.params["flow"])
    yield made
    made.close()


def _filled(text: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        text = text.replace("{" + name + "}", path)
    return text


def _identity(flow: str, user: pwd.struct_passwd) -> tuple[dict[str, str], dict[str, object]]:
    if flow == ROOT:
        # Some machines lack a capability, and the real one starts nothing without all of them.
        return {"HOME": "/root", "USER": "root", "APPTAINER_DROP_CAPS": "sys_resource"}, {}
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    ids = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    return {"HOME": user.pw_dir, "USER": user.pw_name}, ids


def _under(script: str) -> list[str]:
    """Return the shell that becomes the program after the script, unless that names it."""
    if not script:
        return []
    return ["/bin/bash", "-c", script if '"$@"' in script else f'{script}; exec "$@"', "under"]


def _ask_userns(words: list[str]) -> None:
    if words[:2] in (["instance", "start"], ["instance", "run"]):
        words.insert(2, "-u")
    elif words[0] not in ("instance", "overlay"):
        words.insert(2 if words[0].startswith("-") else 1, "-u")


def run(
    program: str, case: Case, flow: str, names: dict[str, str], user: pwd.struct_passwd
) -> Sample:
    """Return what can be compared of one run."""
    own = Path(f"{names['place']}/own-{'r' if program == str(images.REAL_APPTAINER) else 'o'}")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    plain, ids = _identity(flow, user)
    if ids:
        os.chown(own, user.pw_uid, user.pw_gid)
    names = {**names, "own": str(own)}
    environ = {**plain, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    environ |= {name: _filled(value, names) for name, value in case.env.items()}
    statuses, stdout, stderr = [], "", ""
    for line in case.line.split("\n"):
        words = [_filled(word, names) for word in shlex.split(line)]
        if flow == USERNS:
            _ask_userns(words)
        done = subprocess.run(  # type: ignore[call-overload]
            [*_under(_filled(case.under, names)), program, *words],
            env=environ,
            cwd=_filled(case.cwd, names),
            input=case.stdin,
            umask=case.umask,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=120,
            **ids,
        )
        statuses.append(done.returncode)
        stdout += done.stdout.replace(str(own), "OWN")
        stderr += done.stderr.replace(str(own), "OWN")
    if "APPTAINER_CONFIGDIR" in environ:
        # Whatever a failed line has left: an instance would go on without its record.
        argv = [program, "instance", "stop", "-a", "-F"]
        subprocess.run(argv, env=environ, capture_output=True, check=False, **ids)  # type: ignore[call-overload]
    shutil.rmtree(own)
    status = statuses[0] if len(statuses) == 1 else tuple(statuses)
    found: Sample = {"status": status, "said": sample.said(stderr)}
    if case.form == "usage":
        return found
    if case.form == "payload":
        return found | sample.payload(stdout)
    if case.form == "env":
        return found | {"stdout": sample.variables(stdout)}
    if case.form == "mounts":
        return found | {"mounts": sample.mounts(stdout.splitlines())}
    if case.form == "instances":
        stdout = sample.instances(stdout)
    return found | {"stdout": stdout.replace("apptainer-py", "apptainer")}


def meant(case: Case, flow: str) -> dict[str, str]:
    """Return which aspects may differ in this flow, with the reasons."""
    return {
        aspect.partition("@")[0]: reason
        for aspect, reason in case.differs.items()
        if aspect.partition("@")[2] in ("", flow)
    }


def _cleaned(real: Sample, ours: Sample, flow: str) -> tuple[Sample, Sample]:
    """Return both without what differs everywhere."""
    real, ours = dict(real), dict(ours)
    if isinstance(ours.get("mounts"), dict):
        rest = sample.unexplained(ours["mounts"], real["mounts"], RESTRICTIONS)  # type: ignore[arg-type]
        ours["mounts"] = {point: pair[0] for point, pair in rest.items()}
        real["mounts"] = {point: pair[1] for point, pair in rest.items()}
    if isinstance(ours.get("process"), dict):
        dropped = [name for where, name, _ in EVERYWHERE if where in ("", flow)]
        for found in (real, ours):
            table = dict(found["process"])  # type: ignore[call-overload]
            found["process"] = {k: v for k, v in table.items() if k not in dropped}
    return real, ours


def _rows() -> Iterator[object]:
    for group, cases in GROUPS.items():
        for number, case in enumerate(cases):
            for flow in case.flows:
                name = f"{group}-{number}-{flow}-{case.line[:60]}"
                marks = [] if (group, flow) in QUICK else [pytest.mark.long]
                yield pytest.param(case, flow, id=name, marks=marks)


@pytest.mark.parametrize(("case", "flow"), list(_rows()))
def test_same(case: Case, flow: str, field: Field) -> None:
    real, ours = field.begin(case, flow).result()
    may = meant(case, flow)
    result = tally.UNEXPLAINED
    try:
        stale = [aspect for aspect in may if ours[aspect] == real[aspect]]
        assert not stale, "these do not differ any more: take them out of the table"
        if real == ours:
            result = tally.EQUAL
            return
        theirs, mine = _cleaned(real, ours, flow)
        left = [aspect for aspect in ours if aspect not in may]
        assert {name: mine[name] for name in left} == {name: theirs[name] for name in left}
        result = tally.INTENDED
    finally:
        tally.count[result] += 1


def test_the_table_is_as_large_as_it_shall_be() -> None:
    """Each flow has its three hundred lines, and each group is run in some."""
    for flow in ALL:
        lines = [
            case
            for cases in GROUPS.values()
            for case in cases
            if flow in case.flows and not case.line.startswith(WITHOUT_CONTAINER)
        ]
        assert len(lines) >= 300, flow
    assert sum(PAYLOAD in case.line for cases in GROUPS.values() for case in cases) >= 40


def test_the_file_for_apps_is_known() -> None:
    tree = images.real_sandbox(images.shared_folder())
    text = (tree / ".singularity.d/env/95-apps.sh").read_text()
    assert "SINGULARITY_APPNAME" in text
    assert shellenv._is_for_apps(text)
