"""An image that fusermount3 mounts on the host, because FUSE is not allowed in a user namespace."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e import subids
from tests.e2e.identities import expected, table, traced
from tests.e2e.steps import finish, gate, launch, number_of
from tests.own_install import (
    HostState,
    assert_nothing_left,
    eventually,
    household,
    read_until,
)

MARK = "/apptainer-py-rootfs-"
pytestmark = pytest.mark.skipif(
    not Path("/usr/bin/fusermount3").exists(), reason="fusermount3 is not installed"
)


@pytest.fixture
def outside(own, user_tmp):
    """An installation that mounts no FUSE file system in user namespaces."""
    own.configure("allow userns-mount fuse = no")
    user_tmp.chmod(0o755)
    os.chown(user_tmp, own.user.pw_uid, own.user.pw_gid)
    return own


def ours(own) -> list[str]:
    """What is mounted on the host by this user's launches."""
    wanted = f"user_id={own.user.pw_uid},"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if MARK in line and wanted in line]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-p"],
        ["--writable-tmpfs"],
        ["--underlay"],
        ["-f", "--ignore-subuid", "--ignore-fakeroot-command"],
        ["-f"],
    ],
    ids=["plain", "pid", "tmpfs", "underlay", "one id", "ranges"],
)
def test_it_runs_and_leaves_nothing(outside, sif, user_tmp, options):
    with household() as home:
        host = HostState(user_tmp)
        done = outside.run(
            "exec", "-u", *options, sif, "cat", "/etc/test-release",
            env={"TMPDIR": str(user_tmp)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "a small tree\n"), done.stderr
        assert_nothing_left(home, host)


def test_the_status_is_the_payloads(outside, sif):
    assert outside.run("exec", "-u", sif, "sh", "-c", "exit 7").returncode == 7


def test_while_the_payload_runs_nothing_is_mounted_on_the_host(outside, sif, user_tmp):
    with household() as home:
        host = HostState(user_tmp)
        environment = outside.environment({"TMPDIR": str(user_tmp)})
        trace = user_tmp / "trace"
        process = home.adopt(
            outside.start(
                "--trace", trace, "exec", "-u", sif, "sh", "-c",
                "echo up; read x; cat /etc/test-release",
                env=environment, stdin=subprocess.PIPE,
            )
        )  # fmt: skip
        read_until(process.stdout.fileno(), b"up\n")
        # The payload runs beside post_start_host, and may be the first to speak.
        eventually(lambda: not ours(outside), "the mount is detached")
        eventually(lambda: not list(user_tmp.glob("apptainer-py-rootfs-*")), "so is its place")
        assert process.poll() is None
        out, err = process.communicate(b"\n", timeout=20)
        assert (process.returncode, out) == (0, b"a small tree\n"), err
        events = [json.loads(line) for line in trace.read_text().splitlines()]
        trace.unlink()
        assert_nothing_left(home, host)
    hooks = [e for e in events if e["event"] == "hook" and e["process"] == "HOST_HELPER"]
    named = [event["name"] for event in hooks if event["name"] != "INIT_CONFIG"]
    assert named == ["PREPARE_HOST", "POST_START_HOST", "CLEANUP_HOST"]
    who = pwd.getpwuid(outside.user.pw_uid)
    for event in hooks:
        assert traced(event) == expected(table("userns")["HOST_HELPER"], who, set())


def test_without_the_directive_nobody_helps(own, sif, user_tmp):
    own.configure()
    trace = user_tmp / "trace"
    user_tmp.chmod(0o777)
    done = own.run("--trace", trace, "exec", "-u", sif, "true")
    assert done.returncode == 0, done.stderr
    assert "HOST_HELPER" not in trace.read_text()


def launched(world, home, stop, place: str):
    """Launch, and return the process once somebody waits at that step."""
    name, _, rest = place.partition(":")
    wait = f"{number_of(name)}:{rest}:{stop.fd}"
    process = home.adopt(launch(world, "host image", wait=wait, inherited=[stop.fd]))
    eventually(lambda: stop.reached() or process.poll() is not None, "a process waits there")
    assert stop.reached(), finish(process)
    return process


def kill_at_once(pids) -> None:
    """Kill them, so that none sees another's end."""
    victims = list(pids)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@pytest.mark.parametrize("place", ["FUSE_DEVICE:-1:1", "ROOT_DIRECTORY:-1:1", "PIVOT:-1:0"])
def test_the_last_helper_cleans_up_behind_everybody(world, place):
    """All but one are killed at once, while the image is mounted on the host."""
    with household() as home, gate() as stop:
        host = HostState(world.own.session)
        process = launched(world, home, stop, place)
        assert len(ours(world.own)) == 1
        folder = Path(ours(world.own)[0].split()[4]).parent
        # The pair are keeper's youngest children before the server: the second of them stays.
        last = helper_of(process.pid)
        others = [pid for pid in home.alive() if pid != last]
        kill_at_once(others)
        assert_nothing_left(home, host)
        assert not ours(world.own)
        assert not folder.exists()
        finish(process)


def test_what_nobody_lived_to_undo_goes_with_the_next_launch(world, sif):
    """All are killed at once; beside it is the place of a launch that runs."""
    with household() as home, gate() as stop:
        host = HostState(world.own.session)
        process = launched(world, home, stop, "ROOT_DIRECTORY:-1:1")
        folder = Path(ours(world.own)[0].split()[4]).parent
        kill_at_once(home.alive())
        finish(process)
        eventually(lambda: not home.alive(), "all have ended")
        assert folder.exists()
        assert len(ours(world.own)) == 1
        used = folder.with_name(MARK[1:] + "used")
        used.mkdir()
        os.chown(used, world.own.user.pw_uid, world.own.user.pw_gid)
        lock = os.open(used, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (folder, used):
            os.utime(path, (0, 0))  # no launch begins with these just now
        done = world.own.run("exec", "-u", sif, "true", env={"TMPDIR": str(folder.parent)})
        assert done.returncode == 0, done.stderr
        assert not folder.exists()
        assert not ours(world.own)
        used.rmdir()
        os.close(lock)
        assert_nothing_left(home, host)


def helper_of(keeper: int) -> int:
    """The process of cleanup_host: of keeper's children in the host's namespaces the last born."""
    here = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("user", "mnt")]
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    found = [
        int(pid)
        for pid in children
        if [os.stat(f"/proc/{pid}/ns/{name}").st_ino for name in ("user", "mnt")] == here
        and "NoNewPrivs:\t0" in Path(f"/proc/{pid}/status").read_text()
    ]
    return max(found)


@pytest.mark.parametrize("kind", ["overlay", "fusemount"])
def test_what_else_needs_fuse_is_refused(outside, sif, world, user_tmp, kind):
    outside.configure("allow userns-mount fuse = no")
    options = {
        "overlay": ["--overlay", f"{world.place}/extfs.img:ro"],
        "fusemount": ["--fusemount", "host:/bin/true /mnt"],
    }[kind]
    done = outside.run("exec", "-u", *options, sif, "true", env={"TMPDIR": str(user_tmp)})
    assert done.returncode == 255
    assert "needs a FUSE mount in its user namespace, which is not allowed here" in done.stderr
    assert list(user_tmp.iterdir()) == []


def test_a_place_that_cannot_be_written(outside, sif):
    done = outside.run("exec", "-u", sif, "true", env={"TMPDIR": "/proc"})
    assert done.returncode == 255
    lines = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert len(lines) == 1
    assert "cannot mount the image outside of the user namespace: /proc/" in lines[0]


def test_an_instance_lets_its_caller_go(outside, sif, user_tmp):
    environment = {"TMPDIR": str(user_tmp), "HOME": str(user_tmp)}
    with household() as home:
        started = outside.run("instance", "start", "-u", sif, "outside", env=environment)
        assert started.returncode == 0, started.stderr
        assert not ours(outside)
        shown = outside.run(
            "exec", "instance://outside", "cat", "/etc/test-release", env=environment
        )
        stopped = outside.run("instance", "stop", "outside", env=environment)
        assert (shown.returncode, shown.stdout) == (0, "a small tree\n"), shown.stderr
        assert stopped.returncode == 0, stopped.stderr
        eventually(lambda: not home.alive(), "the instance has ended")


def test_where_fuse_is_refused_the_directive_is_named(own, sif):
    """A node that users may not open stands for a security module."""
    own.configure()
    before = "mount -t tmpfs none /mnt; mknod -m 600 /mnt/fuse c 10 229; "
    before += "mount --bind /mnt/fuse /dev/fuse"
    done = subids.launch(own, "exec", "-u", sif, "true", before=before)
    assert done.returncode == 255
    assert "the FUSE device cannot be opened: permission denied" in done.stderr
    assert "`allow userns-mount fuse = no`" in done.stderr


@pytest.mark.parametrize("flow", [(), ("-u",)])
@pytest.mark.parametrize("image", ["root", "overlay"])
def test_a_mount_that_is_refused_names_the_directive(own, sif, world, flow, image):
    """A tracer that denies the call stands for a security module; the root is mounted early."""
    own.configure()
    number, more = 2, []
    if image == "overlay":
        number, more = 3, ["--overlay", f"{world.place}/extfs.img:ro"]
    words = ["strace", "-f", "-o", "/dev/null", "-u", own.user.pw_name, "-e", "trace=fsmount"]
    words += ["-e", f"inject=fsmount:error=EACCES:when={number}", own.program, "exec", *flow]
    done = subprocess.run(
        [*words, *more, sif, "true"], capture_output=True, text=True, check=False, timeout=60,
        cwd=own.user.pw_dir, env=own.environment(),
    )  # fmt: skip
    assert done.returncode == 255
    assert "the mount failed: permission denied" in done.stderr
    assert "`allow userns-mount fuse = no`" in done.stderr
    assert "malformed" not in done.stderr
