"""Whether the image's MPI understands who starts the ranks; if not, each of them runs alone.

A program that cannot ask its launcher says nothing: it is rank 0 of 1, as many times as there are
ranks. What is looked at is what the program is linked with, or else what the image has.
"""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.image import elf
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.host.mpi import Rank

# linux/openat2.h: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_IN_ROOT = 0x12
_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")
_OPEN_MPI, _MPICH = "Open MPI", "MPICH"
_MARKS = (
    ("libmpich.so", _MPICH),
    ("libopen-rte.so", _OPEN_MPI),
    ("libopen-pal.so", _OPEN_MPI),
    ("libmpi.so.40", _OPEN_MPI),
    ("libmpi.so.20", _OPEN_MPI),
    ("libmpi.so.12", _MPICH),
)
_ADVICE = {
    ("PMIx", _MPICH): "MPICH's own mpiexec, or srun --mpi=pmi2",
    ("PMI", _OPEN_MPI): "Open MPI's own mpirun, or srun --mpi=pmix",
    ("", _OPEN_MPI): "srun --mpi=pmix",
    ("", _MPICH): "srun --mpi=pmi2",
}


class _Image:
    """The container's files, as the program will find them."""

    def __init__(self, root: int) -> None:
        self.root = root

    def open(self, path: str, flags: int = 0) -> int:
        flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return _starter.openat2(self.root, os.fsencode(path), flags, _IN_ROOT)

    def names(self, folder: str) -> list[str]:
        try:
            fd = self.open(folder, os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def needed(self, path: str) -> list[str]:
        """Return what a program or library is linked with."""
        try:
            fd = self.open(path)
        except OSError:
            return []
        try:
            return elf.needed(fd)
        except OSError:
            return []
        finally:
            os.close(fd)


def warn(root: int, rank: Rank, program: str) -> None:
    """Say so, if the image's MPI will not find the other ranks."""
    image = _Image(root)
    linked = _which(image.needed(program)) if program.startswith("/") else ""
    # Without any of the protocols it may be no MPI job at all, unless the program says so itself.
    kind = linked or (_installed(image) if rank.protocol else "")
    advice = _ADVICE.get((rank.protocol, kind))
    if advice is None or _understands(image, rank.protocol, kind):
        return
    told = f"told its rank by {rank.protocol}, which it may not understand"
    log.warning(
        f"The image's {kind} is {told if rank.protocol else 'not told its rank'}: then each of the "
        f"ranks is rank 0 of 1; start it with {advice}"
    )


def _which(names: list[str]) -> str:
    found = {kind for mark, kind in _MARKS if any(name.startswith(mark) for name in names)}
    # Both: nothing can be said.
    return found.pop() if len(found) == 1 else ""


def _folders(image: _Image) -> list[str]:
    machine = f"{os.uname().machine}-linux-gnu"
    return [*_FOLDERS, f"/usr/lib/{machine}"]


def _installed(image: _Image) -> str:
    return _which([name for folder in _folders(image) for name in image.names(folder)])


def _understands(image: _Image, protocol: str, kind: str) -> bool:
    """Return whether it was built for that protocol, which is not the rule."""
    if (protocol, kind) == ("PMIx", _MPICH):
        return any(
            name.startswith("libmpich.so.") and _has(image, f"{folder}/{name}", "libpmix.so")
            for folder in _folders(image)
            for name in image.names(folder)
        )
    return (protocol, kind) == ("PMI", _OPEN_MPI) and any(
        name.startswith(("mca_pmix_s1", "mca_pmix_s2"))
        for folder in _folders(image)
        for name in image.names(f"{folder}/openmpi")
    )


def _has(image: _Image, path: str, start: str) -> bool:
    return any(name.startswith(start) for name in image.needed(path))
