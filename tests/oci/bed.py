"""Bundles, and runtimes given by path: the same test runs with ours and with its peers."""

from __future__ import annotations

import atexit
import copy
import ctypes
import fcntl
import functools
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.oci_spec import SPEC

HERE = Path(__file__).resolve().parent
PROBE = "/bin/probe"
DEADLINE_S = 20.0
PR_SET_CHILD_SUBREAPER = 36
APPLETS = (
    "sh ash cat chmod chown chroot cp dd df echo env expr false find grep head hostname id ip kill "
    "ln ls mkdir mkfifo mknod mount mv nc nslookup ps pwd readlink rm rmdir sed seq sleep "
    "sort stat "
    "stty sync tail test touch top tr true tty umount uname wc yes"
)
FOLDERS = "bin dev etc home proc root run sbin sys tmp usr/bin usr/sbin var/tmp"
Completed = subprocess.CompletedProcess[str]
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def config() -> dict[str, Any]:
    """Return a configuration that a test may change."""
    return copy.deepcopy(SPEC)


@functools.cache
def shared_folder() -> Path:
    """Return a directory that everybody can enter and that goes when pytest ends."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-oci-", dir="/var/tmp"))
    made.chmod(0o755)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def probe() -> Path:
    """Return the static program that tells what a payload finds."""
    made = shared_folder() / "probe"
    argv = ["gcc", "-static", "-O1", "-o", str(made), str(HERE / "probe.c")]
    subprocess.run(argv, check=True)
    return made


@functools.cache
def tree() -> Path:
    """Return a root directory with busybox, the probe, and accounts; not to be written to."""
    made = shared_folder() / "tree"
    for folder in FOLDERS.split():
        (made / folder).mkdir(parents=True)
    (made / "tmp").chmod(0o1777)
    shutil.copy("/bin/busybox", made / "bin/busybox")
    for applet in APPLETS.split():
        (made / "bin" / applet).symlink_to("busybox")
    shutil.copy(probe(), made / "bin/probe")
    accounts = "root:x:0:0:root:/root:/bin/sh\nworker:x:1000:1000::/home/worker:/bin/sh\n"
    (made / "etc/passwd").write_text(accounts)
    (made / "etc/group").write_text("root:x:0:\nworker:x:1000:\nextra:x:2000:worker\n")
    return made


def copy_of_tree(target: Path) -> Path:
    """Make a root directory of a test's own; its programs are links to the shared ones."""
    shutil.copytree(tree(), target, symlinks=True, copy_function=_link_programs)
    return target


def _link_programs(source: str, target: str) -> str:
    if "/bin/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)
    return target


