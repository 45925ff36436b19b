"""How far a build is: a moving line on a terminal, a line now and then where output is a log."""

from __future__ import annotations

import os
import time

from apptainer_py.base import log, packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from rich.console import Console

_LINE_EACH_S = 20.0
_CLEAR_LINE_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"
_PART_BYTES = 1 << 18  # drawn at once: a file comes in far smaller pieces


def _terminal() -> Console | None:
    """Return what can show a moving line, or None."""
    if log.listener() is not None:
        return None
    if not os.isatty(2) or not log.INFO <= log.level < log.DEBUG:
        return None
    packages.allow()
    from importlib.util import find_spec

    if find_spec("rich") is None:
        return None
    from rich.console import Console

    console = Console(stderr=True, no_color=True if log.colour is False else None)
    # It cannot move a line where TERM is `dumb`, or names nothing.
    return None if console.is_dumb_terminal or not console.is_terminal else console


def working(text: str) -> AbstractContextManager[None]:
    """Show that something goes on whose end nobody knows."""
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Iterator[None]:
        console = _terminal()
        if console is None:
            yield
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(text, total=None)
            yield

    return shown()


def counting(text: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show how much of so many bytes is done; the function that it gives is told of each part."""
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Iterator[Callable[[int], None]]:
        console = _terminal()
        if console is None:
            yield _Lines(text, total_bytes).told
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(text, total=total_bytes or None)
            gathered = _Gathered(lambda size: bar.advance(task, size))
            yield gathered.told

    return shown()


def after_a_kill() -> None:
    """Undo what a moving line has done to the terminal, where its process could not."""
    if _terminal() is not None:
        os.write(2, _CLEAR_LINE_SHOW_CURSOR)


class _Gathered:
    """Small parts, told of as larger ones.  Threads share it."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        from threading import Lock

        self._tell, self._untold, self._lock = tell, 0, Lock()

    def told(self, size: int) -> None:
        """Take what is done."""
        with self._lock:
            self._untold += size
            if abs(self._untold) < _PART_BYTES:
                return
            size, self._untold = self._untold, 0
        self._tell(size)


class _Lines:
    """What a log is told of something that takes long.  Threads share it."""

    def __init__(self, text: str, total_bytes: int) -> None:
        from threading import Lock

        self._text, self._total, self._done = text, total_bytes, 0
        self._lock, self._next_s = Lock(), time.monotonic() + _LINE_EACH_S

    def told(self, size: int) -> None:
        """Take what is done."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if now < self._next_s:
                return
            self._next_s = now + _LINE_EACH_S
            done = self._done
        of = f" of {self._total / 1e6:.1f}" if self._total else ""
        log.info(f"{self._text}: {done / 1e6:.1f}{of} MB")
