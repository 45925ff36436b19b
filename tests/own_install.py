"""An installation of the tests' own, whose configuration they may change, and what it leaves.

One is made for a whole run of pytest, under a prefix of its own, and removed when pytest ends.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import pwd
import runpy
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import images

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON = "/usr/bin/python3"
PATH = "/usr/local/bin:/usr/bin:/bin"
DEADLINE_S = 20.0
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
REQUEST_VERSION, REQUEST_BYTES = 3, 152
Completed = subprocess.CompletedProcess[str]
_libc = ctypes.CDLL(None, use_errno=True)


class Installation:
    """Where everything is, and how to run it as an ordinary user."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.prefix = place / "prefix"
        self.sysconfdir = place / "etc"
        self.program = self.prefix / "bin/apptainer-py"
        self.libexec = self.prefix / "libexec/apptainer-py"
        self.session = self.libexec / "session"
        self.config = self.sysconfdir / "apptainer-py.conf"
        self.suid = self.libexec / "starter-suid"
        self.user = images.ordinary_user()
        self.shipped = b""
        self.kept: set[str] = set()

    def facts(self) -> dict[str, Any]:
        """Return the names that were compiled in."""
        return runpy.run_path(str(self.prefix / "lib/apptainer-py/apptainer_py/base/build.py"))

    def configure(self, text: str = "", *, audit: str = "none") -> None:
        """Write a configuration of these lines alone; tests do not fill the system's log."""
        lines = text.rstrip("\n") + "\n"
        if "audit log" not in text:
            lines += f"audit log = {audit}\n"
        fresh = self.config.with_suffix(".fresh")
        fresh.write_text(lines)
        fresh.chmod(0o644)
        os.chown(fresh, 0, 0)
        os.rename(fresh, self.config)

    def grant(self, *capabilities: str) -> None:
        """Write a capability.json that grants these to the ordinary user."""
        file = self.sysconfdir / "capability.json"
        file.write_text(json.dumps({"users": {self.user.pw_name: list(capabilities)}}))
        file.chmod(0o644)

    def restore(self) -> None:
        """Put the shipped configuration back, in a directory that is root's alone."""
        for path in self.sysconfdir.iterdir():
            if path.is_symlink() or (path.name not in self.kept and not path.is_dir()):
                path.unlink()
        if self.config.is_dir():
            self.config.rmdir()
        self.config.unlink(missing_ok=True)
        self.config.write_bytes(self.shipped)
        self.config.chmod(0o644)
        os.chown(self.config, 0, 0)
        os.chown(self.sysconfdir, 0, 0)
        self.sysconfdir.chmod(0o755)

    def identity(self, extra_groups: Sequence[int] = ()) -> dict[str, Any]:
        """Return what makes subprocess run something as the ordinary user."""
        return {
            "user": self.user.pw_uid,
            "group": self.user.pw_gid,
            "extra_groups": [self.user.pw_gid, *extra_groups],
        }

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Return a plain environment of the ordinary user."""
        plain = {"PATH": PATH, "HOME": self.user.pw_dir, "USER": self.user.pw_name}
        return {**plain, "LANG": "C.UTF-8", **(more or {})}

    def run(
        self,
        *words: str | Path | bytes,
        root: bool = False,
        groups: Sequence[int] = (),
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = 60,
        **how: Any,
    ) -> Completed:
        """Run our program, as the ordinary user or root; returns what it printed and its status."""
        identity = {} if root else self.identity(groups)
        environment = self.environment(env)
        if root:
            environment |= {"HOME": "/root", "USER": "root"}
        how.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [self.program, *words],
            env=environment,
            cwd=cwd or ("/root" if root else self.user.pw_dir),
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout_s,
            check=False,
            **identity,
            **how,
        )

    def start(self, *words: str | Path, **how: Any) -> subprocess.Popen[bytes]:
        """Start our program as the ordinary user, in a session of its own."""
        how.setdefault("stdin", subprocess.DEVNULL)
        how.setdefault("stdout", subprocess.PIPE)
        how.setdefault("stderr", subprocess.PIPE)
        how.setdefault("start_new_session", True)
        how.setdefault("env", self.environment())
        how.setdefault("cwd", self.user.pw_dir)
        return subprocess.Popen([self.program, *words], **self.identity(), **how)


def installation() -> Installation:
    """Install the checkout under a prefix of its own, once."""
    made, problem = _installed()
    if problem:
        raise RuntimeError(f"./install failed: {problem}")
    return made


@functools.cache
def _installed() -> tuple[Installation, str]:
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-own-", dir="/opt"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    made = Installation(place)
    argv = [REPOSITORY / "install", "--prefix", made.prefix, "--sysconfdir", made.sysconfdir]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        made.shipped = made.config.read_bytes()
        made.kept = {path.name for path in made.sysconfdir.iterdir()}
    return made, "" if done.returncode == 0 else done.stderr


def starter_with_steps() -> tuple[Path, Path]:
    """Return the starter that can be told where to die, without the bit and with it."""
    built = _programs_with_steps()
    return built / "starter-steps", built / "starter-steps-suid"


def oci_with_steps() -> Path:
    """Return apptainer-py-oci with all that it starts, which can be told where to die."""
    return _programs_with_steps() / "apptainer-py-oci-steps"


@functools.cache
def _programs_with_steps() -> Path:
    made = installation()
    output = Path(tempfile.mkdtemp(prefix="apptainer-py-steps-", dir="/var/tmp"))
    try:
        argv = [PYTHON, "-I", "-B", REPOSITORY / "setup.py", "-q", "build_product", "--steps"]
        argv += ["--prefix", made.prefix, "--sysconfdir", made.sysconfdir, "--output", output]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        if done.returncode != 0:
            raise RuntimeError(f"the build failed: {done.stderr}")
        for name in ("starter-steps", "starter-init-steps", "apptainer-py-oci-steps"):
            shutil.copy(output / name, made.libexec / name)
            (made.libexec / name).chmod(0o755)
        suid = made.libexec / "starter-steps-suid"
        shutil.copy(output / "starter-steps", suid)
        suid.chmod(0o4711)
    finally:
        shutil.rmtree(output)
    return made.libexec


# ---- requests by hand: what the launcher would have made ----


def request_bytes(
    build_id: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    *,
    flow: int,
    cwd: str,
    engine: str = "apptainer",
    engine_file: str = "",
    trace_fd: int = -1,
    forecast: tuple[int, int, int, int] = (0, 0, 0, 0),
    flags: int = 0,
) -> bytes:
    """Return the content of a request (starter/request.h)."""
    parts = [list(arguments), [f"{name}={value}" for name, value in environment.items()]]
    parts += [[cwd], [engine], [engine_file]]
    packed = [b"".join(os.fsencode(text) + b"\0" for text in part) for part in parts]
    offsets, at = [], REQUEST_BYTES
    for piece in packed:
        offsets.append(at)
        at += len(piece)
    head = struct.pack(
        "=8sII64sIIIi8I4IQ",
        b"APYREQ1\0", REQUEST_VERSION, REQUEST_BYTES, build_id.encode(), flow, 0,
        int(trace_fd >= 0) | flags, trace_fd, len(arguments), len(environment), *offsets, at,
        *forecast, 0,
    )  # fmt: skip
    return head + b"".join(packed)


def sealed(content: bytes) -> int:
    """Return a sealed, inheritable memfd of that content."""
    import fcntl

    fd = os.memfd_create("request", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    os.set_inheritable(fd, True)
    return fd


# ---- waiting, without sleeping blindly ----


def eventually(true: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it did not within the deadline.
    """
    end = time.monotonic() + deadline_s
    never = select.poll()
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        never.poll(5)


