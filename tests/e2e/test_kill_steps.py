"""SIGKILL before and after every numbered step: nothing is left, and the command returns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.model import protocol
from tests import images, own_install
from tests.own_install import HostState, assert_nothing_left, eventually, household

STEPS = {
    name[5:]: value
    for name, value in vars(protocol).items()
    if name.startswith("STEP_") and isinstance(value, int)
}
FIRST_OF_INIT = protocol.OP_JOIN  # its rows, from here on, are no part of these launches
OPERATIONS = {
    name[3:]: 100 + value
    for name, value in vars(protocol).items()
    if name.startswith("OP_") and isinstance(value, int) and value < FIRST_OF_INIT
}
NUMBERS = {**OPERATIONS, **STEPS}
BEGIN, END = 0, 1
# After these the process is another program: that one is killed, from outside.
BECOMES_ANOTHER = ("EXEC_SERVER", "EXEC_PAYLOAD", "PLAIN_STARTER")
# Tracer and reader are nobody's need: without them the launch goes on.
HARMLESS = ("DROP_TRACER", "DROP_READER")

ENGINE = """
import os
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime.engine import Operations, register_operations, register_rpc_methods

class Engine(Operations):
    def prepare_config(self, context):
        if "plain" in context.arguments and context.facts.reason != protocol.REASON_POLICY:
            context.use_plain_starter()
        context.want_host_helpers()
        context.tell_start(b"")
        context.plan(ContainerPlan(
            image="", uid=context.facts.uid, gid=context.facts.gid, spaces=0,
            flags=protocol.PLANFLAG_NO_NEW_PRIVS, fuse_count=0, caps=(0, 0, 0, 0, 0)))

    def create_container(self, context):
        assert context.call("ping", b"x") == b"x"
        mounting = context.mounting
        os.close(mounting.session(1))
        facts = os.stat("{tree}")
        os.close(mounting.root_directory("{tree}", facts.st_dev, facts.st_ino, 1, "root"))
        os.close(mounting.layer(protocol.LAYERKIND_NONE, "layer"))
        mounting.pivot()

    def start_process(self, context):
        context.execve(b"/bin/sh", [b"sh", b"-c", b"echo ran"], [])

register_operations("engine", Engine)
register_rpc_methods("engine", {{"ping": lambda data: data}})
"""


def words(*options: str) -> tuple[str, ...]:
    return ("apptainer-py", "exec", *options, "{image}", "sh", "-c", "echo ran")


ALL = ("-p", "--hostname", "steps")
GRANT = ("--add-caps", "CAP_CHOWN")
# flow → options of the request, configuration, image, what is killed there
FLOWS = {
    "setuid": (words(*ALL), "", "sif", [
        "KEEPER_START", "SANITIZED", "FORK_TRACER", "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER",
        "FORK_CONTAINER", "FORK_RPC", "DROP_RPC", "FORK_SERVER", "DROP_SERVER", "EXEC_SERVER",
        "FORK_STAGE2", "DROP_STAGE2", "LOAD_STAGE2", "SEALED", "RPC_DONE", "DROP_KEEPER", "GO",
        "EXEC_PAYLOAD", "DROP_SHIM", "PAYLOAD_ENDED", "MASTER_ENDED", "KEEPER_END",
        "DROP_TRACER", "CONTAINER", "SERVE_IMAGE", "SESSION", "ROOT_FUSE", "LAYER", "BIND",
        "MOUNT", "HOSTNAME", "PIVOT",
    ]),
    "no shim": (words(), "", "sif", [
        "DROP_STAGE2", "LOAD_STAGE2", "SEALED", "RPC_DONE", "DROP_KEEPER", "GO", "EXEC_PAYLOAD",
        "PAYLOAD_ENDED",
    ]),
    "kernel image": (words(), "allow setuid-mount squashfs = yes", "sif", ["ROOT_SQUASHFS"]),
    "underlay": (words("--underlay", "-B", "/etc/hostname:/none/x"), "", "sandbox",
                 ["ROOT_DIRECTORY", "UNDERLAY_BIND"]),
    "userns": (words(*ALL), "", "sif", ["USERNS", "DROP_KEEPER", "SERVE_IMAGE", "ROOT_FUSE"]),
    "granted": (words(*ALL, *GRANT), "", "sif", [
        "FORK_STAGE2", "FORK_BEARER", "DROP_BEARER", "DROP_STAGE2", "LOAD_STAGE2", "SEALED",
        "RPC_DONE", "DROP_KEEPER", "GO", "ASK_BEARER", "EXEC_PAYLOAD", "DROP_SHIM",
        "PAYLOAD_ENDED",
    ]),
    "granted, no shim": (words(*GRANT), "", "sif", [
        "FORK_BEARER", "DROP_BEARER", "DROP_STAGE2", "LOAD_STAGE2", "SEALED", "RPC_DONE",
        "DROP_KEEPER", "GO", "ASK_BEARER", "EXEC_PAYLOAD", "PAYLOAD_ENDED", "PIVOT",
    ]),
    "granted, pid 1": (words("-p", "--no-init", *GRANT), "", "sif", [
        "FORK_BEARER", "DROP_BEARER", "DROP_STAGE2", "SEALED", "GO", "ASK_BEARER", "EXEC_PAYLOAD",
    ]),
    "not allowed": (words(), "allow setuid = no", "sif", ["PLAIN_STARTER"]),
    "engine": (("apptainer-py", "x"), "", "sandbox", [
        "HOST_HELPERS", "FORK_HELPER", "DROP_HELPER", "LOAD_HELPER", "FORK_METHODS",
        "DROP_METHODS", "LOAD_METHODS",
    ]),
    "engine gives up": (("apptainer-py", "plain"), "", "sandbox", ["OP_PLAIN_STARTER"]),
}  # fmt: skip
# What the launcher foresees: kinds, namespaces, flags, the image's place among the arguments.
FORESEEN = 1 | 2 | 4
PID_AND_UTS = protocol.SPACE_PID | protocol.SPACE_UTS
FORECASTS = {
    "early": (FORESEEN, PID_AND_UTS, protocol.PLANFLAG_SHIM, 5),
    "early, wrong": (FORESEEN, 0, 0, 5),
    "userns": (FORESEEN, PID_AND_UTS, protocol.PLANFLAG_SHIM, 5),
}
EARLY = [
    "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER", "FORK_CONTAINER", "FORK_RPC", "DROP_RPC",
    "FORK_SERVER", "DROP_SERVER", "FORK_STAGE2", "DROP_STAGE2", "LOAD_STAGE2", "FORK_READER",
    "DROP_READER", "CONTAINER", "SERVE_IMAGE", "SESSION", "ROOT_FUSE", "SEALED",
]  # fmt: skip
FLOWS["early"] = (words(*ALL), "", "sif", EARLY)
# The plan differs, so that all is begun a second time.
FLOWS["early, wrong"] = (words(*ALL), "", "sif", ["CONTAINER", "SESSION", "PIVOT", "GO"])
COVERED_IN_LONG = {
    "userns": [
        "KEEPER_START", "SANITIZED", "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER",
        "FORK_CONTAINER", "FORK_RPC", "DROP_RPC", "FORK_SERVER", "DROP_SERVER", "FORK_STAGE2",
        "DROP_STAGE2", "LOAD_STAGE2", "SEALED", "RPC_DONE", "GO", "EXEC_PAYLOAD", "DROP_SHIM",
        "PAYLOAD_ENDED", "MASTER_ENDED", "KEEPER_END", "CONTAINER", "SESSION", "LAYER", "BIND",
        "MOUNT", "HOSTNAME", "PIVOT",
    ],
}  # fmt: skip


def number_of(name: str) -> int:
    """A step's number; an operation of the same name as a step is written with OP_."""
    return OPERATIONS[name[3:]] if name.startswith("OP_") else NUMBERS[name]


