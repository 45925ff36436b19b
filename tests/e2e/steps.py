"""The numbered steps of a launch, flows that pass all of them, and the starter that stops there."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apptainer_py.model import protocol
from tests import own_install
from tests.own_install import Household, eventually

# What belongs to the oci engine is no part of these launches: its steps, its rows from JOIN on.
FIRST_OF_OCI = protocol.STEP_FORK_INIT
FIRST_OF_INIT = protocol.OP_JOIN
# Layers of overlays, --fakeroot, root's janitor, and a mount of another launch. What is left of
# instances and joins has a table of its own (test_kill_instances.py), for they go on when the
# command has ended. OFFER_MOUNT needs two launches (test_sharing.py).
LATER_STEPS = (
    "FORK_LAYER", "OWN_NAMESPACE", "MAP_IDS", "FORK_ID_MAPPER", "BECOME_ROOT", "FORK_JANITOR",
    "DROP_JANITOR", "TAKE_MOUNT",
)  # fmt: skip
LATER_OPERATIONS = (
    "NETNS", "JANITOR", "SPACE", "FUSE_DEVICE", "CLEAN_GROUP", "NETWORK", "PORT", "ADD_NETWORKS",
)  # fmt: skip
# The janitor lets the tracer go before it serves anybody.
UNTRACED = ("CLEAN_GROUP", "ADD_NETWORKS")
STEPS = {
    name[5:]: value
    for name, value in vars(protocol).items()
    if name.startswith("STEP_")
    and isinstance(value, int)
    and (value < FIRST_OF_OCI or name[5:] in LATER_STEPS)
}
OPERATIONS = {
    name[3:]: 100 + value
    for name, value in vars(protocol).items()
    if name.startswith("OP_")
    and isinstance(value, int)
    and (value < FIRST_OF_INIT or name[3:] in LATER_OPERATIONS)
}
ROLES = {
    value: name[5:]
    for name, value in vars(protocol).items()
    if name.startswith("ROLE_") and isinstance(value, int)
}
# Names that a process has by itself.
NAMES = {"appinit": "SHIM", "squashfuse_ll": "IMAGE_SERVER", "sh": "PAYLOAD"}
NUMBERS = {**OPERATIONS, **STEPS}
BEGIN, END = 0, 1
# After these the process is another program: that one is killed, from outside.
BECOMES_ANOTHER = ("EXEC_SERVER", "EXEC_PAYLOAD", "PLAIN_STARTER")
# Tracer and reader are nobody's need: without them the launch goes on.
HARMLESS = ("DROP_TRACER", "DROP_READER")
# The payload is over, whatever becomes of the launch.
AFTER_PAYLOAD = ("PAYLOAD_ENDED", "MASTER_ENDED", "KEEPER_END")
# post_start_host runs beside the payload, and its failure ends it; so does keeper's, behind GO.
BESIDE_PAYLOAD = (("DROP_HELPER", 0), ("DROP_HELPER", 1), ("LOAD_HELPER", 0), ("LOAD_HELPER", 1),
                  ("GO", 1))  # fmt: skip
# What was begun early is begun again; stage 2 is done once it has told bearer what to run.
MAY_GO_ON = (*((name, end) for name in (*HARMLESS, "FORK_READER", "DROP_HELPER", "LOAD_HELPER")
               for end in (0, 1)), ("ASK_BEARER", 1))  # fmt: skip
HARMLESS_DEATHS = ("TRACER", "READER")
# No user is told this because a process of the launch was killed.
NO_REASONS = (b"Traceback", b"internal error", b"the launch is abandoned")

ENGINE = """
import os
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime.engine import Operations, register_operations, register_rpc_methods

