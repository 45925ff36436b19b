"""Layers into one directory, as the OCI image specification says (layer.md); layers are hostile.

Every look-up starts at a descriptor of that directory, which no link and no ".." leads out of; what
is there by then is never followed when something is put in its place. Nobody else works in the
directory meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import tar_stream
from apptainer_py.image.tar_stream import TarStream, TarWrong
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.image.tar_stream import Entry, Read

_RESOLVE_IN_ROOT = 0x10
_NAME_BYTES = 255
# Directories in a name: each costs the stack two frames.
_LEVELS = 400
WHITEOUT, OPAQUE, SPECIAL = b".wh.", b".wh..wh..opq", b".wh..wh."
_XATTR_BYTES = 65536
_DEEPEST = _LEVELS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Limits(Record):
    """What all layers of an image together may make."""

    entries: int = 2_000_000
    total_bytes: int = 1 << 38


class LayerWrong(ImageError):
    """A layer that leads out of the image, or is none."""

    message = "{reason}"


class Unpacker:
    """One directory that takes layer after layer.

    `owns_all` tells that ids may be given to files; those that the caller has not become root's.
    """

    def __init__(self, root: str, limits: Limits | None = None, *, owns_all: bool = True) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._path = os.fsencode(os.readlink(f"/proc/self/fd/{self._root}"))
        self._limits = limits or Limits()
        self._owns_all = owns_all
        self._entries = 0
        self._bytes = 0
        self._parent: tuple[bytes, int, bytes] | None = None
        # Directories get their modes at the end: one that cannot be written could not be filled.
        self._modes: dict[bytes, tuple[int, int]] = {}
        self._made: set[bytes] = set()
        self._unmapped = False

    def close(self) -> None:
        """Give directories their modes and times, the innermost first."""
        self._forget()
        for path in sorted(self._modes, key=len, reverse=True):
            mode, modified = self._modes[path]
            try:
                fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            os.fchmod(fd, mode)
            _set_time(fd, modified)
            os.close(fd)
        os.close(self._root)
        if self._unmapped:
            log.verbose("files of users that the container does not have belong to its root")

    def apply(self, read: Read) -> None:
        """Put a layer over what is there.

        Raises:
            LayerWrong: an entry leads out of the image or cannot be, or there are too many.
        """
        self._made = set()
        stream = TarStream(self._counted(read))
        try:
            for entry in stream.entries():
                self._entries += 1
                if self._entries > self._limits.entries:
                    raise LayerWrong(
                        reason=f"the image has more than {self._limits.entries} entries"
                    )
                self._put(entry, stream)
        except TarWrong as error:
            raise LayerWrong(reason=f"a layer is damaged: {error}") from None
        finally:
            self._forget()

    def _counted(self, read: Read) -> Read:
        def counted(size: int) -> bytes:
            data = read(size)
            self._count(len(data))
            return data

        return counted

    def _count(self, size: int, *, is_read: bool = True) -> None:
        if self._bytes + size > self._limits.total_bytes:
            raise LayerWrong(reason=f"the image is larger than {self._limits.total_bytes} bytes")
        self._bytes += size if is_read else 0

    # -- look-up

    def _open(self, path: bytes, flags: int) -> int:
        return _starter.openat2(self._root, path or b".", flags | os.O_CLOEXEC, _RESOLVE_IN_ROOT)

    def _forget(self) -> None:
        if self._parent:
            os.close(self._parent[1])
            self._parent = None

    def _directory(self, path: bytes, *, make: bool) -> tuple[int, bytes]:
        """Return a directory of the image, and where it really lies; the last one is kept."""
        if self._parent and self._parent[0] == path:
            return self._parent[1:]
        self._forget()
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            fd = self._open(path, flags)
        except FileNotFoundError:
            if not make:
                raise
            above, _, name = path.rpartition(b"/")
            upper, _ = self._directory(above, make=True)
            os.mkdir(name, 0o755, dir_fd=upper)
            self._forget()
            fd = self._open(path, flags)
        place = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))[len(self._path) :].lstrip(b"/")
        self._parent = (path, fd, place)
        return fd, place

    # -- entries

    def _put(self, entry: Entry, stream: TarStream) -> None:
        parts = parts_of(entry.name)
        if not parts:
            if entry.kind != tar_stream.DIRECTORY:
                raise LayerWrong(reason="a layer puts something in place of the image's root")
            self._own(self._root, entry)
            self._modes[b""] = (entry.mode, entry.modified_ns)
            return
        above, name = b"/".join(parts[:-1]), parts[-1]
        try:
            if name.startswith(WHITEOUT):
                self._whiteout(above, name)
                return
            parent, place = self._directory(above, make=True)
            path = place + b"/" + name if place else name
            if entry.kind in (tar_stream.CHARACTER, tar_stream.BLOCK_DEVICE):
                # A container has a /dev of its own; a device of an image is no way to the host's.
                log.verbose(f"the image's device {_shown(entry.name)} is left out")
                return
            self._clear(parent, name, path, keep_directory=entry.kind == tar_stream.DIRECTORY)
            self._make(entry, stream, parent, name, path)
            self._note(path)
        except OSError as error:
            reason = f"{_shown(entry.name)}: {os.strerror(error.errno or 0).lower()}"
            raise LayerWrong(reason=reason) from None

    def _note(self, path: bytes) -> None:
        """Remember what this layer brings, and the directories that hold it."""
        while path and path not in self._made:
            self._made.add(path)
            path = path.rpartition(b"/")[0]

    def _clear(self, parent: int, name: bytes, path: bytes, *, keep_directory: bool) -> None:
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(there.st_mode):
            if not keep_directory:
                self._remove(parent, name, path)
        else:
            os.unlink(name, dir_fd=parent)

    def _make(self, entry: Entry, stream: TarStream, parent: int, name: bytes, path: bytes) -> None:
        if entry.kind == tar_stream.FILE:
            self._file(entry, stream, parent, name)
        elif entry.kind == tar_stream.DIRECTORY:
            self._subdirectory(entry, parent, name, path)
        elif entry.kind == tar_stream.HARD_LINK:
            self._hard_link(entry, parent, name)
        elif entry.kind == tar_stream.SYMLINK:
            if not entry.link:
                raise LayerWrong(reason=f"the link {_shown(entry.name)} leads nowhere")
            os.symlink(entry.link, name, dir_fd=parent)
            self._own_link(parent, name, entry)
        else:
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._own_link(parent, name, entry)
            os.chmod(name, entry.mode, dir_fd=parent)

    def _file(self, entry: Entry, stream: TarStream, parent: int, name: bytes) -> None:
        self._count(entry.size_bytes, is_read=False)
        self._count(entry.holes_bytes)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            for piece in stream.pieces():
                if isinstance(piece, int):
                    os.lseek(fd, piece, os.SEEK_CUR)
                    continue
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            if entry.holes_bytes:
                os.ftruncate(fd, entry.size_bytes)
            self._own(fd, entry)
            os.fchmod(fd, entry.mode)
            _set_xattrs(fd, entry)
            _set_time(fd, entry.modified_ns)
        finally:
            os.close(fd)

    def _subdirectory(self, entry: Entry, parent: int, name: bytes, path: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            self._own(fd, entry)
            # Until close(): open for us, and no more than that for others.
            os.fchmod(fd, 0o700)
            _set_xattrs(fd, entry)
        finally:
            os.close(fd)
        self._modes[path] = (entry.mode, entry.modified_ns)

    def _hard_link(self, entry: Entry, parent: int, name: bytes) -> None:
        parts = parts_of(entry.link)
        if not parts:
            raise LayerWrong(reason=f"the hard link {_shown(entry.name)} leads nowhere")
        above = self._open(b"/".join(parts[:-1]), os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = os.stat(parts[-1], dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise LayerWrong(reason=f"the hard link {_shown(entry.name)} leads to a directory")
            os.link(parts[-1], name, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(above)

    # -- whiteouts

    def _whiteout(self, above: bytes, name: bytes) -> None:
        try:
            parent, place = self._directory(above, make=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        if name == OPAQUE:
            self._empty(parent, place, 0)
            return
        if name.startswith(SPECIAL):
            return  # aufs kept books in such files
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise LayerWrong(reason=f"the whiteout {_shown(name)} names nothing")
        path = place + b"/" + hidden if place else hidden
        try:
            self._hide(parent, hidden, path, 0)
        except FileNotFoundError:
            return

    def _hide(self, parent: int, name: bytes, path: bytes, depth: int) -> None:
        """Remove an entry of layers below; what this one brings in it stays."""
        if path not in self._made:
            self._remove(parent, name, path)
            return
        try:
            inner = os.open(name, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                return
            raise
        try:
            self._empty(inner, path, depth + 1)
        finally:
            os.close(inner)

    def _empty(self, directory: int, place: bytes, depth: int) -> None:
        """Remove what layers below have left in a directory."""
        if depth > _DEEPEST:
            raise LayerWrong(reason="the image has directories within directories without end")
        for text in os.listdir(directory):
            name = os.fsencode(text)
            self._hide(directory, name, place + b"/" + name if place else name, depth)

    def _remove(self, parent: int, name: bytes, path: bytes) -> None:
        remove_tree(parent, name)
        within = path + b"/"
        for known in [one for one in self._modes if one == path or one.startswith(within)]:
            del self._modes[known]

    # -- owners

    def _own(self, fd: int, entry: Entry) -> None:
        if not self._owns_all:
            return
        try:
            os.fchown(fd, entry.uid, entry.gid)
        except (OSError, OverflowError):
            self._unmapped = True

    def _own_link(self, parent: int, name: bytes, entry: Entry) -> None:
        if not self._owns_all:
            return
        try:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        except (OSError, OverflowError):
            self._unmapped = True


def remove_tree(parent: int, name: bytes) -> None:
    """Remove a file or a whole directory; links are removed, not followed.

    Raises:
        OSError: something cannot be removed.
    """
    try:
        os.unlink(name, dir_fd=parent)
        return
    except (IsADirectoryError, PermissionError):
        pass
    # One directory after another, by "..": how deep they lie is the image's choice, and neither the
    # stack nor the number of open files may be.
    names: list[bytes] = []
    at = _open_to_empty(name, parent)
    # Each of them is to be found again above the next: its owner may have moved one elsewhere.
    inodes = [_inode(at)]
    try:
        # For each level the directories in it that still hold something.
        left = [_remove_files(at)]
        while names or left[-1]:
            goes_down = bool(left[-1])
            step = _open_to_empty(left[-1][-1], at) if goes_down else _above(at)
            os.close(at)
            at = step
            if goes_down:
                inodes.append(_inode(at))
                names.append(left[-1].pop())
                left.append(_remove_files(at))
            else:
                inodes.pop()
                if _inode(at) != inodes[-1]:
                    raise OSError(errno.EBUSY, "it was changed meanwhile")
                left.pop()
                os.rmdir(names.pop(), dir_fd=at)
    finally:
        os.close(at)
    os.rmdir(name, dir_fd=parent)


def _inode(fd: int) -> tuple[int, int]:
    facts = os.fstat(fd)
    return facts.st_dev, facts.st_ino


def _above(fd: int) -> int:
    return os.open("..", _DIRECTORY, dir_fd=fd)


def _open_to_empty(name: bytes, above: int) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=above)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=above)
        return os.open(name, _DIRECTORY, dir_fd=above)


def _remove_files(fd: int) -> list[bytes]:
    """Remove files and empty directories; returns the names of those that hold something."""
    full = []
    try:
        os.fchmod(fd, 0o700)
    except PermissionError:
        pass
    for text in os.listdir(fd):
        name = os.fsencode(text)
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=fd)
            continue
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            full.append(name)
    return full


def parts_of(name: bytes) -> list[bytes]:
    """Return the components of a member's name.

    Raises:
        LayerWrong: it leads out of the image, or is too long.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise LayerWrong(reason=f"the entry {_shown(name)} leads out of the image")
    if any(len(part) > _NAME_BYTES for part in parts):
        raise LayerWrong(reason=f"the name {_shown(name[:80])}... is too long")
    if len(parts) > _LEVELS:
        raise LayerWrong(reason=f"the name {_shown(name[:80])}... is too deep")
    return parts


def _shown(name: bytes) -> str:
    return ascii(name.decode("utf-8", "replace"))


def _set_time(fd: int, modified_ns: int) -> None:
    try:
        os.utime(fd, ns=(modified_ns, modified_ns))
    except (OSError, OverflowError):
        pass  # a time that this file system cannot keep


def kept_xattrs(entry: Entry) -> list[tuple[bytes, bytes]]:
    """Return what belongs to users and programs; overlay's own would be orders to the kernel.

    Raises:
        LayerWrong: one is too large.
    """
    kept = [
        (name, value)
        for name, value in entry.xattrs
        if name == b"security.capability"
        or (name.startswith(b"user.") and not name.startswith(b"user.overlay."))
    ]
    if any(len(name) > _NAME_BYTES or len(value) > _XATTR_BYTES for name, value in kept):
        raise LayerWrong(reason="a layer has an extended attribute that is too large")
    return kept


def _set_xattrs(fd: int, entry: Entry) -> None:
    for name, value in kept_xattrs(entry):
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENOSPC, errno.E2BIG):
                raise
