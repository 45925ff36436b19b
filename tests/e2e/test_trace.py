"""--trace: every stage, hook, operation and step, as JSON lines that nobody can break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import own_install
from tests.own_install import Installation

KEYS = {
    "event", "number", "process", "pid", "at_us", "took_us", "code", "errno", "uid", "gid", "caps",
    "securebits", "no_new_privs", "dumpable", "namespaces", "text",
}  # fmt: skip
HOOKS = {
    "INIT_CONFIG", "PREPARE_CONFIG", "CREATE_CONTAINER", "START_PROCESS", "POST_START_PROCESS",
    "MONITOR_CONTAINER", "CLEANUP_CONTAINER",
}  # fmt: skip
OPERATIONS = {"CONTAINER", "SERVE_IMAGE", "SESSION", "ROOT_FUSE", "LAYER", "BIND", "PIVOT"}
PROCESSES = {"KEEPER", "MASTER", "RPC", "STAGE2", "IMAGE_SERVER"}
STEPS = {
    "KEEPER_START", "SANITIZED", "FORK_TRACER", "DROP_TRACER", "FORK_MASTER", "DROP_MASTER",
    "LOAD_MASTER", "FORK_CONTAINER", "FORK_RPC", "DROP_RPC", "FORK_SERVER", "DROP_SERVER",
    "EXEC_SERVER", "DROP_STAGE2", "SEALED", "RPC_DONE", "DROP_KEEPER", "GO",
    "EXEC_PAYLOAD", "PAYLOAD_ENDED", "MASTER_ENDED", "KEEPER_END",
}  # fmt: skip
SHIM_STEPS = {"FORK_STAGE2", "DROP_SHIM"}
FLOWS = {"setuid": "SETUID", "userns": "USERNS", "root": "ROOT"}


@pytest.fixture
def own(own) -> Installation:
    own.configure()
    return own


@pytest.fixture
def place(own) -> Iterator[Path]:
    """A directory of the user's."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-trace-", dir="/var/tmp"))
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(made)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a trace; the writer may still be at its last."""
    found: list[dict[str, Any]] = []

    def complete() -> bool:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            return False
        found[:] = [json.loads(line) for line in content[:-1].split(b"\n")]
        return found[-1].get("name") == "KEEPER_END"

    own_install.eventually(complete, "the trace is complete")
    return found


@pytest.mark.parametrize("flow", list(FLOWS))
@pytest.mark.parametrize("options", [(), ("-p",)])
def test_everything_is_there(own, sif, place, flow, options):
    path = place / "trace"
    words = ["-u"] if flow == "userns" else []
    done = own.run("--trace", path, "exec", *words, *options, sif, "true", root=flow == "root")
    assert done.returncode == 0, done.stderr
    lines = lines_of(path)
    names = {event: {x["name"] for x in lines if x["event"] == event} for event in
             ("hook", "operation", "step")}  # fmt: skip
    assert names["hook"] == HOOKS
    wanted = OPERATIONS
    if flow == "root":
        wanted = OPERATIONS - {"SERVE_IMAGE", "ROOT_FUSE"} | {"ROOT_SQUASHFS"}
    assert names["operation"] >= wanted
    steps = STEPS | (SHIM_STEPS if options else set())
    if flow == "root":
        steps = steps - {"FORK_SERVER", "DROP_SERVER", "EXEC_SERVER"}
    assert names["step"] >= steps, steps - names["step"]
    launches = [line for line in lines if line["event"] == "launch"]
    assert [(line["flow"], line["at_us"]) for line in launches] == [(FLOWS[flow], 0)]
    roles = {line["process"] for line in lines if line["event"] == "process"}
    wanted_roles = PROCESSES - ({"IMAGE_SERVER"} if flow == "root" else set())
    assert roles >= wanted_roles | ({"SHIM"} if options else set())


def test_each_line_has_every_fact(own, sif, place):
    path = place / "trace"
    assert own.run("--trace", path, "exec", sif, "true").returncode == 0
    lines = lines_of(path)
    for line in lines:
        assert set(line) >= KEYS, line
        assert ("flow" in line) == (line["event"] == "launch")
        assert [len(line[key]) for key in ("uid", "gid", "caps", "namespaces")] == [4, 4, 5, 8]
        assert 0 <= line["at_us"] < 60_000_000
        assert 0 <= line["took_us"] < 60_000_000
        if line["event"] == "operation":
            assert line["number"] > 100
    longest = max(line["at_us"] + line["took_us"] for line in lines)
    assert longest > 1_000
    facts = path.stat()
    assert (facts.st_uid, facts.st_gid) == (own.user.pw_uid, own.user.pw_gid)


@pytest.mark.parametrize(
    "name",
    ["new\nline", 'quo"te', "back\\slash", "esc\x1b[2J", "bidi\u202e", "raw\udcff", "x" * 250],
)
def test_hostile_names_break_no_line(own, sif, place, name):
    box = place / name
    box.mkdir()
    image, path = box / "i.sif", place / "trace"
    shutil.copy(sif, image)
    done = own.run("--trace", path, "exec", "-B", f"{box}:/opt" if ":" not in name else "/opt",
                   image, "true")  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = path.read_bytes()
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in content)
    lines_of(path)


def test_failed_operation_is_shown(own, sif, place):
    path = place / "trace"
    done = own.run("--trace", path, "exec", "-B", "/etc/hostname:/bin", sif, "true")
    assert done.returncode == 255
    failed = [x for x in lines_of(path) if x["event"] == "operation" and x["code"] != 0]
    assert "/bin" in [x["text"] for x in failed]


def test_fifo_that_nobody_reads(own, sif, place):
    """It must be told, not waited for: the file is the caller's own."""
    path = place / "fifo"
    os.mkfifo(path)
    os.chown(path, own.user.pw_uid, own.user.pw_gid)
    done = own.run("--trace", path, "exec", sif, "true", timeout_s=20)
    assert done.returncode in (0, 255)
    assert "Traceback" not in done.stderr


