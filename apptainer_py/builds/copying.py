"""`%files`: from the host, as `cp -fLr` does; from a stage, with its links as they are.

Where something goes is looked up inside the image's root directory, so that a link of the base
leads to nothing of the host; what is there is replaced, never written through.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError, ImageError
from apptainer_py.image import sandbox
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apptainer_py.builds.definition import Line, Section

_RESOLVE_IN_ROOT = 0x10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_HOST = ("-fLr", "--remove-destination")
_STAGE = ("-a", "-H", "-f", "--remove-destination")
_EXPAND = 'for path in {words}; do printf "%s\\0" "$path"; done'


class CopyFailed(ApptainerError):
    message = (
        "While performing build: unable to copy files {whence} to container fs: while copying "
        "{source} to {target}: {reason}"
    )
    hint = "line {line} of the definition file, section %{section}"


class NoStage(ApptainerError):
    message = (
        "While performing build: unable to copy files from stage to container fs: stage {name} "
        "was not found"
    )


def copy(
    section: Section, root: str, *, stages: Mapping[str, str], below: str = "", environ: object
) -> None:
    """Copy what a `%files` or `%appfiles` section lists.

    `stages` has the root directory of each earlier stage; `below` is where relative targets lie.

    Raises:
        NoStage: the section names no earlier stage.
        CopyFailed: something is not there, or cannot be copied.
    """
    source_root = _source_root(section, stages)
    for line in section.lines:
        words = _split(line.text)
        if not words:
            continue
        source, target = words[0], (words[1] if len(words) > 1 else "")
        log.info(f"Copying {_plain(source)} to {_plain(target)}")
        job = _Job(section, line, source, _plain(target), source_root)
        job.run(root, below, environ)


def _source_root(section: Section, stages: Mapping[str, str]) -> str | None:
    words = section.words
    if section.name != "files" or not words:
        return None
    if words[0] != "from" or len(words) < 2:
        return None
    if words[1] not in stages:
        raise NoStage(name=words[1])
    return stages[words[1]]


def _split(text: str) -> list[str]:
    """Return source and target with their quotes: the shell has still to read the source."""
    import re

    if text.lstrip().startswith("#"):
        return []
    return re.findall(r"""(?:[^\s"'\\]|"[^"]*"|'[^']*'|\\.)+""", text)


def _plain(word: str) -> str:
    import shlex

    try:
        return "".join(shlex.split(word)[:1])
    except ValueError:
        return word


class _Job:
    def __init__(
        self, section: Section, line: Line, source: str, target: str, stage: str | None
    ) -> None:
        self._section = section
        self._line = line
        self._source = source
        self._target = target
        self._stage = stage

    def _failed(self, reason: str) -> CopyFailed:
        return CopyFailed(
            whence="from stage" if self._stage else "from host",
            source=_plain(self._source),
            target=self._target or _plain(self._source),
            reason=reason,
            line=self._line.number,
            section=self._section.name,
        )

    def run(self, root: str, below: str, environ: object) -> None:
        try:
            if self._stage is None:
                found = _on_host(self._source, environ)
            else:
                found = _in_stage(self._stage, _plain(self._source))
            if not found:
                raise self._failed(f"cannot stat '{_plain(self._source)}': No such file")
            for source in found:
                self._one(source, root, below)
        except (OSError, ImageError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            name = getattr(error, "filename", None)
            raise self._failed(f"{os.fsdecode(name)}: {text}" if name else str(text)) from None

    def _one(self, source: str, root: str, below: str) -> None:
        target = self._target or source
        if below and not target.startswith("/"):
            target = f"{below}/{target}"
        if below and not self._target:
            target = f"{below}/{os.path.basename(source.rstrip('/'))}"
        into = target.endswith("/")
        at = os.open(root, _DIRECTORY)
        source_fd = _open_source(self._stage, source)
        try:
            parent, name = _place(at, target, os.path.basename(source.rstrip("/")), into=into)
            try:
                self._cp(source_fd, parent, name)
            finally:
                os.close(parent)
        finally:
            os.close(source_fd)
            os.close(at)

    def _cp(self, source: int, parent: int, name: str) -> None:
        import subprocess

        options = _HOST if self._stage is None else _STAGE
        facts = os.fstat(source)
        # A directory is merged into one that is there; anything else replaces what is there.
        argv = ["/bin/cp", *options, "-T", "--", f"/proc/self/fd/{source}"]
        argv.append(f"/proc/self/fd/{parent}/{name}")
        if not stat.S_ISDIR(facts.st_mode) and _is_directory(parent, name):
            raise self._failed(f"'{name}' is a directory")
        done = subprocess.run(
            argv,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(source, parent),
            check=False,
        )
        if done.returncode:
            # What cp is given are descriptors, which say nothing to a reader.
            text = done.stderr.decode("utf-8", "replace")
            text = text.replace(argv[-2], _plain(self._source)).replace(argv[-1], self._target)
            said = text.strip().splitlines()
            raise self._failed(said[-1] if said else f"status {done.returncode}")


def _is_directory(parent: int, name: str) -> bool:
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(mode)


def _on_host(word: str, environ: object) -> list[str]:
    """Return what a shell makes of a word: variables, `~` and patterns (facts §7.1)."""
    import subprocess

    assert isinstance(environ, dict)
    argv = ["/bin/sh", "-c", _EXPAND.format(words=word)]
    done = subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    paths = [os.fsdecode(one) for one in done.stdout.split(b"\0") if one]
    for path in paths:
        os.stat(path)
    return paths


def _in_stage(stage: str, pattern: str) -> list[str]:
    """Return the paths that a pattern means within another stage's root directory."""
    from fnmatch import fnmatchcase

    root = os.open(stage, _DIRECTORY)
    try:
        found = [""]
        for part in pattern.strip("/").split("/"):
            if not set(part) & set("*?["):
                found = [f"{above}/{part}" for above in found]
                continue
            found = [
                f"{above}/{name}"
                for above in found
                for name in sandbox.list_directory(root, above or "/")
                if fnmatchcase(name, part) and (not name.startswith(".") or part.startswith("."))
            ]
        return found
    finally:
        os.close(root)


def _open_source(stage: str | None, path: str) -> int:
    if stage is None:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    root = os.open(stage, _DIRECTORY)
    try:
        inside = os.fsencode(path.strip("/")) or b"."
        return _starter.openat2(root, inside, os.O_PATH | os.O_CLOEXEC, _RESOLVE_IN_ROOT)
    finally:
        os.close(root)


def _place(root: int, target: str, name: str, *, into: bool) -> tuple[int, str]:
    """Return the directory inside the root, made if need be, and the name in it."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    whole = "/".join(parts)
    if into or not parts or _leads_to_directory(root, whole):
        if not into and parts and name and parts[-1] == name and _same_tree(root, whole):
            return _make(root, parts[:-1]), parts[-1]
        return _make(root, parts), name
    return _make(root, parts[:-1]), parts[-1]


def _same_tree(root: int, path: str) -> bool:
    """Return whether a directory is there itself, so that `/dir` copied to `/dir` is merged."""
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=root, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _leads_to_directory(root: int, path: str) -> bool:
    try:
        os.close(_starter.openat2(root, os.fsencode(path), _DIRECTORY, _RESOLVE_IN_ROOT))
    except OSError:
        return False
    return True


def _make(root: int, parts: Sequence[str]) -> int:
    """Return a directory of the image, made with those above it where it is not there."""
    at = os.dup(root)
    done = ""
    for part in parts:
        done = f"{done}/{part}" if done else part
        try:
            step = _starter.openat2(root, os.fsencode(done), _DIRECTORY, _RESOLVE_IN_ROOT)
        except FileNotFoundError:
            os.mkdir(part, 0o755, dir_fd=at)
            step = _starter.openat2(root, os.fsencode(done), _DIRECTORY, _RESOLVE_IN_ROOT)
        os.close(at)
        at = step
    return at
