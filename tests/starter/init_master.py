"""Plays master for starter-init: rows out, replies in, and the payload's output."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import ProcessSpec
from apptainer_py.model.process_frame import process_frame

STARTER = Path(__file__).resolve().parents[2] / "starter"
REQUEST = struct.Struct("=II6QHHI")
REPLY = struct.Struct("=IiiI")
SEALS = 0x1 | 0x2 | 0x4 | 0x8
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NEWCGROUP, NEWTIME = 0x02000000, 0x80
EVERY_CAP = 0x1FFFFFFFFFF
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC = 1, 2, 4, 8
FLAGS = "-std=gnu11 -O1 -D_GNU_SOURCE= -fPIE -static-pie".split()
SHARED = ("wire.c", "report.c", "process.c", "hook.c", "steps.c")
# Puts the descriptors given by number at 3, 4 ..., as a caller of --preserve-fds has them.
KEEP = """
import fcntl, os, sys
program, socket, *kept = sys.argv[1:]
for at, fd in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 500) for fd in kept]):
    os.dup2(fd, at + 3)
os.execv(program, [program, socket])
"""
APPLETS = """
sh true echo mkdir wc uname cat ls id sleep env grep readlink stat tty stty pwd kill ps mount touch
""".split()


class RowRefused(Exception):
    """A row that was not done, with what the reply holds."""

    def __init__(self, op: int, code: int, error: int, value: int, fd: int) -> None:
        super().__init__(f"{protocol.OP_NAMES[op]}: {code}, {os.strerror(error)}, {value}")
        self.code, self.error, self.value, self.fd = code, error, value, fd


class Ended(Exception):
    """The channel was closed by the other side."""


def build(folder: Path, *extra: str) -> Path:
    """Return starter-init, compiled from the tree."""
    folder.chmod(0o755)  # ordinary users run it too
    target = folder / "starter-init"
    sources = [*sorted(STARTER.glob("init*.c")), *(STARTER / name for name in SHARED)]
    subprocess.run(["gcc", *FLAGS, *extra, *map(str, sources), "-o", str(target)], check=True)
    return target


def make_root(folder: Path) -> Path:
    """Return a root directory with busybox and what a runtime mounts on."""
    folder.chmod(0o755)  # root of a user namespace has no rights above it
    root = folder / "rootfs"
    for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    return root


def sealed(content: bytes) -> int:
    """Return a memfd that nobody can change."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def spec(*words: str, **fields: object) -> ProcessSpec:
    """Return a process that runs these words as root, with a small environment."""
    given: dict[str, object] = {
        "arguments": tuple(word.encode() for word in words),
        "environment": (b"PATH=/bin", b"HOME=/"),
        "cwd": b"/",
        "uid": 0,
        "gid": 0,
        "groups": (),
    }
    return ProcessSpec(**{**given, **fields})  # type: ignore[arg-type]


