"""Images: made, fetched, asked, started, signed and sent.

image = apptainer_py.build("tool.sif", "tool.def", force=True)
print(image.labels["org.label-schema.build-arch"])
image.exec(["tool", "--version"], check=True)
"""

from __future__ import annotations

import os
import select
import threading
import time

from apptainer_py.api import building, inspecting, launching
from apptainer_py.api.errors import Cancelled, TimedOut
from apptainer_py.api.messages import quiet, tell
from apptainer_py.api.options import values
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Unpack

    from apptainer_py.api import keywords
    from apptainer_py.api.instances import Instance
    from apptainer_py.api.launching import Completed, Path, Running, Stream
    from apptainer_py.api.messages import OnMessage
    from apptainer_py.verbs.verify import Verdict

_KEPT_BYTES, _NOTE_BYTES, _READ_BYTES = 1 << 20, 1 << 16, 1 << 16


class Metadata(Record):
    """What an image, or one application in it, says about itself; "" is for what it lacks."""

    labels: Mapping[str, str]
    environment: Mapping[str, str]
    runscript: str = ""
    startscript: str = ""
    test: str = ""
    helpfile: str = ""
    deffile: str = ""
    apps: Mapping[str, Metadata]
    warnings: tuple[str, ...] = ()


class Image:
    """An image by its path, or by a URI for what only starts it; it is read when it is asked.

    It stands for its path wherever a path is expected.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)

    def inspect(self) -> Metadata:
        """Return all that it says about itself.

        Raises:
            ImageError: there is no such image, or it cannot be read.
        """
        found = inspecting.inspect(self.path, {"all": True})
        apps = {name: _metadata(facts, {}) for name, facts in found.apps.items()}
        return _metadata(found.attributes, apps, found.warnings)

    @property
    def labels(self) -> Mapping[str, str]:
        """Return its labels.

        Raises:
            ImageError: as `inspect`.
        """
        return self.inspect().labels

    def exec(self, command: Sequence[Path], **options: Any) -> Completed:
        """Run a program in it, as `apptainer_py.exec` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.exec(self.path, command, **options)

    def run(self, arguments: Sequence[Path] = (), **options: Any) -> Completed:
        """Run its runscript, as `apptainer_py.run` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.run(self.path, arguments, **options)

    def test(self, arguments: Sequence[Path] = (), **options: Any) -> Completed:
        """Run its test, as `apptainer_py.test` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.test(self.path, arguments, **options)

    def stream(self, command: Sequence[Path], **options: Any) -> Running:
        """Start a program in it, as `apptainer_py.stream` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.exec`.
        """
        return launching.stream(self.path, command, **options)

    def start(self, name: str, arguments: Sequence[Path] = (), **options: Any) -> Instance:
        """Start an instance of it, as `Instance.start` does.

        Raises:
            ApptainerError, TypeError: as `Instance.start`.
        """
        from apptainer_py.api.instances import Instance

        return Instance.start(self.path, name, arguments, **options)

    def sign(self, *, key: Path = "", passphrase: str = "", **options: Any) -> None:
        """Sign it, with a private key of a PEM file, or else of the user's OpenPGP keyring.

        Raises:
            ApptainerError: there is no such key, or the file cannot be written.
        """
        from apptainer_py.api import signatures

        with quiet(None):
            wanted = values("sign", {**options, "key": key})
            around = signatures.Asking(
                environ=launching.environment_of(None), passphrase=passphrase
            )
            signatures.sign(self.path, wanted, around)

    def verify(self, **options: Any) -> tuple[Verdict, ...]:
        """Verify its signatures, by the options of `verify`; return what each is worth.

        Raises:
            ApptainerError: one is missing or wrong, or was made by somebody unknown.
        """
        from apptainer_py.api import signatures

        verdicts: list[Verdict] = []
        with quiet(None):
            wanted = values("verify", options)
            around = signatures.Asking(environ=launching.environment_of(None))
            signatures.verify(self.path, wanted, around, verdicts.append)
        return tuple(verdicts)

    def push(self, uri: str, **options: Any) -> str:
        """Upload it, as `apptainer_py.push` does.

        Raises:
            ApptainerError, TypeError: as `apptainer_py.push`.
        """
        return push(self.path, uri, **options)

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"Image({self.path!r})"


def build(  # noqa: PLR0913 as `launching.exec`
    target: Path,
    spec: Path,
    *,
    output: Stream | None = None,
    timeout: float | None = None,
    cancel: threading.Event | None = None,
    environ: Mapping[str, str] | None = None,
    on_message: OnMessage | None = None,
    **options: Unpack[keywords.Build],
) -> Image:
    """Build an image from a definition file, a directory, another image or a URI.

    What the build and its scripts print goes to `output`, a descriptor or a file; the end of it is
    a note of the error otherwise.  After `timeout` seconds, or soon after another thread has set
    `cancel`, it ends as one that fails.

    Raises:
        ApptainerError: it cannot be done; nothing is left of it.
        Cancelled, TimedOut: it was not to go on.
        TypeError: an option has no such name or type.
    """
    from apptainer_py.builds.supervised import InterruptedByUser

    wanted, config = _with_config("build", options)
    path = os.fspath(target)
    with quiet(on_message), _Output(output, on_message) as kept:
        patience = _Patience(timeout, cancel)
        around = building.Surroundings(
            environ=launching.environment_of(environ),
            config_file=config,
            output=kept.fd,
            is_unwanted=patience.is_over if timeout is not None or cancel is not None else None,
        )
        try:
            building.build_image(path, os.fspath(spec), wanted, around)
        except InterruptedByUser:
            raise patience.error(f"build {path} {os.fspath(spec)}") from None
    return Image(path)


