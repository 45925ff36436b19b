"""Speaks to starter-init as master does: one row after another, each with its reply."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

STARTER = Path(__file__).resolve().parent.parent.parent / "starter"
SHARED = ("process.c", "wire.c", "report.c", "hook.c", "steps.c")
FLAGS = ("-D_GNU_SOURCE=", "-std=gnu11", "-g", "-O1", "-fno-sanitize-recover=all")
SANITIZERS = ("-fsanitize=address,undefined",)
WCLONE = 0x80000000
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 0x4000, 0x40000, 0x80000, 0x100000
RDONLY, NOSUID, NODEV, NOEXEC, ATIME, IDMAP = 1, 2, 4, 8, 0x70, 0x100000
TREE_RECURSIVE, TREE_NO_FOLLOW = 1, 2
PLACE_FILE, PLACE_COPY_MODE, PLACE_BELOW_PROC, PLACE_MAY_FAIL = 1, 2, 4, 8
ERR_OK, ERR_CANCELLED, ERR_SYSTEM = 0, 18, 21
WHY_CLEARED_LOCKED, WHY_LOCKED_ATIME, WHY_IS_ROOT, WHY_INSIDE_PROC = range(1, 5)
WHY_PROC_NOT_ORDINARY, WHY_SYSFS_NOT_ORDINARY, WHY_NOT_PROC = range(5, 8)


def numbers() -> dict[str, int]:
    """Return the number of every row of server INIT, from protocol.def itself."""
    text = (STARTER / "protocol.def").read_text()
    return {name: int(n) for name, n in re.findall(r"OP\((\w+), (\d+), INIT,", text)}


def compile_init(folder: Path, edits: Sequence[tuple[str, str, str]] = ()) -> Path:
    """Build starter-init with sanitizers, or weakened by (file, text, what stands there)."""
    tree = folder / "starter"
    shutil.copytree(STARTER, tree, symlinks=True)
    for name, text, instead in edits:
        source = (tree / name).read_text()
        assert text in source, f"{name} holds no {text!r} any more"
        (tree / name).write_text(source.replace(text, instead))
    files = sorted(tree.glob("init*.c")) + [tree / name for name in SHARED]
    program = folder / "starter-init"
    names = [path.name for path in files if path.exists()]
    sanitizers = () if edits else SANITIZERS
    argv = ["gcc", *FLAGS, *sanitizers, "-w", "-I.", "-Igenerated", *names, "-o", str(program)]
    subprocess.run(argv, cwd=tree, check=True)
    return program


class RowFailedError(Exception):
    """A row was not done; `code`, `error` and `value` are those of the reply."""

    def __init__(self, name: str, code: int, error: int, value: int) -> None:
        super().__init__(f"{name}: code {code}, {os.strerror(error)}, value {value}")
        self.code, self.error, self.value = code, error, value


class Init:
    """One container in the making; a context manager that leaves nothing behind."""

    ops = numbers()

    def __init__(self, program: Path, *, preexec: Callable[[], None] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.forerunner = subprocess.Popen(
                [program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                preexec_fn=preexec,  # noqa: PLW1509
                env={"ASAN_OPTIONS": "detect_leaks=0"},
            )
        self.socket = ours
        self.pid = 0

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.forerunner.kill()
        self.forerunner.wait()
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, WCLONE - (1 << 32))
            except (ProcessLookupError, ChildProcessError):
                pass
        assert self.forerunner.stderr is not None
        self.forerunner.stderr.close()

    def send(
        self,
        name: str,
        first: str | bytes | None = None,
        second: str | bytes | None = None,
        *nums: int,
        flags: int = 0,
        fd: int = -1,
    ) -> None:
        texts = [t if isinstance(t, bytes | None) else os.fsencode(t) for t in (first, second)]
        tails = [b"" if text is None else text + b"\0" for text in texts]
        padded = [*nums, *[0] * (6 - len(nums))]
        head = struct.pack("<II6QHHI", self.ops[name], flags, *padded, *map(len, tails), 0)
        socket.send_fds(self.socket, [head + b"".join(tails)], [fd] if fd >= 0 else [])

    def receive(self, name: str) -> tuple[int, int]:
        data, fds, _, _ = socket.recv_fds(self.socket, 64, 1)
        if not data:
            raise EOFError(f"starter-init ended at {name}")
        _, code, error, value = struct.unpack("<IiiI", data)
        fd = fds[0] if fds else -1
        if code != ERR_OK:
            if fd >= 0:
                os.close(fd)
            raise RowFailedError(name, code, error, value)
        return value, fd

    def row(
        self,
        name: str,
        first: str | bytes | None = None,
        second: str | bytes | None = None,
        *nums: int,
        flags: int = 0,
        fd: int = -1,
    ) -> int:
        """Ask for one row and return the value of its reply."""
        self.send(name, first, second, *nums, flags=flags, fd=fd)
        value, got = self.receive(name)
        if got >= 0:
            os.close(got)
        return value

    def born(self, spaces: int = NEWNS | NEWPID | NEWUTS | NEWIPC | NEWNET) -> Init:
        """Clone init into new namespaces; id maps of 0 to 0..65535 where there is a user space."""
        self.pid = self.row("SPACES", None, None, spaces)
        if spaces & NEWUSER:
            for kind in ("uid", "gid"):
                Path(f"/proc/{self.pid}/{kind}_map").write_text("0 100000 65536\n")
        self.row("MAPPED", flags=(3 if spaces & NEWUSER else 0))
        return self

    def root(self, path: Path, spaces: int = NEWNS | NEWPID | NEWUTS | NEWIPC | NEWNET) -> Init:
        """Make the namespaces and take a directory as the root."""
        self.born(spaces)
        # Private: what other tests mount or unmount meanwhile is not to be seen in here.
        self.row("PROPAGATION", None, None, MS_PRIVATE | MS_REC)
        self.row("ROOT_BUNDLE", str(path), flags=1)
        return self

    def mount(
        self,
        kind: str,
        target: str,
        options: Sequence[str] = (),
        attributes: int = 0,
        *,
        flags: int = 0,
        propagation: int = 0,
    ) -> int:
        self.row("FS", kind, kind)
        for option in options:
            key, _, value = option.partition("=")
            self.row("FSOPT", key, value if "=" in option else None)
        if attributes:
            self.row("ATTR", None, None, attributes)
        return self.row("PLACE", target, None, propagation, flags=flags)

    def bind(
        self,
        source: Path | str,
        target: str,
        attributes: int = 0,
        *,
        tree: int = TREE_RECURSIVE,
        flags: int = 0,
    ) -> int:
        self.row("TREE", str(source), flags=tree)
        if attributes:
            self.row("ATTR", None, None, attributes)
        return self.row("PLACE", target, flags=flags)

    def enter(self, how: int = 0, cwd: str | None = None) -> Init:
        self.row("ENTER", cwd, None, how)
        return self

    def mounts(self) -> list[tuple[str, str, str, str, str]]:
        """Return (target, root in its file system, type, options, source options) of each mount."""
        found = []
        for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines():
            left, right = line.split(" - ")
            _, _, _, root, point, options = left.split()[:6]
            kind, _, more = right.split(" ", 2)
            found.append((point, root, kind, options, more))
        return found

    def at(self, path: str) -> Path:
        """Return how the test reaches a path of the container, by way of procfs."""
        return Path(f"/proc/{self.pid}/root{path}")