class Master:
    """One launch; use as a context, which ends whatever is still there."""

    def __init__(self, program: Path, *, keep: Sequence[int] = (), stdin: int = -1) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        high = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 1000)
        theirs.close()
        self.socket = ours
        self.socket.settimeout(20)
        self.pid = 0
        self.status: int | None = None
        self.output, out = os.pipe()
        command = [str(program), str(high)]
        if keep:
            command = ["/usr/bin/python3", "-ISBc", KEEP, *command, *map(str, keep)]
        self.forerunner = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin < 0 else stdin,
            stdout=out,
            stderr=out,
            env={},
            pass_fds=(high, *keep),
        )
        os.close(high)
        os.close(out)

    def __enter__(self) -> Master:
        return self

    def __exit__(self, *unused: object) -> None:
        self.socket.close()
        self.forerunner.kill()
        self.forerunner.wait()
        if self.pid and self.status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        os.close(self.output)

    def send(
        self,
        op: int,
        first: bytes | str | None = None,
        second: bytes | str | None = None,
        *,
        numbers: Sequence[int] = (),
        flags: int = 0,
        fd: int = -1,
    ) -> None:
        strings = [os.fsencode(s) + b"\0" if s is not None else b"" for s in (first, second)]
        nums = [number & 0xFFFFFFFFFFFFFFFF for number in numbers] + [0] * (6 - len(numbers))
        head = REQUEST.pack(op, flags, *nums, len(strings[0]), len(strings[1]), 0)
        socket.send_fds(self.socket, [head + b"".join(strings)], [fd] if fd >= 0 else [])

    def receive(self) -> tuple[int, int, int]:
        """Return operation, value and descriptor (or -1) of the next reply."""
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 1)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            raise Ended
        op, code, error, value = REPLY.unpack(data)
        fd = fds[0] if fds else -1
        if code != protocol.ERR_OK:
            raise RowRefused(op, code, error, value, fd)
        return op, value, fd

    def row(self, op: int, *strings: bytes | str | None, **more: object) -> tuple[int, int]:
        """Send a row, wait for its reply; value and descriptor."""
        self.send(op, *strings, **more)  # type: ignore[arg-type]
        done, value, fd = self.receive()
        assert done == op
        return value, fd

    def spaces(self, kinds: int = NEWNS | NEWPID, offsets: tuple[int, ...] = ()) -> None:
        """Clone init; `offsets` are those of a time namespace."""
        numbers = (kinds, *offsets)
        self.pid, _ = self.row(protocol.OP_SPACES, numbers=numbers, flags=bool(offsets))
        assert self.forerunner.wait(timeout=20) == 0

    def mapped(self, flags: int = 8) -> None:
        self.row(protocol.OP_MAPPED, flags=flags)

    def mount(self, kind: str, target: str, options: Sequence[tuple[str, str | None]] = ()) -> None:
        """Mount a file system without a source."""
        self.row(protocol.OP_FS, kind, kind)
        for key, value in options:
            self.row(protocol.OP_FSOPT, key, value)
        self.row(protocol.OP_ATTR, numbers=(NO_SUID | NO_EXEC, 0, 0))
        self.row(protocol.OP_PLACE, target)

    def assemble(self, root: Path, *, node: bool = True) -> None:
        """Make a root with /proc and a /dev of its own, and enter it."""
        self.row(protocol.OP_PROPAGATION)
        self.root_fd = self.row(protocol.OP_ROOT_BUNDLE, str(root), flags=1)[1]
        os.close(self.root_fd)
        self.mount("proc", "/proc")
        self.mount("tmpfs", "/dev", [("mode", "755"), ("size", "65536k")])
        options = [("newinstance", None), ("ptmxmode", "0666"), ("mode", "0620")]
        self.mount("devpts", "/dev/pts", options)
        if node:
            numbers = (0o020666, 1 << 32 | 3, 0, 0)
            self.row(protocol.OP_MKNOD, "/dev/null", numbers=numbers)
        self.row(protocol.OP_LINK, "pts/ptmx", "/dev/ptmx")
        self.row(protocol.OP_ENTER, numbers=(0, 0))

    def create(self, root: Path, flags: int = NEWNS | NEWPID) -> None:
        """All up to PROCESS, for root."""
        self.spaces(flags)
        self.mapped()
        self.assemble(root)

    def process(
        self, wanted: ProcessSpec, program: bytes = b"", hooks: bytes = b"", program_flags: int = 0
    ) -> None:
        fd = sealed(process_frame(wanted, program, hooks, program_flags=program_flags))
        try:
            self.row(protocol.OP_PROCESS, fd=fd)
        finally:
            os.close(fd)

    def go(self, fifo: int = -1) -> None:
        """Send GO; returns when the payload has taken over (or waits at its fifo)."""
        self.send(protocol.OP_GO, fd=fifo)
        try:
            reply = self.receive()
        except Ended:
            return
        raise AssertionError(f"an answer to GO: {reply}")

    def wait(self) -> int:
        """Return the payload's exit status, or minus its signal."""
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def said(self) -> str:
        """Return what it has written, once it has ended."""
        return b"".join(self._chunks()).decode()

    def _chunks(self) -> Iterator[bytes]:
        while chunk := os.read(self.output, 65536):
            yield chunk

    def run(self, wanted: ProcessSpec, **more: object) -> tuple[int, str]:
        """PROCESS, GO, the end: status and output."""
        self.process(wanted, **more)  # type: ignore[arg-type]
        self.go()
        said = self.said()
        return self.wait(), said
