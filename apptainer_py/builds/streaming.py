"""An image of layers that goes into the packer while it arrives, without a tree on the disk.

What a build adds of its own is made in an almost empty root directory: in it stand the folders and
files that this depends on, in place of those of the layers; what is new goes to the packer last.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.builds.skeleton import EMPTY_FILES, FOLDERS, LINKS, META
from apptainer_py.image import squashfs, tar_stream
from apptainer_py.image.blobs import Layer
from apptainer_py.image.oci_stream import Merger, NotPlain, Owners, TooLarge, TooManyAlike

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apptainer_py.image.blobs import Blob
    from apptainer_py.image.oci_layout import Object
    from apptainer_py.image.squashfs import Packing

    Opened = Callable[[Object], Blob]

_RESERVED = (META, ".build.labels", *LINKS)
_SECTIONS = ("environment", "help", "labels", "runscript", "startscript")


class Plan(Record):
    """Where the packed image comes, and how it is made."""

    target: str
    how: Packing
    now_s: int


def can(sections: Sequence[str]) -> bool:
    """Return whether a definition with these sections leaves alone what the layers bring."""
    return all(name in _SECTIONS for name in sections)


class Streamed:
    """Layers on their way through the packer."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._packer = squashfs.StreamPacker(plan.target, plan.how)
        owners = Owners(all_root=plan.how.all_root, epoch=plan.how.epoch)
        reserved = (os.fsencode(name) for name in _RESERVED)
        most = squashfs.ALIKE_MOST if plan.how.compare else 0
        self._merger = Merger(self._packer.write, owners, reserved, alike_most=most)
        self._known: set[str] = set()

    def take(self, layers: Sequence[Object], opened: Opened, root: str) -> None:
        """Pass all layers on, the newest first, and prepare the root directory for the build.

        Raises:
            NotPlain, ImageError: it takes a tree.
        """
        for layer in reversed(layers):
            blob = opened(layer)
            try:
                content = Layer(blob, layer.plain)
                self._merger.apply(content.read)
                content.check()
                blob.check()
            finally:
                blob.close()
        for folder in FOLDERS:
            self._stand_in(root, folder)
        for name in EMPTY_FILES:
            if self._merger.kind_of(os.fsencode(name)):
                self._known.add(name)
                with open(f"{root}/{name}", "xb"):
                    pass

    def _stand_in(self, root: str, folder: str) -> None:
        parts = folder.split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            kind = self._merger.kind_of(os.fsencode(path))
            if not kind or path in self._known:
                continue
            self._known.add(path)
            if kind == tar_stream.SYMLINK:
                os.symlink(".", f"{root}/{path}")
                return
            if kind != tar_stream.DIRECTORY:
                raise NotPlain
            os.mkdir(f"{root}/{path}", 0o755)

    def finish(self, root: str) -> None:
        """Add what is new in the root directory; the image is packed then.

        Raises:
            PackFailed: mksquashfs said no.
        """
        for path in _below(root):
            if path not in self._known:
                self._add(root, path)
        self._merger.close(self._plan.now_s)
        self._packer.finish()

    def _add(self, root: str, path: str) -> None:
        facts = os.lstat(f"{root}/{path}")
        content, link = b"", ""
        if stat.S_ISLNK(facts.st_mode):
            kind, link = tar_stream.SYMLINK, os.readlink(f"{root}/{path}")
        elif stat.S_ISDIR(facts.st_mode):
            kind = tar_stream.DIRECTORY
        else:
            kind = tar_stream.FILE
            with open(f"{root}/{path}", "rb") as file:
                content = file.read()
        entry = tar_stream.Entry(
            kind=kind,
            name=os.fsencode(path),
            link=os.fsencode(link),
            mode=stat.S_IMODE(facts.st_mode),
            uid=0,
            gid=0,
            size_bytes=len(content),
            modified_ns=facts.st_mtime_ns,
        )
        self._merger.add(entry, content)

    def abandon(self) -> None:
        """End the packer."""
        self._packer.abandon()


def _below(root: str) -> Iterator[str]:
    """Yield what is in a directory, folders before what is in them, in the order of names."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        place = os.path.relpath(folder, root)
        prefix = "" if place == "." else f"{place}/"
        for name in sorted([*folders, *files]):
            yield f"{prefix}{name}"


def stream(plan: Plan, layers: Sequence[Object], opened: Opened, root: str) -> Streamed | None:
    """Return the layers in the packer, or nothing where it takes a tree.

    Raises:
        ImageError: the layers are beyond the limits.
        PackFailed: mksquashfs said no.
    """
    made = Streamed(plan)
    try:
        made.take(layers, opened, root)
    except TooLarge:
        made.abandon()
        raise
    except TooManyAlike:
        made.abandon()
        _empty(root)
        plan = plan.replace(how=plan.how.replace(compare=False))
        return stream(plan, layers, opened, root)
    except (NotPlain, ImageError, tar_stream.TarWrong):
        made.abandon()
        log.verbose("the layers are unpacked first: they cannot be merged as they come")
        _empty(root)
        return None
    except BaseException:
        made.abandon()
        raise
    return made


def _empty(root: str) -> None:
    from apptainer_py.image.oci_layers import remove_tree

    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(fd):
            remove_tree(fd, os.fsencode(name))
    finally:
        os.close(fd)
