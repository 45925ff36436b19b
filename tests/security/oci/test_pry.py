"""T-R02 (CVE-2016-9962): who joins a container is closed to its root until it is the payload."""

from __future__ import annotations

import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from tests.e2e.steps import gate
from tests.own_install import eventually, household
from tests.security.oci.killing import Ground, number_of
from tests.security.oci.rootless import Rootless, attacker, subordinate
from tests.security.oci.weakened import weakened

# Where the process that joins stands still: in the container, and not yet its payload.
PLACES = [("OP_MAPPED", 0), ("OP_TENANT", 1), ("OP_PROCESS", 1), ("OP_GO", 0), ("EXEC_PAYLOAD", 0)]
SHIELD = ("init_spaces.c", "if (kind & CLONE_NEWUSER && prctl(PR_SET_DUMPABLE, 0) < 0)", "if (0)")


@pytest.fixture
def rootless(ground: Ground, user: pwd.struct_passwd) -> Iterator[Rootless]:
    made = Rootless(ground.program, user)
    yield made
    shutil.rmtree(made.place)


def pry(rootless: Rootless, maps: tuple[tuple[int, int, int], ...], place: str) -> str:
    """Return what the container's root can do to a process that joins and waits at a place."""
    bundle = rootless.bundle(*maps).args("sleep", "600")
    rootless.hand_over(bundle, maps[0][1])
    out = rootless.place / "exec.out"
    with household() as home, gate() as stop:
        rootless.run_detached("box", bundle)
        wait = {"APY_TEST_WAIT": f"{place}:{stop.fd}"}
        joins = home.adopt(
            rootless.start("exec", "box", "true", out=out, env=wait, pass_fds=[stop.fd])
        )
        eventually(lambda: stop.reached() or joins.poll() is not None, "it stands there")
        assert stop.reached(), out.read_text()
        done = rootless.call("exec", "box", "/bin/attacker", "pry", "1")
        stop.open()
        assert joins.wait(timeout=60) == 0, out.read_text()
        assert rootless.call("delete", "--force", "box").returncode == 0
        eventually(lambda: not home.alive(), "all have ended")
    assert done.returncode == 0, done
    assert "visited 1\n" in done.stdout, done
    return done.stdout.replace("visited 1\n", "")


def maps_of(kind: str, user: pwd.struct_passwd) -> tuple[tuple[int, int, int], ...]:
    first, count = subordinate(user)
    return {
        "root is the caller": ((0, user.pw_uid, 1),),
        "root is a subordinate id": ((0, first, count),),
        "both": ((0, user.pw_uid, 1), (1, first, count - 1)),
    }[kind]


KINDS = ["root is the caller", "root is a subordinate id", "both"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "end"), PLACES)
def test_r02_nobody_pries_into_who_joins(
    rootless: Rootless, user: pwd.struct_passwd, kind: str, name: str, end: int
) -> None:
    place = f"{number_of(name)}:{protocol.ROLE_INIT}:{end}"
    assert pry(rootless, maps_of(kind, user), place) == ""


@pytest.mark.long
def test_weak_shield(ground: Ground, rootless: Rootless, user: pwd.struct_passwd) -> None:
    """Without it a root who is a subordinate id of the caller's holds the caller's process."""
    place = f"{number_of('OP_MAPPED')}:{protocol.ROLE_INIT}:0"
    with weakened(ground, "starter-init-steps", SHIELD):
        found = pry(rootless, maps_of("root is a subordinate id", user), place)
    assert "ptrace" in found


def test_r02_root_of_the_host_may() -> None:
    """The attacker does find what is open: otherwise the tests above would prove nothing."""
    with subprocess.Popen(["sleep", "600"]) as prey:
        others = [p.name for p in Path("/proc").iterdir() if p.name.isdigit()]
        spared = [pid for pid in others if int(pid) != prey.pid]
        argv = [attacker(), "pry", *spared]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        prey.kill()
    for what in ("exe", "fd", "mem", "ptrace", "pidfd_getfd"):
        assert f"{prey.pid} {what} " in said
