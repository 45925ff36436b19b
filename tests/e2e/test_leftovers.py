"""After any end of a launch the host is as before: mounts, loop devices, processes, files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.own_install import (
    HostState,
    assert_nothing_left,
    descendants,
    eventually,
    read_until,
)

FLOWS = {"setuid": (), "userns": ("-u",), "shim": ("-p",), "userns shim": ("-u", "-p")}
WORKS = "echo ready; exec sleep 1000"


@pytest.fixture(scope="module")
def image(installed) -> SimpleNamespace:
    folder = images.shared_folder()
    return SimpleNamespace(
        sif=images.own_sif(folder),
        squashfs=images.bare_squashfs(folder),
        sandbox=images.described_tree(folder),
    )


@pytest.fixture
def own_files(own) -> Iterator[Path]:
    """A directory of the user's whose content must not change."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-left-", dir="/var/tmp"))
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def host(own, own_files) -> HostState:
    folders = [own.session, own.prefix, own_files, Path(own.user.pw_dir)]
    return HostState(*folders)


@pytest.fixture(params=list(FLOWS))
def flow(request) -> tuple[str, ...]:
    return FLOWS[request.param]


@pytest.mark.parametrize("kind", ["sif", "squashfs", "sandbox"])
def test_normal_end(own, image, flow, kind, home, host):
    done = own.run("exec", *flow, getattr(image, kind), "sh", "-c", "exit 3")
    assert done.returncode == 3, done.stderr
    assert_nothing_left(home, host)


def test_normal_end_with_everything(own, image, home, host, own_files):
    options = ["-c", "-p", "-i", "--uts", "--hostname", "x", "--writable-tmpfs", "-S", "/none/s"]
    done = own.run("exec", *options, image.sif, "sh", "-c", "echo x > /file; echo y > /tmp/f")
    assert done.returncode == 0, done.stderr
    assert_nothing_left(home, host)


def test_kernel_mount(own, image, home, host):
    lines = "allow setuid-mount squashfs = yes\nenable overlay = no\nenable underlay = no"
    own.configure(lines)
    seen = own.run("exec", image.sif, "cat", "/proc/self/mountinfo")
    assert "/dev/loop" in seen.stdout, seen.stderr
    assert_nothing_left(home, host)


def test_failing_image(own, home, host, own_files, image):
    """A SIF file that is cut off in its partition, and one with a broken superblock."""
    cut, broken = own_files / "cut.sif", own_files / "broken.sif"
    content = image.sif.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    at = content.index(b"hsqs")
    broken.write_bytes(content[: at + 4] + b"\xff" * 92 + content[at + 96 :])
    before = HostState(*host.folders)
    for path in (cut, broken):
        for options in FLOWS.values():
            done = own.run("exec", *options, path, "true")
            assert done.returncode == 255, done.stderr
            assert "Traceback" not in done.stderr
            assert_nothing_left(home, before)


def test_missing_bind_source(own, image, flow, home, host):
    done = own.run("exec", *flow, "-B", "/nonexistent:/mnt", image.sif, "true")
    assert done.returncode == 255
    assert "/nonexistent" in done.stderr
    assert_nothing_left(home, host)


def test_failed_mount(own, image, flow, home, host):
    """A target that is there, but of another kind: known only while mounting."""
    done = own.run("exec", *flow, "-B", "/etc/hostname:/bin", image.sif, "true")
    assert done.returncode == 255, done.stderr
    assert "/bin" in done.stderr
    assert_nothing_left(home, host)


def test_missing_image_server(own, image, flow, home, host):
    server = own.libexec / "bin/squashfuse_ll"
    aside = own.place / "squashfuse_ll"
    server.rename(aside)
    try:
        done = own.run("exec", *flow, image.sif, "true")
    finally:
        aside.rename(server)
    assert done.returncode == 255
    assert "squashfuse_ll is not installed" in done.stderr
    assert_nothing_left(home, host)


def test_image_server_that_does_not_start(own, image, flow, home, host):
    """It is there, but no program: the mounts hang on nobody."""
    server = own.libexec / "bin/squashfuse_ll"
    aside = own.place / "squashfuse_ll"
    server.rename(aside)
    try:
        server.write_bytes(b"\x7fELF broken")
        server.chmod(0o711)
        done = own.run("exec", *flow, image.sif, "true")
    finally:
        server.unlink()
        aside.rename(server)
    assert done.returncode == 255, done.stderr
    assert_nothing_left(home, host)


def test_full_session_directory(own, image, home, host, own_files):
    """1 MiB, and accounts of the image's that need it all."""
    own.configure("sessiondir max size = 1")
    large = own_files / "box"
    shutil.copytree(image.sandbox, large, symlinks=True)
    entry = "x" * 100 + ":x:0:0::/:\n"
    for name in ("passwd", "group"):
        (large / "etc" / name).write_text(entry * 6000)
    host = HostState(*host.folders)
    done = own.run("exec", large, "true")
    assert done.returncode == 255, done.stderr
    assert "sessiondir max size" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert_nothing_left(home, host)


