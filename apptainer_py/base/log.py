"""Messages to people, on stderr, in Apptainer's form and levels (no `logging`: it costs 6 ms)."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FATAL, ERROR, WARN, LOG, INFO, VERBOSE, DEBUG = -4, -3, -2, -1, 1, 4, 5
_NAMES = {
    FATAL: "FATAL",
    ERROR: "ERROR",
    WARN: "WARNING",
    INFO: "INFO",
    VERBOSE: "VERBOSE",
    DEBUG: "DEBUG",
}
_COLOURS = {FATAL: "31", ERROR: "31", WARN: "33", INFO: "34", VERBOSE: "34", DEBUG: "0"}

level = INFO
colour: bool | None = None
stage = "cli"
# Takes level and text of every message instead, where a command line has a form of its own.
writer: Callable[[int, str], None] | None = None
# The same for one thread, by its number: who calls us as a library decides where messages go.
_listeners: dict[int, Callable[[int, str], None]] = {}


def set_level(number: int) -> None:
    """Set what is shown: −4 nothing but fatal errors … 5 everything (APPTAINER_MESSAGELEVEL)."""
    global level
    level = number


class TellingThisThread:
    """While it is entered, messages of this thread go to a function, and none to stderr."""

    def __init__(self, listener: Callable[[int, str], None]) -> None:
        self._listener = listener
        self._before: Callable[[int, str], None] | None = None

    def __enter__(self) -> None:
        self._before = listener()
        _listeners[_thread_number()] = self._listener

    def __exit__(self, *_error: object) -> None:
        if self._before is None:
            del _listeners[_thread_number()]
        else:
            _listeners[_thread_number()] = self._before


def listener() -> Callable[[int, str], None] | None:
    """Return what this thread's messages go to, or None."""
    return _listeners.get(_thread_number()) if _listeners else None


def forget_listeners() -> None:
    """Have messages go to stderr again, in a process that was forked off a caller's."""
    _listeners.clear()


def name(kind: int) -> str:
    """Return what a level is called: WARNING, INFO, ..."""
    return _NAMES.get(kind, "INFO")


def _thread_number() -> int:
    from _thread import get_ident

    return get_ident()


def _printable(text: str) -> str:
    # A name that an image or a user chose must not move the cursor or start a second line.
    # A byte that is no UTF-8 comes as half of a surrogate pair.
    return "".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    code = ord(c)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(c)[1:-1]


def _emit(kind: int, text: str) -> None:
    tell = listener() or writer
    if tell is not None:
        tell(kind, text)
        return
    if level < kind:
        return
    global colour
    if colour is None:
        colour = sys.stderr.isatty()
    prefix = f"{_NAMES[kind] + ':':<9}"
    if level >= DEBUG:
        import os

        prefix += f"[U={os.geteuid()},P={os.getpid()}]{stage}() "
    if colour:
        prefix = f"\x1b[{_COLOURS[kind]}m{prefix}\x1b[0m"
    sys.stderr.write(f"{prefix}{_printable(text)}\n")
    sys.stderr.flush()


def fatal(text: str) -> None:
    """Say why the command ends."""
    _emit(FATAL, text)


def error(text: str) -> None:
    """Say what failed."""
    _emit(ERROR, text)


def warning(text: str) -> None:
    """Say what was left out or is unusual."""
    _emit(WARN, text)


def info(text: str) -> None:
    """Say what is being done for the user."""
    _emit(INFO, text)


def verbose(text: str) -> None:
    """Say what a curious user wants to know."""
    _emit(VERBOSE, text)


def debug(text: str) -> None:
    """Say what a maintainer wants to know."""
    _emit(DEBUG, text)
