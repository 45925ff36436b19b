"""Ranks of one job, and launches with --sharens: one container for all, whoever of them dies."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests import images
from tests.own_install import eventually, fuse_connections

HELLO = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int rank, size, sum = 0;
    char space[64] = "", *bytes = calloc(1 << 20, 1);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0 && size > 1)
        MPI_Send(bytes, 1 << 20, MPI_CHAR, 1, 0, MPI_COMM_WORLD);
    if (rank == 1)
        MPI_Recv(bytes, 1 << 20, MPI_CHAR, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (readlink("/proc/self/ns/user", space, sizeof(space) - 1) < 0)
        return 1;
    printf("rank %d of %d sum %d %s\n", rank, size, sum, space);
    return MPI_Finalize();
}
"""
# What another rank has in its memory, as one that copies without a detour through a file reads it.
READER = r"""
import ctypes, os, sys
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
word = ctypes.create_string_buffer(8)
here, there = Part(ctypes.addressof(word), 6), Part(int(sys.argv[2]), 6)
libc = ctypes.CDLL(None, use_errno=True)
got = libc.process_vm_readv(int(sys.argv[1]), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(word.value.decode() if got == 6 else os.strerror(ctypes.get_errno()))
try:
    os.stat(f"/proc/{sys.argv[1]}/fd/0")
except OSError as error:
    print(error.strerror)
"""
OWNER = r"""
import ctypes, os, sys
word = ctypes.create_string_buffer(b"secret")
print(os.getpid(), ctypes.addressof(word), flush=True)
sys.stdin.read()
"""
WAITER = 'readlink /proc/self/ns/mnt; read line; ls /etc/test-release && exit "${line:-9}"'
UNDERSTANDS = re.compile(r"WARNING: The image's (\S.*) is told its rank by (\S+), which")


