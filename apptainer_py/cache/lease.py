"""One of several processes does a piece of work, on one machine or on many that share a directory.

A lease is a file that is made with O_EXCL and touched while its holder lives: NFS carries both, and
no lock of the kernel's is needed. It only saves work: what is made is put in place by rename, so
two holders would do no harm. Whoever waits believes no clock but its own.
"""

from __future__ import annotations

import os
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TOUCH_S = 2.0
STALE_S = 15.0
_LOOK_S, _LOOK_MOST_S = 0.02, 0.5
_BYTES = 512


def _start_of(pid: int) -> str:
    """Return when a process of this machine began, in ticks; nothing if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _whoami() -> str:
    pid = os.getpid()
    return f"{_boot()} {_pid_space()} {pid} {_start_of(pid)} {os.urandom(8).hex()}\n"


def _is_dead(text: str) -> bool:
    """Return whether a holder of this machine has ended; of others one cannot know."""
    words = text.split()
    if len(words) != 5 or words[0] != _boot() or words[1] != _pid_space():
        return False
    return not words[2].isdecimal() or _start_of(int(words[2])) != words[3]


class Lease:
    """Held between `with` and its end; `held` is False where another's work was waited for."""

    def __init__(self, path: str, done: Callable[[], bool]) -> None:
        self._path = path
        self._done = done
        self._text = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this process is to do the work."""
        return bool(self._text)

    def __enter__(self) -> Lease:
        seen: tuple[str, int] = ("", 0)
        since, look = time.monotonic(), _LOOK_S
        while not self._done():
            if self._take():
                # It may have become done between the look and the lease.
                if self._done():
                    self._give_up()
                    break
                self._thread = threading.Thread(target=self._touch, daemon=True)
                self._thread.start()
                break
            now = self._look()
            if now != seen:
                seen, since = now, time.monotonic()
            if seen[0] and (_is_dead(seen[0]) or time.monotonic() - since > STALE_S):
                self._break(seen[0])
                continue
            time.sleep(look)
            look = min(look * 1.5, _LOOK_MOST_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._text:
            self._give_up()

    def _take(self) -> bool:
        text = _whoami()
        made = f"{self._path}.{text.split()[-1]}"
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        # With its content from the first moment: who looks never sees an empty one.
        try:
            os.link(made, self._path)
        except FileExistsError:
            return False
        finally:
            os.unlink(made)
        self._text = text
        return True

    def _look(self) -> tuple[str, int]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return "", 0
        try:
            return os.read(fd, _BYTES).decode("utf-8", "replace"), os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)

    def _break(self, text: str) -> None:
        """Take a dead holder's lease away; another's that came meanwhile is put back."""
        aside = f"{self._path}.{os.urandom(8).hex()}"
        try:
            os.rename(self._path, aside)
        except OSError:
            return
        try:
            with open(aside, encoding="utf-8", errors="replace") as file:
                if file.read(_BYTES) != text:
                    os.link(aside, self._path)
        except OSError:
            pass
        finally:
            os.unlink(aside)

    def _touch(self) -> None:
        while not self._over.wait(TOUCH_S):
            try:
                os.utime(self._path)
            except OSError:
                pass

    def _give_up(self) -> None:
        if self._look()[0] == self._text:
            try:
                os.unlink(self._path)
            except OSError:
                pass
        self._text = ""
