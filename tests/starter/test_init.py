"""starter-init from end to end: a master made of Python, a root of busybox, no other part of us."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.starter import init_master
from tests.starter.init_master import Master, spec


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_master.build(tmp_path_factory.mktemp("init"))


@pytest.fixture(scope="module")
def root(require_root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_master.make_root(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def master(program: Path, root: Path):
    with Master(program) as made:
        yield made


def test_a_program_runs_as_pid_1(master: Master, root: Path) -> None:
    master.create(root)
    status, said = master.run(spec("sh", "-c", "echo $$; pwd; ls /; exit 7"))
    assert (status, said.split()) == (7, "1 / bin dev etc proc sys tmp".split())


def test_nothing_of_ours_is_open_in_the_payload(master: Master, root: Path) -> None:
    master.create(root)
    assert master.run(spec("ls", "/proc/self/fd")) == (0, "0\n1\n2\n3\n")  # 3: ls's own


def test_exe_is_no_file_of_the_host(master: Master, root: Path) -> None:
    master.create(root)
    assert master.run(spec("readlink", "/proc/1/exe")) == (0, "/bin/busybox\n")
