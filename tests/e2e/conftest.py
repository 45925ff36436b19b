"""What tests of a launch share: an installation of their own, an image, the starter with steps."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images, own_install
from tests.e2e import steps
from tests.own_install import Household, Installation, household


@pytest.fixture(scope="session")
def installed(require_root: None) -> Installation:
    """The checkout under a prefix of its own."""
    return own_install.installation()


@pytest.fixture
def own(installed: Installation) -> Iterator[Installation]:
    """That installation, for tests that change its configuration."""
    installed.restore()
    yield installed
    installed.restore()


@pytest.fixture(scope="session")
def sif(installed: Installation) -> Path:
    """A SIF file that belongs to root and that everybody may read."""
    return images.own_sif(images.shared_folder())


@pytest.fixture
def home(require_root: None) -> Iterator[Household]:
    """The processes that a test starts, orphans included."""
    with household() as found:
        yield found


@pytest.fixture(scope="session")
def world(installed: Installation, sif: Path) -> Iterator[SimpleNamespace]:
    """The starter that can be told where to die or to wait, and what it is run on."""
    plain, suid = own_install.starter_with_steps()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-steps-", dir="/var/tmp"))
    made.chmod(0o755)
    sandbox = images.small_tree(images.shared_folder())
    engine = made / "engine.py"
    engine.write_text(steps.ENGINE.format(tree=sandbox))
    yield SimpleNamespace(
        own=installed, plain=plain, suid=suid, engine=engine, sif=sif, sandbox=sandbox,
        build_id=installed.facts()["BUILD_ID"], place=made,
    )  # fmt: skip
    installed.restore()
    shutil.rmtree(made)
