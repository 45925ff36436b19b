"""Hooks of a container as the bytes that starter/hook.c runs (starter/hook.h)."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.model.oci_plan import Hook

MAGIC = b"APYHOK1\0"
_HEADER = struct.Struct("=8sIIII")
_ENTRY = struct.Struct("=IIIII")


def hook_frames(hooks: Sequence[Hook], state: tuple[bytes, bytes]) -> bytes:
    """Return the frame for these hooks, which get `state` as JSON on stdin.

    The container's pid is put between both parts of `state`; where the second one is empty, the
    first is the whole JSON.

    Raises:
        ValueError: a string has a NUL in it.
    """
    entries = b"".join(map(_entry, hooks))
    before, after = state
    total = _HEADER.size + len(before) + len(after) + len(entries)
    head = _HEADER.pack(MAGIC, total, len(hooks), len(before), len(after))
    return head + before + after + entries


def _entry(hook: Hook) -> bytes:
    arguments = hook.arguments or (hook.path,)
    own = hook.environment is not None
    environment = hook.environment or ()
    words = [
        word.encode("utf-8", "surrogateescape") for word in (hook.path, *arguments, *environment)
    ]
    if any(b"\0" in word for word in words):
        raise ValueError("a hook's path, argument or variable has a NUL in it")
    strings = b"".join(word + b"\0" for word in words)
    return (
        _ENTRY.pack(
            _ENTRY.size + len(strings),
            hook.timeout_seconds * 1000,
            len(arguments),
            len(environment),
            own,
        )
        + strings
    )
