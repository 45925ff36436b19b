"""Runs a command where the root is the kernel's own first file system, as in an initramfs.

    initramfs.py UID PROGRAM [WORD...]

The host's directories are bound there, in a mount namespace that nobody else sees; what was made to
bind them on goes again.
"""

from __future__ import annotations

import ctypes
import os
import sys

BOUND = ("/usr", "/etc", "/opt", "/dev", "/tmp", "/var", "/home", "/root", "/sys", "/run", "/proc")
LINKED = ("/bin", "/sbin", "/lib", "/lib64")
CLONE_NEWNS, MS_PRIVATE_ALL, MNT_DETACH = 0x20000, (1 << 18) | 0x4000, 2
OPEN_TREE, MOVE_MOUNT, CLONE_RECURSIVE, FROM_ITSELF = 428, 429, 0x8001, 4
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)


def good(result: int) -> int:
    """Return what a function of libc has, or raise its error."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def enter() -> list[str]:
    """Go there; return what was made."""
    good(libc.unshare(CLONE_NEWNS))
    good(libc.mount(None, b"/", None, MS_PRIVATE_ALL, None))
    space = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    trees = [
        (path, good(libc.syscall(OPEN_TREE, AT_FDCWD, path.encode(), CLONE_RECURSIVE)))
        for path in BOUND
    ]
    links = [(path, os.readlink(path)) for path in LINKED if os.path.islink(path)]
    good(libc.umount2(b"/", MNT_DETACH))
    good(libc.setns(space, CLONE_NEWNS))
    made = []
    for path, tree in trees:
        if not os.path.isdir(path):
            os.mkdir(path)
            made.append(path)
        good(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, path.encode(), FROM_ITSELF))
    for path, target in links:
        if not os.path.lexists(path):
            os.symlink(target, path)
            made.append(path)
    return made


def run(uid: int, words: list[str]) -> int:
    """Run the command as an account; return its status."""
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.execve(words[0], words, {"PATH": "/usr/bin:/bin"})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    made = enter()
    try:
        return run(int(sys.argv[1]), sys.argv[2:])
    finally:
        for path in BOUND:
            libc.umount2(path.encode(), MNT_DETACH)
        for path in made:
            (os.unlink if os.path.islink(path) else os.rmdir)(path)


if __name__ == "__main__":
    sys.exit(main())
