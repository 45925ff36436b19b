"""Launches that only the lab's virtual machine can show: AppArmor labels in each flow."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

OURS = str(Path(os.environ["OCI_OURS"]).with_name("apptainer-py"))
USER = "labuser"
PROFILE = """
profile lab_launch flags=(attach_disconnected) {
  file, capability, network, mount, signal, ptrace, umount, pivot_root,
  deny /secret r,
}
"""
SHOWN = "cat /proc/self/attr/current; cat /secret"
FLOWS = {
    "setuid": (USER, ()),
    "userns": (USER, ("-u",)),
    "root": ("root", ()),
    "fakeroot": (USER, ("-f",)),
    "granted": (USER, ("--add-caps", "net_raw")),
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def user() -> str:
    subprocess.run(["useradd", "-m", USER], check=True)
    for file in ("/etc/subuid", "/etc/subgid"):
        text = Path(file).read_text()
        if f"{USER}:" not in text:
            Path(file).write_text(f"{text}{USER}:4000000:65536\n")
    subprocess.run([OURS, "capability", "add", "--user", USER, "net_raw"], check=True)
    os.chmod("/dev/fuse", 0o666)
    return USER


@pytest.fixture(scope="module")
def image(user) -> Iterator[Path]:
    """A sandbox of the machine's busybox."""
    top = Path("/var/tmp/lab-image")
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "home", "root", "var/tmp"):
        (top / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", top / "bin")
    for name in ("sh", "cat", "sleep", "true", "grep", "ls"):
        (top / "bin" / name).symlink_to("busybox")
    (top / "secret").write_text("word\n")
    yield top
    shutil.rmtree(top)


@pytest.fixture
def run(user) -> Run:
    def launch(who: str, *words: str | Path, program: str = OURS) -> subprocess.CompletedProcess:
        entry = pwd.getpwnam(who)
        return subprocess.run(
            [program, *map(str, words)], capture_output=True, text=True, check=False, timeout=120,
            user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], cwd=entry.pw_dir,
            env={"PATH": os.environ["PATH"], "HOME": entry.pw_dir},
        )  # fmt: skip

    return launch


@pytest.fixture(scope="module")
def profile() -> str:
    parser = f"{os.environ['LAB_FOLDER']}/root/sbin/apparmor_parser"
    subprocess.run([parser, "-r", "-K"], input=PROFILE, text=True, check=True)
    return "apparmor:lab_launch"


def assert_bound(done: subprocess.CompletedProcess[str]) -> None:
    assert "lab_launch (enforce)" in done.stdout, (done.stdout, done.stderr)
    assert "Permission denied" in done.stderr
    assert "word" not in done.stdout


@pytest.mark.parametrize("flow", FLOWS)
def test_a_profile(run, image, profile, flow):
    who, options = FLOWS[flow]
    done = run(who, "exec", *options, "--security", profile, image, "sh", "-c", SHOWN)
    assert_bound(done)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_profile_that_is_not_loaded(run, image, flow):
    who, options = FLOWS[flow]
    done = run(who, "exec", *options, "--security", "apparmor:nothing", image, "cat", "/secret")
    assert (done.returncode, done.stdout) == (255, ""), done.stderr
    assert "failed to apply security configuration" in done.stderr
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert len(fatal) == 1, done.stderr


@pytest.mark.parametrize("flow", ["setuid", "userns", "root", "fakeroot"])
def test_an_instance_and_who_joins_it(run, image, profile, flow):
    who, options = FLOWS[flow]
    name = f"lab-{flow}"
    started = run(who, "instance", "start", *options, "--security", profile, image, name)
    assert started.returncode == 0, started.stderr
    done = run(who, "exec", f"instance://{name}", "sh", "-c", SHOWN)
    run(who, "instance", "stop", name)
    assert_bound(done)


OVER_PROC = {
    "none": ("--no-mount", "proc"),
    "a directory": ("-B", "{fake}:/proc"),
    "a file": ("-B", "{fake}/self/attr/exec:/proc/self/attr/exec"),
    "with a filter": ("--security", "seccomp:{fake}/filter.json"),
}
NO_WRITE = """{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["openat2", "readlinkat"], "action": "SCMP_ACT_ERRNO"}]}"""


@pytest.mark.parametrize("what", OVER_PROC)
@pytest.mark.parametrize("flow", FLOWS)
def test_what_lies_over_proc_takes_no_label_away(run, image, profile, tmp_path_factory, flow, what):
    who, options = FLOWS[flow]
    fake = tmp_path_factory.mktemp("fake")
    for attributes in ("self/attr", "thread-self/attr", "self/attr/apparmor"):
        (fake / attributes).mkdir(parents=True)
        (fake / attributes / "exec").write_text("")
        (fake / attributes / "exec").chmod(0o666)
    (fake / "filter.json").write_text(NO_WRITE)
    for folder in (fake, *fake.parents[:-2]):
        folder.chmod(0o755)
    more = [word.format(fake=fake) for word in OVER_PROC[what]]
    done = run(
        who, "exec", *options, *more, "--security", profile, image, "sh", "-c",
        "echo there; cat /secret",
    )  # fmt: skip
    assert "word" not in done.stdout
    assert "Permission denied" in done.stderr or done.returncode == 255, done.stderr
    assert what == "a file" or done.stdout == "there\n", done.stderr
