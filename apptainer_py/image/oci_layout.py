"""Image layouts of the OCI image specification: a directory, or one as a tar file."""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import arch, tar_stream
from apptainer_py.image.blobs import Blob, Digest, Layer
from apptainer_py.image.tar_stream import TarStream, TarWrong
from apptainer_py.kernel import _starter
from apptainer_py.model.json_text import JsonWrong, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_JSON_BYTES = 4 << 20
_FILES_MOST = 65536
LAYERS_MOST = 512
_NESTED_MOST = 8
# What an archive may be when it is not compressed, or not sparse.
WHOLE_MOST = 1 << 38
_RESOLVE_BENEATH_NO_LINKS = 0x08 | 0x04
_TAG = "org.opencontainers.image.ref.name"
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DOCUMENTS = (
    *_INDEXES,
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_LAYER_STARTS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)


class LayoutWrong(ImageError):
    """No layout, or not one that can be used."""

    message = "could not open image {image}: {reason}"


class Object(Record):
    """A descriptor of the specification.

    `plain` is what the configuration calls a layer: the digest of its content, if that is another.
    """

    digest: str
    size_bytes: int
    media_type: str = ""
    plain: str = ""


class Image(Record):
    """What a manifest names."""

    config: bytes
    layers: tuple[Object, ...]


def split_name(text: str) -> tuple[str, str, str]:
    """Return transport, path and reference ("", a tag or @digest) of `oci:PATH[:TAG|@DIGEST]`."""
    transport, _, rest = text.partition(":")
    if os.path.exists(rest):
        return transport, rest, ""
    path, at, digest = rest.rpartition("@")
    if at and ":" in digest:
        return transport, path, f"@{digest}"
    path, colon, tag = rest.rpartition(":")
    return (transport, path, tag) if colon else (transport, rest, "")


