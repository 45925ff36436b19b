"""What variables say of a rank."""

from __future__ import annotations

import os

import pytest

from apptainer_py.host import mpi

SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
}
OPEN_MPI = {
    "PMIX_NAMESPACE": "77", "PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def rank(job: str, number: int, size: int, local: int, protocol: str) -> mpi.Rank:
    return mpi.Rank(job=job, rank=number, size=size, local=local, protocol=protocol)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (OPEN_MPI, rank("PMIX_NAMESPACE:77", 1, 2, 2, "PMIx")),
        ({**SLURM, **OPEN_MPI}, rank("PMIX_NAMESPACE:77", 1, 2, 2, "PMIx")),
        (SLURM, rank("SLURM_JOB_ID:5:0", 3, 4, 0, "")),
        ({**SLURM, "PMI_FD": "9"}, rank("SLURM_JOB_ID:5:0", 3, 4, 0, "PMI")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}, None),
        ({"PMIX_RANK": "x", "PMIX_NAMESPACE": "n"}, rank("PMIX_NAMESPACE:n", 0, 0, 0, "PMIx")),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_ID": "f"}, rank("FLUX_JOB_ID:f", 1, 0, 0, "?")),
    ],
)
def test_who_it_is(environment: dict[str, str], found: mpi.Rank | None) -> None:
    assert mpi.find(environment, os.getpid()) == found


def test_a_job_without_a_name_has_its_launcher_s() -> None:
    """The nearest process, from the one that has started the launch on, that is no rank."""
    hydra = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALNRANKS": "2"}
    found = mpi.find(hydra, os.getpid())
    assert found is not None
    assert found.job.startswith(f"launcher:{os.getpid()}:")
    assert mpi.find(hydra, os.getpid()) == found


def test_a_parent_that_proc_hides_is_a_parent() -> None:
    assert mpi.parent(os.getpid()).startswith(f"parent:{os.getpid()}:")
    assert mpi.parent(1 << 30) == f"parent:{1 << 30}:0"
