"""Instances, attacked through what a user can write: records, logs, pid files, names, processes.

A record is the user's own file. Whatever it says, nobody comes to signal or to enter a process that
is not an instance of that user's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.test_instances import STARTED, Instances
from tests.own_install import descendants, eventually

NAME = "apy-test-1"
NAMED = 'import ctypes, time; ctypes.CDLL(None).prctl(15, b"appinit"); time.sleep(60)'


@pytest.fixture(scope="session")
def image() -> Path:
    return images.own_sif(images.shared_folder())


@pytest.fixture
def own(product) -> Iterator[Instances]:
    made = Instances(product.program, "setuid")
    made.forget()
    yield made
    made.forget()


def forge(own: Instances, name: str = NAME, **fields: object) -> Path:
    """Write a record as its user could; returns its file."""
    account = own.account
    folder = own.folder / "app" / os.uname().nodename / account.pw_name / name
    folder.mkdir(parents=True, exist_ok=True)
    said = {"pid": 1, "ppid": 1, "name": name, "user": account.pw_name, "image": "/x", **fields}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(said))
    for path in [file, *list(file.parents)[:6]]:
        if own.home in path.parents:
            os.chown(path, account.pw_uid, account.pw_gid)
    return file


def as_user(own: Instances, *words: str, **how: object) -> subprocess.Popen[bytes]:
    account = own.account
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        words, user=account.pw_uid, group=account.pw_gid, extra_groups=[], **how
    )


def facts_of(pid: int) -> dict[str, object]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"pid": pid, "ppid": int(fields[1]), "startTime": int(fields[19])}


@pytest.mark.parametrize("whose", ["root", "the user"])
def test_a_forged_record_brings_no_signal(own: Instances, product, whose: str) -> None:
    """Root stops a user's instances by name: the record names a process that is none."""
    if whose == "root":
        victim = subprocess.Popen(["/bin/sleep", "60"])
    else:
        victim = as_user(own, "/bin/sleep", "60")
    try:
        forge(own, **facts_of(victim.pid))
        root = Instances(product.program, "root")
        for words in (["--user", own.account.pw_name, NAME], ["-u", own.account.pw_name, "-aF"]):
            done = root.run("instance", "stop", *words)
            assert done.returncode == 1
            assert done.stderr.startswith('Error for command "stop": no instance found\n')
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_process_of_that_name_is_no_instance(own: Instances, tmp_path: Path) -> None:
    """Its comm and its parent's title are right, as anybody can have them; it is no pid 1."""
    title = f"Apptainer instance: {own.account.pw_name} [{NAME}]"
    line = f'exec -a "{title}" /bin/bash -c "$0 & wait"'
    parent = as_user(own, "/bin/bash", "-c", line, f"/usr/bin/python3 -c '{NAMED}'")
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        eventually(lambda: children.read_text().split(), "the child is there")
        child = int(children.read_text().split()[0])
        eventually(lambda: Path(f"/proc/{child}/comm").read_text() == "appinit\n", "it is named")
        forge(own, **facts_of(child))
        assert own.listed() == {}
        done = own.run("exec", f"instance://{NAME}", "true")
        text = f"FATAL:   While setting image/instance: no instance found with name {NAME}\n"
        assert (done.returncode, done.stderr) == (255, text)
    finally:
        parent.kill()
        parent.wait()


def test_a_number_that_is_used_again_is_no_instance(own: Instances, image: Path) -> None:
    """pid and parent are right, the time of the start is another's."""
    assert own.start(image, NAME).stderr == STARTED
    file = own.record(NAME)
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "startTime": said["startTime"] - 1}))
    other_boot = {**said, "bootId": "0" * 36}
    elsewhere = {**said, "pidNamespace": 1}
    for wrong in ({**said, "startTime": said["startTime"] - 1}, other_boot, elsewhere):
        forge(own, **wrong)
        done = own.run("exec", f"instance://{NAME}", "true")
        assert done.returncode == 255
        assert "no instance found" in done.stderr
    forge(own, **said)
    assert own.run("exec", f"instance://{NAME}", "true").returncode == 0


