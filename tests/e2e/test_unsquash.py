"""`--unsquash`: a directory for the time of one launch, whoever is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation

DEADLINE_S = 30.0


@pytest.fixture
def place(require_root: None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-unsquash-", dir="/var/tmp"))
    made.chmod(0o1777)
    yield made
    shutil.rmtree(made)


def left(place: Path) -> list[str]:
    return [path.name for above in place.iterdir() for path in above.iterdir()]


def wait_for(condition) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_directory_for_one_launch(
    installed: Installation, sif: Path, place: Path, flow: str
) -> None:
    script = 'echo "$APPTAINER_CONTAINER"; cat /etc/group > /dev/null && exit 7'
    words = ["exec", "--unsquash", sif, "sh", "-c", script]
    done = run(installed.program, flow, words, env={"APPTAINER_TMPDIR": str(place)})
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(f"{place}/apptainer-py-unsquash-")
    lines = [line for line in done.stderr.splitlines() if "user namespace" not in line]
    assert lines == [
        "INFO:    Converting SIF file to temporary sandbox...",
        "INFO:    Cleaning up image...",
    ]
    assert left(place) == []


def test_the_variable_asks_for_it_too(installed: Installation, sif: Path, place: Path) -> None:
    env = {"APPTAINER_TMPDIR": str(place), "APPTAINER_UNSQUASH": "1"}
    done = run(installed.program, "setuid", ["run", sif], env=env)
    assert "Cleaning up image" in done.stderr
    done = run(installed.program, "setuid", ["exec", "--unsquash=false", sif, "true"], env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_can_be_written(installed: Installation, sif: Path, place: Path) -> None:
    words = ["exec", "-w", "--unsquash", sif, "sh", "-c", "echo x > /new && cat /new"]
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr


def test_a_directory_stays_as_it_is(installed: Installation, place: Path) -> None:
    tree = images.small_tree(images.shared_folder())
    words = ["exec", "--unsquash", tree, "sh", "-c", 'echo "$APPTAINER_CONTAINER"']
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert (done.returncode, done.stdout, left(place)) == (0, f"{tree}\n", []), done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_is_killed(
    installed: Installation, sif: Path, place: Path, number: signal.Signals
) -> None:
    """The front dies, and the container has its root until it ends too."""
    user = images.ordinary_user()
    reading, writing = os.pipe()
    front = subprocess.Popen(
        [installed.program, "-s", "exec", "--unsquash", sif, "sh", "-c",
         "echo begun; read line; ls /etc/group; echo over"],
        env={"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "APPTAINER_TMPDIR": str(place)},
        cwd="/", stdin=reading, stdout=subprocess.PIPE, text=True,
        user=user.pw_uid, group=user.pw_gid, extra_groups=[],
    )  # fmt: skip
    os.close(reading)
    assert front.stdout is not None
    assert front.stdout.readline() == "begun\n"
    assert len(left(place)) == 1
    front.send_signal(number)
    front.wait(DEADLINE_S)
    if number == signal.SIGKILL:
        assert len(left(place)) == 1
        os.write(writing, b"\n")
        assert front.stdout.read() == "/etc/group\nover\n"
    os.close(writing)
    wait_for(lambda: left(place) == [])
    front.stdout.close()


def test_what_a_killed_sweeper_left_is_removed(
    installed: Installation, sif: Path, place: Path
) -> None:
    user = images.ordinary_user()
    above = place / f"apptainer-py-unsquash-{user.pw_uid}"
    (above / "rootfs-left/root").mkdir(parents=True)
    for path in (above, above / "rootfs-left", above / "rootfs-left/root"):
        os.chown(path, user.pw_uid, user.pw_gid)
    above.chmod(0o700)
    words = ["exec", "--unsquash", sif, "true"]
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert done.returncode == 0, done.stderr
    wait_for(lambda: left(place) == [])


@pytest.mark.parametrize(("words", "said"), [
    (("exec", "--unsquash", "/none", "true"), "no such file or directory"),
    (("exec", "--unsquash", "--oci", "SIF", "true"), "`--unsquash` is not supported with --oci"),
    (("instance", "start", "--unsquash", "SIF", "x"), "--unsquash"),
])  # fmt: skip
def test_what_is_refused(
    installed: Installation, sif: Path, place: Path, words: tuple[str, ...], said: str
) -> None:
    line = [word.replace("SIF", str(sif)) for word in words]
    done = run(installed.program, "setuid", line, env={"APPTAINER_TMPDIR": str(place)})
    assert done.returncode == 255
    assert said in done.stderr
    assert list(place.iterdir()) == []


def test_a_directory_of_somebody_else_is_not_used(
    installed: Installation, sif: Path, place: Path
) -> None:
    above = place / f"apptainer-py-unsquash-{images.ordinary_user().pw_uid}"
    above.mkdir(mode=0o777)
    words = ["exec", "--unsquash", sif, "true"]
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert done.returncode == 255
    assert "is not a directory of your own" in done.stderr
