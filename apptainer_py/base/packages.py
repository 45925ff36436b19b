"""Debian's packages for Python, without whose look-up the interpreter starts faster."""

from __future__ import annotations

import sys

_FOLDER = "/usr/lib/python3/dist-packages"


def allow() -> None:
    """Let what is imported from now on come from Debian's packages too, behind all else."""
    if _FOLDER not in sys.path:
        sys.path.append(_FOLDER)
