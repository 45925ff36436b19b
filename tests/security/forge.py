"""A caller that forges: requests byte by byte, and a starter run with any inherited state."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import re
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).resolve().parent.parent.parent
_HEADER_TEXT = (REPOSITORY / "starter/request.h").read_text()
VERSION = int(re.findall(r"#define REQUEST_VERSION (\d+)u", _HEADER_TEXT)[0])
# Each field of struct request_header and how it is packed.
FIELDS = {
    name: "I"
    if kind == "uint32_t"
    else "Q"
    if kind == "uint64_t"
    else "i"
    if kind == "int32_t"
    else "8s"
    if count == "8"
    else "64s"
    for kind, name, count in re.findall(
        r"^    (char|u?int(?:32|64)_t) (\w+)(?:\[(\w+)\])?;",
        _HEADER_TEXT.partition("struct request_header {")[2],
        re.MULTILINE,
    )
}
HEADER = struct.Struct("<" + "".join(FIELDS.values()))
_ENDS = ("argv_off", "env_off", "cwd_off", "engine_off", "engine_file_off", "total")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
FLOWS = {"setuid": 1, "userns": 2, "root": 3}
PATIENCE_S = 20
_PR_SET_CHILD_SUBREAPER = 36


def without_hints(errors: str) -> list[str]:
    """Return the lines of an error, without those that say what to do next."""
    return [line for line in errors.splitlines() if not line.startswith("INFO:")]


def request(
    build_id: str,
    arguments: Sequence[str | bytes],
    *,
    environment: Sequence[str | bytes] = (),
    cwd: str | bytes = "/",
    engine: str | bytes = "apptainer",
    engine_file: str | bytes = "",
    flow: str = "setuid",
    **forged: object,
) -> bytes:
    """Return the bytes of a launch request; `forged` replaces fields of its header by name."""
    parts = [_strings(arguments), _strings(environment)]
    parts += [_strings([part]) for part in (cwd, engine, engine_file)]
    ends = [HEADER.size]
    for part in parts:
        ends.append(ends[-1] + len(part))
    fields: dict[str, object] = {
        **dict.fromkeys(FIELDS, 0),
        "magic": b"APYREQ1\0",
        "version": VERSION,
        "header_size": HEADER.size,
        "build_id": build_id.encode(),
        "flow": FLOWS[flow],
        "reason": 1 if flow == "userns" else 0,
        "flags": 0,
        "trace_fd": -1,
        "argc": len(arguments),
        "envc": len(environment),
        **dict(zip(_ENDS, ends, strict=True)),
    }
    assert set(fields) | set(forged) == set(FIELDS)
    fields |= forged
    return HEADER.pack(*(fields[name] for name in FIELDS)) + b"".join(parts)


def _strings(items: Iterable[str | bytes]) -> bytes:
    return b"".join(os.fsencode(item) + b"\0" for item in items)


def memory_file(data: bytes, seals: int = SEALS) -> int:
    """Return a memfd with these bytes and seals."""
    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def identity(user: pwd.struct_passwd | None) -> dict[str, object]:
    """Return what Popen needs to become this user; nothing for root."""
    if user is None:
        return {}
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}


def start(
    program: str,
    arguments: Sequence[str | bytes],
    *,
    user: pwd.struct_passwd | None = None,
    inherited: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
    **options: object,
) -> subprocess.Popen[bytes]:
    """Start a program as a user, with its streams on pipes, after `prepare` in the child."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    given = {**streams, "env": {}, "cwd": "/", **identity(user), **options}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [program, *arguments],
        pass_fds=inherited,
        preexec_fn=prepare,  # noqa: PLW1509  pytest has one thread
        **given,
    )


def finish(process: subprocess.Popen[bytes], stdin: bytes = b"") -> SimpleNamespace:
    """Wait for the end; a process that does not end fails the test and is killed."""
    try:
        out, err = process.communicate(stdin, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        left_behind(0)
        out, err = process.communicate(timeout=PATIENCE_S)
        raise AssertionError(f"it hangs; stderr so far: {err!r}") from None
    text = err.decode(errors="replace")
    return SimpleNamespace(status=process.returncode, out=out.decode(errors="replace"), err=text)


def start_starter(
    starter: str, data: bytes | int, *, words: Sequence[str] = (), **how: object
) -> subprocess.Popen[bytes]:
    """Start a starter on a request, given as bytes (sealed here) or as a descriptor."""
    fd = memory_file(data) if isinstance(data, bytes) else data
    inherited = [fd, *how.pop("inherited", ())]  # type: ignore[misc]
    try:
        return start(starter, [str(fd), *words], inherited=inherited, **how)  # type: ignore[arg-type]
    finally:
        if isinstance(data, bytes):
            os.close(fd)


def run_starter(starter: str, data: bytes | int, **how: object) -> SimpleNamespace:
    """Run a starter on a request to its end."""
    return finish(start_starter(starter, data, **how))  # type: ignore[arg-type]


def adopt_orphans() -> None:
    """Become the parent of every process that a launch leaves, so that none can hide."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def children(pid: int | str = "self") -> list[int]:
    """Return the children of a process; none if it has ended."""
    found = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    for task in tasks:
        try:
            text = Path(f"/proc/{pid}/task/{task}/children").read_text()
        except OSError:
            continue
        found += [int(word) for word in text.split()]
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Return all processes below this one."""
    below = children(pid)
    return below + [one for child in below for one in descendants(child)]


def left_behind(deadline_s: float = 5) -> list[str]:
    """Return the command lines of processes that a finished launch left; ends them, too.

    Within the deadline they may still be ending, as the server of an unmounted image does.
    """
    deadline = time.monotonic() + deadline_s
    left = []
    for pid in _until_none(deadline):
        left.append(f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return left


def _until_none(deadline: float) -> list[int]:
    while pids := children():
        handle = os.pidfd_open(pids[0])
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        ended = poll.poll(max(0, (deadline - time.monotonic()) * 1000))
        os.close(handle)
        if not ended:
            return pids
        os.waitpid(pids[0], 0)
    return []


def host_mounts(product: SimpleNamespace) -> list[str]:
    """Return the mounts of this namespace that belong to a launch."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if product.libexecdir in line]


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def read_line(stream: object, *, within_s: float = PATIENCE_S) -> bytes:
    """Return the next line of an unread pipe, byte by byte; fails if none comes in time."""
    fd = stream.fileno()  # type: ignore[attr-defined]
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    line = b""
    deadline = time.monotonic() + within_s
    while not line.endswith(b"\n"):
        if not poll.poll(max(0, (deadline - time.monotonic()) * 1000)):
            raise AssertionError(f"no line came: {line!r}")
        byte = os.read(fd, 1)
        if not byte:
            raise AssertionError(f"the stream ended: {line!r}")
        line += byte
    return line