class Engine(Operations):
    def prepare_config(self, context):
        if "plain" in context.arguments and context.facts.reason != protocol.REASON_ENGINE:
            context.use_plain_starter()
        context.want_host_helpers()
        context.tell_start(b"")
        context.plan(ContainerPlan(
            image="", uid=context.facts.uid, gid=context.facts.gid,
            spaces=protocol.SPACE_NET, flags=protocol.PLANFLAG_NO_NEW_PRIVS, fuse_count=0,
            caps=(0, 0, 0, 0, 0)))

    def create_container(self, context):
        assert context.call("ping", b"x") == b"x"
        mounting = context.mounting
        os.close(mounting.session(1))
        facts = os.stat("{tree}")
        os.close(mounting.root_directory("{tree}", facts.st_dev, facts.st_ino, 1, "root"))
        os.close(mounting.layer(protocol.LAYERKIND_NONE, "layer"))
        os.close(mounting.space(0))
        mounting.pivot()

    def start_process(self, context):
        context.execve(b"/bin/sh", [b"sh", b"-c", b"echo ran"], [])

register_operations("engine", Engine)
register_rpc_methods("engine", {{"ping": lambda data: data}})
"""


def words(*options: str) -> tuple[str, ...]:
    return ("apptainer-py", "exec", *options, "{image}", "sh", "-c", "{script}")


ALL = ("-p", "--hostname", "steps")
GRANT = ("--add-caps", "CAP_CHOWN")
# flow → options of the request, configuration, image, what is killed there
FLOWS = {
    "setuid": (words(*ALL), "", "sif", [
        "KEEPER_START", "SANITIZED", "FORK_TRACER", "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER",
        "FORK_CONTAINER", "FORK_RPC", "DROP_RPC", "FORK_SERVER", "DROP_SERVER", "EXEC_SERVER",
        "FORK_STAGE2", "DROP_STAGE2", "SEALED", "RPC_DONE", "DROP_KEEPER", "GO",
        "EXEC_PAYLOAD", "DROP_SHIM", "PAYLOAD_ENDED", "MASTER_ENDED", "KEEPER_END",
        "DROP_TRACER", "CONTAINER", "SERVE_IMAGE", "SESSION", "ROOT_FUSE", "LAYER", "BIND",
        "MOUNT", "HOSTNAME", "PIVOT",
    ]),
    "no shim": (words(), "", "sif", [
        "DROP_STAGE2", "SEALED", "RPC_DONE", "DROP_KEEPER", "GO", "EXEC_PAYLOAD",
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
        "DROP_METHODS", "LOAD_METHODS", "SPACE",
    ]),
    # A mount on the host that the container takes.
    "host image": (words("-p"), "allow userns-mount fuse = no", "sif", [
        "HOST_HELPERS", "FUSE_DEVICE", "FORK_HELPER", "DROP_HELPER", "LOAD_HELPER", "SERVE_IMAGE",
        "ROOT_DIRECTORY", "GO",
    ]),
    "engine gives up": (("apptainer-py", "plain"), "", "sandbox", ["OP_PLAIN_STARTER"]),
    "overlays": (words("-p", "--overlay", "{overlay}", "--overlay", "{squashfs}"), "", "sif", [
        "IMAGE_FUSE", "IMAGE_DIRECTORY", "IMAGE_LAYER", "FORK_LAYER", "LAYER",
    ]),
    "extfs": (words("--overlay", "{place}/extfs.img:ro"), "", "sif", ["SERVE_EXTFS"]),
    "kernel overlay": (words("--overlay", "{squashfs}"), "allow setuid-mount squashfs = yes", "sif",
                       ["IMAGE_KERNEL"]),
    "fakeroot": (words("-f"), "", "sif", [
        "OWN_NAMESPACE", "MAP_IDS", "BECOME_ROOT", "DROP_RPC", "DROP_STAGE2", "GO",
    ]),
    "limits": (words("--pids-limit", "100"), "", "sif", [
        "JANITOR", "FORK_JANITOR", "DROP_JANITOR", "CLEAN_GROUP",
    ]),
    "netns": (words("--netns-path", "{netns}"), "", "sif", ["NETNS"]),
    "userns fakeroot": (words("-f"), "", "sif", ["MAP_IDS", "FORK_ID_MAPPER", "BECOME_ROOT"]),
}  # fmt: skip
ROOT_FLOWS = ("limits", "netns")
# On a host of their own, to which `before` takes a launch (test_kill_networks.py).
NETWORK_STEPS = [
    "NETWORK", "PORT", "JANITOR", "FORK_JANITOR", "DROP_JANITOR", "ADD_NETWORKS",
]  # fmt: skip
# What the launcher foresees: kinds, namespaces, flags, the image's place among the arguments.
FORESEEN = 1 | 2 | 4
PID_AND_UTS = protocol.SPACE_PID | protocol.SPACE_UTS
SHIM_AND_LEAN = protocol.PLANFLAG_SHIM | protocol.PLANFLAG_LEAN
FORECASTS = {
    "early": (FORESEEN, PID_AND_UTS, SHIM_AND_LEAN, 5),
    "early, wrong": (FORESEEN, 0, protocol.PLANFLAG_LEAN, 5),
    "userns": (FORESEEN, PID_AND_UTS, SHIM_AND_LEAN, 5),
}
EARLY = [
    "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER", "TAKE_MOUNT", "FORK_CONTAINER", "FORK_RPC",
    "DROP_RPC", "FORK_SERVER", "DROP_SERVER", "FORK_STAGE2", "DROP_STAGE2", "FORK_READER",
    "DROP_READER", "CONTAINER", "SERVE_IMAGE", "SESSION", "ROOT_FUSE", "SEALED",
]  # fmt: skip
FLOWS["early"] = (words(*ALL), "", "sif", EARLY)
# The plan differs, so that all is begun a second time.
FLOWS["early, wrong"] = (words(*ALL), "", "sif", ["CONTAINER", "SESSION", "PIVOT", "GO"])
COVERED_IN_LONG = {
    "userns": [
        "KEEPER_START", "SANITIZED", "FORK_MASTER", "DROP_MASTER", "LOAD_MASTER",
        "FORK_CONTAINER", "FORK_RPC", "DROP_RPC", "FORK_SERVER", "DROP_SERVER", "FORK_STAGE2",
        "DROP_STAGE2", "SEALED", "RPC_DONE", "GO", "EXEC_PAYLOAD", "DROP_SHIM",
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


def flow_of(flow: str) -> int:
    """Return the flow that the launcher would choose for one of the table."""
    if flow in ROOT_FLOWS:
        return protocol.FLOW_ROOT
    plain = flow in ("userns", "host image", "engine", "engine gives up", "userns fakeroot")
    return protocol.FLOW_USERNS if plain else protocol.FLOW_SETUID


def launch(
    world: Any, flow: str, *, die: str = "", wait: str = "", trace: Path | None = None,
    inherited: Sequence[int] = (), script: str = "echo ran", netns: str = "/proc/self/ns/net",
    before: Sequence[str] = (), limit_ms: int = 0,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start the starter as the launcher does, with variables that it would not pass on.

    Programs that stand before it take it to its place, and make it the user's.
    """
    arguments, configuration, kind, _ = FLOWS[flow]
    own = world.own
    own.configure(configuration)
    own.grant("CAP_CHOWN")
    image = world.sif if kind == "sif" else world.sandbox
    engine = flow.startswith("engine")
    # The tracer is one of the processes: it is always there.
    target = trace or Path("/dev/null")
    trace_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.set_inheritable(trace_fd, True)
    setuid = flow_of(flow) == protocol.FLOW_SETUID
    root = flow in ROOT_FLOWS
    places = {
        "place": world.place,
        "netns": netns,
        "overlay": world.overlay,
        "squashfs": world.squashfs,
    }
    content = own_install.request_bytes(
        world.build_id,
        [word.format(image=image, script=script, **places) for word in arguments],
        own.environment(),
        flow=flow_of(flow),
        cwd="/",
        engine="engine" if engine else "apptainer",
        engine_file=str(world.engine) if engine else "",
        trace_fd=trace_fd,
        forecast=FORECASTS.get(flow, (0, 0, 0, 0)),
    )
    request = own_install.sealed(content)
    try:
        program = world.suid if setuid else world.plain
        return subprocess.Popen(
            [*before, str(program) if before else "Apptainer runtime parent", str(request)],
            executable=before[0] if before else program,
            pass_fds=(request, trace_fd, *inherited),
            env={"APY_TEST_DIE": die, "APY_TEST_WAIT": wait, "APY_TEST_LIMIT_MS": str(limit_ms)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            **({} if root or before else own.identity()),
        )
    finally:
        os.close(request)
        os.close(trace_fd)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=own_install.DEADLINE_S)
    return process.returncode, out, err