def rows(table: dict[str, list[str]]) -> list[tuple[str, str, int]]:
    found = []
    for flow, names in table.items():
        for name in names:
            ends = (BEGIN,) if name in BECOMES_ANOTHER or name == "OP_PLAIN_STARTER" else (0, 1)
            found += [(flow, name, end) for end in ends]
    return found


HERE = rows({flow: row[3] for flow, row in FLOWS.items()})
# Each has a test of its own below, by the name of what is killed.
FROM_OUTSIDE = [(name, END) for name in (*BECOMES_ANOTHER, "OP_PLAIN_STARTER")]


@pytest.fixture(scope="module")
def world(require_root) -> Iterator[SimpleNamespace]:
    plain, suid = own_install.starter_with_steps()
    own = own_install.installation()
    folder = images.shared_folder()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-steps-", dir="/var/tmp"))
    made.chmod(0o755)
    sandbox = images.small_tree(folder)
    engine = made / "engine.py"
    engine.write_text(ENGINE.format(tree=sandbox))
    grants = own.sysconfdir / "capability.json"
    grants.write_text(json.dumps({"users": {own.user.pw_name: ["CAP_CHOWN"]}}))
    grants.chmod(0o644)
    yield SimpleNamespace(
        own=own, plain=plain, suid=suid, engine=engine, build_id=own.facts()["BUILD_ID"],
        sif=images.own_sif(folder), sandbox=sandbox, place=made,
    )  # fmt: skip
    own.restore()
    shutil.rmtree(made)


def launch(world, flow: str, die: str, trace: Path | None = None) -> subprocess.Popen[bytes]:
    """Start the starter as the launcher does, with the variable that it would not pass on."""
    arguments, configuration, kind, _ = FLOWS[flow]
    own = world.own
    own.configure(configuration)
    image = world.sif if kind == "sif" else world.sandbox
    engine = flow.startswith("engine")
    # The tracer is one of the processes: it is always there.
    target = trace or Path("/dev/null")
    trace_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.set_inheritable(trace_fd, True)
    setuid = flow not in ("userns", "engine", "engine gives up")
    content = own_install.request_bytes(
        world.build_id,
        [word.format(image=image) for word in arguments],
        own.environment(),
        flow=protocol.FLOW_SETUID if setuid else protocol.FLOW_USERNS,
        cwd="/",
        engine="engine" if engine else "apptainer",
        engine_file=str(world.engine) if engine else "",
        trace_fd=trace_fd,
        forecast=FORECASTS.get(flow, (0, 0, 0, 0)),
    )
    request = own_install.sealed(content)
    try:
        return subprocess.Popen(
            ["Apptainer runtime parent", str(request)],
            executable=world.suid if setuid else world.plain,
            pass_fds=(request, trace_fd),
            env={"APY_TEST_DIE": die},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            **own.identity(),
        )
    finally:
        os.close(request)
        os.close(trace_fd)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=15)
    return process.returncode, out, err


