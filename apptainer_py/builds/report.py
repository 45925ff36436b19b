"""How far a build is: a moving line on a terminal, nothing where the output is a log."""

from __future__ import annotations

import os

from apptainer_py.base import log, packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


def _moving() -> bool:
    if log.listener() is not None:
        return False
    if not os.isatty(2) or not log.INFO <= log.level < log.DEBUG:
        return False
    packages.allow()
    from importlib.util import find_spec

    return find_spec("rich") is not None


def working(text: str) -> AbstractContextManager[None]:
    """Show that something goes on whose end nobody knows."""
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Iterator[None]:
        if not _moving():
            yield
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task(text, total=None)
            yield

    return shown()


def counting(text: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show how much of so many bytes is done; the function that it gives is told of each part."""
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Iterator[Callable[[int], None]]:
        if not _moving():
            yield lambda size: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(text, total=total_bytes)
            yield lambda size: bar.advance(task, size)

    return shown()