def test_payload_fills_the_session_directory(own, image, home, host):
    own.configure("sessiondir max size = 1")
    script = "dd if=/dev/zero of=/big bs=64k count=64"
    done = own.run("exec", "--writable-tmpfs", image.sif, "busybox", "sh", "-c", script)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert_nothing_left(home, host)


# ---- what a payload leaves behind ----


@pytest.mark.parametrize("options", [(), ("-u",), ("--no-init", "-i"), ("--writable-tmpfs",)])
def test_background_process_lives_on(own, image, options, home, host, own_files):
    """As in a shell: the command returns; its root stays until the last process has ended."""
    go, answer = own_files / "go", own_files / "answer"
    os.mkfifo(go)
    os.chmod(go, 0o666)
    script = f"(read line < {go}; ls /bin > {answer}; cat /etc/test-release >> {answer}) & exit 4"
    done = own.run(
        "exec", *options, "-B", own_files, image.sif, "sh", "-c",
        f"exec >/dev/null 2>&1; {script}",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    with open(go, "w", encoding="utf-8") as pipe:
        pipe.write("go\n")
    eventually(lambda: not home.alive(), "the background process has ended")
    assert "busybox" in answer.read_text()
    assert "a small tree" in answer.read_text()
    go.unlink()
    answer.unlink()
    assert_nothing_left(home, host)


def test_background_process_keeps_nobody_of_ours(own, image, home, host):
    done = own.run(
        "exec", image.sif, "sh", "-c", "exec >/dev/null 2>&1 </dev/null; sleep 1000 & exit 0"
    )
    assert done.returncode == 0, done.stderr
    names = []

    def settled() -> bool:
        names[:] = sorted(name for _, _, name in home.alive().values())
        return names == ["sleep", "squashfuse_ll"]

    try:
        eventually(settled, "only the payload's process and its image are left", 1)
    except AssertionError:
        raise AssertionError(str(names)) from None
    for pid, (_, _, name) in home.alive().items():
        if name == "sleep":
            os.kill(pid, signal.SIGKILL)
    assert_nothing_left(home, host)


@pytest.mark.parametrize("options", [("-p",), ("-u", "-p"), ("-p", "--no-init")])
def test_background_process_ends_with_its_pid_namespace(own, image, options, home, host):
    script = "exec >/dev/null 2>&1; setsid sleep 1000 & sleep 1000 & exit 5"
    done = own.run("exec", *options, image.sif, "busybox", "sh", "-c", script)
    assert done.returncode == 5, done.stderr
    assert_nothing_left(home, host)


# ---- one of our processes is killed ----


def roles(keeper: int) -> dict[str, int]:
    """Return who is who below a command: by position and name, from the outside."""
    found = {"keeper": keeper}
    for pid, (parent, _, name) in sorted(descendants(keeper).items()):
        if name == "squashfuse_ll":
            found["image server"] = pid
        elif name == "appinit":
            found["shim"] = pid
        elif name == "sleep":
            found["payload"] = pid
        elif parent == keeper and "master" not in found:
            found["master"] = pid
    return found


VICTIMS = ["keeper", "master", "image server", "shim", "payload"]


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed(own, image, flow, victim, home, host):
    if victim == "shim" and "-p" not in flow:
        return  # there is none in this flow: nothing to assert
    process = home.adopt(own.start("exec", *flow, image.sif, "sh", "-c", WORKS))
    read_until(process.stdout.fileno(), b"ready")
    who: dict[str, int] = {}

    def everybody() -> bool:
        who.update(roles(process.pid))
        return {victim, "payload"} <= set(who)

    eventually(everybody, f"{victim} is there")
    os.kill(who[victim], signal.SIGKILL)
    status = process.wait(timeout=10)
    assert status in (-signal.SIGKILL, 128 + signal.SIGKILL, 255)
    assert_nothing_left(home, host)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
@pytest.mark.parametrize("victim", ["image server", "master"])
def test_stopped_or_crashed(own, image, victim, number, home, host):
    """The payload's user may send any signal to processes of its own."""
    process = home.adopt(own.start("exec", image.sif, "sh", "-c", "echo ready; read x; exec true",
                        stdin=subprocess.PIPE))  # fmt: skip
    read_until(process.stdout.fileno(), b"ready")
    eventually(lambda: victim in roles(process.pid), f"{victim} is there")
    os.kill(roles(process.pid)[victim], number)
    if number == signal.SIGSTOP:
        # Stopped it hangs whoever needs it: the way out is the user's to kill the command.
        process.kill()
        for pid in home.alive():
            os.kill(pid, signal.SIGCONT)
    process.communicate(b"x\n", timeout=10)
    assert_nothing_left(home, host)
