"""Containers made by the classes of runtime/library.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.runtime.library import Container
from apptainer_py.runtime.process import Process, ProcessSettings
from tests.oci import bed as beds
from tests.oci.apptainer.conftest import Desk, desk

__all__ = ["bundle", "desk", "facts", "home"]


class Home:
    """Makes containers of one bundle, which the bed of the test removes."""

    def __init__(self, made: Desk, bundle: beds.Bundle) -> None:
        self.desk = made
        self.bundle = bundle

    def container(self, name: str = "") -> Container:
        self.bundle.write()
        name = name or self.desk.name()
        root, program = str(self.desk.root), self.desk.runtime.program
        return Container(root, name, str(self.bundle.path), program)

    def sleeping(self) -> Container:
        """Return a running container."""
        made = self.container()
        quiet = os.open("/dev/null", os.O_RDWR)
        settings = ProcessSettings(
            args=("sleep", "600"), init=True, stdin=quiet, stdout=quiet, stderr=quiet
        )
        made.run(Process(settings))
        os.close(quiet)
        return made


@pytest.fixture
def bundle(desk: Desk) -> beds.Bundle:
    return desk.bundle()


@pytest.fixture
def home(desk: Desk, bundle: beds.Bundle) -> Home:
    return Home(desk, bundle)


@pytest.fixture(params=["init", "tenant"])
def facts(request: pytest.FixtureRequest, home: Home) -> Callable[..., dict[str, Any]]:
    """Returns what the probe finds as a process of these settings: the first, or one more."""

    def find(**fields: Any) -> dict[str, Any]:
        container = home.container() if request.param == "init" else home.sleeping()
        output = Path(home.desk.place / "output")
        with output.open("w+") as stream:
            settings = {"args": (beds.PROBE,), "stdout": stream.fileno(), **fields}
            process = Process(ProcessSettings(**settings, init=request.param == "init"))
            container.run(process)
            assert process.wait() == 0, process.messages
        return dict(json.loads(output.read_text()))

    return find
