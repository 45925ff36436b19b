"""Where messages go while a function works for a Python program: never to its stderr."""

from __future__ import annotations

from apptainer_py.base import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    # Takes the level of a message, such as "WARNING", and its text.
    OnMessage = Callable[[str, str], None]

_LEVELS = frozenset(map(log.name, (log.ERROR, log.WARN, log.INFO)))


def tell(lines: Iterable[str], told: OnMessage) -> None:
    """Tell of those lines that another process has printed as messages."""
    for line in lines:
        level, colon, text = line.partition(":")
        if colon and level in _LEVELS:
            told(level, text.strip())


def quiet(told: OnMessage | None) -> log.TellingThisThread:
    """Return what has a function told of messages of this thread, or nobody."""

    def tell(kind: int, text: str) -> None:
        if told is not None and kind <= log.INFO:
            told(log.name(kind), text)

    return log.TellingThisThread(tell)
