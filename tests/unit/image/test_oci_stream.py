"""Layers that are merged as they come make what they make when one is unpacked over the other."""

from __future__ import annotations

import io
import os
import random
import stat
import tarfile
from pathlib import Path

import pytest

from apptainer_py.base.errors import ApptainerError
from apptainer_py.image.oci_layers import Limits, Unpacker, remove_tree
from apptainer_py.image.oci_stream import Merger, NotPlain, Owners, TooLarge
from tests.unit.image.test_oci_layers import SPARSE, folder, layer, member, sparse_tar

Members = list[tuple[tarfile.TarInfo, bytes]]
RESERVED = (b".singularity.d",)
KINDS = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}


def merged(*layers: bytes, limits: Limits | None = None, owners: Owners | None = None) -> bytes:
    parts: list[bytes] = []
    merger = Merger(parts.append, owners or Owners(), RESERVED, limits)
    for data in reversed(layers):
        merger.apply(io.BytesIO(data).read)
    merger.close(7)
    return b"".join(parts)


def members_of(stream: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        return archive.getmembers()


def tree_of(root: Path, *layers: bytes) -> dict[str, tuple[object, ...]]:
    """Unpack layers; return what is there: kind, mode, content, and which names are one file."""
    root.mkdir()
    unpacker = Unpacker(str(root), owns_all=False)
    try:
        for data in layers:
            unpacker.apply(io.BytesIO(data).read)
    finally:
        unpacker.close()
    found: dict[str, tuple[object, ...]] = {}
    twins: dict[int, str] = {}
    for place, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            path = f"{place}/{name}"
            facts = os.lstat(path)
            short = os.path.relpath(path, root)
            content: object = b""
            if stat.S_ISREG(facts.st_mode):
                content = Path(path).read_bytes(), twins.setdefault(facts.st_ino, short)
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            mode = 0 if stat.S_ISLNK(facts.st_mode) else facts.st_mode
            found[short] = (stat.S_IFMT(facts.st_mode), mode, content)
    return found


NAMES = ("a", "b", "a/x", "a/y", "b/x", "a/x/z", "b/x/z", "a/x/w")


def one(chosen: random.Random) -> tuple[tarfile.TarInfo, bytes]:
    name = chosen.choice(NAMES)
    kind = chosen.choice(("file", "file", "folder", "folder", "folder", "gone", "opaque", *KINDS))
    if kind == "folder":
        return folder(name, mode=chosen.choice((0o755, 0o700)))
    if kind == "gone":
        above, _, last = name.rpartition("/")
        return member(f"{above}/.wh.{last}" if above else f".wh.{last}")
    if kind == "opaque":
        return member(f"{name}/.wh..wh..opq")
    if kind in KINDS:
        return member(name, kind=KINDS[kind], link=chosen.choice(NAMES))
    return member(name, chosen.randbytes(3))


def test_any_layers_make_the_same_tree(tmp_path: Path) -> None:
    plain = 0
    for seed in range(600):
        chosen = random.Random(seed)
        layers = [
            layer(*(one(chosen) for _ in range(chosen.randrange(1, 5))))
            for _ in range(chosen.randrange(1, 5))
        ]
        try:
            stream = merged(*layers)
        except (NotPlain, ApptainerError):
            continue
        plain += 1
        wanted = tree_of(tmp_path / "tree", *layers)
        assert tree_of(tmp_path / "merged", stream) == wanted, seed
        at = os.open(tmp_path, os.O_RDONLY)
        for name in (b"tree", b"merged"):
            remove_tree(at, name)
        os.close(at)
    assert plain > 100


UNTOLD: dict[str, list[Members]] = {
    "through a link below": [
        [member("lib", kind=tarfile.SYMTYPE, link="usr")],
        [member("lib/file")],
    ],
    "through a link of its own": [[member("l", kind=tarfile.SYMTYPE, link="/"), member("l/file")]],
    "a whiteout through a link": [
        [member("lib", kind=tarfile.SYMTYPE, link="usr"), member("usr/x")],
        [member("lib/.wh.x")],
    ],
    "twice": [[member("file", b"1"), member("file", b"2")]],
    "out": [[member("../file")]],
    "out by a hard link": [[member("file", kind=tarfile.LNKTYPE, link="../../etc/passwd")]],
    "a hard link to what is below": [
        [member("old", b"1")],
        [member("new", kind=tarfile.LNKTYPE, link="old")],
    ],
    "in place of the root": [[member(".", b"1")]],
    "a root that is closed": [[folder(".", mode=0o700)]],
    "metadata": [[member(".singularity.d/runscript", b"1")]],
    "a capability of another version": [
        [member("file", pax={"SCHILY.xattr.security.capability": "\1\0\0\3"})]
    ],
}


@pytest.mark.parametrize("layers", UNTOLD.values(), ids=UNTOLD.keys())
def test_what_takes_a_tree(layers: list[Members]) -> None:
    with pytest.raises((NotPlain, ApptainerError)):
        merged(*(layer(*members) for members in layers))


def test_what_the_image_may_hold() -> None:
    data = layer(*(member(f"file{number}") for number in range(5)))
    with pytest.raises(TooLarge, match="more than 4 entries"):
        merged(data, limits=Limits(entries=4))
    with pytest.raises(TooLarge, match="larger than 1000 bytes"):
        merged(data, limits=Limits(total_bytes=1000))


def test_names_times_owners_and_attributes() -> None:
    name = "d" * 99 + "/" + "f" * 120
    entry, content = member(
        name, b"12", pax={"SCHILY.xattr.user.kept": "v", "mtime": "5000000000.5"}
    )
    hidden, _ = member("b", pax={"SCHILY.xattr.trusted.overlay.opaque": "y"})
    device, _ = member("c", kind=tarfile.CHRTYPE)
    link, _ = member("l", kind=tarfile.SYMTYPE, link="t" * 150)
    data = layer((entry, content), (hidden, b""), (device, b""), (link, b""))
    stream = merged(data, owners=Owners(all_root=True, epoch=1000))
    found = {one.name: one for one in members_of(stream)}
    assert sorted(found) == sorted([name, "b", "l", "d" * 99])
    assert found[name].mtime == 1000
    assert (found[name].uid, found[name].gid, found[name].size) == (0, 0, 2)
    assert found[name].pax_headers["SCHILY.xattr.user.kept"] == "v"
    assert found["b"].pax_headers == {}
    assert found["l"].linkname == "t" * 150


def test_owners_are_kept_for_root() -> None:
    entry, _ = member("file")
    entry.uid, entry.gid = 12345, 3_000_000_000
    stream = merged(layer((entry, b"")), owners=Owners(all_root=False))
    (found,) = members_of(stream)
    assert (found.uid, found.gid) == (12345, 3_000_000_000)


@pytest.mark.parametrize(("kind", "options"), SPARSE, ids=str)
def test_a_sparse_file_in_the_stream(tmp_path: Path, kind: str, options: list[str]) -> None:
    data = sparse_tar(tmp_path, kind, options, (0, b"start"), (1 << 20, b"x" * 777))
    made = tree_of(tmp_path / "made", merged(data))
    assert made == tree_of(tmp_path / "wanted", data)
    assert {"after", "holes"} <= set(made)
    with pytest.raises(TooLarge):
        merged(data, limits=Limits(total_bytes=2 << 20))
