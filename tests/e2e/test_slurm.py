"""Ranks that srun(1) starts on two nodes, which are this machine twice."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.slurm_nodes import cluster
from tests.e2e.test_ranks import UNDERSTANDS, Jobs, compiled, folder, root

pytestmark = pytest.mark.long

__all__ = ["folder", "root"]


@pytest.fixture(scope="module")
def conf(require_root: None) -> Iterator[Path]:
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def mpi(product) -> Jobs:
    return Jobs(product.program, Path())


def srun(
    mpi: Jobs, conf: Path, options: Sequence[str], words: Sequence[str | Path], binds: str = ""
) -> subprocess.CompletedProcess[str]:
    """Return what a step of two ranks did."""
    more = {"SLURM_CONF": str(conf), "APPTAINER_BIND": binds}
    line = ["srun", "-n2", "--overcommit", *options, mpi.program, "exec", *map(str, words)]
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        line, env=mpi.environment(more), cwd=mpi.user.pw_dir, capture_output=True, text=True,
        check=False, timeout=120, **mpi.identity(),
    )  # fmt: skip


def hello(
    mpi: Jobs, conf: Path, options: Sequence[str], ours: Sequence[str], root: Path, program: Path
) -> tuple[list[str], str]:
    """Return what the ranks print, sorted, and what is said beside."""
    binds = f"/usr,/etc/openmpi,/etc/alternatives,{program.parent}:/opt,{conf.parent}"
    done = srun(mpi, conf, options, [*ours, root, f"/opt/{program.name}"], binds)
    assert done.returncode == 0, done.stderr
    return sorted(line.rpartition(" ")[0] for line in done.stdout.splitlines()), done.stderr


# UCX takes two nodes on one machine for one, and tries the other one's memory: not with -u.
@pytest.mark.parametrize(
    ("how", "kind", "nodes", "ours"),
    [
        ("pmix", "openmpi", "1", []),
        ("pmix", "openmpi", "1", ["-u"]),
        ("pmix", "openmpi", "2", []),
        ("pmix", "openmpi", "2", ["-u"]),
        ("pmi2", "mpich", "1", []),
        ("pmi2", "mpich", "1", ["-u"]),
        ("pmi2", "mpich", "2", []),
    ],
)
def test_ranks_find_each_other(
    mpi: Jobs,
    conf: Path,
    root: Path,
    folder: Path,
    how: str,
    kind: str,
    nodes: str,
    ours: list[str],
) -> None:
    options = [f"--mpi={how}", f"-N{nodes}"]
    lines, said = hello(mpi, conf, options, ours, root, compiled(folder, kind))
    assert lines == ["rank 0 of 2 sum 1", "rank 1 of 2 sum 1"]
    assert not UNDERSTANDS.search(said)


@pytest.mark.parametrize("ours", [[], ["-u"]])
def test_what_mpich_does_not_understand(
    mpi: Jobs, conf: Path, root: Path, folder: Path, ours: list[str]
) -> None:
    program = compiled(folder, "mpich")
    lines, said = hello(mpi, conf, ["--mpi=pmix", "-N1"], ours, root, program)
    assert lines == ["rank 0 of 1 sum 0"] * 2
    # Once a container: such ranks do not wait for each other, and the second may come too late.
    assert 1 <= UNDERSTANDS.findall(said).count(("MPICH", "PMIx")) <= (2 if ours else 1)
    lines, said = hello(mpi, conf, ["--mpi=none", "-N1"], ours, root, program)
    told = said.count("WARNING: The image's MPICH is not told its rank: ")
    assert 1 <= told <= (2 if ours else 1)


@pytest.mark.parametrize("ours", [[], ["-u"]])
def test_status_and_signal_come_back(mpi: Jobs, conf: Path, root: Path, ours: list[str]) -> None:
    done = srun(mpi, conf, ["-N2"], [*ours, root, "sh", "-c", "exit 7"])
    assert done.returncode == 7
    done = srun(mpi, conf, ["-N2"], [*ours, root, "sh", "-c", "kill -TERM $$"])
    assert done.returncode == 128 + 15
