"""An engine that is not built in: its hooks, its methods and its host pair, in two flows."""

from __future__ import annotations

import json
import os
import pwd
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.model import protocol
from tests import images
from tests.e2e.identities import expected, table, traced
from tests.security import forge
from tests.typing.engines import GOOD, REACHES, bad_engine

MASTER, START = protocol.STAGE_MASTER, protocol.STAGE_START
BEFORE, AFTER = protocol.STAGE_POST_START_HOST, protocol.STAGE_CLEANUP_HOST
STAGE_OF = {
    "prepare_config": MASTER,
    "prepare_host": AFTER,
    "create_container": MASTER,
    "start_process": START,
    "post_start_host": BEFORE,
    "post_start_process": MASTER,
    "monitor_container": MASTER,
    "cleanup_container": MASTER,
    "cleanup_host": AFTER,
}


@pytest.fixture(autouse=True, scope="module")
def orphans(require_root):
    forge.adopt_orphans()


@pytest.fixture(scope="module")
def root() -> Path:
    """A root directory with a mark."""
    tree = images.small_tree(images.shared_folder())
    (tree / "test-root").touch()
    return tree


@pytest.fixture(params=["userns", "root"])
def flow(request) -> str:
    return request.param


@pytest.fixture
def who(flow, user) -> pwd.struct_passwd:
    return pwd.getpwuid(0) if flow == "root" else user


@pytest.fixture
def folder(who, user_tmp) -> Path:
    """A directory that belongs to the caller, who may have no capability in some stages."""
    os.chown(user_tmp, who.pw_uid, who.pw_gid)
    return user_tmp


class Log:
    """What the hooks wrote: name, words, stage and pid of each line."""

    def __init__(self, text: str) -> None:
        lines = [line.split() for line in text.splitlines()]
        rows = [(words[0], words[1:-2], int(words[-2]), int(words[-1])) for words in lines]
        self.lines = [
            SimpleNamespace(name=name, words=words, stage=stage, pid=pid)
            for name, words, stage, pid in rows
        ]

    @classmethod
    def of(cls, folder: Path) -> Log:
        return cls((folder / "log").read_text())

    def named(self, name: str) -> list[SimpleNamespace]:
        return [line for line in self.lines if line.name == name]

    def one(self, name: str) -> SimpleNamespace:
        (line,) = self.named(name)
        return line


