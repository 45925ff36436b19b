"""A bed for each test, in which nothing may be left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.oci.runtimes import expect_differences, pytest_generate_tests, runtime

__all__ = ["bed", "bundle", "pytest_generate_tests", "runtime"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expect_differences(items)


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