def eventually(true: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until something is so.

    Raises:
        AssertionError: it is not so when the deadline has passed.
    """
    end = time.monotonic() + deadline_s
    nothing = select.poll()
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        nothing.poll(5)


class Bundle:
    """A directory with config.json and a root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rootfs = path / "rootfs"
        self.config = config()
        path.mkdir()
        path.chmod(0o755)
        copy_of_tree(self.rootfs)

    @property
    def process(self) -> dict[str, Any]:
        return self.config["process"]

    @property
    def linux(self) -> dict[str, Any]:
        return self.config["linux"]

    def args(self, *words: str) -> Bundle:
        """Say what runs."""
        self.process["args"] = list(words)
        return self

    def shell(self, script: str) -> Bundle:
        """Say what the container's shell runs."""
        return self.args("sh", "-c", script)

    def mount(self, destination: str, kind: str, source: str, *options: str) -> Bundle:
        """Add a mount."""
        entry = {"destination": destination, "type": kind, "source": source}
        self.config["mounts"].append({**entry, "options": list(options)})
        return self

    def without_mount(self, destination: str) -> Bundle:
        """Take a mount out."""
        mounts = self.config["mounts"]
        self.config["mounts"] = [one for one in mounts if one["destination"] != destination]
        return self

    def replace_mount(self, destination: str, kind: str, source: str, *options: str) -> Bundle:
        """Put another mount in a mount's place in the list."""
        entry = {"destination": destination, "type": kind, "source": source}
        at = [one["destination"] for one in self.config["mounts"]].index(destination)
        self.config["mounts"][at] = {**entry, "options": list(options)}
        return self

    def space(self, kind: str, path: str | None = None) -> Bundle:
        """Make a new namespace of a kind, or join one."""
        self.without_space(kind)
        self.linux["namespaces"].append({"type": kind, **({"path": path} if path else {})})
        return self

    def without_space(self, kind: str) -> Bundle:
        """Stay in the caller's namespace of a kind."""
        spaces = self.linux["namespaces"]
        self.linux["namespaces"] = [one for one in spaces if one["type"] != kind]
        return self

    def user_space(self, outside: int = 100000, count: int = 65536) -> Bundle:
        """Make a user namespace whose root is an ordinary id outside."""
        self.space("user")
        for name in ("uidMappings", "gidMappings"):
            self.linux[name] = [{"containerID": 0, "hostID": outside, "size": count}]
        # The programs are shared between bundles: only what is not a link may change its owner.
        for path in [self.rootfs, *self.rootfs.rglob("*")]:
            if "/bin/" not in str(path.relative_to(self.path)):
                os.chown(path, outside, outside, follow_symlinks=False)
        return self

    def hook(self, kind: str, script: str, **more: object) -> Bundle:
        """Add a hook that runs a line of shell."""
        entry = {"path": "/bin/sh", "args": ["sh", "-c", script], **more}
        self.config.setdefault("hooks", {}).setdefault(kind, []).append(entry)
        return self

    def write(self) -> Bundle:
        """Write config.json."""
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self


class Runtime:
    """A program with runc's command line."""

    def __init__(self, name: str, program: str) -> None:
        self.name = name
        self.program = program


class Container:
    """A container that a test has created; its first process is a child of the test's process."""

    def __init__(self, bed: Bed, identifier: str, bundle: Bundle) -> None:
        self.bed = bed
        self.id = identifier
        self.bundle = bundle
        self.pid = int((bundle.path / f"{identifier}.pid").read_text())
        self.output = bundle.path / f"{identifier}.out"
        self.exit: int | None = None

    def start(self) -> Completed:
        return self.bed.good("start", self.id)

    def kill(self, name: str = "KILL") -> Completed:
        return self.bed.good("kill", self.id, name)

    def delete(self, *flags: str) -> Completed:
        return self.bed.good("delete", *flags, self.id)

    def state(self) -> dict[str, Any]:
        return json.loads(self.bed.good("state", self.id).stdout)

    def status(self) -> str:
        return str(self.state()["status"])

    def exec(self, *words: str, **how: Any) -> Completed:
        """Run one more process in it."""
        flags = how.pop("flags", ())
        return self.bed.call("exec", *flags, self.id, *words, **how)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Return the payload's status once it has ended, as a shell has it."""
        if self.exit is None:
            pidfd = os.pidfd_open(self.pid)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            ended = poll.poll(deadline_s * 1000)
            os.close(pidfd)
            assert ended, f"{self.id} has not ended"
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.exit = code if code >= 0 else 128 - code
        return self.exit

    def finish(self) -> None:
        """Kill it, reap all its processes that have come to us, and delete it.

        A pid namespace, and so its first process, ends when the last of its processes is reaped.
        """
        self.kill()

        def gone() -> bool:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self.pid:
                self.exit = status
            return pid == self.pid

        eventually(gone, "the first process is reaped")
        self.delete()

    def said(self) -> str:
        """Return what the payload has written to its standard output and error so far."""
        return self.output.read_text()

    def lines(self, wanted: str) -> str:
        """Return the output once it has a word in it."""
        eventually(lambda: wanted in self.said(), f"{wanted!r} in the output")
        return self.said()


class Bed:
    """One runtime, a state directory of its own, and what a test makes with it."""

    def __init__(self, runtime: Runtime, place: Path) -> None:
        self.runtime = runtime
        self.place = place
        self.root = place / "state"
        self.ids: list[str] = []
        self.containers: list[Container] = []

    # ---- commands ----

    def argv(self, *words: str | Path) -> list[str]:
        return [self.runtime.program, "--root", str(self.root), *(str(word) for word in words)]

    def call(self, *words: str | Path, **how: Any) -> Completed:
        """Run a command of the runtime's to its end."""
        how.setdefault("timeout", 60)
        how.setdefault("stdin", subprocess.DEVNULL if "input" not in how else None)
        if how["stdin"] is None:
            del how["stdin"]
        return subprocess.run(
            self.argv(*words), capture_output=True, text=True, errors="replace", **how
        )

    def good(self, *words: str | Path, **how: Any) -> Completed:
        """Run a command that must succeed."""
        done = self.call(*words, **how)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done

    def bad(self, *words: str | Path, **how: Any) -> str:
        """Run a command that must fail with status 1; return what it said on standard error."""
        done = self.call(*words, **how)
        assert done.returncode == 1, (words, done.returncode, done.stdout, done.stderr)
        assert done.stderr.strip() or done.stdout.strip(), "it failed without a word"
        assert "Traceback" not in done.stderr
        return done.stderr

    # ---- bundles and containers ----

    def name(self) -> str:
        made = f"apytest-{os.getpid()}-{next(_numbers)}"
        self.ids.append(made)
        return made

    def bundle(self) -> Bundle:
        return Bundle(self.place / f"bundle-{next(_numbers)}")

    def run(self, bundle: Bundle, *flags: str, **how: Any) -> Completed:
        """Run a bundle in the foreground; return the payload's status and output."""
        bundle.write()
        return self.call("run", *flags, "--bundle", bundle.path, self.name(), **how)

    def output(self, bundle: Bundle, *flags: str, **how: Any) -> str:
        """Return what the payload printed, which must have ended well."""
        done = self.run(bundle, *flags, **how)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    def facts(self, bundle: Bundle, *flags: str, **how: Any) -> dict[str, Any]:
        """Return what the probe finds when it is the payload."""
        return json.loads(self.output(bundle.args(PROBE), *flags, **how))

    def refused(self, bundle: Bundle, *flags: str, **how: Any) -> str:
        """Create a container that must not come to be; return what was said."""
        bundle.write()
        name = self.name()
        pid_file = bundle.path / f"{name}.pid"
        words = ("create", *flags, "--bundle", bundle.path, "--pid-file", pid_file, name)
        with open(bundle.path / "refused.out", "w") as stream:
            done = subprocess.run(
                self.argv(*words),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=60,
                **how,
            )
        said = (bundle.path / "refused.out").read_text(errors="replace")
        assert done.returncode == 1, (done.returncode, said)
        assert said.strip(), "refused without a word"
        assert "Traceback" not in said
        assert not (self.root / name).exists(), "a refused container left its state"
        gone = self.call("state", name)
        assert gone.returncode == 1
        return said

    def create(self, bundle: Bundle, *flags: str, **how: Any) -> Container:
        """Create a container whose output goes to a file."""
        bundle.write()
        name = self.name()
        pid_file = bundle.path / f"{name}.pid"
        words = ("create", *flags, "--bundle", bundle.path, "--pid-file", pid_file, name)
        with open(bundle.path / f"{name}.out", "w") as stream:
            streams = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, **how}
            done = subprocess.run(self.argv(*words), timeout=60, **streams)
        said = (bundle.path / f"{name}.out").read_text(errors="replace")
        assert done.returncode == 0, said
        made = Container(self, name, bundle)
        self.containers.append(made)
        return made

    def started(self, bundle: Bundle, *flags: str, **how: Any) -> Container:
        """Create and start."""
        made = self.create(bundle, *flags, **how)
        made.start()
        return made

    def sleeping(self, bundle: Bundle | None = None, *flags: str) -> Container:
        """Start a container that stays until it is killed."""
        made = bundle or self.bundle()
        return self.started(made.args("sleep", "600"), *flags)

    def clear(self) -> None:
        """Delete everything that a test has made."""
        for name in self.ids:
            if (self.root / name).exists():
                self.call("kill", name, "KILL")
                reap()
                self.call("delete", "--force", name)
        reap()


