"""OCI layouts: directories, archives, and what does not fit together."""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image.blobs import Blob, Digest, Unpacked
from apptainer_py.image.oci_config import ImageConfig, parse_config
from apptainer_py.image.oci_layers import Unpacker
from apptainer_py.image.oci_layout import Layout, LayoutWrong, split_name
from apptainer_py.image.oci_user import UserUnknown, find_user
from tests.unit.image.test_oci_layers import SPARSE, sparse_tar

INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = {"architecture": "amd64", "os": "linux", "rootfs": {}, "config": {"Cmd": ["sh"]}}


def layer(name: str = "file", content: bytes = b"text") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.uid, info.gid = os.getuid(), os.getgid()
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compress.restype = ctypes.c_size_t
    space = ctypes.create_string_buffer(len(data) + 1024)
    size = library.ZSTD_compress(
        space, ctypes.c_size_t(len(space)), data, ctypes.c_size_t(len(data)), 3
    )
    return space.raw[:size]


class Maker:
    """Writes a layout, right or wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str = "") -> dict[str, Any]:
        digits = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digits).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digits}", "size": len(data)}

    def document(self, value: object, kind: str = "") -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), kind)

    def manifest(self, *layers: bytes, config: object = CONFIG, **more: object) -> dict[str, Any]:
        rows = [self.blob(data, str(more.get("kind", LAYER))) for data in layers]
        return self.document({"config": self.document(config), "layers": rows})

    def index(self, *rows: dict[str, Any], tags: tuple[str, ...] = ("v1",)) -> None:
        marked = [
            {**row, "annotations": {"org.opencontainers.image.ref.name": tag}}
            for row, tag in zip(rows, tags, strict=False)
        ]
        value = {"schemaVersion": 2, "manifests": marked}
        (self.path / "index.json").write_text(json.dumps(value))


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "layout")


def unpacked(name: str, target: Path) -> ImageConfig:
    layout = Layout(name)
    try:
        image = layout.image()
        target.mkdir()
        unpacker = Unpacker(str(target))
        layout.unpack(image, unpacker)
        unpacker.close()
        return parse_config(image.config, image=name)
    finally:
        layout.close()


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_layers_of_each_compression(
    maker: Maker, tmp_path: Path, packed: Callable[[bytes], bytes]
) -> None:
    content = os.urandom(700_000)
    maker.index(maker.manifest(packed(layer(content=content)), packed(layer("second"))))
    config = unpacked(f"oci:{maker.path}:v1", tmp_path / "root")
    assert config.command == ("sh",)
    assert (tmp_path / "root/file").read_bytes() == content
    assert (tmp_path / "root/second").read_text() == "text"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["sha256:" + "0" * 64], "its content is not sha256:000"),
        ([], "as many layers"),
        ("sha256:", "as many layers"),
        ([7], "is none"),
        (["sha256:../../x"], "is none"),
    ],
)
def test_content_is_what_the_configuration_says(
    maker: Maker, tmp_path: Path, said: object, words: str
) -> None:
    data = layer()
    right = ["sha256:" + hashlib.sha256(data).hexdigest()]
    for tree in (right, said):
        config = {**CONFIG, "rootfs": {"type": "layers", "diff_ids": tree}}
        maker.index(maker.manifest(gzip.compress(data), config=config))
        if tree is right:
            unpacked(f"oci:{maker.path}", tmp_path / "root")
    with pytest.raises(ImageError, match=words):
        unpacked(f"oci:{maker.path}", tmp_path / "other")


def test_what_follows_an_archive_is_read_in_bounds(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apptainer_py.image.blobs._REST_BYTES", 1 << 15)
    for more, refused in ((4096, False), (1 << 20, True)):
        data = layer() + bytes(more)
        tree = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(data).hexdigest()]}
        maker.index(maker.manifest(gzip.compress(data), config={**CONFIG, "rootfs": tree}))
        with pytest.raises(ImageError, match="far behind") if refused else nullcontext():
            unpacked(f"oci:{maker.path}", tmp_path / str(more))


def test_gzip_in_parts(maker: Maker, tmp_path: Path) -> None:
    data = layer(content=b"x" * 5000)
    maker.index(maker.manifest(gzip.compress(data[:3000]) + gzip.compress(data[3000:])))
    unpacked(f"oci:{maker.path}", tmp_path / "root")
    assert (tmp_path / "root/file").read_bytes() == b"x" * 5000


@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive(maker: Maker, tmp_path: Path, prefix: str) -> None:
    maker.index(maker.manifest(layer()))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(maker.path.rglob("*")):
            archive.add(path, f"{prefix}{path.relative_to(maker.path)}", recursive=False)
    unpacked(f"oci-archive:{tmp_path}/a.tar:v1", tmp_path / "root")
    assert (tmp_path / "root/file").read_text() == "text"


def refused(name: str) -> str:
    with pytest.raises(LayoutWrong) as caught:
        Layout(name).image()
    return str(caught.value)


def test_a_tag_that_is_not_there(maker: Maker) -> None:
    maker.index(maker.manifest(layer()))
    assert "it has no image v2" in refused(f"oci:{maker.path}:v2")


def test_several_images_have_to_be_told_apart(maker: Maker) -> None:
    one, other = maker.manifest(layer()), maker.manifest(layer("other"))
    maker.index(one, other, tags=("v1", "v2"))
    assert "several images (v1, v2)" in refused(f"oci:{maker.path}")
    assert Layout(f"oci:{maker.path}@{other['digest']}").image().layers


def test_an_index_in_an_index_is_for_this_machine(maker: Maker, tmp_path: Path) -> None:
    platform = {"platform": {"os": "linux", "architecture": "amd64"}}
    rows = [
        {**maker.manifest(layer("no")), "platform": {"os": "windows", "architecture": "amd64"}},
        {**maker.manifest(layer("yes")), **platform},
    ]
    maker.index(maker.document({"manifests": rows}, INDEX))
    unpacked(f"oci:{maker.path}", tmp_path / "root")
    assert os.listdir(tmp_path / "root") == ["yes"]


def test_another_machine_is_chosen_by_its_variant_too(maker: Maker, tmp_path: Path) -> None:
    rows = [
        {
            **maker.manifest(layer(name)),
            "platform": {"os": "linux", "architecture": machine, "variant": variant},
        }
        for name, machine, variant in (
            ("x", "amd64", ""), ("six", "arm", "v6"), ("seven", "arm", "v7"),
        )
    ]  # fmt: skip
    maker.index(maker.document({"manifests": rows}, INDEX))
    for number, (machine, variant, name) in enumerate(
        [("arm", "v7", "seven"), ("arm", "7", "seven"), ("arm", "", "six"), ("", "", "x")]
    ):
        layout = Layout(f"oci:{maker.path}")
        layout.take_machine(machine, variant)
        image = layout.image()
        root = tmp_path / str(number)
        root.mkdir()
        layout.unpack(image, Unpacker(str(root), owns_all=False))
        layout.close()
        assert os.listdir(root) == [name]
    layout = Layout(f"oci:{maker.path}")
    layout.take_machine("arm", "v5")
    with pytest.raises(LayoutWrong, match="it has no image for arm v5"):
        layout.image()
    layout.close()


@pytest.mark.parametrize(("kind", "options"), SPARSE, ids=str)
def test_sparse_files_of_an_archive(
    maker: Maker, tmp_path: Path, kind: str, options: list[str]
) -> None:
    data = sparse_tar(tmp_path, "gnu", [], (1 << 20, b"x"))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = archive.extractfile("holes").read()  # type: ignore[union-attr]
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        head = tarfile.TarInfo("big")
        head.size = len(expected)
        archive.addfile(head, io.BytesIO(expected))
    row = maker.manifest(plain.getvalue())
    maker.index(row)
    # Files with holes, also where those are the layer's own empty blocks.
    for path in (maker.path / "blobs/sha256").iterdir():
        subprocess.run(["fallocate", "--dig-holes", path], check=True)
    argv = ["tar", "--create", "--sparse", f"--format={kind}", *options, "-C", maker.path, "."]
    made = subprocess.run(argv, capture_output=True, check=True).stdout
    assert len(made) < 1 << 20, "tar knows no holes here"
    (tmp_path / "x.tar").write_bytes(made)
    (tmp_path / "out").mkdir()
    layout = Layout(f"oci-archive:{tmp_path / 'x.tar'}", folder=str(tmp_path))
    layout.unpack(layout.image(), Unpacker(str(tmp_path / "out"), owns_all=False))
    layout.close()
    assert (tmp_path / "out/big").read_bytes() == expected


def test_a_damaged_layer_is_found(maker: Maker, tmp_path: Path) -> None:
    data = layer()
    maker.index(maker.manifest(data))
    digits = hashlib.sha256(data).hexdigest()
    (maker.path / "blobs/sha256" / digits).write_bytes(data[:-1] + b"x")
    with pytest.raises(LayoutWrong, match="damaged or incomplete"):
        unpacked(f"oci:{maker.path}", tmp_path / "root")


def test_a_manifest_that_is_another(maker: Maker) -> None:
    row = maker.manifest(layer())
    maker.index(row)
    path = maker.path / "blobs/sha256" / row["digest"][7:]
    path.write_bytes(path.read_bytes().replace(b"layers", b"lAyers"))
    assert "damaged" in refused(f"oci:{maker.path}")


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha256:" + "g" * 64, "md5:" + "0" * 32, "", 7]
)
def test_a_digest_that_is_none(maker: Maker, digest: object) -> None:
    maker.index({"digest": digest, "size": 2})
    assert "none" in refused(f"oci:{maker.path}") or "descriptor" in refused(f"oci:{maker.path}")


def test_a_blob_that_is_a_link(maker: Maker, tmp_path: Path) -> None:
    row = maker.manifest(layer())
    maker.index(row)
    path = maker.path / "blobs/sha256" / row["digest"][7:]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "symbolic links" in refused(f"oci:{maker.path}")


def test_a_document_without_end(maker: Maker) -> None:
    maker.index({"digest": "sha256:" + "0" * 64, "size": 1 << 40})
    assert "larger than" in refused(f"oci:{maker.path}")


def test_an_index_that_names_itself_for_ever(maker: Maker) -> None:
    row = maker.manifest(layer())
    for _ in range(10):
        row = maker.document({"manifests": [row]}, INDEX)
    maker.index(row)
    assert "and so on" in refused(f"oci:{maker.path}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(f"{LAYER}+encrypted", "not supported"), ("application/wasm", "not supported")],
)
def test_a_kind_of_layer_that_is_unknown(maker: Maker, kind: str, reason: str) -> None:
    maker.index(maker.manifest(layer(), kind=kind))
    assert reason in refused(f"oci:{maker.path}")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"manifests": 1}', '{"manifests": [1]}'])
def test_an_index_that_is_none(maker: Maker, text: str) -> None:
    (maker.path / "index.json").write_text(text)
    assert refused(f"oci:{maker.path}")


def test_no_layout_at_all(tmp_path: Path) -> None:
    assert "oci-layout" in refused(f"oci:{tmp_path}")
    assert "no such file" in refused(f"oci:{tmp_path}/nowhere")


def test_a_bomb_is_unpacked_piece_by_piece(tmp_path: Path) -> None:
    data = gzip.compress(bytes(64 << 20))
    (tmp_path / "bomb").write_bytes(data)
    fd = os.open(tmp_path / "bomb", os.O_RDONLY)
    digest = Digest("sha256:" + hashlib.sha256(data).hexdigest())
    stream = Unpacked(Blob(fd, 0, len(data), digest))
    assert len(stream.read(10 << 20)) <= 1 << 18
    os.close(fd)


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08broken", b"\x28\xb5\x2f\xfdbroken"])
def test_damaged_compression(maker: Maker, tmp_path: Path, data: bytes) -> None:
    maker.index(maker.manifest(data))
    with pytest.raises(LayoutWrong):
        unpacked(f"oci:{maker.path}", tmp_path / "root")


def test_names(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert split_name(f"oci:{tmp_path}/a:b") == ("oci", f"{tmp_path}/a:b", "")
    assert split_name("oci:/x/y:tag") == ("oci", "/x/y", "tag")
    assert split_name("oci:/x/y@sha256:00") == ("oci", "/x/y", "@sha256:00")
    assert split_name("oci-archive:/x/y.tar") == ("oci-archive", "/x/y.tar", "")


# -- configuration and user


def test_a_configuration_by_itself_or_in_its_file() -> None:
    bare = b'{"Entrypoint": ["e"], "Cmd": ["c"], "Env": ["A=1", "nothing"], "User": "u"}'
    expected = ImageConfig(entrypoint=("e",), command=("c",), environment=("A=1",), user="u")
    assert parse_config(bare, image="i") == expected
    assert parse_config(b'{"rootfs": {}, "config": %s}' % bare, image="i") == expected
    assert parse_config(b'{"rootfs": {}, "config": null}', image="i") == ImageConfig()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"Cmd": "sh"}', '{"Env": [1]}', '{"User": 3}', '{"Cmd": ["\\u0000"]}']
)
def test_a_configuration_that_is_wrong(text: str) -> None:
    with pytest.raises(ImageError):
        parse_config(text.encode(), image="i")


PASSWD = b"root:x:0:0::/root:/bin/sh\napp:x:33:34::/app:/bin/sh\nbroken\n5:x:77:78::/:\n"
GROUP = b"root:x:0:\napp:x:34:\nextra:x:50:app,other\n"


@pytest.mark.parametrize(
    ("wanted", "uid", "gid", "groups"),
    [
        ("", 0, 0, ()),
        ("app", 33, 34, (50,)),
        ("33", 33, 34, (50,)),
        ("1234", 1234, 0, ()),
        ("5", 77, 78, ()),
        ("app:extra", 33, 50, ()),
        ("app:7", 33, 7, ()),
        ("1234:50", 1234, 50, ()),
    ],
)
def test_users(wanted: str, uid: int, gid: int, groups: tuple[int, ...]) -> None:
    found = find_user(wanted, PASSWD, GROUP, image="i")
    assert (found.uid, found.gid, found.groups) == (uid, gid, groups)


@pytest.mark.parametrize("wanted", ["nobody", "app:nobody", "4294967295", "-1", "99999999999"])
def test_users_that_are_not_there(wanted: str) -> None:
    with pytest.raises(UserUnknown):
        find_user(wanted, PASSWD, GROUP, image="i")