def test_nobody_enters_what_another_program_has_started(own: Instances, image: Path) -> None:
    """The starter looks for itself: a shim of the user's own making has another program."""
    account = own.account
    title = f"Apptainer instance: {account.pw_name} [{NAME}]"
    line = f'exec -a "{title}" unshare -Ur --mount --pid --fork /usr/bin/python3 -c "$0"'
    parent = as_user(own, "/bin/bash", "-c", line, NAMED)
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        eventually(lambda: children.read_text().split(), "the child is there")
        child = int(children.read_text().split()[0])
        eventually(lambda: Path(f"/proc/{child}/comm").read_text() == "appinit\n", "it is named")
        for userns in (False, True):
            forge(own, **facts_of(child), userns=userns)
            assert NAME in own.listed()
            done = own.run("exec", f"instance://{NAME}", "true")
            assert done.returncode == 255
            assert "the process is no instance of yours" in done.stderr
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize("claim", ["init", "self", "another's", "own program", "own container"])
@pytest.mark.parametrize("userns", [False, True])
def test_s04_no_record_leads_into_another_namespace(
    own: Instances, image: Path, claim: str, userns: bool
) -> None:
    """CVE-2019-11328: whatever process the record names, nobody comes into its namespaces."""
    left: list[subprocess.Popen[bytes]] = []
    pid = {"init": 1, "self": os.getpid()}.get(claim, 0)
    if claim == "another's":
        left.append(subprocess.Popen(["/usr/bin/unshare", "-mp", "--fork", "/bin/sleep", "60"]))
    elif claim == "own program":
        left.append(as_user(own, "/bin/sleep", "60"))
    elif claim == "own container":
        line = [own.program, "exec", "-p", str(image), "/bin/sleep", "60"]
        left.append(as_user(own, *line, env={"HOME": str(own.home)}, cwd="/"))
    try:
        if left:
            children = Path(f"/proc/{left[0].pid}/task/{left[0].pid}/children")
            if claim == "own container":  # its shim: our own program, but no instance's keeper
                eventually(lambda: "appinit" in names_below(left[0].pid), "the shim is there")
                pid = names_below(left[0].pid)["appinit"]
            elif claim == "another's":
                eventually(children.read_text, "the child is there")
                pid = int(children.read_text().split()[0])
            else:
                pid = left[0].pid
        forge(own, **facts_of(pid), userns=userns)
        before = os.readlink("/proc/self/ns/mnt")
        for option in ([], ["-u"]):
            done = own.run("exec", *option, f"instance://{NAME}", "readlink", "/proc/self/ns/mnt")
            assert (done.returncode, done.stdout) == (255, ""), done.stdout
            assert len([line for line in done.stderr.splitlines() if "FATAL" in line]) == 1
        assert os.readlink("/proc/self/ns/mnt") == before
    finally:
        for process in left:
            process.kill()
            process.wait()


def names_below(pid: int) -> dict[str, int]:
    return {name: number for number, (_, _, name) in descendants(pid).items()}


def test_no_log_is_written_through_a_link(own: Instances, image: Path, user_tmp: Path) -> None:
    target = user_tmp / "target"
    target.write_text("untouched\n")
    logs = own.folder / "logs" / os.uname().nodename / own.account.pw_name
    assert own.start(image, NAME).stderr == STARTED
    own.run("instance", "stop", NAME)
    log = logs / f"{NAME}.out"
    log.unlink()
    log.symlink_to(target)
    done = own.start(image, NAME)
    assert done.returncode == 255
    assert f"{log}: too many levels of symbolic links" in done.stderr
    assert target.read_text() == "untouched\n"
    assert own.listed() == {}


@pytest.mark.parametrize("flow", ["setuid", "root"])
def test_no_pid_file_is_a_link(product, image: Path, user_tmp: Path, flow: str) -> None:
    """Root's pid file in a directory of a user's."""
    own = Instances(product.program, flow)
    target, link = user_tmp / "target", user_tmp / "pid"
    target.write_text("untouched\n")
    link.symlink_to(target)
    try:
        done = own.start("--pid-file", link, image, NAME)
        assert "WARNING: Failed to write pid file: could not create pid file" in done.stderr
        assert target.read_text() == "untouched\n"
    finally:
        own.forget()


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/b", "", "a b", "x\n", "é", "a" * 300])
def test_no_name_leads_elsewhere(own: Instances, image: Path, name: str) -> None:
    for words in (["instance", "start", image, name], ["exec", f"instance://{name}", "true"]):
        done = own.run(*words)
        assert done.returncode == 255
        assert "is not a valid instance name" in done.stderr
    assert own.run("instance", "stats", name).returncode == 1


def test_a_link_to_records_leads_to_the_users_own(
    own: Instances, image: Path, user_tmp: Path
) -> None:
    """What root lists for a user is that user's, though a link may lead to it."""
    assert own.start(image, NAME).stderr == STARTED
    folder = own.record(NAME).parent
    moved = user_tmp / "moved"
    folder.rename(moved)
    folder.symlink_to(moved)
    try:
        root = Instances("", "root")
        root.program = own.program
        words = ("instance", "list", "-u", own.account.pw_name, "--json")
        shown = json.loads(root.run(*words).stdout)["instances"]
        assert [one["instance"] for one in shown] == [NAME]
        os.chown(moved, 0, 0)
        assert json.loads(root.run(*words).stdout) == {"instances": []}
    finally:
        os.chown(moved, own.account.pw_uid, own.account.pw_gid)
        folder.unlink()
        moved.rename(folder)


def test_what_a_record_says_does_not_speak_to_a_terminal(own: Instances, image: Path) -> None:
    assert own.start(image, NAME).stderr == STARTED
    said = json.loads(own.record(NAME).read_text())
    forge(own, **{**said, "image": "/x\x1b]0;owned\x07\n/y"})
    shown = own.run("instance", "list").stdout
    assert "\x1b" not in shown
    assert shown.count("\n") == 2
    forge(own, **said)


def test_a_user_has_no_hand_on_the_first_process(own: Instances, image: Path) -> None:
    """In the setuid flow the first process is closed to its own user."""
    assert own.start(image, NAME).stderr == STARTED
    pid = json.loads(own.record(NAME).read_text())["pid"]
    done = own.run("instance", "list")
    assert done.returncode == 0
    probe = as_user(own, "/bin/readlink", f"/proc/{pid}/exe", stderr=subprocess.DEVNULL)
    assert probe.wait(timeout=20) == 1
    assert os.stat(f"/proc/{pid}/stat").st_uid == 0
    os.kill(pid, signal.SIGKILL)