def subreaper(on: bool) -> None:
    """Become, or cease to be, the parent of orphans."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def reap() -> None:
    """Reap whatever has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points of this mount namespace beneath a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [point for point in points if point.startswith(str(folder) + "/")]


@functools.cache
def hierarchies() -> dict[str, str]:
    """Return where each cgroup v1 controller is mounted, and "" for cgroup2."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        kind = words[words.index("-") + 1]
        if kind == "cgroup2":
            found[""] = words[4]
        elif kind == "cgroup":
            for option in words[-1].split(","):
                found[option] = words[4]
    return found


def own_cgroup(controller: str) -> str:
    """Return this process's cgroup in a hierarchy."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    return "/"


def cgroup_folder(controller: str, path: str) -> Path:
    """Return the directory of an absolute cgroup path in a hierarchy."""
    return Path(hierarchies()[controller] + path)


def cgroups_named(word: str) -> list[str]:
    """Return the cgroups of the machine that have a word in their name."""
    found = []
    for place in set(hierarchies().values()):
        # Those of others come and go while one looks.
        for folder, names, _ in os.walk(place, onerror=None):
            found += [f"{folder}/{name}" for name in names if word in name]
    return found


def pseudo_terminal_from(path: Path) -> tuple[Any, Callable[[], int]]:
    """Listen on a console socket; return the listener and what receives the terminal."""
    import array
    import socket

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(DEADLINE_S)

    def receive() -> int:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
        numbers = array.array("i")
        numbers.frombytes(ancillary[0][2][:4])
        fcntl.fcntl(numbers[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return int(numbers[0])

    return listener, receive


def end(pid: int) -> None:
    """Kill a process that a test has started."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
