"""Cache and memory bandwidth classes of a container: the resctrl file system (Intel RDT)."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import read_at_most

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOUNTINFO_BYTES = 1 << 20
_MONITORING = ("enableMonitoring", "enableCMT", "enableMBM")


class ResctrlError(ApptainerError):
    message = "{text}"


def find_root() -> str | None:
    """Return where resctrl is mounted, None if it is not."""
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    text = read_at_most(fd, _MOUNTINFO_BYTES).decode("utf-8", "surrogateescape")
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("resctrl "):
            return before.split(" ")[4]
    return None


def _group(root: str, wish: dict[str, Any], name: str) -> str:
    return f"{root}/{wish.get('closID') or name}"


def schemata(wish: dict[str, Any]) -> str:
    """Return what is written to schemata, "" for nothing."""
    lines = [wish[key] for key in ("l3CacheSchema", "memBwSchema") if wish.get(key)]
    return "\n".join([*lines, *(wish.get("schemata") or ())])


def join(wish: dict[str, Any], name: str, pid: int, root: str | None = None) -> None:
    """Put a process, and all that it starts, into the class that `linux.intelRdt` asks for.

    Raises:
        ResctrlError: there is no resctrl, or it refuses; what was made is gone then.
    """
    root = root or find_root()
    if root is None:
        text = "intelRdt is specified in config, but Intel RDT is not enabled"
        raise ResctrlError(text=text)
    path = _group(root, wish, name)
    text = schemata(wish)
    if wish.get("closID") and not text and not os.path.isdir(path):
        text = (
            "clos dir not accessible (must be pre-created when l3CacheSchema and memBwSchema are "
            f"empty): stat {path}: no such file or directory"
        )
        raise ResctrlError(text=text)
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        if text:
            _write(f"{path}/schemata", f"{text}\n")
        _write(f"{path}/tasks", str(pid))
        if any(wish.get(key) for key in _MONITORING):
            monitor = f"{path}/mon_groups/{name}"
            os.makedirs(monitor, 0o755, exist_ok=True)
            _write(f"{monitor}/tasks", str(pid))
    except OSError as error:
        remove(wish, name, root)
        why = (error.strerror or "").lower()
        raise ResctrlError(text=f"unable to set Intel RDT: {error.filename}: {why}") from None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def remove(wish: dict[str, Any], name: str, root: str | None = None) -> None:
    """Remove what join() has made; a class that was named belongs to who named it."""
    root = root or find_root()
    if root is None:
        return
    path = _group(root, wish, name)
    gone = [f"{path}/mon_groups/{name}"]
    if not wish.get("closID"):
        gone.append(path)
    for one in gone:
        try:
            os.rmdir(one)
        except OSError:
            continue
