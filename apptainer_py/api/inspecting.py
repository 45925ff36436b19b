"""What images say about themselves, by the options of `inspect`."""

from __future__ import annotations

from apptainer_py.verbs import inspect as verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def inspect(path: str, options: Mapping[str, Any]) -> verb.Inspection:
    """Return it, as text and as data; options are by their long names.

    Raises:
        ApptainerError: there is no such image, or it cannot be read.
    """
    wanted = {name.replace("-", "_"): value for name, value in options.items()}
    return verb.inspect(path, verb.Wanted(**wanted))
