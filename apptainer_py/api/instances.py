"""Instances: containers that stay, which programs are started in by name.

with apptainer_py.Instance.start("image.sif", "web") as web:
    web.exec(["curl", "-s", "localhost"])
"""

from __future__ import annotations

import os

from apptainer_py.api import launching
from apptainer_py.api.errors import UsageError
from apptainer_py.api.messages import quiet
from apptainer_py.api.options import values
from apptainer_py.verbs import instance_list, instance_stats, instance_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Self, Unpack

    from apptainer_py.api import keywords
    from apptainer_py.api.launching import Completed, Path, Running
    from apptainer_py.runtime import instances as records
    from apptainer_py.verbs.instance_stats import Usage


class Instance:
    """An instance of the caller's, or of a `user` whom root asks for, as it was found.

    `name`, `pid`, `image`, `ip`, `log_out` and `log_err` are those of `instance list`.
    """

    def __init__(self, record: records.Instance, *, user: str = "") -> None:
        self.name = record.name
        self.pid = record.pid
        self.image = record.image
        self.ip = record.ip
        self.log_out = record.log_out
        self.log_err = record.log_err
        self._user = user

    @classmethod
    def start(
        cls,
        image: Path,
        name: str,
        arguments: Sequence[Path] = (),
        *,
        timeout: float | None = None,
        environ: Mapping[str, str] | None = None,
        **options: Unpack[keywords.Start],
    ) -> Self:
        """Start one, whose startscript is given the arguments.

        Raises:
            LaunchError: it could not be started.
            TimedOut: that took longer than `timeout` seconds.
            TypeError: an option has no such name or type.
        """
        how = launching.How(timeout=timeout, environ=environ, check=True)
        words = (name, *launching.words_of(arguments))
        launching.complete("instance start", image, words, how, options)
        return cls.get(name)

    @classmethod
    def get(cls, name: str, *, user: str = "") -> Self:
        """Return the instance of that name.

        Raises:
            UsageError: none runs.
        """
        for record in found(name, user=user, all=True):
            if record.name == name:
                return cls(record, user=user)
        raise UsageError(text=f"no instance found with name {name}")

    @classmethod
    def list(cls, pattern: str = "*", *, user: str = "") -> list[Self]:
        """Return the instances that run, by name.

        Raises:
            ApptainerError: another user's are asked for, and the caller is not root.
        """
        return [cls(record, user=user) for record in found(pattern, user=user)]

    @property
    def uri(self) -> str:
        """Return what names it to the commands that start programs in it."""
        return f"instance://{self.name}"

    def exec(self, command: Sequence[Path], **options: Any) -> Completed:
        """Run a program in it, as `apptainer_py.exec` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.exec(self.uri, command, **options)

    def run(self, arguments: Sequence[Path] = (), **options: Any) -> Completed:
        """Run the image's runscript in it, as `apptainer_py.run` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.run(self.uri, arguments, **options)

    def stream(self, command: Sequence[Path], **options: Any) -> Running:
        """Start a program in it, as `apptainer_py.stream` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.stream(self.uri, command, **options)

    def usage(self) -> Usage:
        """Return what all of its processes use together at this moment.

        Raises:
            UsageError: it has ended.
        """
        return instance_stats.usage_now(
            self.name, launching.environment_of(None), user=self._user, uid=os.getuid()
        )

    def stop(self, *, signal: str = "", force: bool = False, timeout: int = 10) -> None:
        """End it: with a signal, by default the image's own, and SIGKILL some seconds later.

        Raises:
            UsageError: it has ended already.
        """
        with quiet(None):
            stop(self.name, user=self._user, signal=signal, force=force, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.stop()
        except UsageError:
            return  # by itself, meanwhile

    def __repr__(self) -> str:
        return f"Instance(name={self.name!r}, pid={self.pid}, image={self.image!r})"


def found(pattern: str, *, user: str = "", all: bool = False) -> list[records.Instance]:  # noqa: A002
    """Return the records of the instances that run; `all` has those too that only share namespaces.

    Raises:
        ApptainerError: another user's are asked for, and the caller is not root.
    """
    environ = launching.environment_of(None)
    return instance_list.matching(pattern, environ, user=user, uid=os.getuid(), with_shared=all)


def stop(pattern: str = "", **options: object) -> None:
    """Stop the instances whose names match, by the options of `instance stop`.

    Raises:
        ApptainerError: there are none, or one cannot be stopped.
    """
    wanted: dict[str, Any] = values("instance stop", options)
    instance_stop.instance_stop(
        pattern,
        launching.environment_of(None),
        everything=wanted["all"],
        user=wanted["user"],
        uid=os.getuid(),
        number=wanted["signal"],
        force=wanted["force"],
        timeout_s=wanted["timeout"],
    )