def kill_at(world, flow: str, name: str, end: int) -> None:
    with household() as home:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow, f"{number_of(name)}:-1:{end}"))
        status, out, err = finish(process)
        assert b"STEPS:   a process dies here" in err, (status, out, err)
        assert_nothing_left(home, host)
    # The command ends as the killed one, or with its own word for it, or had done its work.
    assert status in (0, 255, -signal.SIGKILL, 128 + signal.SIGKILL), (status, err)
    if name in HARMLESS:
        assert (status, out) == (0, b"ran\n")
    assert b"Traceback" not in err


@pytest.mark.parametrize(("flow", "name", "end"), HERE)
def test_killed_at_a_step(world, flow, name, end):
    kill_at(world, flow, name, end)


@pytest.mark.long
@pytest.mark.parametrize(("flow", "name", "end"), rows(COVERED_IN_LONG))
def test_killed_at_a_step_in_the_other_flow(world, flow, name, end):
    kill_at(world, flow, name, end)


@pytest.mark.parametrize("flow", list(FLOWS))
def test_flow_works_when_nobody_dies(world, flow):
    """Otherwise a kill would prove nothing."""
    with household() as home:
        host = HostState(world.own.session, world.place)
        process = home.adopt(launch(world, flow, ""))
        status, out, err = finish(process)
        assert_nothing_left(home, host)
    assert (status, out) == (0, b"ran\n"), err


def test_payload_killed_at_its_first_moment(world):
    """The far end of EXEC_PAYLOAD."""
    with household() as home:
        host = HostState(world.own.session)
        done = world.own.run("exec", "-p", world.sif, "sh", "-c", "kill -KILL $$")
        assert done.returncode == 128 + signal.SIGKILL, done.stderr
        assert_nothing_left(home, host)


def test_image_server_killed_once_it_runs(world):
    """The far end of EXEC_SERVER."""
    with household() as home:
        host = HostState(world.own.session)
        words = ["exec", world.sif, "sh", "-c", "while :; do ls /bin; done"]
        process = home.adopt(world.own.start(*words, stdout=subprocess.DEVNULL))

        def servers() -> list[int]:
            found = home.alive().items()
            return [pid for pid, (_, _, name) in found if name == "squashfuse_ll"]

        eventually(servers, "the image server runs")
        os.kill(servers()[0], signal.SIGKILL)
        assert process.wait(timeout=15) != 0
        assert_nothing_left(home, host)


@pytest.mark.parametrize("flow", ["not allowed", "engine gives up"])
def test_plain_starter_killed_at_its_first_moment(world, flow):
    """The far end of PLAIN_STARTER, step and operation: the program that it becomes."""
    with household() as home:
        host = HostState(world.own.session)
        process = home.adopt(launch(world, flow, ""))
        link = Path(f"/proc/{process.pid}/exe")
        plain = world.own.libexec / "starter"

        def became_plain() -> bool:
            return process.poll() is not None or os.readlink(link) == str(plain)

        eventually(became_plain, "the plain starter runs")
        process.kill()
        finish(process)
        assert_nothing_left(home, host)


def test_every_number_is_covered():
    numbers = [*STEPS.values(), *OPERATIONS.values()]
    wanted = {(number, end) for number in numbers for end in (BEGIN, END)}
    killed = {(number_of(name), end) for _, name, end in HERE}
    killed |= {(number_of(name), end) for name, end in FROM_OUTSIDE}
    assert killed == wanted


def test_trace_prints_every_number(world):
    """What a flow of the table kills at, the trace of that flow shows."""
    own = world.own
    trace = own.place / "trace"
    for flow, (_, _, _, names) in FLOWS.items():
        trace.unlink(missing_ok=True)
        finish(launch(world, flow, "", trace))
        shown = {
            line["number"]
            for line in map(json.loads, trace.read_text().splitlines())
            if line["event"] in ("step", "operation")
        }
        # The process has become another program before it could tell of this one.
        told = {number_of(name) for name in names if name != "OP_PLAIN_STARTER"}
        assert told <= shown, flow
    trace.unlink()


def test_installed_starter_has_no_such_hook(world):
    assert b"APY_TEST_DIE" in world.suid.read_bytes()
    for program in (world.own.suid, world.own.libexec / "starter"):
        assert b"APY_TEST_DIE" not in program.read_bytes()
        assert b"a process dies here" not in program.read_bytes()