class Layout:
    """An open layout."""

    _any_machine = False
    _machine = ""
    _variant = ""

    def __init__(self, name: str, *, named: str = "", folder: str = "/tmp") -> None:
        self._name = named or name
        # Where the sparse files of an archive are made whole, in a file without a name.
        self._folder = folder
        self._whole: int | None = None
        self._whole_bytes = 0
        transport, path, self._reference = split_name(name)
        self.path = os.path.abspath(path)
        # Whether it is made whole, offset and size.
        self._members: dict[str, tuple[bool, int, int]] | None = None
        self._links: dict[str, str] = {}
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            raise self._wrong((error.strerror or "").lower()) from None
        mode = os.fstat(self._fd).st_mode
        if transport != "oci":
            if not stat.S_ISREG(mode):
                raise self._wrong("it is no file")
            self._members = self._list()
        elif not stat.S_ISDIR(mode):
            raise self._wrong("it is no directory")

    def take_machine(self, machine: str, variant: str = "") -> None:
        """Take an image for this architecture, also where this host cannot run it.

        "" stands for this host's, and for any variant.
        """
        self._any_machine |= bool(machine)
        self._machine, self._variant = machine, variant

    def close(self) -> None:
        """Give the files up."""
        os.close(self._fd)
        if self._whole is not None:
            os.close(self._whole)

    def _wrong(self, reason: str) -> LayoutWrong:
        return LayoutWrong(image=self._name, reason=reason)

    # -- files

    def _list(self) -> dict[str, tuple[bool, int, int]]:
        """Return where each file of the archive lies."""
        place = 0

        def read(size: int) -> bytes:
            nonlocal place
            data = os.pread(self._fd, size, place)
            place += len(data)
            return data

        found: dict[str, tuple[bool, int, int]] = {}
        stream = TarStream(read)
        try:
            for entry in stream.entries():
                if len(found) + len(self._links) == _FILES_MOST:
                    raise self._wrong(f"the archive has more than {_FILES_MOST} files")
                name = os.fsdecode(entry.name).removeprefix("./")
                if entry.kind == tar_stream.SYMLINK:
                    self._links[name] = os.fsdecode(entry.link)
                if entry.kind != tar_stream.FILE:
                    continue
                if entry.holes_bytes:
                    found[name] = (True, self._make_whole(stream), entry.size_bytes)
                    continue
                found[name] = (False, place, entry.size_bytes)
                place = stream.pass_over(place)
        except TarWrong as error:
            raise self._wrong(str(error)) from None
        return found

    def _make_whole(self, stream: TarStream) -> int:
        """Write the sparse file at hand to a file of its own kind; return where it lies there."""
        start = self._whole_bytes
        try:
            if self._whole is None:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                self._whole = os.open(self._folder, flags, 0o600)
            for piece in stream.pieces():
                self._whole_bytes += piece if isinstance(piece, int) else len(piece)
                if self._whole_bytes > WHOLE_MOST:
                    raise self._wrong("the archive is too large")
                if isinstance(piece, bytes):
                    _write(self._whole, piece, self._whole_bytes - len(piece))
            os.ftruncate(self._whole, self._whole_bytes)
        except OSError as error:
            reason = f"{self._folder}: {os.strerror(error.errno or 0).lower()}"
            raise self._wrong(reason) from None
        return start

    def _open(self, name: str) -> tuple[int, int, int]:
        """Return descriptor, offset and size of a file; the caller closes the descriptor."""
        if self._members is not None:
            if name not in self._members:
                raise self._wrong(f"it has no {name}")
            is_whole, offset, size = self._members[name]
            fd = self._whole if is_whole else None
            return os.dup(self._fd if fd is None else fd), offset, size
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = _starter.openat2(self._fd, name.encode(), flags, _RESOLVE_BENEATH_NO_LINKS)
        except OSError as error:
            raise self._wrong(f"{name}: {os.strerror(error.errno or 0).lower()}") from None
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            os.close(fd)
            raise self._wrong(f"{name} is no file")
        return fd, 0, facts.st_size

    def _small(self, name: str) -> bytes:
        fd, offset, size = self._open(name)
        try:
            if size > _JSON_BYTES:
                raise self._wrong(f"{name} is larger than {_JSON_BYTES} bytes")
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def _blob(self, wanted: Object) -> tuple[Blob, int]:
        digest = Digest(wanted.digest)
        fd, offset, size = self._open(f"blobs/{digest.algorithm}/{digest.digits}")
        if size != wanted.size_bytes:
            os.close(fd)
            reason = f"{wanted.digest} has {size} bytes, {wanted.size_bytes} are named"
            raise self._wrong(reason)
        return Blob(fd, offset, size, digest), fd

    def open(self, wanted: Object) -> Blob:
        """Return an object of the layout, which the caller closes.

        Raises:
            LayoutWrong: it has none of that size.
        """
        return self._blob(wanted)[0]

    def _document(self, wanted: Object) -> bytes:
        if wanted.size_bytes > _JSON_BYTES:
            raise self._wrong(f"{wanted.digest} is larger than {_JSON_BYTES} bytes")
        blob, fd = self._blob(wanted)
        try:
            parts = []
            while data := blob.read(_JSON_BYTES):
                parts.append(data)
            blob.check()
        except ImageError as error:
            raise self._wrong(str(error.facts["reason"])) from None
        finally:
            os.close(fd)
        return b"".join(parts)

    # -- documents

    def _json(self, data: bytes, what: str) -> dict[str, Any]:
        try:
            value = loads(data)
        except JsonWrong as error:
            raise self._wrong(f"{what}: {error}") from None
        if not isinstance(value, dict):
            raise self._wrong(f"{what} is no JSON object")
        return value

    def _json_list(self, data: bytes, what: str) -> list[dict[str, Any]]:
        try:
            value = loads(data)
        except JsonWrong as error:
            raise self._wrong(f"{what}: {error}") from None
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self._wrong(f"{what} is no list of JSON objects")
        return value

    def _object(self, value: object, what: str) -> Object:
        if isinstance(value, dict):
            digest, size = value.get("digest"), value.get("size")
            kind = value.get("mediaType", "")
            if (
                isinstance(digest, str)
                and isinstance(size, int)
                and size >= 0
                and isinstance(kind, str)
            ):
                try:
                    Digest(digest)
                except ImageError as error:
                    raise self._wrong(str(error.facts["reason"])) from None
                return Object(digest=digest, size_bytes=size, media_type=kind)
        raise self._wrong(f"{what} is no descriptor")

    def image(self) -> Image:
        """Return the image that the name means, for this machine where there are several.

        Raises:
            LayoutWrong: there is none, or it is not one that can be used.
        """
        version = self._json(self._small("oci-layout"), "oci-layout").get("imageLayoutVersion")
        if not isinstance(version, str) or not version.startswith("1."):
            raise self._wrong(f"the layout's version is {version!r}, not 1")
        index = self._json(self._small("index.json"), "index.json")
        wanted = self._choose(index)
        for _ in range(_NESTED_MOST):
            document = self._json(self._document(wanted), wanted.digest)
            kind = document.get("mediaType", wanted.media_type)
            if "manifests" in document and "layers" in document:
                raise self._wrong(f"{wanted.digest} is an index and a manifest in one")
            if kind != wanted.media_type and wanted.media_type and kind in _DOCUMENTS:
                raise self._wrong(f"{wanted.digest} is not of the kind that names it")
            if wanted.media_type not in _INDEXES and "manifests" not in document:
                return self._manifest(document)
            wanted = self._for_this_machine(document)
        raise self._wrong("its index names an index, and so on")

    def _rows(self, index: dict[str, Any]) -> list[dict[str, Any]]:
        rows = index.get("manifests")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._wrong("its index lists no manifests")
        return rows

    def _choose(self, index: dict[str, Any]) -> Object:
        rows = self._rows(index)
        if self._reference.startswith("@"):
            rows = [row for row in rows if row.get("digest") == self._reference[1:]]
        elif self._reference:
            rows = [row for row in rows if _tag_of(row) == self._reference]
        if not rows:
            raise self._wrong(
                f"it has no image {self._reference}" if self._reference else "it has no image"
            )
        if len(rows) > 1:
            fitting = [row for row in rows if _fits(row, self._machine, self._variant)]
            if len(fitting) != 1:
                tags = ", ".join(sorted(filter(None, map(_tag_of, rows))))
                raise self._wrong(f"it has several images ({tags}); name one, as in oci:PATH:TAG")
            rows = fitting
        return self._object(rows[0], "an entry of index.json")

    def _for_this_machine(self, index: dict[str, Any]) -> Object:
        rows = [row for row in self._rows(index) if _fits(row, self._machine, self._variant)]
        if not rows:
            machine = f"{self._machine or arch.host_arch()} {self._variant}".strip()
            raise self._wrong(f"it has no image for {machine}")
        return self._object(rows[0], "an entry of an index")

    def _manifest(self, manifest: dict[str, Any]) -> Image:
        layers = manifest.get("layers")
        if not isinstance(layers, list) or len(layers) > LAYERS_MOST:
            raise self._wrong(f"its manifest has no layers, or more than {LAYERS_MOST}")
        found = tuple(self._object(layer, "a layer of the manifest") for layer in layers)
        for layer in found:
            kind = layer.media_type
            if not kind.startswith(_LAYER_STARTS) or "encrypted" in kind:
                raise self._wrong(f"a layer of the kind {kind!r} is not supported")
        config = self._document(self._object(manifest.get("config"), "the manifest's config"))
        facts = self._json(config, "the image's configuration")
        self._check_machine(facts)
        return Image(config=config, layers=self._with_plain(found, facts))

    def _with_plain(self, layers: tuple[Object, ...], facts: dict[str, Any]) -> tuple[Object, ...]:
        """Return layers with what the configuration says of them, where it says anything."""
        tree = facts.get("rootfs")
        digests = tree.get("diff_ids") if isinstance(tree, dict) else None
        if digests is None:
            return layers
        if not isinstance(digests, list) or len(digests) != len(layers):
            raise self._wrong("its configuration does not name as many layers as its manifest")
        found = []
        for layer, plain in zip(layers, digests, strict=True):
            try:
                Digest(plain if isinstance(plain, str) else "")
            except ImageError as error:
                raise self._wrong(str(error.facts["reason"])) from None
            found.append(layer if plain == layer.digest else layer.replace(plain=plain))
        return tuple(found)

    def _check_machine(self, facts: dict[str, Any]) -> None:
        machine = facts.get("architecture", "")
        if isinstance(machine, str) and not (self._any_machine or _can_run(machine)):
            raise self._wrong(
                f"the image's architecture ({machine}) could not run on the host's "
                f"({arch.host_arch()})"
            )

    def unpack(self, image: Image, target: Any) -> None:
        """Give each layer, the lowest first, to an Unpacker.

        Raises:
            ImageError: a layer is damaged, or leads out of the image.
        """
        for layer in image.layers:
            blob, fd = self._blob(layer)
            try:
                stream = Layer(blob, layer.plain)
                target.apply(stream.read)
                stream.check()
                blob.check()
            except ImageError as error:
                raise self._wrong(f"{error.facts['reason']} ({layer.digest[:19]})") from None
            finally:
                os.close(fd)