def ends() -> tuple[int, ...]:
    """Return how a launch may end: with its own word, or as one of its processes did.

    The first process of a pid namespace cannot send itself SIGKILL, and traps instead.
    """
    signals = (signal.SIGKILL, signal.SIGILL)
    return (0, 255, *(-number for number in signals), *(128 + number for number in signals))


def told(status: int, err: bytes) -> bool:
    """Return whether a launch that failed by itself says so in one line, and in a user's words."""
    if any(word in err for word in NO_REASONS):
        return False
    last_words = [line for line in err.splitlines() if line.startswith((b"FATAL", b"ERROR"))]
    return len(last_words) == 1 if status == 255 else len(last_words) <= 1


def has_spoken(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the payload has written anything yet."""
    assert process.stdout is not None
    count = array.array("i", [0])
    fcntl.ioctl(process.stdout, termios.FIONREAD, count)
    return count[0] > 0


class Gate:
    """The page that a test shares with a starter which waits at a step (starter/steps.c)."""

    _FORM = struct.Struct("=5i")
    _WIDE = (1 << 31) - 1

    def __init__(self) -> None:
        self.fd = os.memfd_create("gate")
        os.set_inheritable(self.fd, True)
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._page = mmap.mmap(self.fd, mmap.PAGESIZE)

    def reached(self) -> bool:
        """Return whether a process waits there."""
        reached, _, passed, _, _ = self._FORM.unpack_from(self._page)
        return bool(reached > passed)

    def waiting(self) -> str:
        """Return the role of the process that waits."""
        return ROLES[self._FORM.unpack_from(self._page)[1]]

    def open(self) -> None:
        """Let it go on, and whoever comes later."""
        reached, role, _, step, end = self._FORM.unpack_from(self._page)
        self._FORM.pack_into(self._page, 0, reached, role, self._WIDE, step, end)

    def move(self, step: int, end: int) -> None:
        """Let it go on, and have the next one wait elsewhere."""
        reached, role, _, _, _ = self._FORM.unpack_from(self._page)
        self._FORM.pack_into(self._page, 0, reached, role, reached, step, end)

    def close(self) -> None:
        """Give the page back."""
        self._page.close()
        os.close(self.fd)


@contextmanager
def gate() -> Iterator[Gate]:
    """Make a gate, and leave it open."""
    made = Gate()
    try:
        yield made
    finally:
        made.open()
        made.close()


def processes(home: Household) -> dict[str, int]:
    """Return the processes of a launch by role, two of one role with a number behind it."""
    found: dict[str, int] = {}
    for pid, (_, state, name) in sorted(home.alive().items()):
        if state != "Z":
            role, number = NAMES.get(name, name), 2
            while role in found:
                role, number = f"{role} {number}", number + 1
            found[role] = pid
    return found


def settled(home: Household) -> dict[str, int]:
    """Wait until nobody has anything left to do, and return who is there.

    Whoever looks into a mount that nobody serves yet waits without a signal reaching it (D).
    """
    seen: list[object] = []

    def quiet() -> bool:
        seen.append(sorted(home.alive().items()))
        idle = all(state in "SDZ" for _, (_, state, _) in seen[-1])  # type: ignore[attr-defined]
        return idle and len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

    eventually(quiet, "all wait")
    return processes(home)