def read_until(fd: int, wanted: bytes, deadline_s: float = DEADLINE_S) -> bytes:
    """Read from a descriptor until some bytes have come; returns all that came.

    Raises:
        AssertionError: the other side closed, or the deadline has passed.
    """
    end = time.monotonic() + deadline_s
    got = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    while wanted not in got:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise AssertionError(f"{wanted!r} did not come; there is {got!r}")
        try:
            piece = os.read(fd, 65536)
        except OSError:
            piece = b""
        if not piece:
            raise AssertionError(f"{wanted!r} did not come before the end; there is {got!r}")
        got += piece
    return got


# ---- what is there ----


def _status(pid: int) -> tuple[int, str, str] | None:
    """Return parent, state and name of a process, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[1]), fields[0], name


def descendants(of: int) -> dict[int, tuple[int, str, str]]:
    """Return every process below one: number → parent, state, name."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (facts := _status(int(entry))) is not None:
            table[int(entry)] = facts
    found: dict[int, tuple[int, str, str]] = {}
    grown = {of}
    while grown:
        grown = {pid for pid, facts in table.items() if facts[0] in grown and pid not in found}
        found.update({pid: table[pid] for pid in grown})
    return found


class Household:
    """The processes that tests start: orphans come to us, so that none gets out of sight."""

    def __init__(self) -> None:
        self.before = set(descendants(os.getpid()))
        self.started: list[subprocess.Popen[bytes]] = []

    def adopt(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Look after a process that a test has started: it ends, at the latest, with the test."""
        self.started.append(process)
        return process

    def alive(self) -> dict[int, tuple[int, str, str]]:
        """Return every process below us that was not there before; orphaned zombies are reaped."""
        found = descendants(os.getpid())
        living = {}
        for pid, facts in found.items():
            if pid in self.before:
                continue
            if facts[0] == os.getpid() and facts[1] == "Z":
                # subprocess reaps its own children; ours are the orphans.
                if pid not in {process.pid for process in self.started}:
                    _reap(pid)
                continue
            living[pid] = facts
        return living

    def kill_all(self) -> None:
        """End whatever a failed test has left."""
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.started:
            process.wait(timeout=DEADLINE_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


@contextmanager
def household() -> Iterator[Household]:
    """Be the parent of every orphan for a while."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    home = Household()
    try:
        yield home
    finally:
        home.kill_all()
        eventually(lambda: not home.alive(), "the killed processes are gone")
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def mounts() -> list[str]:
    """Return the host's mount table, without numbers that say nothing."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted(line.split(" ", 2)[2] for line in lines)


def loop_devices() -> dict[str, str]:
    """Return every loop device in use with the file behind it."""
    found = {}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found[entry.parts[3]] = entry.read_text().strip()
        except OSError:
            continue
    return found


def fuse_connections() -> set[str]:
    """Return the FUSE connections of the kernel, where it tells."""
    folder = Path("/sys/fs/fuse/connections")
    return set(os.listdir(folder)) if folder.is_dir() else set()


def files(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Return everything below some directories: path → mode, owner, size of a file."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            facts = path.lstat()
            size = facts.st_size if path.is_file() else 0
            found[str(path)] = (facts.st_mode, facts.st_uid, size)
    return found


class HostState:
    """What a launch must not change."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.mounts = mounts()
        self.loops = loop_devices()
        self.files = files(*folders)

    def differences(self) -> list[str]:
        """Return what is not as it was, as text."""
        now = HostState(*self.folders)
        found = []
        for name in ("mounts", "loops", "files"):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now:
                new = [x for x in is_now if x not in was or _differs(was, is_now, x)]
                gone = [x for x in was if x not in is_now]
                if name == "loops" and not new:
                    continue  # somebody else's, who has done with it
                found.append(f"{name}: new {new}, gone {gone}")
        return found


def _differs(was: object, is_now: object, key: str) -> bool:
    return isinstance(was, dict) and isinstance(is_now, dict) and was[key] != is_now[key]


def within_a_second() -> float:
    """Return how long to wait for what takes no second: longer where others need the machine."""
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    return DEADLINE_S if busy else 1.0


def assert_nothing_left(home: Household, host: HostState, deadline_s: float | None = None) -> None:
    """Assert that no process, mount, loop device or file remains once a second has passed."""

    def clean() -> bool:
        return not home.alive() and not host.differences()

    try:
        eventually(clean, "nothing is left", deadline_s or within_a_second())
    except AssertionError:
        raise AssertionError(f"left: processes {home.alive()}, host {host.differences()}") from None


def account(name: str) -> pwd.struct_passwd:
    """Return the account of a name."""
    return pwd.getpwnam(name)
