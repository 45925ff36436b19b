"""Where programs of the host are found that an option needs: the directive `binary path`."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_CALLERS = "$PATH"


def find(name: str, configuration: Mapping[str, object], path: str) -> str:
    """Return the absolute path of a program; "" where no directory of `binary path` has it.

    `path` is the caller's PATH, for the word `$PATH` of the directive; "" in the setuid flow, where
    that word is left out.
    """
    for entry in str(configuration["binary path"]).split(":"):
        for directory in path.split(":") if entry == _CALLERS else [entry]:
            found = os.path.join(directory, name)
            if directory.startswith("/") and os.path.isfile(found) and os.access(found, os.X_OK):
                return found
    return ""
