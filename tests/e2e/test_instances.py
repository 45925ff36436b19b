"""Instances in each flow: started, listed, joined, stopped, and what is left of them."""

from __future__ import annotations

import json
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS
from tests.own_install import DEADLINE_S, eventually

# What runs behind an `&` heeds no SIGINT.
SERVICE = 'trap "kill \\$left; {0}" {1}; sleep 100 & left=$!; echo up; wait'
STARTED = "INFO:    instance started successfully\n"


class Instances:
    """Runs our program as one caller in one flow; `start` and `join` take the flow's option."""

    def __init__(self, program: str, flow: str) -> None:
        self.program = program
        self.flow = flow
        self.account = pwd.getpwnam("root") if flow == "root" else images.ordinary_user()
        self.home = Path(self.account.pw_dir)
        self.folder = self.home / ".apptainer/instances"

    def run(
        self, *words: str | Path, env: dict[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Return what a command line did."""
        return subprocess.run(
            [self.program, *map(str, words)],
            **self._as_caller(env),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command line, whose end the test waits for."""
        return subprocess.Popen([self.program, *words], **self._as_caller())

    def _as_caller(self, env: dict[str, str] | None = None) -> dict[str, Any]:
        return {
            "env": {"PATH": "/usr/bin:/bin", "HOME": str(self.home), **(env or {})},
            "cwd": "/",
            "user": self.account.pw_uid,
            "group": self.account.pw_gid,
            "extra_groups": [],
        }

    def option(self) -> list[str]:
        """Return what chooses the flow."""
        return ["-u"] if self.flow == "userns" else []

    def start(
        self, *words: str | Path, how: str = "start", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start an instance: options, image, name, arguments."""
        return self.run("instance", how, *self.option(), *words, env=env)

    def listed(self) -> dict[str, dict[str, object]]:
        """Return what runs, by name."""
        found = json.loads(self.run("instance", "list", "--json").stdout)["instances"]
        return {one["instance"]: one for one in found}

    def record(self, name: str) -> Path:
        """Return the file of a record."""
        return next(self.folder.glob(f"app/*/{self.account.pw_name}/{name}/{name}.json"))

    def log(self, name: str, which: str = "out") -> str:
        """Return what an instance has written."""
        files = self.folder.glob(f"logs/*/{self.account.pw_name}/{name}.{which}")
        return "".join(file.read_text() for file in files)

    def forget(self) -> None:
        """Stop all, and remove the logs that tests have made."""
        self.run("instance", "stop", "--all", "--force")
        for file in self.folder.glob(f"logs/*/{self.account.pw_name}/apy-test-*"):
            file.unlink()


@pytest.fixture(params=FLOWS)
def own(request: pytest.FixtureRequest, product) -> Iterator[Instances]:
    made = Instances(product.program, request.param)
    made.forget()
    yield made
    made.forget()
    assert made.listed() == {}


@pytest.fixture(scope="session")
def image() -> Path:
    return images.own_sif(images.shared_folder())


def service(folder: Path, text: str, labels: dict[str, str] | None = None) -> Path:
    """Make a sandbox whose start script this is."""
    made = folder / "service"
    subprocess.run(["cp", "-a", images.small_tree(images.shared_folder()), made], check=True)
    meta = made / ".singularity.d"
    meta.mkdir()
    for name in ("startscript", "runscript"):
        (meta / name).write_text(f"#!/bin/sh\n{text}\n")
        (meta / name).chmod(0o755)
    (meta / "labels.json").write_text(json.dumps(labels or {}))
    return made


def said(own: Instances, what: Sequence[str | Path]) -> tuple[int, str]:
    done = own.run(*what)
    return done.returncode, done.stderr


def test_a_life(own: Instances, image: Path) -> None:
    done = own.start(image, "apy-test-1", "a", "b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", STARTED)
    one = own.listed()["apy-test-1"]
    assert one["img"] == str(image)
    eventually(lambda: own.log("apy-test-1") == "start\n", "the start script has run")
    assert Path(f"/proc/{one['pid']}/comm").read_text() == "appinit\n"
    assert own.run("exec", "instance://apy-test-1", "cat", "/proc/1/comm").stdout == "appinit\n"
    exists = said(own, ["instance", "start", *own.option(), image, "apy-test-1"])
    assert exists == (255, "FATAL:   instance apy-test-1 already exists\n")
    stopped = said(own, ["instance", "stop", "apy-test-1"])
    text = f"INFO:    Stopping apy-test-1 instance of {image} (PID={one['pid']})\n"
    assert stopped == (0, text)
    assert not Path(f"/proc/{one['pid']}").exists()
    assert not list(own.folder.glob("app/*/*/apy-test-1"))


def test_what_a_command_in_it_is(own: Instances, image: Path) -> None:
    assert own.start(image, "apy-test-1").returncode == 0
    pid = own.listed()["apy-test-1"]["pid"]
    spaces = "mnt", "pid", "user", "ipc", "uts"
    words = ["sh", "-c", "for name; do readlink /proc/self/ns/$name; done", "sh", *spaces]
    inside = own.run("exec", "instance://apy-test-1", *words).stdout.split()
    assert inside == [os.readlink(f"/proc/{pid}/ns/{name}") for name in spaces]
    status = own.run("exec", "instance://apy-test-1", "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(own.account.pw_uid)] * 4
    assert len(fields["NSpid"].split()) == 1
    if own.flow != "root":
        assert {int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
        assert fields["NoNewPrivs"] == "1"
    tells = own.run("exec", "instance://apy-test-1", "env").stdout.splitlines()
    assert "APPTAINER_INSTANCE=apy-test-1" in tells
    assert f"APPTAINER_CONTAINER={image}" in tells


def test_streams_status_and_directory_of_a_command_in_it(own: Instances, image: Path) -> None:
    assert own.start(image, "apy-test-1").returncode == 0
    where = "instance://apy-test-1"
    done = own.run("exec", where, "sh", "-c", "cat; echo err >&2; exit 7", stdin="through\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "through\n", "err\n")
    assert own.run("exec", "--pwd", "/etc", where, "pwd").stdout == "/etc\n"
    assert own.run("run", where, "x").stdout == "run x\n"
    assert own.run("test", where).stdout == "tested\n"
    assert own.run("shell", where, stdin="echo $0\n").stdout == "/bin/sh\n"
    killed = own.run("exec", where, "sh", "-c", "kill -9 $$")
    assert killed.returncode == -signal.SIGKILL
    missing = said(own, ["exec", "--pwd", "/nowhere", where, "pwd"])
    assert missing == (
        255,
        "FATAL:   failed to set working directory: chdir /nowhere: no such file or directory\n",
    )
    assert said(own, ["exec", where, "nonsense"])[0] == 255


def test_what_it_leaves_to_its_caller(own: Instances, image: Path) -> None:
    """The caller's streams and directory are let go, so that nobody waits for their end."""
    assert own.start(image, "apy-test-1").returncode == 0
    keeper = json.loads(own.record("apy-test-1").read_text())["ppid"]
    of_it = [keeper, *map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())]
    for pid in of_it:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        for number in range(3):
            link = Path(f"/proc/{pid}/fd/{number}")
            assert not link.is_symlink() or "pipe:" not in os.readlink(link)
    assert os.getsid(keeper) == keeper


def test_a_service_ends_in_its_own_way(own: Instances, user_tmp: Path) -> None:
    image = service(user_tmp, SERVICE.format("echo bye; exit 0", "INT"))
    assert own.start(image, "apy-test-1").returncode == 0
    eventually(lambda: "up" in own.log("apy-test-1"), "the service is up")
    stopped = said(own, ["instance", "stop", "-t", "50", "apy-test-1"])
    assert stopped[0] == 0
    assert "Timeout" not in stopped[1]
    assert own.log("apy-test-1") == "up\nbye\n"


def test_who_does_not_heed_the_signal_is_killed(own: Instances, user_tmp: Path) -> None:
    image = service(user_tmp, "trap '' INT TERM; echo up; while :; do sleep 1; done")
    assert own.start(image, "apy-test-1").returncode == 0
    eventually(lambda: "up" in own.log("apy-test-1"), "the service is up")
    pid = own.listed()["apy-test-1"]["pid"]
    status, text = said(own, ["instance", "stop", "--timeout", "1", "apy-test-*"])
    assert status == 0
    assert f"Killing apy-test-1 instance of {image} (PID={pid}) (Timeout)" in text
    assert own.listed() == {}


def test_the_images_own_signal(own: Instances, user_tmp: Path) -> None:
    labels = {"org.opencontainers.image.stopSignal": "SIGUSR1"}
    script = "for s in INT TERM USR1; do " + SERVICE.format("echo got $s; exit", "$s; done")
    image = service(user_tmp, script, labels)
    for options, signal_name in (([], "USR1"), (["-s", "TERM"], "TERM"), (["-s", "2"], "INT")):
        assert own.start(image, "apy-test-1").returncode == 0
        eventually(lambda: own.log("apy-test-1").endswith("up\n"), "the service is up")
        stopping = own.begin("instance", "stop", *options, "apy-test-1")
        got = f"up\ngot {signal_name}\n"
        eventually(lambda got=got: own.log("apy-test-1").endswith(got), got)
        # Process 1 does not end with a service that SIGUSR1 has ended, and has ten seconds.
        own.run("instance", "stop", "-s", "KILL", "apy-test-1")
        assert stopping.wait(timeout=20) == 0
        assert own.listed() == {}


def test_commands_in_it_end_with_it(own: Instances, image: Path) -> None:
    assert own.start(image, "apy-test-1").returncode == 0
    joined = own.begin("exec", "instance://apy-test-1", "sleep", "100")
    pid = own.listed()["apy-test-1"]["pid"]
    inside = ["exec", "instance://apy-test-1", "ps"]
    eventually(lambda: "sleep 100" in own.run(*inside).stdout, "the command runs")
    assert own.run("instance", "stop", "-t", "50", "apy-test-1").returncode == 0
    assert joined.wait(timeout=20) == -signal.SIGINT
    assert not Path(f"/proc/{pid}").exists()


def test_pid_file(own: Instances, image: Path, user_tmp: Path) -> None:
    file = user_tmp / "pid"
    done = own.start("--pid-file", file, image, "apy-test-1")
    assert (done.returncode, done.stderr) == (0, STARTED)
    assert file.read_text() == f"{own.listed()['apy-test-1']['pid']}\n"
    failed = own.start(image, "apy-test-2", env={"APPTAINER_PID_FILE": "/nonexistent/pid"})
    assert failed.returncode == 0
    assert failed.stderr == STARTED + (
        "WARNING: Failed to write pid file: could not create pid file: open /nonexistent/pid: "
        "no such file or directory\n"
    )


def test_options_of_exec(own: Instances, image: Path, user_tmp: Path) -> None:
    """What shapes a container shapes an instance too, and who joins finds it so."""
    (user_tmp / "file").write_text("bound\n")
    options = ["-B", f"{user_tmp}:/mnt", "--writable-tmpfs", "-i", "--hostname", "elsewhere"]
    done = own.start(*options, "--env", "A=b", image, "apy-test-1")
    assert (done.returncode, done.stderr) == (0, STARTED)
    words = ["sh", "-c", "cat /mnt/file; uname -n; touch /etc/new && echo written"]
    done = own.run("exec", "instance://apy-test-1", *words)
    assert done.stdout == "bound\nelsewhere\nwritten\n"
    again = own.run("exec", "instance://apy-test-1", "stat", "-c", "%n", "/etc/new")
    assert again.stdout == "/etc/new\n"
    done = own.run("exec", "--net", "-B", "/etc", "--nv", "instance://apy-test-1", "uname", "-n")
    assert (done.returncode, done.stdout) == (0, "elsewhere\n")
    assert done.stderr == (
        "WARNING: --bind, --net, --nv: without effect on an instance that runs; for "
        "`instance start`\n"
    )


def test_all_beside_a_name_means_the_name(own: Instances, image: Path) -> None:
    for name in ("apy-test-1", "apy-test-2"):
        assert own.start(image, name).returncode == 0
    assert own.run("instance", "stop", "--all", "apy-test-1").returncode == 0
    assert list(own.listed()) == ["apy-test-2"]
    assert own.run("instance", "stop", "--all", "apy-test-1").returncode == 1
    assert own.run("instance", "stop", "-a").returncode == 0
    assert own.listed() == {}


def test_run_and_its_arguments(own: Instances, image: Path) -> None:
    assert own.start(image, "apy-test-1", "x", "y z", how="run").returncode == 0
    eventually(lambda: own.log("apy-test-1") == "run x y z\n", "the runscript has run")


def test_what_cannot_start_leaves_no_name(own: Instances, user_tmp: Path) -> None:
    image = service(user_tmp, "true")
    (image / ".singularity.d/startscript").write_text("#!/nonexistent\n")
    (image / "bin/sh").unlink()
    done = own.start(image, "apy-test-1")
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:   ")
    assert STARTED not in done.stderr
    assert not list(own.folder.glob("app/*/*/apy-test-1"))
    assert own.start("/nonexistent.sif", "apy-test-1").returncode == 255
    app = said(own, ["instance", "start", *own.option(), "--app", "none", image, "apy-test-1"])
    assert app == (255, "FATAL:   No startscript for contained app: none\n")
    assert not list(own.folder.glob("app/*/*/apy-test-1"))


@pytest.mark.parametrize("victim", ["master", "keeper", "shim"])
def test_whoever_is_killed_the_name_is_free(own: Instances, image: Path, victim: str) -> None:
    assert own.start(image, "apy-test-1").returncode == 0
    found = json.loads(own.record("apy-test-1").read_text())
    keeper = found["ppid"]
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    victims = {"keeper": keeper, "shim": found["pid"], "master": int(children[0])}
    os.kill(victims[victim], signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{keeper}").exists(), "the instance has ended")
    eventually(lambda: not Path(f"/proc/{found['pid']}").exists(), "all of it has")
    assert own.listed() == {}
    assert not list(own.folder.glob("app/*/*/apy-test-1"))
    done = own.start(image, "apy-test-1")
    assert (done.returncode, done.stderr) == (0, STARTED)


def test_starts_of_one_name_at_once(own: Instances, image: Path) -> None:
    words = [own.program, "instance", "start", *own.option(), str(image), "apy-test-1"]
    ids = {"user": own.account.pw_uid, "group": own.account.pw_gid, "extra_groups": []}
    environment = {"HOME": str(own.home), "PATH": "/bin"}
    pipe = subprocess.DEVNULL
    started = [
        subprocess.Popen(words, env=environment, cwd="/", stdout=pipe, stderr=pipe, **ids)  # type: ignore[call-overload]
        for _ in range(4)
    ]
    assert sorted(process.wait(timeout=60) for process in started) == [0, 255, 255, 255]
    assert list(own.listed()) == ["apy-test-1"]


@pytest.mark.parametrize("who", ["pid", "ppid"])
def test_who_is_stopped_can_be_ended(own: Instances, user_tmp: Path, who: str) -> None:
    """First process or keeper: neither stops for the other's sake, as nobody's job does."""
    image = service(user_tmp, "exec sleep 1000")
    assert own.start(image, "apy-test-1").returncode == 0
    record = json.loads(own.record("apy-test-1").read_text())
    stopped = Path(f"/proc/{record[who]}/stat")
    os.kill(record[who], signal.SIGSTOP)
    eventually(lambda: stopped.read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
    done = own.run("exec", *own.option(), "instance://apy-test-1", "echo", "joined")
    assert (done.returncode, done.stdout) == (0, "joined\n"), done.stderr
    done = own.run("instance", "stop", "apy-test-1")
    assert (done.returncode, done.stderr.count("Killing")) == (0, 0), done.stderr
    assert own.listed() == {}
    assert own.start(image, "apy-test-1").returncode == 0


def test_a_name_whose_record_is_lost(own: Instances, image: Path) -> None:
    """It is held as long as the instance lives, and who wants it is told by whom."""
    assert own.start(image, "apy-test-1").returncode == 0
    keeper = os.pidfd_open(json.loads(own.record("apy-test-1").read_text())["ppid"])
    own.record("apy-test-1").unlink()
    try:
        assert own.listed() == {}
        done = own.start(image, "apy-test-1")
        refused, hint = done.stderr.splitlines()
        assert (done.returncode, refused) == (255, "FATAL:   instance apy-test-1 already exists")
        os.kill(int(re.search("`kill -9 ([0-9]+)`", hint)[1]), signal.SIGKILL)
        assert select.select([keeper], [], [], DEADLINE_S)[0]
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(keeper, signal.SIGKILL)
        os.close(keeper)
    eventually(lambda: own.start(image, "apy-test-1").returncode == 0, "the name is free")


def test_where_a_link_leads(own: Instances, image: Path, user_tmp: Path) -> None:
    """Homes are small: ~/.apptainer, or a part of it, often lies elsewhere."""
    chosen, elsewhere = user_tmp / "chosen", user_tmp / "elsewhere"
    for folder in (chosen, elsewhere):
        folder.mkdir()
        os.chown(folder, own.account.pw_uid, own.account.pw_gid)
    (chosen / "instances").symlink_to("../elsewhere")
    env = {"APPTAINER_CONFIGDIR": str(chosen)}
    done = own.start(image, "apy-test-1", env=env)
    assert (done.returncode, done.stderr) == (0, STARTED)
    assert len(list(elsewhere.glob("app/*/*/apy-test-1/apy-test-1.json"))) == 1
    assert "apy-test-1" in own.run("instance", "list", env=env).stdout
    assert own.run("exec", *own.option(), "instance://apy-test-1", "true", env=env).returncode == 0
    assert own.run("instance", "stop", "apy-test-1", env=env).returncode == 0
    os.chown(elsewhere, 12345, 12345)
    done = own.start(image, "apy-test-1", env=env)
    told = f"the link leads to no directory of {own.account.pw_name}"
    assert done.returncode == 255
    assert done.stderr.splitlines()[0] == f"FATAL:   {chosen}/instances: {told}"
    shutil.rmtree(elsewhere)
    done = own.start(image, "apy-test-1", env=env)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL:   {chosen}/instances: no such file or directory\n")


def test_a_log_that_cannot_be_leaves_no_name(own: Instances, image: Path, user_tmp: Path) -> None:
    env = {"APPTAINER_CONFIGDIR": str(user_tmp)}
    os.chown(user_tmp, own.account.pw_uid, own.account.pw_gid)
    assert own.start(image, "apy-test-1", env=env).returncode == 0
    assert own.run("instance", "stop", "apy-test-1", env=env).returncode == 0
    log = next(user_tmp.glob("instances/logs/*/*/apy-test-1.out"))
    log.unlink()
    log.mkdir()
    done = own.start(image, "apy-test-1", env=env)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL:   {log}: is a directory\n")
    assert not list(user_tmp.glob("instances/app/*/*/apy-test-1"))


def test_stats(own: Instances, user_tmp: Path) -> None:
    image = service(user_tmp, "while :; do :; done")
    assert own.start(image, "apy-test-1").returncode == 0
    done = own.run("instance", "stats", "--json", "apy-test-1")
    assert "WARNING: JSON output is only available for a single timepoint" in done.stderr
    found = json.loads(done.stdout)
    assert found["pids_stats"]["current"] == 2
    assert found["cpu_stats"]["cpu_usage"]["total_usage"] > 0
    memory = found["memory_stats"]["usage"]
    assert 0 < memory["usage"] < memory["limit"]
    table = own.run("instance", "stats", "--no-stream", "apy-test-1").stdout.splitlines()
    assert table[0].split()[:2] == ["INSTANCE", "NAME"]
    assert table[1].split()[0] == "apy-test-1"
    missing = own.run("instance", "stats", "nope")
    assert (missing.returncode, missing.stderr.splitlines()[0]) == (
        1,
        'Error for command "stats": no instance found',
    )


def test_stats_of_control_groups(product, image: Path) -> None:
    own = Instances(product.program, "root")
    try:
        done = own.start("--memory", "100M", image, "apy-test-1")
        if "cannot use cgroups" in done.stderr:
            pytest.skip("did not run: no control groups to be had here")
        assert done.returncode == 0, done.stderr
        found = json.loads(
            own.run("instance", "stats", "--no-stream", "--json", "apy-test-1").stdout
        )
        assert found["memory_stats"]["usage"]["limit"] == 100 << 20
        assert found["pids_stats"]["current"] >= 1
        shown = own.run("instance", "stats", "--no-stream", "apy-test-1").stdout.splitlines()[1]
        assert "/ 100MiB" in shown
    finally:
        own.forget()


def test_live_stats_end_with_the_instance(product, image: Path) -> None:
    own = Instances(product.program, "setuid")
    assert own.start(image, "apy-test-1").returncode == 0
    words = [own.program, "instance", "stats", "apy-test-1"]
    ids = {"user": own.account.pw_uid, "group": own.account.pw_gid, "extra_groups": []}
    pipe = subprocess.PIPE
    shown = subprocess.Popen(words, env={"HOME": str(own.home)}, stdout=pipe, cwd="/", **ids)  # type: ignore[call-overload]
    try:
        assert shown.stdout.readline().startswith(b"INSTANCE NAME")
        assert shown.stdout.readline().startswith(b"apy-test-1")
    finally:
        own.forget()
    assert shown.wait(timeout=20) == 0
    shown.stdout.close()


def test_the_flow_is_the_instances_own(product, image: Path) -> None:
    plain, setuid = Instances(product.program, "userns"), Instances(product.program, "setuid")
    setuid.forget()
    try:
        assert setuid.start(image, "apy-test-s").returncode == 0
        assert plain.start(image, "apy-test-u").returncode == 0
        wrong = said(plain, ["exec", "-u", "instance://apy-test-s", "true"])
        text = "FATAL:   a setuid installation is required to join this instance\n"
        assert wrong == (255, text)
        for options in ([], ["-u"]):
            done = plain.run(
                "exec", *options, "instance://apy-test-u", "readlink", "/proc/self/ns/user"
            )
            pid = plain.listed()["apy-test-u"]["pid"]
            assert done.stdout.strip() == os.readlink(f"/proc/{pid}/ns/user")
    finally:
        setuid.forget()


@pytest.mark.long
def test_two_hundred_at_once(own: Instances, image: Path) -> None:
    names = [f"apy-test-{number}" for number in range(200)]
    ids = {"user": own.account.pw_uid, "group": own.account.pw_gid, "extra_groups": []}
    environment = {"HOME": str(own.home), "PATH": "/bin"}
    for first in range(0, len(names), 20):
        starting = [
            subprocess.Popen(
                [own.program, "instance", "start", *own.option(), str(image), name],
                env=environment,
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                **ids,
            )  # type: ignore[call-overload]
            for name in names[first : first + 20]
        ]
        assert [process.communicate(timeout=120)[1] for process in starting] == [
            STARTED.encode()
        ] * 20
    assert sorted(own.listed()) == sorted(names)
    assert own.run("exec", "instance://apy-test-137", "echo", "here").stdout == "here\n"
    assert own.run("instance", "stop", "--all").returncode == 0
    assert own.listed() == {}


def test_records_lie_where_the_environment_says(own: Instances, image: Path) -> None:
    """As Apptainer's, for every command."""
    there = own.home / "elsewhere"
    env = {"APPTAINER_CONFIGDIR": str(there)}
    done = own.start(image, "placed", env=env)
    try:
        assert done.returncode == 0, done.stderr
        assert list(there.glob(f"instances/app/*/{own.account.pw_name}/placed/placed.json"))
        assert "placed" not in own.listed()
        assert "placed" in own.run("instance", "list", env=env).stdout
        words = ("exec", *own.option(), "instance://placed", "true")
        assert own.run(*words, env=env).returncode == 0
        assert own.run(*words).returncode == 255
    finally:
        stopped = own.run("instance", "stop", "placed", env=env)
        shutil.rmtree(there)
    assert stopped.returncode == 0
