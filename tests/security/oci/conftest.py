"""What the tests of the oci engine's security share: a bed of ours, the programs with steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import own_install
from tests.oci import bed as beds
from tests.oci.conftest import bed, bundle
from tests.security.oci.killing import Ground

__all__ = ["bed", "bundle"]


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest, require_root: None) -> beds.Runtime:
    """Our program; OCI_OURS names another build than the installed one."""
    ours = os.environ.get("OCI_OURS")
    if ours is None:
        ours = f"{request.getfixturevalue('product').bindir}/apptainer-py-oci"
    return beds.Runtime("ours", ours)


@pytest.fixture(scope="session")
def ground(require_root: None) -> Iterator[Ground]:
    """The program that can be told where to die, and a place that nothing may be left in.

    OCI_STEPS names one that is installed already, beside the programs with steps that it starts.
    """
    given = os.environ.get("OCI_STEPS")
    program = Path(given) if given else own_install.oci_with_steps()
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-kill-", dir="/var/tmp"))
    place.chmod(0o755)
    device = f"apk{os.getpid() % 100000}"
    made = Ground(program, place, device)
    made.restore_device()
    yield made
    subprocess.run(["ip", "link", "del", f"{device}p"], check=False, capture_output=True)
    shutil.rmtree(place)
