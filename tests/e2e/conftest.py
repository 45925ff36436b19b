"""What tests of a launch share: an installation of their own, an image, the starter with steps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import extfs_images, images, own_install
from tests.e2e import steps
from tests.own_install import Installation


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


@pytest.fixture(scope="session")
def world(installed: Installation, sif: Path) -> Iterator[SimpleNamespace]:
    """The starter that can be told where to die or to wait, and what it is run on."""
    plain, suid = own_install.starter_with_steps()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-steps-", dir="/var/tmp"))
    made.chmod(0o755)
    sandbox = images.small_tree(images.shared_folder())
    engine = made / "engine.py"
    engine.write_text(steps.ENGINE.format(tree=sandbox))
    user = installed.user.pw_uid
    # What is written to it stays; it is no part of what must be as before.
    overlay = Path(tempfile.mkdtemp(prefix="apptainer-py-overlay-", dir="/var/tmp"))
    os.chown(overlay, user, installed.user.pw_gid)
    extfs_images.extfs(made / "extfs.img", owner=user)
    yield SimpleNamespace(
        own=installed, plain=plain, suid=suid, engine=engine, sif=sif, sandbox=sandbox,
        build_id=installed.facts()["BUILD_ID"], place=made,
        overlay=overlay, squashfs=images.bare_squashfs(images.shared_folder()),
    )  # fmt: skip
    installed.restore()
    for folder in (made, overlay):
        shutil.rmtree(folder)
