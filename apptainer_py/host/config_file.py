"""The administrator's file on this machine: read by the starter's own C code, written whole."""

from __future__ import annotations

import os

from apptainer_py.base.errors import ConfigError
from apptainer_py.base.record import Record
from apptainer_py.model.directives import config_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.directive_table import Config
    from apptainer_py.model.directives import Directive


class FileWrong(ConfigError):
    message = "couldn't parse configuration file {file}: {reason}"
    hint = "`config check` lists everything that is wrong with it"


class Problem(Record):
    """Something wrong in a file: the place, the directive or path, what, and what was meant."""

    file: str
    line: int
    key: str
    text: str
    nearest: str

    def __str__(self) -> str:
        if self.line == 0:
            return f"{self.key or self.file}: {self.text}"
        meant = f" (nearest: {self.nearest})" if self.nearest else ""
        subject = f"{self.key}: " if self.key else ""
        return f"{self.file}:{self.line}: {subject}{self.text}{meant}"


class Reading(Record):
    """A file as the C parser sees it; `lines` has 0 for a directive that the file does not give."""

    file: str
    config: Config
    lines: dict[str, int]
    problems: tuple[Problem, ...]

    def value(self, directive: Directive) -> Any:
        """Return the value of a directive."""
        return getattr(self.config, directive.field)

    def place(self, key: str) -> str:
        """Return where the value of a directive comes from."""
        line = self.lines.get(key)
        if line is None:
            return key
        return f"{self.file}:{line}" if line else "default"


def read(file: str, *, require_root_owned: bool) -> Reading:
    """Read a file.

    Raises:
        FileWrong: there is no file.
    """
    from apptainer_py.kernel._starter import parse_config

    try:
        values, lines, problems = parse_config(file, require_root_owned=require_root_owned)
    except FileNotFoundError:
        raise FileWrong(file=file, reason=f"open {file}: no such file or directory") from None
    except ValueError as error:
        raise FileWrong(file=repr(file), reason=error) from None
    return _reading(file, values, lines, problems)


def _reading(
    file: str,
    values: dict[str, Any],
    lines: dict[str, int],
    problems: list[tuple[int, str, str, str]],
) -> Reading:
    return Reading(
        file=file,
        config=config_from(values),
        lines=lines,
        problems=tuple(
            Problem(file=file, line=line, key=key, text=text, nearest=nearest)
            for line, key, text, nearest in problems
        ),
    )


def read_text(file: str, text: str) -> Reading:
    """Read a text as if `file` held it."""
    from apptainer_py.kernel._starter import parse_config_fd

    fd = os.memfd_create("config", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as target:
            target.write(text.encode("utf-8", "surrogateescape"))
        return _reading(file, *parse_config_fd(fd))
    finally:
        os.close(fd)


def replace(file: str, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new one."""
    folder, name = os.path.split(os.path.abspath(file))
    fresh = f"{folder}/.{name}.{os.getpid()}"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as target:
                target.write(text.encode("utf-8", "surrogateescape"))
                target.flush()
                os.fchmod(fd, 0o644)
                os.fsync(fd)
            os.replace(fresh, file)
        except BaseException:
            os.unlink(fresh)
            raise
        above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    except OSError as error:
        raise ConfigError(file=file, reason=f"cannot be written: {error.strerror}") from None
