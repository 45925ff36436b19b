"""Layers over each other, and layers that want out."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from apptainer_py.image import oci_layers
from apptainer_py.image.oci_layers import LayerWrong, Limits, Unpacker, remove_tree

LINKS = {"symlink": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}


def member(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    mode: int = 0o644,
    size: int | None = None,
    pax: dict[str, str] | None = None,
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    info.uid, info.gid = os.getuid(), os.getgid()
    info.size = len(content) if size is None else size
    info.pax_headers = pax or {}
    return info, content


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.DIRTYPE, mode=mode)


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    done = b""
    for info, content in members:
        done += info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)
    return done + bytes(1024)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    inner = tmp_path / "image"
    inner.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return inner


def unpack(root: Path, *layers: bytes, limits: Limits | None = None) -> None:
    unpacker = Unpacker(str(root), limits)
    try:
        for data in layers:
            unpacker.apply(io.BytesIO(data).read)
    finally:
        unpacker.close()


def untouched(root: Path) -> bool:
    outside = root.parent / "outside"
    return (
        os.listdir(outside) == ["secret"]
        and (outside / "secret").read_text() == "secret"
        and (outside / "secret").stat().st_nlink == 1
        and sorted(os.listdir(root.parent)) == ["image", "outside"]
    )


def test_files_directories_and_links(root: Path) -> None:
    unpack(
        root,
        layer(
            folder("a", 0o555),
            member("a/file", b"text", mode=0o640),
            member("a/again", kind=tarfile.LNKTYPE, link="a/file"),
            member("link", kind=tarfile.SYMTYPE, link="/a/file"),
            member("pipe", kind=tarfile.FIFOTYPE, mode=0o600),
            member("deep/without/entries", b"x"),
            member("./with/./dots//", kind=tarfile.DIRTYPE),
            member("/absolute", b"inside"),
        ),
    )
    assert (root / "a/file").read_text() == "text"
    assert stat.S_IMODE((root / "a/file").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o555
    assert (root / "a/again").samefile(root / "a/file")
    assert os.readlink(root / "link") == "/a/file"
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert (root / "deep/without/entries").exists()
    assert (root / "with/dots").is_dir()
    assert (root / "absolute").read_text() == "inside"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/../out", "..", "a/.."])
def test_a_name_that_leads_out_is_refused(root: Path, name: str) -> None:
    with pytest.raises(LayerWrong, match="leads out of the image"):
        unpack(root, layer(member(name, b"x")))
    assert untouched(root)


@pytest.mark.parametrize("link", ["/", "..", "../outside", "{outside}", "/proc/self/cwd"])
def test_a_link_on_the_way_stays_inside(root: Path, link: str) -> None:
    target = link.replace("{outside}", str(root.parent / "outside"))
    try:
        unpack(
            root,
            layer(member("way", kind=tarfile.SYMTYPE, link=target)),
            layer(member("way/secret", b"changed"), member("way/new", b"x")),
        )
    except LayerWrong as error:
        # What the link names is not there, so nothing can be made behind it.
        assert "way" in str(error)
    assert untouched(root)


@pytest.mark.parametrize("target", ["{outside}/secret", "../outside/secret", "way/secret"])
def test_a_hard_link_finds_nothing_outside(root: Path, target: str) -> None:
    outside = str(root.parent / "outside")
    with pytest.raises(LayerWrong):
        unpack(
            root,
            layer(
                member("way", kind=tarfile.SYMTYPE, link=outside),
                member("stolen", kind=tarfile.LNKTYPE, link=target.replace("{outside}", outside)),
            ),
        )
    assert untouched(root)
    assert not (root / "stolen").exists()


def test_a_hard_link_to_a_directory_is_refused(root: Path) -> None:
    hard = member("b", kind=tarfile.LNKTYPE, link="a")
    with pytest.raises(LayerWrong, match="leads to a directory"):
        unpack(root, layer(folder("a"), hard))


def test_a_link_is_replaced_and_not_written_through(root: Path) -> None:
    secret = str(root.parent / "outside/secret")
    unpack(
        root,
        layer(member("file", kind=tarfile.SYMTYPE, link=secret), member("file", b"own")),
    )
    assert untouched(root)
    assert (root / "file").read_text() == "own"
    assert not (root / "file").is_symlink()


def test_a_directory_takes_the_place_of_a_link(root: Path) -> None:
    outside = str(root.parent / "outside")
    unpack(
        root,
        layer(member("d", kind=tarfile.SYMTYPE, link=outside)),
        layer(folder("d"), member("d/secret", b"own")),
    )
    assert untouched(root)
    assert (root / "d/secret").read_text() == "own"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_are_left_out(root: Path, kind: bytes) -> None:
    unpack(root, layer(member("device", kind=kind), member("after", b"x")))
    assert os.listdir(root) == ["after"]


def test_the_last_of_equal_names_counts(root: Path) -> None:
    unpack(
        root,
        layer(
            member("name", b"one"),
            member("name", b"two"),
            folder("other"),
            member("other/in", b"x"),
            member("other", b"file"),
        ),
    )
    assert (root / "name").read_text() == "two"
    assert (root / "other").read_text() == "file"


def test_nothing_takes_the_place_of_the_root(root: Path) -> None:
    with pytest.raises(LayerWrong, match="in place of the image's root"):
        unpack(root, layer(member("./", kind=tarfile.SYMTYPE, link="/etc")))
    assert untouched(root)


# -- whiteouts


def test_a_whiteout_removes_what_is_below(root: Path) -> None:
    unpack(
        root,
        layer(member("file", b"x"), folder("d"), member("d/in", b"x"), member("stays", b"x")),
        layer(member(".wh.file"), member(".wh.d"), member(".wh.nothing")),
    )
    assert os.listdir(root) == ["stays"]


def test_a_whiteout_leaves_what_its_own_layer_brings(root: Path) -> None:
    unpack(
        root,
        layer(folder("d"), member("d/old", b"x")),
        layer(folder("d"), member("d/new", b"x"), member(".wh.d")),
    )
    assert os.listdir(root / "d") == ["new"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_opaque_directory(root: Path, first: bool) -> None:
    opaque = member("d/.wh..wh..opq")
    new = member("d/sub/new", b"x")
    unpack(
        root,
        layer(folder("d"), folder("d/sub"), member("d/sub/old", b"x"), member("d/old", b"x")),
        layer(folder("d"), *([opaque, new] if first else [new, opaque])),
    )
    assert os.listdir(root / "d") == ["sub"]
    assert os.listdir(root / "d/sub") == ["new"]


@pytest.mark.parametrize("name", [".wh.secret", ".wh..wh..opq"])
@pytest.mark.parametrize("link", ["{outside}", "../outside"])
def test_a_whiteout_through_a_link_removes_nothing_outside(
    root: Path, name: str, link: str
) -> None:
    target = link.replace("{outside}", str(root.parent / "outside"))
    unpack(
        root,
        layer(member("way", kind=tarfile.SYMTYPE, link=target)),
        layer(member(f"way/{name}")),
    )
    assert untouched(root)


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_a_whiteout_of_no_name_is_refused(root: Path, name: str) -> None:
    with pytest.raises(LayerWrong, match="names nothing"):
        unpack(root, layer(member(name)))
    assert untouched(root)


# -- limits


def test_too_many_entries(root: Path) -> None:
    data = layer(*[member(f"f{number}") for number in range(6)])
    with pytest.raises(LayerWrong, match="more than 5 entries"):
        unpack(root, data, limits=Limits(entries=5))


def test_a_size_that_cannot_be_is_refused_before_it_is_read(root: Path) -> None:
    with pytest.raises(LayerWrong, match="larger than"):
        unpack(root, layer(member("huge", size=1 << 50)), limits=Limits(total_bytes=1 << 20))


def test_all_layers_count_together(root: Path) -> None:
    data = layer(member("file", bytes(4096)))
    with pytest.raises(LayerWrong, match="larger than"):
        unpack(root, data, data, data, limits=Limits(total_bytes=3 * 4096))


def test_a_file_that_ends_too_early(root: Path) -> None:
    data = layer(member("file", b"x" * 2000))[:1024]
    with pytest.raises(LayerWrong, match="ends in the middle"):
        unpack(root, data)


def test_what_fills_the_last_block_may_be_missing(root: Path) -> None:
    """As in the layers of umoci 0.4."""
    whole = layer(member("a", b"a"), member("b", b"bc"))
    unpack(root, whole[: 3 * 512 + 2])
    assert (root / "b").read_bytes() == b"bc"


def test_a_damaged_header(root: Path) -> None:
    data = bytearray(layer(member("file", b"x")))
    data[0] ^= 1
    with pytest.raises(LayerWrong, match="damaged"):
        unpack(root, bytes(data))


def test_an_extended_header_without_end(root: Path) -> None:
    info, _ = member("x", kind=tarfile.XHDTYPE, size=1 << 40)
    data = info.tobuf(tarfile.USTAR_FORMAT if info.size < 8**11 else tarfile.GNU_FORMAT)
    with pytest.raises(LayerWrong, match="larger than"):
        unpack(root, data + bytes(4096))


def test_a_component_that_is_too_long(root: Path) -> None:
    with pytest.raises(LayerWrong, match="too long"):
        unpack(root, layer(member("n" * 300, b"x")))


def test_a_name_of_odd_bytes_is_kept(root: Path) -> None:
    info, content = member("odd", b"x")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[:3] = b"\xff\n\xfe"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    unpack(root, bytes(block) + content + bytes(511) + bytes(1024))
    assert os.listdir(os.fsencode(root)) == [b"\xff\n\xfe"]


# -- attributes and removal


def test_attributes_of_overlay_are_not_set(root: Path) -> None:
    attributes = {
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.redirect": "/",
        "SCHILY.xattr.user.kept": "v",
    }
    unpack(root, layer(member("file", b"x", pax=attributes)))
    assert not [name for name in os.listxattr(root / "file") if "overlay" in name]


def test_removal_goes_deep_and_follows_no_link(root: Path) -> None:
    (root / "way").symlink_to(root.parent / "outside")
    deepest = root
    for _ in range(300):
        deepest /= "d"
        deepest.mkdir()
    (deepest / "file").write_text("x")
    (root / "d/closed").mkdir()
    (root / "d/closed").chmod(0)
    parent = os.open(root.parent, os.O_RDONLY)
    remove_tree(parent, b"image")
    os.close(parent)
    assert os.listdir(root.parent) == ["outside"]
    assert (root.parent / "outside/secret").exists()


def test_a_name_of_too_many_directories_is_refused(root: Path) -> None:
    unpack(root, layer(member("/".join(["d"] * 399 + ["file"]), b"x")))
    with pytest.raises(LayerWrong, match="too deep"):
        unpack(root, layer(member("/".join(["d"] * 2000), b"x")))


def test_extended_headers_are_bounded(root: Path) -> None:
    extended = member("x", b"9 a=bcde\n", kind=tarfile.XHDTYPE)
    blocks = extended[0].tobuf(tarfile.USTAR_FORMAT) + extended[1].ljust(512, b"\0")
    with pytest.raises(LayerWrong, match="too many extended headers"):
        unpack(root, blocks * 100 + layer(member("file", b"x")))


def test_a_wide_and_deep_tree_is_removed(root: Path) -> None:
    rows = [member(f"top/{one}/{two}/file", b"x") for one in range(30) for two in range(30)]
    rows.append(member("/".join(["top"] + ["d"] * 300 + ["file"]), b"x"))
    unpack(root, layer(*rows))
    fd = os.open(root, os.O_RDONLY)
    try:
        remove_tree(fd, b"top")
    finally:
        os.close(fd)
    assert os.listdir(root) == []


def test_a_tree_that_its_owner_moves_about_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("image/top/a/deep", "image/top/b", "outside/a", "outside/b"):
        (root.parent / name).mkdir(parents=True, exist_ok=True)
    for name in ("image/top/a/deep/file", "image/top/b/file", "outside/a/file", "outside/b/file"):
        (root.parent / name).touch()
    above = oci_layers._above
    moved = []

    def move(fd: int) -> int:
        if not moved:
            moved.append(1)
            inner = os.readlink(f"/proc/self/fd/{fd}")
            os.rename(inner, root.parent / "outside" / os.path.basename(inner))
        return above(fd)

    monkeypatch.setattr(oci_layers, "_above", move)
    parent = os.open(root, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="changed meanwhile"):
            remove_tree(parent, b"top")
    finally:
        os.close(parent)
    assert (root.parent / "outside/a/file").exists()
    assert (root.parent / "outside/b/file").exists()


# ---- sparse files ----

SPARSE = [
    ("gnu", []),
    ("pax", ["--sparse-version=0.0"]),
    ("pax", ["--sparse-version=0.1"]),
    ("pax", ["--sparse-version=1.0"]),
]


def sparse_tar(folder: Path, kind: str, options: list[str], *pieces: tuple[int, bytes]) -> bytes:
    """Return what GNU tar makes of a file with holes, and of one behind it."""
    with (folder / "holes").open("wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(3 << 20)
    (folder / "after").write_bytes(b"after")
    argv = ["tar", "--create", "--sparse", f"--format={kind}", *options, "holes", "after"]
    made = subprocess.run(argv, cwd=folder, capture_output=True, check=True).stdout
    assert len(made) < 1 << 20, "tar knows no holes here"
    return made


@pytest.mark.parametrize(("kind", "options"), SPARSE, ids=str)
def test_a_sparse_file_is_what_it_stands_for(
    root: Path, tmp_path: Path, kind: str, options: list[str]
) -> None:
    pieces = [(number << 18, bytes([number]) * 5000) for number in range(1, 9)]
    unpack(root, sparse_tar(tmp_path, kind, options, *pieces))
    assert (root / "holes").read_bytes() == (tmp_path / "holes").read_bytes()
    assert (root / "after").read_bytes() == b"after"
    assert (root / "holes").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(("kind", "options"), SPARSE, ids=str)
def test_a_file_that_is_one_hole(root: Path, tmp_path: Path, kind: str, options: list[str]) -> None:
    unpack(root, sparse_tar(tmp_path, kind, options))
    assert (root / "holes").read_bytes() == bytes(3 << 20)
    assert (root / "after").read_bytes() == b"after"


def test_holes_count_as_what_they_are(root: Path, tmp_path: Path) -> None:
    data = sparse_tar(tmp_path, "gnu", [], (0, b"x"))
    with pytest.raises(LayerWrong, match="larger than"):
        unpack(root, data, limits=Limits(total_bytes=2 << 20))
    with pytest.raises(LayerWrong, match="larger than"):
        unpack(root, data, data, limits=Limits(total_bytes=4 << 20))


WRONG_MAPS = [
    {"map": "0,5,3,2", "size": "9"},  # over each other
    {"map": "0,5,8", "size": "9"},
    {"map": "0,5,8,9", "size": "9"},  # more than there is
    {"map": "0,5,8,2", "size": "9"},  # beyond the end
    {"map": "0,7", "size": "x"},
    {"map": "0,-7", "size": "9"},
    {"map": "0,7"},
    {"map": "0," + "9" * 30, "size": "9"},
    {"major": "1", "minor": "0", "realsize": "9"},
]


@pytest.mark.parametrize("headers", WRONG_MAPS, ids=str)
def test_a_wrong_map_is_refused(root: Path, headers: dict[str, str]) -> None:
    pax = {f"GNU.sparse.{name}": value for name, value in headers.items()}
    with pytest.raises(LayerWrong, match="sparse file in the archive is damaged"):
        unpack(root, layer(member("a", b"1234567", pax=pax)))


def test_a_map_without_end_is_refused(root: Path) -> None:
    numbers = b"70000\n" + b"0\n0\n" * 70000
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    with pytest.raises(LayerWrong, match="sparse file"):
        unpack(root, layer(member("a", numbers, pax=pax)))
