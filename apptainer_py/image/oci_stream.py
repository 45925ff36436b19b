"""Layers merged into one tar stream, for a packer that reads while they arrive.

The newest layer comes first: what it brings or takes away hides what older ones bring, so each is
read once, and no tree is made. That holds where a name means the same place in each layer. Whatever
could mean another one, or is out of the ordinary, is `NotPlain`: then a tree is made, by
`oci_layers`, whose judgement of what is wrong counts.
"""

from __future__ import annotations

from apptainer_py.base.record import Record
from apptainer_py.image import tar_stream
from apptainer_py.image.oci_layers import (
    OPAQUE,
    SPECIAL,
    WHITEOUT,
    LayerWrong,
    Limits,
    kept_xattrs,
    parts_of,
)
from apptainer_py.image.tar_stream import BLOCK, TarStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from apptainer_py.image.tar_stream import Entry, Read

    Write = Callable[[bytes], None]

_CAPABILITY, _CAPABILITY_VERSION = b"security.capability", b"\x02"
_NAME_BYTES = 100
_IDS = (1 << 32) - 1
_TIME_MOST = (1 << 32) - 1
_ROOT_MODE = 0o755
# What the names of an image may take in memory, with what each one costs beside its bytes.
_NAMES_BYTES, _EACH_BYTES = 36 << 20, 120


class NotPlain(Exception):
    """The layers cannot be merged in one pass."""


class TooManyAlike(NotPlain):
    """So many files are of one size that to compare them with each other would take hours."""


class TooLarge(LayerWrong):
    """The layers are beyond the limits, in whatever way they are read."""


class Owners(Record):
    """Whose the files are, and when: `all_root` makes them root's, `epoch` is the latest time."""

    all_root: bool = True
    epoch: int | None = None


class _Layer:
    """What one layer has brought until now."""

    def __init__(self) -> None:
        self.folders: set[bytes] = set()
        self.others: set[bytes] = set()
        # Folders that are there because something is in them, with no entry of their own.
        self.implied: set[bytes] = set()
        self.hidden: set[bytes] = set()
        self.emptied: set[bytes] = set()
        # Files that are in the stream, under the name that others are linked to.
        self.files: dict[bytes, bytes] = {}
        self.checked: dict[bytes, bool] = {}
        self.filled: set[bytes] = set()


