"""Files of `docker save`: a tar file with images, their layers, and `manifest.json`."""

from __future__ import annotations

import os
import posixpath

from apptainer_py.base.errors import ImageError
from apptainer_py.image.blobs import Blob, Digest, Layer, Unpacked
from apptainer_py.image.oci_layout import LAYERS_MOST, WHOLE_MOST, Image, Layout, Object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TRANSPORT = "docker-archive"
_CHUNK = 1 << 20
_LINKS_MOST = 8
_STARTS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")


def split_name(text: str) -> tuple[str, str]:
    """Return path and reference ("", a name with a tag, or @number) of `PATH[:REFERENCE]`."""
    if os.path.exists(text):
        return text, ""
    path, _, reference = text.partition(":")
    return path, reference


class Archive(Layout):
    """An open archive; one that is compressed is unpacked to a file without a name in `folder`."""

    def __init__(self, source: str, folder: str) -> None:
        path, reference = split_name(source)
        super().__init__(f"{TRANSPORT}:{path}", named=f"{TRANSPORT}:{source}", folder=folder)
        self._reference = reference

    def _list(self) -> dict[str, tuple[bool, int, int]]:
        if os.pread(self._fd, 4, 0).startswith(_STARTS):
            plain = self._plain()
            os.close(self._fd)
            self._fd = plain
        return super()._list()

    def _plain(self) -> int:
        """Return a descriptor of the same archive, not compressed."""
        whole = Blob(self._fd, 0, os.fstat(self._fd).st_size, Digest(f"sha256:{'0' * 64}"))
        made = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            stream, size = Unpacked(whole), 0
            while data := stream.read(_CHUNK):
                size += len(data)
                if size > WHOLE_MOST:
                    raise self._wrong("the archive is too large")
                while data:
                    data = data[os.write(made, data) :]
        except ImageError as error:
            os.close(made)
            raise self._wrong(str(error.facts["reason"])) from None
        return made

    def _open(self, name: str) -> tuple[int, int, int]:
        # docker writes a layer once; another image's name for it is a link to the first.
        for _ in range(_LINKS_MOST):
            if name not in self._links:
                break
            name = posixpath.normpath(posixpath.join(posixpath.dirname(name), self._links[name]))
        return super()._open(name)

    def image(self) -> Image:
        """Return the image that the name means.

        Raises:
            LayoutWrong: there is none, or it is not one that can be used.
        """
        row = self._row()
        config, layers = row.get("Config"), row.get("Layers")
        if not isinstance(config, str) or not isinstance(layers, list):
            raise self._wrong("its manifest.json names no configuration or no layers")
        document = self._small(config)
        facts = self._json(document, "the image's configuration")
        self._check_machine(facts)
        tree = facts.get("rootfs")
        digests = tree.get("diff_ids") if isinstance(tree, dict) else None
        if not isinstance(digests, list) or len(digests) != len(layers):
            raise self._wrong("its configuration does not name as many layers as its manifest")
        if len(layers) > LAYERS_MOST:
            raise self._wrong(f"it has more than {LAYERS_MOST} layers")
        pairs = zip(layers, digests, strict=True)
        return Image(config=document, layers=tuple(self._layer(*pair) for pair in pairs))

    def _row(self) -> dict[str, Any]:
        rows = self._json_list(self._small("manifest.json"), "manifest.json")
        if self._reference.startswith("@"):
            number = self._reference[1:]
            if not (number.isascii() and number.isdecimal() and int(number) < len(rows)):
                raise self._wrong(f"it has {len(rows)} images, and none of the number {number}")
            return rows[int(number)]
        if self._reference:
            wanted = _full(self._reference)
            for row in rows:
                if wanted in map(_full, _tags(row)):
                    return row
            raise self._wrong(f"it has no image {self._reference}; it has: {_listed(rows)}")
        if len(rows) != 1:
            raise self._wrong(
                f"it has {len(rows)} images ({_listed(rows)}); "
                f"name one, as in {TRANSPORT}:FILE:NAME:TAG"
            )
        return rows[0]

    def _layer(self, name: object, digest: object) -> Object:
        if not isinstance(name, str) or not isinstance(digest, str):
            raise self._wrong("its manifest.json has what is no layer")
        try:
            Digest(digest)
        except ImageError as error:
            raise self._wrong(str(error.facts["reason"])) from None
        fd, _, size = self._open(name)
        os.close(fd)
        return Object(digest=digest, size_bytes=size, media_type=name)

    def unpack(self, image: Image, target: Any) -> None:
        """Give each layer, the lowest first, to an Unpacker.

        Raises:
            ImageError: a layer is damaged, or leads out of the image.
        """
        for layer in image.layers:
            fd, offset, size = self._open(layer.media_type)
            digest = Digest(layer.digest)
            try:
                # The digest is that of the plain layer, which may be compressed here.
                stream = Layer(Blob(fd, offset, size, digest), layer.digest)
                target.apply(stream.read)
                stream.check()
            except ImageError as error:
                raise self._wrong(f"{error.facts['reason']} ({layer.digest[:19]})") from None
            finally:
                os.close(fd)


def _tags(row: dict[str, Any]) -> list[str]:
    tags = row.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _listed(rows: list[dict[str, Any]]) -> str:
    names = [tag for row in rows for tag in _tags(row)]
    return ", ".join(name for name in names[:10] if name.isprintable()) or "images without a name"


def _full(name: str) -> str:
    """Return a name with what docker adds to short ones: its own registry, `library`, `latest`."""
    first, slash, _ = name.partition("/")
    if not slash:
        name = f"docker.io/library/{name}"
    elif first != "localhost" and "." not in first and ":" not in first:
        name = f"docker.io/{name}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
