"""The one place where commands without a container read the caller's environment."""

from __future__ import annotations

import os


def of_caller() -> dict[str, str]:
    """Return a copy of the environment that this program was started with."""
    return dict(os.environ)  # noqa: TID251 cli is where it is read
