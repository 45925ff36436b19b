"""Which programs are tested, for conftest files to import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.oci import bed
from tests.oci.differences import DIFFERENCES

PEERS = Path(os.environ.get("PEERS_ROOT", "/opt/peers")) / "root/usr"
RUNC = (PEERS / "sbin/runc", PEERS / "bin/runc", Path("/usr/sbin/runc"))


def peer_program() -> Path | None:
    """Return runc, of setup-peers or of the system."""
    return next((path for path in RUNC if os.access(path, os.X_OK)), None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with each runtime that OCI_RUNTIMES names: `ours`, or `ours,runc`."""
    if "runtime" in metafunc.fixturenames:
        names = os.environ.get("OCI_RUNTIMES", "ours").split(",")
        metafunc.parametrize("runtime", names, indirect=True, scope="session")


def title_of(item: pytest.Item, name: str) -> str:
    """Return the name of a test without the parameter that is its runtime."""
    call = getattr(item, "callspec", None)
    words = call.id.split("-") if call else []
    if name in words:
        words.remove(name)
    return item.name.split("[")[0] + (f"[{'-'.join(words)}]" if words else "")


def runtime_of(item: pytest.Item) -> str | None:
    """Return the runtime that a test is for."""
    call = getattr(item, "callspec", None)
    return call.params.get("runtime") if call else None


def expect_differences(items: list[pytest.Item]) -> None:
    """Mark what is known to differ as a strict expected failure."""
    for item in items:
        name = runtime_of(item)
        reason = DIFFERENCES.get(name, {}).get(title_of(item, name)) if name else None
        if reason:
            item.add_marker(pytest.mark.xfail(strict=True, reason=f"{name}: {reason}"))


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest, require_root: None) -> bed.Runtime:
    """One of the programs; OCI_OURS names another build of ours than the installed one."""
    if request.param == "runc":
        found = peer_program()
        if found is None:
            pytest.skip("did not run: runc is not installed (see PEERS_SETUP)")
        return bed.Runtime("runc", str(found))
    ours = os.environ.get("OCI_OURS")
    if ours is None:
        ours = f"{request.getfixturevalue('product').bindir}/apptainer-py-oci"
    return bed.Runtime("ours", ours)
