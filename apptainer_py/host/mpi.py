"""What has started us as one of several: the job's name, our rank, the protocol that it speaks.

mpirun(1), srun(1) and their like tell it by variables. A job's name is the same for all its ranks
on this machine, and for no other job that runs at the same time.
"""

from __future__ import annotations

import os

from apptainer_py.base.record import Record
from apptainer_py.model.request import RANK_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_SIZES = (
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "FLUX_JOB_SIZE",
    "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
_LOCAL_SIZES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "JSM_NAMESPACE_LOCAL_SIZE",
)
_JOBS = (
    ("PMIX_NAMESPACE",),
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ("FLUX_JOB_ID",),
    ("PALS_APID",),
    ("OMPI_MCA_ess_base_jobid",),
)
# How a program finds the others.
_PMIX = ("PMIX_NAMESPACE",)
_PMI = ("PMI_FD", "PMI_PORT", "PMI_CONTROL_PORT")
_MOST_ANCESTORS = 16


class Rank(Record):
    """One of several; `size` and `local` (how many on this machine) are 0 where nobody tells.

    `protocol` is PMIx, PMI, nothing where Slurm has been told to speak none, or "?".
    """

    job: str
    rank: int
    size: int
    local: int
    protocol: str


def find(environment: Mapping[str, str], caller: int) -> Rank | None:
    """Return which of several this is; None where it is alone, or the job has no name.

    `caller` is the number of the process that has started this launch.
    """
    size = _number(environment, _SIZES)
    if size == 1:
        return None
    job = _job(environment, caller)
    if not job:
        return None
    return Rank(
        job=job,
        rank=_number(environment, RANK_VARIABLES),
        size=size,
        local=_number(environment, _LOCAL_SIZES),
        protocol=_protocol(environment),
    )


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int:
    for name in names:
        text = environment.get(name, "")
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
    return 0


def _protocol(environment: Mapping[str, str]) -> str:
    if any(name in environment for name in _PMIX):
        return "PMIx"
    if any(name in environment for name in _PMI):
        return "PMI"
    return "" if "SLURM_STEP_ID" in environment else "?"


def _job(environment: Mapping[str, str], caller: int) -> str:
    for names in _JOBS:
        values = [environment.get(name, "") for name in names]
        if all(values):
            return ":".join((names[0], *values))
    # Hydra, which MPICH and its children have, gives its jobs no names.
    name = next((one for one in RANK_VARIABLES if one in environment), "")
    return _launcher(caller, name) if name and name != "SLURM_PROCID" else ""


def _launcher(caller: int, variable: str) -> str:
    """Return what stands for the nearest process above us that is no rank."""
    pid = caller
    try:
        for _ in range(_MOST_ANCESTORS):
            above, started = _stat(pid)
            if not _has_variable(pid, os.fsencode(variable)):
                return f"launcher:{pid}:{started}"
            pid = above
    except (OSError, ValueError):
        pass
    return ""


def parent(caller: int) -> str:
    """Return what stands for the process that has started this launch."""
    try:
        _, started = _stat(caller)
    except (OSError, ValueError):
        started = 0  # hidden, as proc(5) may have it; as long as it lives, its number is enough
    return f"parent:{caller}:{started}"


def _stat(pid: int) -> tuple[int, int]:
    """Return parent and start of a process, the latter in clock ticks since the machine's own."""
    fields = _read(f"/proc/{pid}/stat", 4096).rpartition(b")")[2].split()
    if len(fields) < 20:
        raise ValueError("this is no process")
    return int(fields[1]), int(fields[19])


def _has_variable(pid: int, name: bytes) -> bool:
    try:
        text = _read(f"/proc/{pid}/environ", 1 << 20)
    except PermissionError:
        return False  # somebody else's process is no rank of ours
    return any(entry.startswith(name + b"=") for entry in text.split(b"\0"))


def _read(path: str, most: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while most > 0 and (part := os.read(fd, most)):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)
