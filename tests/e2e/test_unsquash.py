"""`--unsquash`: a directory for the time of one launch, whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, images
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Completed, Installation

DEADLINE_S = 30.0
NAME = "apy-unsq"


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


def test_what_it_cannot_do_is_told(installed: Installation, sif: Path, place: Path) -> None:
    """A SIF file's overlay is not in the directory, and an ext3 image is started as it is."""
    image, disk = place / "with_overlay.sif", place / "root.ext3"
    shutil.copy(sif, image)
    extfs_images.extfs(disk, images.small_tree(images.shared_folder()))
    env = {"APPTAINER_TMPDIR": str(place)}
    run(installed.program, "root", ["overlay", "create", "--sparse", image])
    for name, said in (
        (image, f"WARNING: --unsquash leaves out the overlay partition of {image}\n"),
        (disk, f"WARNING: --unsquash does nothing for {disk}, which is an ext3 image\n"),
    ):
        name.chmod(0o755)
        done = run(installed.program, "setuid", ["exec", "--unsquash", name, "true"], env=env)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        name.unlink()


def test_options_end_before_the_image(installed: Installation, sif: Path, place: Path) -> None:
    words = ["exec", "--unsquash", "--", sif, "echo", "--unsquash"]
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert (done.returncode, done.stdout, left(place)) == (0, "--unsquash\n", []), done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_is_killed(
    installed: Installation, sif: Path, place: Path, number: signal.Signals
) -> None:
    """The front dies, the container with it, and then the root of that."""
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
    assert front.stdout.read() == ""
    wait_for(lambda: left(place) == [])
    os.close(writing)
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


def stop(program: Path | str, flow: str, name: str, *options: str) -> Completed:
    return run(
        program, "setuid" if flow == "userns" else flow, ["instance", "stop", *options, name]
    )


def start(installed: Installation, flow: str, image: Path, place: Path, *more: str) -> Completed:
    words = ["instance", "start", *(["-u"] if flow == "userns" else []), "--unsquash", image, NAME]
    env = {"APPTAINER_TMPDIR": str(place)}
    return run(installed.program, "root" if flow == "root" else "setuid", [*words, *more], env=env)


@pytest.mark.parametrize("flow", FLOWS)
def test_an_instances_directory_lives_as_long_as_it(
    installed: Installation, sif: Path, place: Path, flow: str
) -> None:
    env = {"APPTAINER_TMPDIR": str(place)}
    started = start(installed, flow, sif, place, "x")
    try:
        assert started.returncode == 0, started.stderr
        assert started.stderr.endswith("INFO:    instance started successfully\n")
        own = "root" if flow == "root" else "setuid"
        words = ["exec", f"instance://{NAME}", "sh", "-c", "cat /etc/test-release"]
        inside = run(installed.program, flow, words)
        assert (inside.returncode, len(left(place))) == (0, 1), inside.stderr
        # Another launch removes what nobody uses, and this is used.
        other = run(installed.program, own, ["exec", "--unsquash", sif, "true"], env=env)
        assert other.returncode == 0, other.stderr
        assert len(left(place)) == 1
    finally:
        stop(installed.program, flow, NAME)
    wait_for(lambda: left(place) == [])


def test_a_start_that_fails_leaves_nothing(installed: Installation, sif: Path, place: Path) -> None:
    words = ["instance", "start", "--unsquash", "--hostname", "a_b", sif, NAME]
    done = run(installed.program, "setuid", words, env={"APPTAINER_TMPDIR": str(place)})
    assert (done.returncode, "not a valid hostname" in done.stderr) == (255, True), done.stderr
    assert left(place) == []


def of_sweeper(place: Path) -> int:
    """Return the process that holds the one directory."""
    wanted = str(next(path for above in place.iterdir() for path in above.iterdir()))
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == wanted:
                return int(fd.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody holds {wanted}")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("who", ["keeper", "sweeper"])
def test_an_instances_directory_goes_whoever_is_killed(
    installed: Installation, sif: Path, place: Path, who: str
) -> None:
    env = {"APPTAINER_TMPDIR": str(place)}
    assert start(installed, "setuid", sif, place).returncode == 0
    try:
        listed = run(installed.program, "setuid", ["instance", "list", "--json"]).stdout
        pid = next(one["pid"] for one in json.loads(listed)["instances"] if one["instance"] == NAME)
        if who == "keeper":
            os.kill(parent_of(pid), signal.SIGKILL)
        else:
            sweeper = of_sweeper(place)
            os.kill(sweeper, signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{sweeper}").exists())
            # Nobody holds it, but it is in use: then it goes with the next.
            words = ["exec", "--unsquash", sif, "true"]
            assert run(installed.program, "setuid", words, env=env).returncode == 0
            assert len(left(place)) == 1
            stop(installed.program, "setuid", NAME)
            assert run(installed.program, "setuid", words, env=env).returncode == 0
    finally:
        stop(installed.program, "setuid", NAME, "--force")
    wait_for(lambda: left(place) == [])
