"""The runtimes under test, and a bed for each test in which nothing may be left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.oci.differences import DIFFERENCES

PEERS = Path(os.environ.get("PEERS_ROOT", "/opt/peers")) / "root/usr"
RUNC = (PEERS / "sbin/runc", PEERS / "bin/runc", Path("/usr/sbin/runc"))


def peer_program() -> Path | None:
    """Return runc, of setup-peers or of the system."""
    return next((path for path in RUNC if os.access(path, os.X_OK)), None)


def chosen() -> list[str]:
    """Return the names of the runtimes to test: OCI_RUNTIMES says which, by default both."""
    return os.environ.get("OCI_RUNTIMES", "ours,runc").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runtime" in metafunc.fixturenames:
        metafunc.parametrize("runtime", chosen(), indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        name = call.params.get("runtime") if call else None
        if name is None:
            continue
        words = [word for word in call.id.split("-") if word != name]
        title = item.name.split("[")[0] + (f"[{'-'.join(words)}]" if words else "")
        reason = DIFFERENCES.get(name, {}).get(title)
        if reason:
            item.add_marker(pytest.mark.xfail(strict=True, reason=f"{name}: {reason}"))


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest, require_root: None) -> beds.Runtime:
    """One of the programs; OCI_OURS names another build of ours than the installed one."""
    if request.param == "runc":
        found = peer_program()
        if found is None:
            pytest.skip("did not run: runc is not installed (see PEERS_SETUP)")
        return beds.Runtime("runc", str(found))
    ours = os.environ.get("OCI_OURS")
    if ours is None:
        product = request.getfixturevalue("product")
        ours = f"{product.bindir}/apptainer-py-oci"
    return beds.Runtime("ours", ours)


@pytest.fixture
def bed(runtime: beds.Runtime) -> Iterator[beds.Bed]:
    """A place for one test; it fails if a container, mount or cgroup is left."""
    place = Path(tempfile.mkdtemp(dir=beds.shared_folder()))
    place.chmod(0o755)
    beds.subreaper(on=True)
    made = beds.Bed(runtime, place)
    try:
        yield made
    finally:
        made.clear()
        beds.subreaper(on=False)
        left = beds.mounts_below(place)
        states = os.listdir(made.root) if made.root.is_dir() else []
        shutil.rmtree(place, ignore_errors=True)
    assert not left, f"mounts are left: {left}"
    assert not states, f"containers are left: {states}"
    mine = [name for name in made.ids if name.startswith("apytest-")]
    groups = [found for name in mine for found in beds.cgroups_named(name)]
    assert not groups, f"cgroups are left: {groups}"


@pytest.fixture
def bundle(bed: beds.Bed) -> beds.Bundle:
    return bed.bundle()