class Fetched(Layout):
    """A layout that holds an image which its index does not name: it came by its manifest.

    With `any_machine` the image may be one that this host cannot run.
    """

    def __init__(
        self, path: str, manifest: Object, *, name: str, any_machine: bool = False
    ) -> None:
        super().__init__(f"oci:{path}")
        self._name = name
        self._wanted = manifest
        self._any_machine = any_machine

    def image(self) -> Image:
        """Return the image of the manifest.

        Raises:
            LayoutWrong: it is not one that can be used.
        """
        return self._manifest(self._json(self._document(self._wanted), self._wanted.digest))


def _write(fd: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(fd, data, place)
        data, place = data[written:], place + written


def _tag_of(row: dict[str, Any]) -> str:
    notes = row.get("annotations")
    tag = notes.get(_TAG, "") if isinstance(notes, dict) else ""
    return tag if isinstance(tag, str) else ""


def _fits(row: dict[str, Any], wanted: str, variant: str) -> bool:
    platform = row.get("platform")
    if not isinstance(platform, dict):
        return True
    if not arch.is_variant(platform.get("variant", ""), variant):
        return False
    machine, system = platform.get("architecture", ""), platform.get("os", "linux")
    if system not in ("", "linux") or not isinstance(machine, str):
        return False
    return machine in ("", wanted) if wanted else _can_run(machine)


def _can_run(machine: str) -> bool:
    host = arch.host_arch()
    return machine in ("", host) or arch.can_run(machine, host)