def launch(product, flow, who, folder, root, payload, source=None, *, traced_to=None):
    """Start the probe engine; its file and its log lie in `folder`."""
    file = folder / "engine.py"
    file.write_text(source or GOOD.read_text())
    forged = {}
    inherited = []
    if traced_to is not None:
        fd = os.open(traced_to, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        forged, inherited = {"flags": 1, "trace_fd": fd}, [fd]
    data = forge.request(
        product.build_id,
        ["probe", str(root), *payload],
        environment=["KEY=value"],
        cwd="/var",
        engine="probe",
        engine_file=str(file),
        flow=flow,
        **forged,
    )
    starter = product.starter_suid if flow == "setuid" else product.starter
    try:
        return forge.start_starter(
            starter, data, user=None if flow == "root" else who, inherited=inherited
        )
    finally:
        for fd in inherited:
            os.close(fd)


@contextmanager
def waiting(product, flow, who, folder, root, **how):
    """The probe engine with a payload that waits for the end of its stdin."""
    payload = ["/bin/sh", "-c", "echo up; exec cat"]
    process = launch(product, flow, who, folder, root, payload, **how)
    try:
        assert forge.read_line(process.stdout) == b"up\n"
        yield process
    finally:
        process.kill() if process.poll() is None else None
        forge.finish(process)


def test_every_hook_runs_once_in_its_process_and_in_order(product, flow, who, root, folder):
    process = launch(product, flow, who, folder, root, ["/bin/sh", "-c", "echo payload; exit 3"])
    done = forge.finish(process)
    assert (done.status, done.out, done.err) == (3, "payload\n", "")
    log = Log.of(folder)
    assert [(line.name, line.stage) for line in log.lines if line.name in STAGE_OF] == list(
        STAGE_OF.items()
    )
    stages = sorted(line.stage for line in log.named("init_config"))
    assert stages == sorted([MASTER, START, BEFORE, AFTER, protocol.STAGE_METHODS])
    for line in log.named("init_config"):
        mine = [other.name for other in log.lines if other.pid == line.pid and other is not line]
        assert "init_config" not in mine
    assert log.one("start_process").words == ["1"]
    assert log.one("cleanup_container").words == [str(3 << 8)]
    assert forge.left_behind() == []
    assert forge.host_mounts(product) == []


def test_a_method_runs_in_the_container_with_the_mounting_identity(
    product, flow, who, root, folder
):
    trace = folder / "trace"
    process = launch(product, flow, who, folder, root, ["/bin/true"], traced_to=trace)
    assert forge.finish(process).status == 0
    said, space = Log.of(folder).one("answer").words[0].split("-")
    assert said == "called"
    assert int(space) != os.stat("/proc/self/ns/mnt").st_ino
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    (event,) = [e for e in events if e["event"] == "process" and e["process"] == "METHODS"]
    assert traced(event) == expected(table(flow)["METHODS"], who, {"mnt"})


def test_the_host_pair_runs_as_the_caller_in_the_host_namespaces(product, flow, who, root, folder):
    trace = folder / "trace"
    process = launch(product, flow, who, folder, root, ["/bin/true"], traced_to=trace)
    assert forge.finish(process).status == 0
    log = Log.of(folder)
    here = [str(os.stat("/proc/self/ns/mnt").st_ino), str(who.pw_uid)]
    assert log.one("post_start_host").words == ["/var", *here]
    assert log.one("cleanup_host").words == ["True", *here]
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    pair = [event for event in events if event["process"] == "HOST_HELPER"]
    hooks = [event["name"] for event in pair if event["event"] == "hook"]
    assert hooks.count("INIT_CONFIG") == 2
    assert [name for name in hooks if name != "INIT_CONFIG"] == [
        "PREPARE_HOST",
        "POST_START_HOST",
        "CLEANUP_HOST",
    ]
    identities = [traced(event) for event in pair if event["event"] in ("process", "hook")]
    assert identities == [expected(table(flow)["HOST_HELPER"], who, set())] * 7


def test_cleanup_host_runs_when_everything_else_was_killed(product, flow, who, root, folder):
    # A pipe as the log lets the test wait for a line.
    os.mkfifo(folder / "log")
    os.chown(folder / "log", who.pw_uid, who.pw_gid)
    with (
        open(folder / "log", "r+b", buffering=0) as pipe,
        waiting(product, flow, who, folder, root) as process,
    ):
        text = b""
        while b"monitor_container" not in text or b"init_config %d" % AFTER not in text:
            text += forge.read_line(pipe)
        (helper,) = [
            line.pid for line in Log(text.decode()).named("init_config") if line.stage == AFTER
        ]
        others = [process.pid, *forge.descendants(process.pid)]
        assert helper in others
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: nobody sees another's end
            for pid in others:
                if pid != helper:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
        assert forge.finish(process).status == -signal.SIGKILL
        last = Log(forge.read_line(pipe).decode()).one("cleanup_host")
    assert forge.left_behind() == []
    here = [str(os.stat("/proc/self/ns/mnt").st_ino), str(who.pw_uid)]
    assert last.words == ["False", *here]


def test_an_engine_without_the_host_pair(product, flow, who, root, folder):
    source = GOOD.read_text().replace("        context.want_host_helpers()\n", "")
    source = source.replace('        context.tell_host(b"for the host pair")\n', "")
    process = launch(product, flow, who, folder, root, ["/bin/sh", "-c", "exit 4"], source)
    assert forge.finish(process).status == 4
    log = Log.of(folder)
    assert log.one("cleanup_container").words == [str(4 << 8)]
    assert not log.named("post_start_host") + log.named("cleanup_host")
    assert forge.left_behind() == []


def test_an_engine_without_methods(product, flow, who, root, folder):
    source = GOOD.read_text().replace('register_rpc_methods("probe", {"where": where})\n', "")
    done = forge.finish(launch(product, flow, who, folder, root, ["/bin/true"], source))
    assert done.status == 255
    assert "the method where failed: no answer" in done.err
    assert Log.of(folder).one("cleanup_container").words == ["None"]
    assert Log.of(folder).one("cleanup_host").words[0] == "True"
    assert forge.left_behind() == []


def test_the_setuid_flow_refuses_an_engine_file(product, user, root, user_tmp):
    process = launch(product, "setuid", user, user_tmp, root, ["/bin/true"])
    done = forge.finish(process)
    assert (done.status, done.out) == (255, "")
    assert done.err == "FATAL:   the setuid flow accepts built-in engines only\n"
    assert not (user_tmp / "log").exists()


def test_the_setuid_flow_knows_no_other_engine(product, user):
    data = forge.request(product.build_id, ["x", "exec", "/", "true"], engine="probe")
    done = forge.run_starter(product.starter_suid, data, user=user)
    assert done.status == 255
    assert "there is no engine named probe" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("hook", REACHES)
def test_a_hook_that_reaches_beyond_its_stage_ends_the_launch(product, user, root, hook, user_tmp):
    source, _ = bad_engine(hook)
    attribute = REACHES[hook].split(".")[1].split("(")[0]
    # The payload would wait for ever: only the end of the launch ends it.
    ends = hook.startswith("cleanup")
    payload = ["/bin/sh", "-c", "exit 7" if ends else "exec sleep 1000"]
    done = forge.finish(launch(product, "userns", user, user_tmp, root, payload, source))
    assert f"object has no attribute '{attribute}'" in done.err
    assert "Traceback" not in done.err
    assert done.status == (7 if ends else 255)
    assert forge.left_behind() == []


def test_an_engine_that_is_not_python_is_told_in_one_line(product, user, root, user_tmp):
    process = launch(product, "userns", user, user_tmp, root, ["/bin/true"], "def (:\n")
    done = forge.finish(process)
    assert done.status == 255
    assert len(done.err.splitlines()) == 1
    assert forge.left_behind() == []
