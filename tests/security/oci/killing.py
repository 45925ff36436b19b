"""Commands of the oci engine, each of which passes some numbered steps, and who dies there."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apptainer_py.model import protocol
from tests.oci import bed as beds
from tests.own_install import HostState, Household, eventually, household

BEGIN, END = 0, 1
NAMED = {name: value for name, value in vars(protocol).items() if isinstance(value, int)}
# What the launch passes on its way to the interpreter is the first engine's too.
SHARED = ("KEEPER_START", "DROP_MASTER", "LOAD_MASTER", "GO", "EXEC_PAYLOAD")
STEPS = {
    name[5:]: value
    for name, value in NAMED.items()
    if name.startswith("STEP_")
    and (protocol.STEP_FORK_INIT <= value <= protocol.STEP_UNDONE or name[5:] in SHARED)
}
OF_APPTAINER = ("OP_STREAM", "OP_IMAGE", "OP_OVERLAY")
OPERATIONS = {
    f"OP_{name[3:]}": 100 + value
    for name, value in NAMED.items()
    # Streams that the monitor keeps, and images, are of the other command line.
    if name.startswith("OP_")
    and protocol.OP_JOIN <= value <= protocol.OP_OVERLAY
    and name not in OF_APPTAINER
}
NUMBERS = {**STEPS, **OPERATIONS}
# Behind these the process is another program, or waits: whoever dies there is killed from outside.
WITHOUT_END = ("EXEC_STARTER", "EXEC_INIT", "GO", "EXEC_PAYLOAD", "OP_GO")
DIED = b"STEPS:   a process dies here"
DEADLINE_S = 30.0

_ASSEMBLED = (
    "FS FSOPT TREE ATTR COPYUP PLACE REMOUNT MKNOD LINK NETDEV RUN_HOOKS ENTER "
    "ROOT_READONLY NAME SYSCTL READONLY_PATH MASK_PATH"
).split()
_LAUNCH = ["EXEC_STARTER", "KEEPER_START", "DROP_MASTER", "LOAD_MASTER", "FORK_INIT", "EXEC_INIT"]
_INSIDE = [f"OP_{name}" for name in ("PROCESS", "GO")]
# flow → what is killed there; the flows are the methods of Ground below.
FLOWS: dict[str, list[str]] = {
    "create": [
        *_LAUNCH, "STATE_MADE", "STATE_NAMED", "GROUPS_MADE", "PID_NAMED", "LIMITS_SET",
        "OUTER_HOOKS", "STATE_DONE", "TOLD_PID", "GO",
        *(f"OP_{name}" for name in ("CGROUP", "PREP", "SPACES", "MAPPED", "KEYRING")),
        *(f"OP_{name}" for name in ("PROPAGATION", "ROOT_BUNDLE", *_ASSEMBLED)), *_INSIDE,
    ],
    "create terminal": ["OP_CONSOLE"],
    "create mapped": ["MAPS_WRITTEN", "OP_SPACES", "OP_MAPPED"],
    "create labelled": ["OP_APPARMOR"],
    "create failing": ["UNDONE"],
    "start": ["EXEC_PAYLOAD", "OPEN_FIFO", "POSTSTART"],
    "kill": ["SIGNAL"],
    "delete": ["REMOVE_GROUPS", "REMOVE_FILES", "POSTSTOP"],
    "delete running": ["SIGNAL", "REMOVE_GROUPS", "REMOVE_FILES", "POSTSTOP"],
    "delete creating": ["END_CREATOR"],
    "run": ["WATCHED", "UNDONE", "EXEC_PAYLOAD"],
    "run detached": ["TOLD_PID", "OP_GO", "EXEC_PAYLOAD"],
    "exec": [
        *("EXEC_STARTER", "FORK_INIT", "EXEC_INIT", "TOLD_PID", "WATCHED", "EXEC_PAYLOAD"),
        *(f"OP_{name}" for name in ("JOIN", "TENANT", "SPACES", "MAPPED", "CGROUP", "PREP")),
        *_INSIDE,
    ],
}  # fmt: skip


def number_of(name: str) -> int:
    """Return the number by which a program is told to die at a step."""
    return NUMBERS[name]


def rows() -> list[tuple[str, str, int]]:
    """Return (flow, step, end) of every kill."""
    return [
        (flow, name, end)
        for flow, names in FLOWS.items()
        for name in names
        for end in ((BEGIN,) if name in WITHOUT_END else (BEGIN, END))
    ]


class Ground:
    """Where containers are made and killed: one state directory, one bundle for each flow."""

    def __init__(self, program: Path, place: Path, device: str) -> None:
        self.program = program
        self.place = place
        self.device = device
        self.state = place / "state"
        self.state.mkdir(mode=0o700)
        self._bundles: dict[str, beds.Bundle] = {}
        self._count = 0

    def facts(self) -> dict[str, Any]:
        """Return what was compiled into the programs."""
        prefix = self.program.parents[2]
        return runpy.run_path(str(prefix / "lib/apptainer-py/apptainer_py/base/build.py"))

    # ---- what is run

    def start(
        self, *words: str, die: str = "", wait: str = "", out: Path, inherited: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to a file: containers inherit it."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/root"}
        if die:
            environment["APY_TEST_DIE"] = die
        if wait:
            environment["APY_TEST_WAIT"] = wait
        with out.open("ab") as stream:
            return subprocess.Popen(
                [self.program, "--root", self.state, *words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                pass_fds=inherited,
                cwd=self.place,
            )

    # ---- bundles

    def bundle(self, kind: str) -> beds.Bundle:
        """Return the bundle of a flow; the tests leave it as it is."""
        if kind not in self._bundles:
            made = beds.Bundle(self.place / f"bundle-{len(self._bundles)}").args("sleep", "600")
            getattr(self, f"_fill_{kind}")(made)
            made.write()
            self._bundles[kind] = made
        return self._bundles[kind]

    def _fill_plain(self, made: beds.Bundle) -> None:
        made.hook("poststart", "true").hook("poststop", "true")

    def _fill_everything(self, made: beds.Bundle) -> None:
        for kind in ("prestart", "createRuntime", "createContainer", "startContainer"):
            made.hook(kind, "true")
        (made.path / "source").mkdir()
        made.mount("/mnt", "bind", str(made.path / "source"), "rbind", "ro")
        made.mount("/var", "tmpfs", "tmpfs", "tmpcopyup")
        made.mount("/dev/shm", "", "", "remount", "bind", "ro")
        made.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
        made.linux["netDevices"] = {self.device: {}}
        made.process["oomScoreAdj"] = 100
        # What the first kill would make is there, so that each leaves the bundle as it was.
        for name in ("mnt", "dev/pts", "dev/shm", "dev/mqueue"):
            (made.rootfs / name).mkdir(parents=True, exist_ok=True)

    def _fill_terminal(self, made: beds.Bundle) -> None:
        made.process["terminal"] = True

    def _fill_mapped(self, made: beds.Bundle) -> None:
        made.user_space()

    def _fill_labelled(self, made: beds.Bundle) -> None:
        made.process["apparmorProfile"] = "unheard-of"

    def _fill_failing(self, made: beds.Bundle) -> None:
        made.args("/no/such/program")

    def _fill_hanging(self, made: beds.Bundle) -> None:
        made.hook("createRuntime", f"cat {made.path}/gate >/dev/null")
        os.mkfifo(made.path / "gate")

    def _fill_short(self, made: beds.Bundle) -> None:
        made.args("true")

    # ---- one kill

    @contextmanager
    def scene(self, flow: str) -> Iterator[Scene]:
        """Be ready for the command of a flow; nothing of it may be left afterwards."""
        self._count += 1
        self.restore_device()
        scene = Scene(self, flow, f"kill-{os.getpid()}-{self._count}")
        with household() as home:
            scene.home = home
            scene.prepare()
            try:
                yield scene
            finally:
                scene.close()

    def restore_device(self) -> None:
        """Have the network device that a configuration names; it goes with a namespace."""
        if not Path(f"/sys/class/net/{self.device}").exists():
            peer = f"{self.device}p"
            subprocess.run(["ip", "link", "del", peer], check=False, capture_output=True)
            words = ["type", "veth", "peer", "name", peer]
            subprocess.run(["ip", "link", "add", self.device, *words], check=True)


_BUNDLES = {
    "create": "everything", "create terminal": "terminal",
    "create mapped": "mapped", "create labelled": "labelled",
    "create failing": "failing", "delete creating": "hanging", "run": "short",
}  # fmt: skip


class Scene:
    """One container, and the command that somebody dies in."""

    home: Household

    def __init__(self, ground: Ground, flow: str, name: str) -> None:
        self.ground = ground
        self.flow = flow
        self.name = name
        self.bundle = ground.bundle(_BUNDLES.get(flow, "plain"))
        self.out = ground.place / f"{name}.out"
        self.pid_file = ground.place / f"{name}.pid"
        self.listener: socket.socket | None = None
        self.gate = -1
        self.host = HostState(ground.state, self.bundle.path)

    def prepare(self) -> None:
        """Come to where the command of the flow is next."""
        steps: dict[str, Callable[[], object]] = {
            "kill": self._started, "delete": self._stopped, "delete running": self._started,
            "exec": self._started, "delete creating": self._hanging,
        }  # fmt: skip
        steps.get(self.flow, lambda: None)()
        if self.flow == "create terminal":
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(self._console()))
            self.listener.listen(1)

    def _console(self) -> Path:
        return self.ground.place / f"{self.name}.sock"

    def call(self, *words: str, out: Path | None = None, **how: Any) -> int:
        """Run a command to its end, and reap meanwhile whatever has come to us.

        A pid namespace, and so its first process, ends when the last of its processes is reaped.
        """
        process = self.home.adopt(self.ground.start(*words, out=out or self.out, **how))

        def ended() -> bool:
            self.home.alive()
            return process.poll() is not None

        eventually(ended, f"{words} ends", DEADLINE_S)
        return process.returncode

    def _good(self, *words: str) -> None:
        status = self.call(*words)
        assert status == 0, self.said()

    def _created(self) -> None:
        self._good("create", "--bundle", str(self.bundle.path), self.name)

    def _started(self) -> None:
        self._created()
        self._good("start", self.name)

    def _stopped(self) -> None:
        self._started()
        self._good("kill", self.name, "KILL")
        eventually(lambda: not self.home.alive(), "the payload has ended")

    def _hanging(self) -> None:
        words = ("create", "--bundle", str(self.bundle.path), self.name)
        self.home.adopt(self.ground.start(*words, out=self.out))
        # Whoever opens the other end of a fifo has come.
        self.gate = os.open(self.bundle.path / "gate", os.O_WRONLY)

    def words(self) -> list[tuple[str, ...]]:
        """Return the commands of the flow; the processes of all of them can be told to die."""
        bundle, pid_file = str(self.bundle.path), str(self.pid_file)
        from_bundle = ("--bundle", bundle, "--pid-file", pid_file)
        return {
            "create": [("create", *from_bundle, self.name)],
            "create terminal": [("create", *from_bundle, "--console-socket",
                                 str(self._console()), self.name)],
            "create mapped": [("create", *from_bundle, self.name)],
            "create labelled": [("create", *from_bundle, self.name)],
            "create failing": [("create", *from_bundle, self.name)],
            "start": [("create", *from_bundle, self.name), ("start", self.name)],
            "kill": [("kill", self.name, "KILL")],
            "delete": [("delete", self.name)],
            "delete running": [("delete", "--force", self.name)],
            "delete creating": [("delete", "--force", self.name)],
            "run": [("run", *from_bundle, self.name)],
            "run detached": [("run", "--detach", *from_bundle, self.name)],
            "exec": [("exec", "--pid-file", pid_file, self.name, "true")],
        }[self.flow]  # fmt: skip

    def said(self) -> bytes:
        """Return what all commands and the container have written."""
        return self.out.read_bytes() if self.out.exists() else b""

    def run(self, die: str) -> int:
        """Run the commands of the flow; returns the status of the last one that was run."""
        status = 0
        for words in self.words():
            status = self.call(*words, die=die)
            if status != 0:
                break
        return status

    def recover(self) -> None:
        """Assert that `list`, `state` and `delete --force` cope, and that nothing is left then."""
        show = self.ground.place / f"{self.name}.show"
        assert self.call("list", out=show) == 0, show.read_bytes()
        assert self.call("state", self.name, out=show) in (0, 1), show.read_bytes()
        assert b"Traceback" not in show.read_bytes() + self.said()
        status = self.call("delete", "--force", self.name, out=show)
        assert status == 0, (self.said(), show.read_bytes())
        self.close()
        self.assert_nothing_left()
        for path in (show, self.out):
            path.unlink(missing_ok=True)

    def assert_nothing_left(self) -> None:
        """Assert that no process, mount, cgroup, state directory, fifo or other file remains."""
        for path in (self.pid_file, self._console()):
            path.unlink(missing_ok=True)

        def left() -> list[str]:
            found = [f"process {facts}" for facts in self.home.alive().values()]
            found += self.host.differences()
            found += [str(path) for path in self.ground.place.glob(f".{self.name}*")]
            return found + beds.cgroups_named(self.name)

        try:
            eventually(lambda: not left(), "nothing is left")
        except AssertionError:
            raise AssertionError(f"left: {left()}; said {self.said()!r}") from None

    def close(self) -> None:
        """Give up what the commands had from here: the caller's hook ends, if it still runs."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        if self.gate >= 0:
            os.close(self.gate)
            self.gate = -1


def by_signal(status: int) -> bool:
    """Return whether a command ended as the process that was told to die."""
    return status in (-signal.SIGKILL, -signal.SIGILL)
