"""What the functions for Python programs raise: the product's own tree, and what only they need.

The text of each is the one line that the command would print.
"""

from __future__ import annotations

from apptainer_py.base.errors import (
    ApptainerError,
    ImageError,
    LaunchError,
    NotSupported,
    UsageError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.api.launching import Completed

__all__ = [
    "ApptainerError", "Cancelled", "CommandFailed", "ImageError", "LaunchError", "NotSupported",
    "TimedOut", "UsageError",
]  # fmt: skip


class NotLaunched(LaunchError):
    """The container could not be made; the text is the program's own."""

    def __init__(self, *, text: str, returncode: int) -> None:
        super().__init__(text=text)
        self.returncode = returncode


class CommandFailed(ApptainerError):
    """What ran in the container did not end with 0; `result` has all of it."""

    message = "{command} ended with status {status}"

    def __init__(self, result: Completed) -> None:
        super().__init__(command=" ".join(result.args), status=result.returncode)
        self.result = result


class Cancelled(ApptainerError):
    """The caller did not want the build any more."""

    message = "the build was cancelled; nothing of it is left"


class TimedOut(ApptainerError):
    """It did not end in time, and was killed; what it had written until then is kept."""

    message = "{command} did not end within {seconds:g} s"

    def __init__(self, *, command: str, seconds: float, stdout: bytes, stderr: bytes) -> None:
        super().__init__(command=command, seconds=seconds)
        self.stdout = stdout
        self.stderr = stderr
