"""A process that stands for another one: its child's signals and status are its own."""

from __future__ import annotations

import os

_SIGNALLED = 128


def wait_for(child: int) -> int:
    """Pass signals on to a child until it ends; return its status, a signal's number negated."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_of_a_shell(status: int) -> int:
    """Return the status that a shell tells for it."""
    return status if status >= 0 else _SIGNALLED - status
