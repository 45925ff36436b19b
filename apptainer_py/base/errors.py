"""What can go wrong, in one tree; each class is a message, a hint and an exit status.

ApptainerError                 255: a failure that we understand
├── UsageError                 1: the command line; the usage is shown
├── ImageError                 the image cannot be used
├── ConfigError                the administrator's file
├── BindError                  a bind specification or its source
├── LaunchError                the container could not be made
│   ├── ImageGone              its file system's server has ended
│   └── StarterRefused         the starter said no, with its number
└── NotSupported               known, but not built
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class ApptainerError(Exception):
    """A failure that we understand; anything else is a bug and shows a traceback with `-d`."""

    message: ClassVar[str] = "{text}"
    hint: ClassVar[str | None] = None
    exit_code: ClassVar[int] = 255

    def __init__(self, **facts: object) -> None:
        super().__init__()
        self.facts = facts

    def __str__(self) -> str:
        return self.message.format(**self.facts)

    def advice(self) -> str | None:
        """Return what to do next, with the facts filled in, or None."""
        return self.hint.format(**self.facts) if self.hint else None


class UsageError(ApptainerError):
    message = "{text}"
    exit_code = 1


class ImageError(ApptainerError):
    message = "{image}: {reason}"


class ConfigError(ApptainerError):
    message = "{file}: {reason}"


class BindError(ApptainerError):
    message = "{text}"


class LaunchError(ApptainerError):
    message = "{text}"


class ImageGone(LaunchError):
    """Whoever served the container's file system has ended, and everything in it with that."""

    message = "the image server has ended, and with it the container's file system"


def is_gone(number: object) -> bool:
    """Return whether an errno is that of a file system whose server has ended."""
    import errno

    return number in (errno.ENOTCONN, errno.ECONNABORTED)


class NotSupported(ApptainerError):
    message = "{what} is not supported yet"
