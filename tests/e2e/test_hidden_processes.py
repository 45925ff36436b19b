"""Where /proc hides the processes that their user may not trace (hidepid): the starter's are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.test_instances import STARTED, Instances
from tests.own_install import read_until

# Since Linux 5.8 the option is a mount's own.
LEAST = (5, 8)
HIDE = "mount -t proc -o hidepid={how} proc /proc && echo mounted && exec sleep 1000"
SHARE = """
"$1" exec --sharens "$2" sh -c 'readlink /proc/self/ns/mnt; exec sleep 1000' > "$3" &
until [ -s "$3" ]; do sleep 0.01; done
cat "$3"
"$1" exec --sharens "$2" readlink /proc/self/ns/mnt
kill $!
"""


class Hidden(Instances):
    """Runs our program in a mount namespace that has such a /proc."""

    def __init__(self, program: str, flow: str, holder: int) -> None:
        super().__init__(program, flow)
        self.holder = holder

    def run(
        self, *words: str | Path, env: dict[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Return what a command line did."""
        return self.command([self.program, *map(str, words)])

    def command(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """Return what any command line did, as the ordinary user."""
        ids = [f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}"]
        return subprocess.run(
            ["nsenter", "-m", "-t", str(self.holder), "setpriv", *ids, "--clear-groups", *argv],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture(scope="module", params=["1", "2", "4"])
def holder(require_root: None, request: pytest.FixtureRequest) -> Iterator[int]:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < LEAST:
        pytest.skip("this kernel's hidepid= is one for all mounts of /proc")
    script = HIDE.format(how=request.param)
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert read_until(process.stdout.fileno(), b"\n") == b"mounted\n"
        yield process.pid
        process.kill()


@pytest.fixture(scope="module")
def image() -> Path:
    return images.own_sif(images.shared_folder())


def test_an_instance_that_could_not_be_found_is_not_started(product, holder, image) -> None:
    own = Hidden(product.program, "setuid", holder)
    own.forget()
    done = own.start(image, "apy-test-1")
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.startswith("FATAL:   hidepid option set on /proc mount, ")
    assert len(done.stderr.splitlines()) == 2
    assert not list(own.folder.glob("app/*/*/apy-test-1"))
    done = own.run("exec", image, "echo", "ran")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_one_of_the_user_namespace_flow_lives_its_life(product, holder, image) -> None:
    own = Hidden(product.program, "userns", holder)
    own.forget()
    done = own.start(image, "apy-test-1")
    assert (done.returncode, done.stderr) == (0, STARTED)
    assert list(own.listed()) == ["apy-test-1"]
    done = own.run("exec", "-u", "instance://apy-test-1", "echo", "joined")
    assert (done.returncode, done.stdout, done.stderr) == (0, "joined\n", "")
    assert own.start(image, "apy-test-1").stderr == "FATAL:   instance apy-test-1 already exists\n"
    assert own.run("instance", "stop", "apy-test-1").returncode == 0
    assert own.listed() == {}


def test_launches_of_one_parent_share_a_container(product, holder, image, user_tmp) -> None:
    own = Hidden(product.program, "userns", holder)
    words = ["sh", "-c", SHARE, "sh", product.program, str(image), str(user_tmp / "first")]
    done = own.command(words)
    first, second = done.stdout.splitlines()
    assert first == second, done.stderr
