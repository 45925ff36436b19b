"""The end of a container that its caller does not wait for: what it has started ends with it.

A SIGKILL to the child that was started takes its container's first process with it, and nobody
else: a shell would leave the program that it waits for.  So the processes below are stopped one
after the other until there is none that is not, and then killed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any, Final

# One that starts others faster than they are found is killed as far as it is known.
_ROUNDS = 50
_SIGKILL: Final = 9
_SIGSTOP: Final = 19


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a child with all of its descendants, as far as the caller may; it is not waited for."""
    if child.poll() is not None:
        return
    held: dict[int, int] = {}
    try:
        for _ in range(_ROUNDS):
            new = _below(child.pid) - held.keys()
            if not new:
                break
            for pid in new:
                _stop(pid, child.pid, held)
        child.kill()
        for fd in held.values():
            _send(fd, _SIGKILL)
    finally:
        for fd in held.values():
            os.close(fd)


def _stop(pid: int, top: int, held: dict[int, int]) -> None:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    # Its number may have become another one's before it was held.
    if pid not in _below(top):
        os.close(fd)
        return
    held[pid] = fd
    _send(fd, _SIGSTOP)


def _send(fd: int, number: int) -> None:
    import signal

    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return  # it has ended, or is another user's: of a range of subordinate ids


def _below(top: int) -> set[int]:
    """Return the descendants of a process."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            parent = _parent(name)
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    left = [top]
    while left:
        for pid in children.get(left.pop(), ()):
            if pid not in found:
                found.add(pid)
                left.append(pid)
    return found


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return int(file.read(512).rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
