"""`--runscript-timeout`: how long the image's own shell may evaluate before the runscript."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import LaunchError
from apptainer_py.model.duration import seconds_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.runtime.contexts import MonitorContext
    from apptainer_py.runtime.meeting import Meeting

_SIGKILL = 9  # the module signal loads enum
# What a shell of ours is called with (process.py, start.py); a runscript is called otherwise.
_EVALUATES = (b"-c", b'eval "$1"', b"apptainer-py")


class NoDuration(LaunchError):
    message = "{reason}"
    hint = "a duration is a number with a unit, such as 30s or 5m"


def read(text: str) -> float:
    """Return the seconds that are meant.

    Raises:
        NoDuration: it is no duration, or none is left.
    """
    try:
        seconds = seconds_of(text)
    except ValueError as error:
        raise NoDuration(reason=error) from None
    if seconds <= 0:
        raise NoDuration(reason=f"context deadline exceeded: --runscript-timeout {text}")
    return seconds


def watch(context: MonitorContext, seconds: float, meeting: Meeting | None) -> None:
    """End the container where its shell has not come to the runscript in time."""
    if context.ends_within(seconds, meeting) or not any(map(_evaluates, _family(context.pid))):
        return
    log.fatal(
        f"context deadline exceeded: the image's environment was not read within {seconds:g} s "
        "(--runscript-timeout)"
    )
    os.kill(context.pid, _SIGKILL)


def _family(pid: int) -> list[int]:
    """Return the first process of a container and its children: with a shim, these are asked."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
            return [pid, *map(int, children.read().split())]
    except OSError:
        return []


def _evaluates(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            words = tuple(line.read(4096).split(b"\0"))
    except OSError:
        return False
    return any(words[at : at + 3] == _EVALUATES for at in (1, 2))