def test_fifo_whose_reader_reads_nothing(own, sif, place):
    """The pipe fills; the launch goes on, and ends."""
    path = place / "fifo"
    os.mkfifo(path)
    os.chown(path, own.user.pw_uid, own.user.pw_gid)
    with own_install.household() as home:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        import fcntl

        fcntl.fcntl(reader, 1031, 4096)  # F_SETPIPE_SZ
        done = own.run("--trace", path, "exec", sif, "echo", "ran", timeout_s=20)
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
        os.close(reader)
        own_install.eventually(lambda: not home.alive(), "the writer has ended", 2)


@pytest.mark.parametrize("kind", ["directory", "not writable", "in no directory", "empty name"])
def test_file_that_cannot_be_written(own, sif, place, kind):
    target = {
        "directory": place,
        "not writable": Path("/etc/passwd"),
        "in no directory": place / "none/trace",
        "empty name": "",
    }[kind]
    before = Path("/etc/passwd").read_bytes()
    done = own.run("--trace", target, "exec", sif, "true", timeout_s=20)
    if kind != "empty name":
        assert done.returncode == 255
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert Path("/etc/passwd").read_bytes() == before


def test_full_device(own, sif):
    done = own.run("--trace", "/dev/full", "exec", sif, "echo", "ran", timeout_s=20)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_file_size_limit(own, sif, place):
    """The writer hits the caller's limit; the launch does not."""
    path = place / "trace"
    script = 'ulimit -Sf 1; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", own.program, "--trace", path, "exec", sif, "echo", "ran"],
        capture_output=True, text=True, check=False, env=own.environment(), cwd=own.user.pw_dir,
        timeout=20, **own.identity(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_link_to_roots_file(own, sif, place):
    """The file is opened as the caller, not as root."""
    victim = own.place / "root-only"
    victim.write_text("root")
    victim.chmod(0o600)
    (place / "link").symlink_to(victim)
    done = own.run("--trace", place / "link", "exec", sif, "true")
    assert done.returncode == 255
    assert victim.read_text() == "root"
    victim.unlink()


def test_trace_says_nothing_to_others(own, sif, place):
    """Standard output and error are the payload's."""
    path = place / "trace"
    done = own.run("--trace", path, "exec", sif, "echo", "ran")
    assert (done.stdout, done.stderr) == ("ran\n", "")