class Jobs:
    """Starts launches that think that they are ranks, with this process for their parent."""

    def __init__(self, program: str, image: Path) -> None:
        self.program = program
        self.image = image
        self.user = images.ordinary_user()
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        plain = {"PATH": "/usr/bin:/bin", "HOME": self.user.pw_dir, "LANG": "C.UTF-8"}
        return {**plain, **(more or {})}

    def identity(self) -> dict[str, object]:
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}

    def start(
        self, words: Sequence[str | Path], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `exec` with these options, image and command."""
        process = subprocess.Popen(  # type: ignore[call-overload]
            [self.program, "exec", *map(str, words)], env=self.environment(env), cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, **self.identity(),
        )  # fmt: skip
        self.started.append(process)
        return process

    def waiter(
        self, *options: str | Path, env: Mapping[str, str] | None = None
    ) -> tuple[subprocess.Popen[str], str]:
        """Start one that waits for a line; return it, and the namespace of its mounts."""
        process = self.start([*options, self.image, "sh", "-c", WAITER], env)
        assert process.stdout is not None
        space = process.stdout.readline().strip()
        if not space:
            pytest.fail(process.communicate()[1])
        return process, space

    def end(self, process: subprocess.Popen[str], line: str = "0\n") -> tuple[int, str]:
        """Let one go on; return its status, and what it has written since."""
        out, err = process.communicate(line, timeout=60)
        return process.returncode, out + err

    def kill_all(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def sif(require_root: None) -> Path:
    if not os.stat("/dev/fuse").st_mode & 0o002:
        pytest.skip("/dev/fuse is closed to ordinary users")
    return images.own_sif(images.shared_folder())


@pytest.fixture
def jobs(product, sif: Path) -> Iterator[Jobs]:
    before = fuse_connections()
    made = Jobs(product.program, sif)
    yield made
    made.kill_all()
    eventually(lambda: fuse_connections() <= before, "the image's server ends with its last user")


def rank(number: int, job: str = "77", size: int = 3) -> dict[str, str]:
    """Return what Slurm says to a rank that speaks PMI."""
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(number), "PMI_FD": "9",
        "PMI_RANK": str(number), "PMI_SIZE": str(size),
    }  # fmt: skip


def test_ranks_of_one_job_live_in_one_container(jobs: Jobs) -> None:
    spaces = [jobs.waiter("-u", env=rank(number))[1] for number in range(3)]
    assert len(set(spaces)) == 1
    assert all(jobs.end(one) == (0, "/etc/test-release\n") for one in jobs.started)


def test_each_has_its_own_command_environment_and_status(jobs: Jobs) -> None:
    _, space = jobs.waiter("-u", env=rank(0))
    text = 'readlink /proc/self/ns/mnt; echo "$PMI_RANK $FOO $0 $*" "$(umask)"; exit 7'
    one = jobs.start(["-u", "--env", "FOO=x y", jobs.image, "sh", "-c", text, "a", "b"], rank(1))
    assert jobs.end(one) == (7, f"{space}\n1 x y a b 0022\n")


def is_another(jobs: Jobs, space: str) -> bool:
    """Start one more; a number that has become free is given again, until somebody else has it."""
    with contextlib.ExitStack() as held:
        for _ in range(8):
            one, found = jobs.waiter("-u", env=rank(0))
            if found != space:
                return True
            jobs.end(one)
            argv = ["unshare", "-m", "sh", "-c", "echo held; exec sleep 60"]
            other = held.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE))
            held.callback(other.kill)
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
    return False


def test_whoever_is_killed_the_others_go_on_and_more_may_come(jobs: Jobs) -> None:
    first, space = jobs.waiter("-u", env=rank(0))
    second, _ = jobs.waiter("-u", env=rank(1))
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    third, found = jobs.waiter("-u", env=rank(2))
    assert found == space
    assert jobs.end(second) == (0, "/etc/test-release\n")
    fourth, found = jobs.waiter("-u", env=rank(0))
    assert found == space
    assert jobs.end(third) == jobs.end(fourth) == (0, "/etc/test-release\n")
    assert is_another(jobs, space), "the container has gone with its last"


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["-u"], rank(1, job="78")),
        (["-u", "-B", "/var/tmp:/mnt"], rank(1)),
        (["-u", "--pid"], rank(1)),
        (["-u"], {}),
        ([], rank(1)),
    ],
    ids=["another job", "another bind", "a namespace of its own", "no job", "setuid"],
)
def test_others_do_not(jobs: Jobs, options: list[str], env: dict[str, str]) -> None:
    _, space = jobs.waiter("-u", env=rank(0))
    assert jobs.waiter(*options, env=env)[1] != space


def test_sharens_shares_with_the_same_parent_alone(jobs: Jobs) -> None:
    _, space = jobs.waiter("--sharens")
    assert jobs.waiter("--sharens")[1] == space
    line = [jobs.program, "exec", "--sharens", jobs.image, "readlink", "/proc/self/ns/mnt"]
    text = " ".join(map(str, line)) + "; :"
    done = subprocess.run(  # type: ignore[call-overload]
        ["/bin/sh", "-c", text], env=jobs.environment(), cwd="/", capture_output=True, text=True,
        check=False, **jobs.identity(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() not in ("", space)


@pytest.mark.parametrize(
    ("option", "what"),
    [("--pid", "a namespace of its own"), ("--fakeroot", "--fakeroot")],
)
def test_sharens_and_what_cannot_be_shared(jobs: Jobs, option: str, what: str) -> None:
    one = jobs.start(["--sharens", option, jobs.image, "true"])
    status, said = jobs.end(one)
    assert status == 255
    assert said.splitlines()[0] == f"FATAL:   --sharens cannot be used with {what}"


ASKS = r"""
import socket, sys
one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
one.settimeout(20)
one.connect("\0" + sys.argv[1])
print(one.recvmsg(16, 64)[0])
"""
OFFERS = r"""
import array, socket, sys
one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
one.bind("\0" + sys.argv[1])
one.listen()
print("listens", flush=True)
mounts = open("/proc/self/ns/mnt")
while True:
    socket.send_fds(one.accept()[0], [b"share"], [mounts.fileno(), one.fileno()])
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [((), "b'share'\n"), (("unshare", "--user", "--pid", "--fork", "--kill-child"), "b''\n")],
)
def test_a_payload_in_a_pid_namespace_gets_nothing(
    jobs: Jobs, before: tuple[str, ...], said: str
) -> None:
    jobs.waiter("--sharens")
    (name,) = _names(jobs)
    done = subprocess.run(  # type: ignore[call-overload]
        [*before, "/usr/bin/python3", "-I", "-c", ASKS, name], env=jobs.environment(), cwd="/",
        capture_output=True, text=True, check=False, timeout=60, **jobs.identity(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_what_a_payload_in_a_pid_namespace_offers_is_not_taken(jobs: Jobs) -> None:
    jobs.waiter("--sharens")
    (name,) = _names(jobs)
    jobs.kill_all()
    eventually(lambda: not _names(jobs), "the name is free")
    forger = subprocess.Popen(  # type: ignore[call-overload]
        ["unshare", "--user", "--pid", "--mount", "--fork", "--kill-child", "/usr/bin/python3",
         "-I", "-c", OFFERS, name],
        env=jobs.environment(), cwd="/", stdout=subprocess.PIPE, text=True, **jobs.identity(),
    )  # fmt: skip
    try:
        assert forger.stdout is not None and forger.stdout.readline() == "listens\n"
        _, space = jobs.waiter("--sharens")
        assert jobs.waiter("--sharens")[1] == space
    finally:
        forger.kill()
        forger.communicate()


def _names(jobs: Jobs) -> set[str]:
    start = re.escape(f"@apptainer-py/{jobs.user.pw_uid}/")
    found = re.findall(rf"{start}\w+/0", Path("/proc/net/unix").read_text())
    return {name[1:] for name in found}


@pytest.mark.parametrize("listens", [True, False])
def test_a_name_that_another_user_holds_is_passed_over(jobs: Jobs, listens: bool) -> None:
    """Root takes the names that ranks would take; theirs is the next."""
    import socket

    _, space = jobs.waiter("-u", env=rank(0))
    names = _names(jobs)
    jobs.kill_all()
    taken = []
    for name in names:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        eventually(lambda one=one, name=name: _bound(one, "\0" + name), "the name is free")
        if listens:
            one.listen()
        taken.append(one)
    assert taken
    _, space = jobs.waiter("-u", env=rank(0))
    assert jobs.waiter("-u", env=rank(1))[1] == space
    for one in taken:
        one.close()


def _bound(one: object, name: str) -> bool:
    try:
        one.bind(name)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


# ---- with a real MPI ----


@pytest.fixture(scope="module")
def folder(require_root: None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-mpi-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    """A root directory in which the host's libraries are where they are on the host."""
    made = folder / "root"
    shutil.copytree(images.small_tree(images.shared_folder()), made, symlinks=True)
    shutil.rmtree(made / "usr")
    (made / "usr").mkdir()
    for name in ("lib", "lib64"):
        (made / name).symlink_to(f"usr/{name}")
    return made


def compiled(folder: Path, kind: str) -> Path:
    """Return the program, linked with that MPI."""
    compiler, made = shutil.which(f"mpicc.{kind}"), folder / f"hello.{kind}"
    if compiler is None or shutil.which(f"mpirun.{kind}") is None:
        pytest.skip(f"{kind} is not installed")
    if not made.exists():
        source = folder / "hello.c"
        source.write_text(HELLO)
        subprocess.run([compiler, "-o", made, source], check=True)
    return made


def launched(
    jobs: Jobs, root: Path, kind: str, program: Path, options: Sequence[str], ranks: int = 2
) -> tuple[list[str], str]:
    """Return the sorted lines that the ranks print, and what is said beside."""
    binds = f"/usr,/etc/openmpi,/etc/alternatives,{program.parent}:/opt"
    env = {"APPTAINER_BIND": binds, "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    line = [
        f"mpirun.{kind}",
        "-n",
        str(ranks),
        jobs.program,
        "exec",
        *options,
        root,
        f"/opt/{program.name}",
    ]
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        os.chown(scratch, jobs.user.pw_uid, jobs.user.pw_gid)
        done = subprocess.run(  # type: ignore[call-overload]
            [str(word) for word in line], env=jobs.environment({**env, "TMPDIR": scratch}),
            cwd=jobs.user.pw_dir, capture_output=True, text=True, check=False, timeout=120,
            **jobs.identity(),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines()), done.stderr


@pytest.fixture(scope="module")
def mpi(product) -> Jobs:
    return Jobs(product.program, Path())


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
@pytest.mark.parametrize("options", [[], ["-u"], ["-u", "--sharens"], ["-u", "--contain"]])
def test_mpi_programs_find_each_other(
    mpi: Jobs, root: Path, folder: Path, kind: str, options: list[str]
) -> None:
    lines, said = launched(mpi, root, kind, compiled(folder, kind), options)
    spaces = {line.rpartition(" ")[2] for line in lines}
    assert [line.rpartition(" ")[0] for line in lines] == ["rank 0 of 2 sum 1", "rank 1 of 2 sum 1"]
    assert len(spaces) == 1
    assert "CMA" not in said, "one rank copies from the other's memory"


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(
    ("launcher", "kind", "told"),
    [("openmpi", "mpich", ("MPICH", "PMIx")), ("mpich", "openmpi", ("Open MPI", "PMI"))],
)
def test_a_launcher_that_is_not_understood(
    mpi: Jobs,
    root: Path,
    folder: Path,
    launcher: str,
    kind: str,
    told: tuple[str, str],
    options: list[str],
) -> None:
    program = compiled(folder, kind)
    compiled(folder, launcher)
    lines, said = launched(mpi, root, launcher, program, options)
    assert [line.rpartition(" ")[0] for line in lines] == ["rank 0 of 1 sum 0"] * 2
    # Once a container: such ranks do not wait for each other, and the second may come too late.
    spaces = {line.rpartition(" ")[2] for line in lines}
    assert UNDERSTANDS.findall(said) == [told] * (len(spaces) if options else 1)


def test_memory_and_descriptors_of_another_rank(mpi: Jobs, root: Path) -> None:
    options = ["-u", "-B", "/usr", root, "/usr/bin/python3", "-c"]
    owner = mpi.start([*options, OWNER], rank(0))
    assert owner.stdout is not None
    where = owner.stdout.readline().split()
    inside = mpi.end(mpi.start([*options, READER, *where], rank(1)))
    outside = mpi.end(mpi.start([*options, READER, *where], rank(1, job="other")))
    mpi.end(owner)
    assert inside == (0, "secret\n")
    assert outside == (0, "Operation not permitted\nPermission denied\n")
