"""Whose programs an image has, as its files tell."""

from __future__ import annotations

import os
import stat

from apptainer_py.image import arch
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_SHELL: Final = b"bin/sh"
_RESOLVE_IN_ROOT: Final = 0x10
_HEAD_BYTES: Final = 20


def machine_of(root: str) -> str:
    """Return the architecture of the shell of an image, or of the first program; "" without any."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _machine(top, _SHELL)
        if found:
            return found
        for folder, folders, files, at in os.fwalk(".", dir_fd=top):
            folders.sort()
            for name in sorted(files):
                if not _is_program(at, name):
                    continue
                found = _machine(top, os.fsencode(os.path.join(folder, name)))
                if found:
                    return found
        return ""
    finally:
        os.close(top)


def _is_program(at: int, name: str) -> bool:
    mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _machine(root: int, path: bytes) -> str:
    """Return the architecture of one file; links of the image lead to files of the image."""
    try:
        fd = _starter.openat2(root, path, os.O_PATH | os.O_CLOEXEC, _RESOLVE_IN_ROOT)
    except OSError:
        return ""
    try:
        # Only then: a device of the image does something when it is opened.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
            return arch.of_program(file.read(_HEAD_BYTES))
    except OSError:
        return ""
    finally:
        os.close(fd)
