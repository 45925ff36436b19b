"""A seccomp profile of config.json as the program for the kernel, compiled once a machine."""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The size of one struct sock_filter, and the kernel's BPF_MAXINSNS.
INSTRUCTION_BYTES = 8
INSTRUCTIONS_MAX = 4096
NEW_LISTENER = 1 << 3
_MAGIC = b"APYSEC1\n"
_FILES_MAX = 256


class SeccompError(ApptainerError):
    message = "{text}"


def program(profile: dict[str, Any], cache_dir: str | None) -> tuple[bytes, int]:
    """Return the filter and the flags for seccomp(2); no bytes where the profile asks for nothing.

    `cache_dir` is a directory of the caller's own, made if it lacks; None compiles every time.

    Raises:
        SeccompError: the profile is not valid, or libseccomp is not there.
    """
    if not profile.get("defaultAction") and not profile.get("syscalls"):
        return b"", 0
    file = None if cache_dir is None else f"{cache_dir}/{_key(profile)}"
    found = None if file is None else _read(file)
    if found is not None:
        return found
    from apptainer_py.host.seccomp_rules import compile_profile

    code, flags = compile_profile(profile)
    if len(code) > INSTRUCTIONS_MAX * INSTRUCTION_BYTES:
        count = len(code) // INSTRUCTION_BYTES
        text = f"the seccomp profile makes {count} instructions; the kernel takes 4096"
        raise SeccompError(text=text)
    if file is not None and cache_dir is not None:
        _write(cache_dir, file, code, flags)
    return code, flags


def _library() -> str:
    """Return which libseccomp is installed, without loading it: a newer one knows more names."""
    folder = build.LIBPYTHON.rpartition("/")[0]
    try:
        return os.readlink(f"{folder}/libseccomp.so.2")
    except OSError:
        return ""


def _key(profile: dict[str, Any]) -> str:
    from _blake2 import blake2b

    facts = repr((build.BUILD_ID, _library(), os.uname().machine, profile))
    return blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _read(path: str) -> tuple[bytes, int] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o170022 != 0o100000:
        # Whoever else could have written it might have left out what the profile forbids.
        os.close(fd)
        return None
    data = read_at_most(fd, 64 + INSTRUCTIONS_MAX * INSTRUCTION_BYTES)
    head, code = data[:24], data[24:]
    size = int.from_bytes(head[8:16], "little")
    if head[:8] != _MAGIC or size != len(code) or not code or size % INSTRUCTION_BYTES:
        return None
    return code, int.from_bytes(head[16:24], "little")


def _write(cache_dir: str, path: str, code: bytes, flags: int) -> None:
    data = _MAGIC + len(code).to_bytes(8, "little") + flags.to_bytes(8, "little") + code
    fresh = f"{path}.{os.getpid()}"
    try:
        if not os.path.isdir(cache_dir):
            os.makedirs(cache_dir, 0o700, exist_ok=True)
        elif len(names := os.listdir(cache_dir)) > _FILES_MAX:
            for name in names:
                os.unlink(f"{cache_dir}/{name}")
        write_all(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), data)
        os.rename(fresh, path)
    except OSError:
        # A full or read-only place costs the next call some milliseconds, and nothing else.
        return
