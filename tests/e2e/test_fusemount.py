"""`--fusemount`: the four kinds, looked at from inside the container, in the three flows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e import steps, three_flows
from tests.own_install import HostState, Household, assert_nothing_left, eventually, household

KINDS = ("host", "host-daemon", "container", "container-daemon")
SERVER = "squashfuse_ll"
pytestmark = pytest.mark.usefixtures("open_fuse")


@pytest.fixture(scope="module")
def place(installed) -> Iterator[Path]:
    """A file system to serve, and a root that has the host's programs bound to it."""
    made = images.shared_folder() / "fusemount"
    (made / "packed").mkdir(parents=True)
    (made / "packed/file").write_text("served\n")
    command = ["mksquashfs", made / "packed", made / "data.sqfs", "-quiet", "-no-progress"]
    subprocess.run([*command, "-all-root"], check=True, stdout=subprocess.DEVNULL)
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "var/tmp"):
        (made / "root" / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (made / "root" / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group"):
        (made / "root/etc" / name).touch()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def run(own, place):
    def launch(flow: str, spec: str, *words: str, script: str = "cat /new/deep/file"):
        line = ["exec", "-B", f"/usr,{place}", "--fusemount", spec.format(place=place), *words]
        return three_flows.run(own.program, flow, [*line, place / "root", "sh", "-c", script])

    return launch


@pytest.mark.parametrize("flow", three_flows.FLOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_serves_what_it_has(run, flow, kind):
    script = "cat /new/deep/file; grep ' /new/deep ' /proc/self/mountinfo; echo $$"
    done = run(flow, f"{kind}:{SERVER} {{place}}/data.sqfs /new/deep", script=script)
    assert done.returncode == 0, done.stderr
    read, mount, number = done.stdout.splitlines()
    assert read == "served"
    assert " fuse " in mount and "nosuid,nodev" in mount
    # A program in the container needs a PID namespace, to end with it.
    assert (int(number) < 100) == kind.startswith("container")


@pytest.mark.parametrize("kind", KINDS)
def test_the_owner_is_root_with_fakeroot(run, place, kind):
    script = "stat -c %u /new/deep/file; cat /new/deep/file"
    done = run("setuid", f"{kind}:{SERVER} {{place}}/data.sqfs /new/deep", "-f", script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("served\n")


def test_what_a_program_is_given(run, place):
    """The device is its third descriptor, and whether it stays in the foreground is its flag."""
    program = place / "tells"
    tells = 'echo "$@" >&2\nreadlink /proc/self/fd/3 >&2\n'
    program.write_text(f'#!/bin/sh\n{tells}exec {SERVER} "$@"\n')
    program.chmod(0o755)
    for kind, flag in (("host", " -f"), ("container", " -f"), ("host-daemon", "")):
        done = run("setuid", f"{kind}:{program} {{place}}/data.sqfs /new/deep")
        assert done.stderr == f"{place}/data.sqfs /dev/fd/3{flag}\n/dev/fuse\n"
        assert done.stdout == "served\n"


def test_several_and_an_instance(run, own, place):
    two = f"host:{SERVER} {{place}}/data.sqfs /a,container:{SERVER} {{place}}/data.sqfs /a/../b"
    assert run("setuid", two, script="cat /a/file /b/file").stdout == "served\nserved\n"


def test_an_instance_has_them(own, sif, place):
    spec = f"host:{SERVER} {place}/data.sqfs /mnt"
    done = own.run("instance", "start", "--fusemount", spec, sif, "fuses")
    assert done.returncode == 0, done.stderr
    try:
        assert own.run("exec", "instance://fuses", "cat", "/mnt/file").stdout == "served\n"
    finally:
        own.run("instance", "stop", "fuses")


REFUSED = {
    "no mount point": (
        "host:x",
        "While setting FUSE mount configuration: while setting fuse mount: no whitespace "
        'separators found in command "host:x"',
    ),
    "no such kind": (
        "bad:x /mnt",
        "While setting FUSE mount configuration: while setting fuse mount: fusemount spec begin "
        "with an unknown prefix bad:x",
    ),
    "relative": (
        "host:x mnt",
        "container creation failed: --fusemount host:x mnt: destination must be an absolute path",
    ),
    "root": ("host:x /", "container creation failed: --fusemount cannot mount over /"),
    "no program": (
        "host:none-such /mnt",
        "container creation failed: while running FUSE drivers: could not start program none-such "
        '/dev/fd/3 -f: exec: "none-such": executable file not found in $PATH',
    ),
    "no program inside": (
        "container:/none/such /mnt",
        "could not start program /none/such /dev/fd/3 -f: fork/exec /none/such: no such file or "
        "directory",
    ),
    "failed": (
        "host-daemon:/bin/false /mnt",
        "container creation failed: while running FUSE drivers: could not start program /bin/false "
        "/dev/fd/3: exit status 1",
    ),
    "failed inside": (
        "container-daemon:/bin/false /mnt",
        "could not start program /bin/false /dev/fd/3: exit status 1",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be(run, name):
    spec, said = REFUSED[name]
    done = run("setuid", spec, script="true")
    assert done.returncode == 255
    assert [x for x in done.stderr.splitlines() if "FATAL" in x] == [f"FATAL:   {said}"]


def test_inside_without_a_pid_namespace(own, run):
    done = run("setuid", f"container:{SERVER} x /mnt", "--no-pid")
    assert done.returncode == 255
    assert "needs a PID namespace" in done.stderr
    own.configure("allow pid ns = no")
    assert "`allow pid ns = no`" in run("setuid", f"container:{SERVER} x /mnt").stderr


@pytest.mark.parametrize("flow", three_flows.FLOWS)
def test_the_administrator_can_forbid_it(own, run, flow):
    own.configure("enable fusemount = no")
    done = run(flow, f"host:{SERVER} {{place}}/data.sqfs /mnt")
    assert done.returncode == 255
    said = "FATAL:   fusemount disabled by configuration 'enable fusemount = no'"
    assert done.stderr.splitlines() == [said]


def test_it_is_closed_to_other_users(run):
    """Root too: whoever looks into /proc must not wait for a server of the user's."""
    script = "grep ' /mnt ' /proc/self/mountinfo"
    done = run("setuid", f"host:{SERVER} {{place}}/data.sqfs /mnt", script=script)
    assert " - fuse" in done.stdout and "nosuid,nodev" in done.stdout, done.stderr
    assert "allow_other" not in done.stdout


def test_who_may_not_open_the_device_gets_none(run):
    """The starter could open it; what the administrator has closed stays closed."""
    device = Path("/dev/fuse")
    before = device.stat().st_mode & 0o7777
    device.chmod(0o600)
    try:
        done = run("setuid", f"host:{SERVER} {{place}}/data.sqfs /mnt")
    finally:
        device.chmod(before)
    assert done.returncode == 255
    assert "--fusemount needs /dev/fuse" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", ["KEEPER", "MASTER", "SERVER"])
def test_whoever_is_killed_nothing_is_left(own, place, kind, victim):
    with household() as home:
        host = HostState(own.session)
        line = ["exec", "-B", f"/usr,{place}", "--fusemount"]
        line += [f"{kind}:{SERVER} {place}/data.sqfs /mnt", place / "root"]
        process = home.adopt(own.start(*line, "sh", "-c", "cat /mnt/file; exec sleep 60"))
        eventually(lambda: steps.has_spoken(process), "the payload runs")
        pid = process.pid if victim == "KEEPER" else _of(home, process.pid, victim)
        os.kill(pid, signal.SIGKILL)
        if victim == "SERVER":
            # The mount is dead, the payload is not: what it makes of that is its own.
            assert process.poll() is None
            process.terminate()
        process.communicate(timeout=20)
        assert_nothing_left(home, host)


def _of(home: Household, keeper: int, victim: str) -> int:
    """The server, or master, which is keeper's first child."""
    if victim == "SERVER":
        return steps.processes(home)["IMAGE_SERVER"]
    return min(pid for pid, (parent, _, _) in home.alive().items() if parent == keeper)


def test_a_program_may_finish_what_it_does(run, place, own):
    """One that writes something back once its mount has ended is waited for."""
    program, mark = place / "slow", place / "mark"
    program.write_text(f'#!/bin/sh\n{SERVER} "$@"\nsleep 0.3\necho written > {mark}\n')
    program.chmod(0o755)
    mark.touch()
    os.chown(mark, own.user.pw_uid, own.user.pw_gid)
    done = run("setuid", f"host:{program} {{place}}/data.sqfs /new/deep")
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert mark.read_text() == "written\n"
