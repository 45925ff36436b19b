"""`pull`: an image from a registry, or from the web, as a file."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.files import copy_rest, give_name, open_nameless
from apptainer_py.base.record import Record
from apptainer_py.builds import uris

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.builds.uris import Convert

_MODE = 0o755


class Exists(ApptainerError):
    message = 'Image file already exists: "{target}" - will not overwrite'
    hint = "--force overwrites it"


class CannotPull(ApptainerError):
    message = "While pulling {uri}: {reason}"


class Request(Record):
    """A command line of `pull`; `name` is a file, `folder` where it goes."""

    uri: str
    how: Fetching
    environ: Mapping[str, str]
    name: str = ""
    folder: str = ""
    force: bool = False


def pull(request: Request, convert: Convert) -> str:
    """Fetch an image; return the path of its file.

    Raises:
        ApptainerError: it cannot be had, or the file is there.
    """
    target = request.name or f"{uris.file_stem(request.uri)}.sif"
    uris.split(request.uri)
    if request.folder:
        target = os.path.join(request.folder, target)
    if os.path.lexists(target) and not request.force:
        raise Exists(target=target)
    above = os.path.dirname(target) or "."
    if not os.path.isdir(above):
        raise CannotPull(uri=request.uri, reason=f"there is no directory {above}")
    with uris.cache_for(request.how, request.environ) as cache:
        found = uris.fetch(request.uri, request.how, request.environ, cache, convert)
        try:
            _copy(found, target)
        except OSError as error:
            reason = f"{target}: {(error.strerror or '').lower()}"
            raise CannotPull(uri=request.uri, reason=reason) from None
    log.verbose(f"{request.uri} is {target}")
    return target


def _copy(source: str, target: str) -> None:
    """Copy it beside the target, then put it there: nobody sees a part of an image."""
    above, name = os.path.split(target)
    made = f"{name}.{os.urandom(6).hex()}.part"
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    folder = os.open(above or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _write(reading, folder, made)
        os.rename(made, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        try:
            os.unlink(made, dir_fd=folder)
        except OSError:
            pass
        raise
    finally:
        os.close(folder)
        os.close(reading)


def _write(reading: int, folder: int, name: str) -> None:
    """Write a copy that has no name until it is whole, where the file system has such files."""
    try:
        writing = open_nameless(folder, os.O_WRONLY, _MODE)
    except OSError:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        writing = os.open(name, flags, _MODE, dir_fd=folder)
        nameless = False
    else:
        nameless = True
    try:
        copy_rest(reading, writing)
        if nameless:
            give_name(writing, folder, name)
    finally:
        os.close(writing)