def pull(
    uri: str,
    target: Path = "",
    *,
    output: Stream | None = None,
    environ: Mapping[str, str] | None = None,
    on_message: OnMessage | None = None,
    **options: Unpack[keywords.Pull],
) -> Image:
    """Fetch an image to a file, whose name is made of the URI's if no other is given.

    Raises:
        ApptainerError: it cannot be had, or the file is there, and `force` is not asked for.
        TypeError: an option has no such name or type.
    """
    wanted, config = _with_config("pull", options)
    with quiet(on_message), _Output(output, on_message) as kept:
        around = building.Surroundings(
            environ=launching.environment_of(environ), config_file=config, output=kept.fd
        )
        return Image(building.pull_image(uri, os.fspath(target), wanted, around))


def push(
    image: Path,
    uri: str,
    *,
    environ: Mapping[str, str] | None = None,
    on_message: OnMessage | None = None,
    **options: Unpack[keywords.Push],
) -> str:
    """Upload a SIF file; return the digest of what the registry now has.

    Raises:
        ApptainerError: the registry does not take it, or it is no SIF file.
        TypeError: an option has no such name or type.
    """
    wanted, _ = _with_config("push", options)
    with quiet(on_message):
        return building.push_image(os.fspath(image), uri, wanted, launching.environment_of(environ))


class _Patience:
    """How long a caller wants a build to go on."""

    def __init__(self, timeout: float | None, cancel: threading.Event | None) -> None:
        self._seconds, self._cancel = timeout, cancel
        self._end_s = None if timeout is None else time.monotonic() + timeout

    def is_over(self) -> bool:
        is_late = self._end_s is not None and time.monotonic() >= self._end_s
        return is_late or (self._cancel is not None and self._cancel.is_set())

    def error(self, command: str) -> BaseException:
        """Return what a build raises that was interrupted; without a reason here it was ^C."""
        if self._cancel is not None and self._cancel.is_set():
            return Cancelled()
        if self._seconds is not None and self.is_over():
            return TimedOut(command=command, seconds=self._seconds, stdout=b"", stderr=b"")
        return KeyboardInterrupt()


class _Output:
    """Where a build prints to: what the caller gives, or memory, for a note of what went wrong.

    A build is a process of its own, so its messages are told once it has ended, those among the
    last MiB, at least, of what it has printed.
    """

    def __init__(self, given: Stream | None, told: OnMessage | None) -> None:
        self._given = given
        self._told = told
        self._said = bytearray()
        self._reader: threading.Thread | None = None
        self._over = -1
        self.fd = -1

    def __enter__(self) -> _Output:
        if self._given is None:
            reading, self.fd = os.pipe2(os.O_CLOEXEC)
            over, self._over = os.pipe2(os.O_CLOEXEC)
            self._reader = threading.Thread(target=self._keep, args=(reading, over), daemon=True)
            self._reader.start()
        else:
            self.fd = self._given if isinstance(self._given, int) else self._given.fileno()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        advice = error.advice() if isinstance(error, ApptainerError) else None
        if error is not None and advice:
            error.add_note(advice)
        if self._reader is None:
            return
        # The build has ended, and all that it has started; what other threads fork at the same
        # time has the pipe, too, so that its end does not come.
        os.write(self._over, b"\n")
        self._reader.join()
        os.close(self._over)
        os.close(self.fd)
        if self._told is not None:
            tell(self._said.decode("utf-8", "replace").splitlines(), self._told)
        if self._said and isinstance(error, ApptainerError):
            error.add_note(self._said[-_NOTE_BYTES:].decode("utf-8", "replace"))

    def _keep(self, reading: int, over: int) -> None:
        """Keep the end of what is printed, however much it is."""
        os.set_blocking(reading, False)
        is_over = False
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        poll.register(over, select.POLLIN)
        while True:
            try:
                self._said += os.read(reading, _READ_BYTES)
                if len(self._said) > 2 * _KEPT_BYTES:
                    del self._said[:-_KEPT_BYTES]
            except BlockingIOError:
                if is_over:
                    break
                is_over = over in dict(poll.poll())
        os.close(reading)
        os.close(over)


def _with_config(command: str, options: Mapping[str, Any]) -> tuple[dict[str, object], str]:
    config = options.get("config") or ""
    return values(command, {k: v for k, v in options.items() if k != "config"}), os.fspath(config)


def _metadata(
    facts: Mapping[str, Any], apps: Mapping[str, Metadata], warnings: tuple[str, ...] = ()
) -> Metadata:
    names = ("runscript", "startscript", "test", "helpfile", "deffile")
    return Metadata(
        labels=dict(facts.get("labels") or {}),
        environment=dict(facts.get("environment") or {}),
        apps=apps,
        warnings=warnings,
        **{name: str(facts.get(name) or "") for name in names},
    )