class Merger:
    """A tar stream that layer after layer goes to, the newest first.

    With `alike_most` no more files than that may be of one size.
    """

    def __init__(
        self,
        write: Write,
        owners: Owners,
        reserved: Iterable[bytes],
        limits: Limits | None = None,
        *,
        alike_most: int = 0,
    ) -> None:
        self._write = write
        self._owners = owners
        self._reserved = frozenset(reserved)
        self._limits = limits or Limits()
        self._folders: set[bytes] = set()
        self._others: dict[bytes, bytes] = {}
        self._implied: set[bytes] = set()
        # Of older layers nothing shows below these, nor with these names.
        self._closed: set[bytes] = set()
        self._hidden: set[bytes] = set()
        self._needed: set[bytes] = set()
        self._shown: set[bytes] = set()
        self._entries = 0
        self._bytes = 0
        self._names_bytes = 0
        self._alike_most = alike_most
        # How many files of each size are in the stream, for a packer that compares them.
        self._sizes: dict[int, int] = {}

    # -- what is there in the end

    def kind_of(self, path: bytes) -> bytes:
        """Return the kind of entry that a path is, nothing where there is none."""
        if path in self._shown or path in self._needed:
            return tar_stream.DIRECTORY
        return self._others.get(path, b"")

    def add(self, entry: Entry, content: bytes = b"") -> None:
        """Put an entry into the stream that no layer has."""
        self._emit(entry, entry.name, entry.link)
        self._write(content + bytes(-len(content) % BLOCK))

    def close(self, now_s: int) -> None:
        """Add folders of which no layer says anything, and the end."""
        for path in sorted(self._needed - self._shown):
            self.add(
                tar_stream.Entry(
                    kind=tar_stream.DIRECTORY,
                    name=path,
                    link=b"",
                    mode=0o755,
                    uid=0,
                    gid=0,
                    size_bytes=0,
                    modified_ns=now_s * 10**9,
                )
            )
        self._write(bytes(2 * BLOCK))

    # -- layers

    def apply(self, read: Read) -> None:
        """Merge a layer that lies below those before it.

        Raises:
            NotPlain: it takes a tree to do that.
            ImageError: the layer is damaged, or beyond the limits.
        """
        layer = _Layer()
        stream = TarStream(self._counted(read))
        for entry in stream.entries():
            self._entries += 1
            if self._entries > self._limits.entries:
                raise TooLarge(reason=f"the image has more than {self._limits.entries} entries")
            self._put(entry, stream, layer)
        # Whether such a folder is an older one, or a new one, depends on the order of the entries.
        for path in layer.implied - layer.folders:
            if path in layer.hidden or any(one in layer.emptied for one in _above_all(path)):
                raise NotPlain
        self._closed |= layer.hidden | layer.emptied | layer.others
        self._hidden |= layer.hidden
        self._folders |= layer.folders
        self._implied |= layer.implied

    def _counted(self, read: Read) -> Read:
        def counted(size: int) -> bytes:
            data = read(size)
            self._count(len(data))
            return data

        return counted

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._limits.total_bytes:
            raise TooLarge(reason=f"the image is larger than {self._limits.total_bytes} bytes")

    def _put(self, entry: Entry, stream: TarStream, layer: _Layer) -> None:
        parts = parts_of(entry.name)
        if not parts:
            self._root(entry)
            return
        if parts[0] in self._reserved:
            raise NotPlain
        above, name = b"/".join(parts[:-1]), parts[-1]
        shows = self._above(above, layer)
        if name.startswith(WHITEOUT):
            self._whiteout(above, name, layer)
            return
        self._imply(above, layer)
        if entry.kind in (tar_stream.CHARACTER, tar_stream.BLOCK_DEVICE):
            return
        path = above + b"/" + name if above else name
        if path in layer.others:
            raise NotPlain
        if entry.kind == tar_stream.DIRECTORY:
            self._folder(entry, path, layer, shows=shows)
        else:
            self._other(entry, path, stream, layer, shows=shows)

    def _root(self, entry: Entry) -> None:
        is_roots = self._owners.all_root or (entry.uid, entry.gid) == (0, 0)
        if entry.kind != tar_stream.DIRECTORY or entry.mode != _ROOT_MODE or not is_roots:
            raise NotPlain
        if kept_xattrs(entry):
            raise NotPlain

    def _above(self, above: bytes, layer: _Layer) -> bool:
        """Take folders on the way for what they are; return whether something in them shows."""
        found = layer.checked.get(above)
        if found is not None:
            return found
        shows = above not in self._closed
        if above:
            shows &= self._above(above.rpartition(b"/")[0], layer)
            if above in layer.others:
                raise NotPlain
            if above not in layer.folders:
                self._remember(above)
                layer.implied.add(above)
        layer.checked[above] = shows
        return shows

    def _imply(self, above: bytes, layer: _Layer) -> None:
        """Note that a folder is there, also where nothing in it is to be seen."""
        while above and above not in layer.filled:
            layer.filled.add(above)
            outer = above.rpartition(b"/")[0]
            if layer.checked[outer] and above not in self._hidden and above not in self._others:
                self._needed.add(above)
            above = outer

    def _remember(self, path: bytes) -> None:
        self._names_bytes += len(path) + _EACH_BYTES
        if self._names_bytes > _NAMES_BYTES:
            raise NotPlain

    def _whiteout(self, above: bytes, name: bytes, layer: _Layer) -> None:
        if name == OPAQUE:
            layer.emptied.add(above)
            return
        if name.startswith(SPECIAL):
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise NotPlain
        path = above + b"/" + hidden if above else hidden
        self._remember(path)
        layer.hidden.add(path)

    def _folder(self, entry: Entry, path: bytes, layer: _Layer, *, shows: bool) -> None:
        if path in layer.folders:
            raise NotPlain
        self._remember(path)
        layer.folders.add(path)
        if not shows or path in self._hidden or path in self._others:
            return
        if path in self._folders:
            if kept_xattrs(entry):
                raise NotPlain
            return
        self._shown.add(path)
        self._emit(entry, path, b"")

    def _other(
        self, entry: Entry, path: bytes, stream: TarStream, layer: _Layer, *, shows: bool
    ) -> None:
        if path in layer.folders or path in layer.implied or path in self._implied:
            raise NotPlain
        link = self._link(entry, layer)
        self._remember(path)
        layer.others.add(path)
        if not shows or path in self._hidden or path in self._folders or path in self._others:
            return
        if entry.kind == tar_stream.HARD_LINK:
            # To a file of the same layer that is in the stream.
            link = layer.files.get(link, b"")
            if not link:
                raise NotPlain
        if entry.kind in (tar_stream.HARD_LINK, tar_stream.FILE):
            layer.files[path] = link or path
        self._others[path] = entry.kind
        self._count_alike(entry)
        self._emit(entry, path, link)
        if entry.kind == tar_stream.FILE:
            self._count(entry.holes_bytes)
            for data in stream.content():
                self._write(data)
            self._write(bytes(-entry.size_bytes % BLOCK))

    def _count_alike(self, entry: Entry) -> None:
        size = entry.size_bytes
        if self._alike_most and size and entry.kind == tar_stream.FILE:
            self._sizes[size] = self._sizes.get(size, 0) + 1
            if self._sizes[size] > self._alike_most:
                raise TooManyAlike

    def _link(self, entry: Entry, layer: _Layer) -> bytes:
        """Return where a link leads, also one that does not show: a tree would want to know."""
        if entry.kind == tar_stream.HARD_LINK:
            target = b"/".join(parts_of(entry.link))
            if entry.size_bytes or target not in layer.others:
                raise NotPlain
            return target
        if entry.kind == tar_stream.SYMLINK and not entry.link:
            raise NotPlain
        return entry.link

    # -- the stream

    def _emit(self, entry: Entry, name: bytes, link: bytes) -> None:
        head = b""
        if entry.kind in (tar_stream.FILE, tar_stream.DIRECTORY):
            head = _attributes(kept_xattrs(entry))
        for kind, text in ((b"L", name), (b"K", link if entry.kind != tar_stream.FILE else b"")):
            if len(text) > _NAME_BYTES:
                head += _header(kind, b"././@LongLink", size=len(text) + 1) + _padded(text + b"\0")
        self._write(head + self._own_header(entry, name, link))

    def _own_header(self, entry: Entry, name: bytes, link: bytes) -> bytes:
        uid, gid = (0, 0) if self._owners.all_root else (entry.uid, entry.gid)
        if not (0 <= uid < _IDS and 0 <= gid < _IDS):
            raise NotPlain
        time_s = max(0, min(entry.modified_ns // 10**9, _TIME_MOST))
        if self._owners.epoch is not None:
            time_s = min(time_s, self._owners.epoch)
        is_link = entry.kind in (tar_stream.HARD_LINK, tar_stream.SYMLINK)
        return _header(
            entry.kind,
            name[:_NAME_BYTES],
            link=link[:_NAME_BYTES] if is_link else b"",
            mode=0o777 if entry.kind == tar_stream.SYMLINK else entry.mode,
            uid=uid,
            gid=gid,
            size=entry.size_bytes if entry.kind == tar_stream.FILE else 0,
            time_s=time_s,
        )


def _above_all(path: bytes) -> Iterator[bytes]:
    while path:
        path = path.rpartition(b"/")[0]
        yield path


def _attributes(xattrs: list[tuple[bytes, bytes]]) -> bytes:
    records = b""
    for name, value in xattrs:
        if name == _CAPABILITY and value[3:4] != _CAPABILITY_VERSION:
            raise NotPlain
        rest = b" SCHILY.xattr." + name + b"=" + value + b"\n"
        size = len(rest)
        # The length counts its own digits.
        while size != len(rest) + len(str(size)):
            size = len(rest) + len(str(size))
        records += str(size).encode() + rest
    return (
        _header(b"x", b"././@PaxHeader", size=len(records)) + _padded(records) if records else b""
    )


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def _number(value: int, size: int) -> bytes:
    if value < 8 ** (size - 1):
        return b"%0*o\0" % (size - 1, value)
    return b"\x80" + value.to_bytes(size - 1, "big")


def _header(  # noqa: PLR0913 the fields of a header
    kind: bytes,
    name: bytes,
    *,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    time_s: int = 0,
) -> bytes:
    fields = (_number(mode, 8), _number(uid, 8), _number(gid, 8), _number(size, 12))
    head = name.ljust(100, b"\0") + b"".join(fields) + _number(time_s, 12)
    tail = kind + link.ljust(100, b"\0") + b"ustar  \0"
    total = sum(head) + sum(tail) + 8 * 0x20
    return (head + b"%06o\0 " % total + tail).ljust(BLOCK, b"\0")
