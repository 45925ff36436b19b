"""Holes of image and archive tools (facts, security B8): a test for each row, on what a user calls.

Row T-I01 is `test_i01_...`.
"""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from apptainer_py.image import arch
from tests import fixtures, images, sif_bytes
from tests.e2e import steps, three_flows
from tests.own_install import Installation, eventually, files, household

ROWS = {f"I{number:02}" for number in range(1, 8)}
FLOWS = three_flows.FLOWS
PLAIN = (
    "-noI",
    "-noD",
    "-noF",
    "-noX",
    "-no-fragments",
    "-no-duplicates",
    "-quiet",
    "-no-progress",
)


own = fixtures.own(None)


@pytest.fixture
def place(own) -> Iterator[Path]:
    """The user's directory; beside it root's, with a canary that nothing may touch."""
    top = Path(tempfile.mkdtemp(prefix="apptainer-py-b8-", dir="/var/tmp"))
    top.chmod(0o755)
    (top / "host").mkdir()
    (top / "host/canary").write_text("canary")
    made = top / "user"
    made.mkdir()
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(top)


def is_untouched(place: Path) -> bool:
    host = place.parent / "host"
    whole = os.listdir(host) == ["canary"] and (host / "canary").read_text() == "canary"
    return whole and sorted(os.listdir(place.parent)) == ["host", "user"]


def give(own: Installation, *paths: Path) -> None:
    for path in paths:
        os.chown(path, own.user.pw_uid, own.user.pw_gid, follow_symlinks=False)


def failed_in_words(done: subprocess.CompletedProcess[str]) -> bool:
    """Return whether a command ended with one FATAL line, and no traceback."""
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    return done.returncode == 255 and len(fatal) == 1 and "Traceback" not in done.stderr


def test_every_row_has_a_test():
    names = re.findall(r"^def test_(i\d\d)_", Path(__file__).read_text(), re.M)
    assert {name.upper() for name in names} == ROWS


# ---- squashfs ----


def crafted(place: Path, changes: dict[bytes, bytes]) -> Path:
    """Return a squashfs whose names were changed in its tables, which are not compressed."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "aaaaaaaaaa1").symlink_to(place.parent / "host")
    (tree / "aaaaaaaaaa2").mkdir()
    (tree / "aaaaaaaaaa2/planted").write_text("planted")
    (tree / "bbbbbbbbbbbbbbbbbbbb").write_text("planted")
    packed = place / "crafted.sqfs"
    subprocess.run(["mksquashfs", tree, packed, *PLAIN], check=True, capture_output=True)
    data = packed.read_bytes()
    table = int.from_bytes(data[72:80], "little")
    head, tables = data[:table], data[table:]
    for before, after in changes.items():
        assert len(before) == len(after)
        assert before in tables
        tables = tables.replace(before, after)
    packed.write_bytes(head + tables)
    shutil.rmtree(tree)
    return packed


CRAFTED = {
    "a link, then a directory of its name": {b"aaaaaaaaaa2": b"aaaaaaaaaa1"},
    "a name that leads up": {b"bbbbbbbbbbbbbbbbbbbb": b"../../host/planted\0\0"},
    "a name with a slash": {b"bbbbbbbbbbbbbbbbbbbb": b"aaaaaaaaaa1/planted1"},
    "a directory named dot-dot": {b"aaaaaaaaaa2": b"..\0\0\0\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_i01_what_is_unpacked_stays_in_its_directory(own, place, what):
    """`build --sandbox` and `--unsquash`, as the user; a fresh directory each time."""
    packed = crafted(place, CRAFTED[what])
    env = {"APPTAINER_TMPDIR": str(place)}
    built = own.run("build", "--sandbox", place / "box", packed, env=env, cwd=place)
    assert is_untouched(place)
    assert built.returncode == 0 or failed_in_words(built), built.stderr
    own.run("exec", "--unsquash", packed, "true", env=env, cwd=place)
    assert is_untouched(place)
    assert not (place / "planted").exists()
    unsquashed = f"apptainer-py-unsquash-{own.user.pw_uid}"
    assert set(os.listdir(place)) <= {"box", "crafted.sqfs", unsquashed}


@pytest.mark.parametrize("what", CRAFTED)
def test_i02_an_image_hurts_its_own_server_at_most(own, place, what):
    """What the server makes of odd names is seen inside only."""
    packed = crafted(place, CRAFTED[what])
    done = own.run("exec", packed, "cat", "/aaaaaaaaaa1/planted", "/../host/canary", cwd="/")
    assert "canary" not in done.stdout
    assert is_untouched(place)


@pytest.mark.parametrize("flow", ["setuid", "userns"])
def test_i02_the_image_server_has_no_right(own, open_fuse, flow):
    image = images.bare_squashfs(images.shared_folder())
    words = [
        "exec",
        *(["-u"] if flow == "userns" else []),
        image,
        "sh",
        "-c",
        "echo; exec sleep 60",
    ]
    with household() as home:
        process = home.adopt(
            subprocess.Popen(
                [own.program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=own.environment(), cwd="/",
                start_new_session=True, **own.identity(),
            )
        )  # fmt: skip
        eventually(lambda: steps.has_spoken(process), "the payload runs")
        server = steps.processes(home)["IMAGE_SERVER"]
        lines = Path(f"/proc/{server}/status").read_text().splitlines()
        status = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
        assert status["Uid"] == [str(own.user.pw_uid)] * 4
        assert status["NoNewPrivs"] == ["1"]
        rights = {name: int(status[f"Cap{name}"][0], 16) for name in ("Inh", "Prm", "Eff", "Amb")}
        assert set(rights.values()) == {0}
        assert int(status["CapBnd"][0], 16) == 0 or flow == "userns"
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize("flow", ["setuid", "userns"])
@pytest.mark.parametrize("how", ["echo x >> /six", ": > /six", "truncate -s 1 /six"])
def test_i03_a_file_that_is_written_loses_its_bits(own, place, flow, how):
    """Through the overlay, by its owner: setuid and setgid go, as without one."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / "bin/truncate").symlink_to("busybox")
    give(own, tree, *tree.rglob("*"))
    (tree / "six").write_text("six")
    give(own, tree / "six")
    (tree / "six").chmod(0o6777)
    first = ["-u"] if flow == "userns" else []
    script = f"stat -c %a /six; {how}; stat -c %a /six"
    done = own.run("exec", *first, "--writable-tmpfs", tree, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6777", "777"]
    assert stat.S_IMODE((tree / "six").stat().st_mode) == 0o6777


# ---- LUKS ----


def luks() -> bytes:
    """A LUKS2 header that says that it is in the middle of being decrypted (CVE-2021-4122)."""
    config = {
        "keyslots": {"0": {"type": "reencrypt", "mode": "decrypt", "direction": "forward"}},
        "config": {"requirements": {"mandatory": ["online-reencrypt"]}},
        "segments": {"0": {"type": "linear", "offset": "0", "size": "dynamic"}},
    }
    head = struct.pack(
        ">6sHQQ48s32s64s40s", b"LUKS\xba\xbe", 2, 16384, 3, b"", b"sha256", b"", b"x"
    )
    return head.ljust(4096, b"\0") + json.dumps(config).encode().ljust(12288, b"\0")


@pytest.mark.parametrize("flow", FLOWS)
def test_i04_no_luks_header_is_looked_at(own, place, flow):
    """Refused by what the SIF file's table says, with no helper of the kernel's called."""
    content = luks().ljust(1 << 16, b"\0")
    image = place / "luks.sif"
    part = sif_bytes.partition(size=len(content), fs=5)
    image.write_bytes(sif_bytes.sif([part], content=content))
    before = set(os.listdir("/dev"))
    env = {"APPTAINER_ENCRYPTION_PASSPHRASE": "secret"}
    done = three_flows.run(own.program, flow, ["exec", image, "true"], env=env)
    assert failed_in_words(done), done.stderr
    assert "it is encrypted with LUKS" in done.stderr
    assert set(os.listdir("/dev")) == before


# ---- layers ----


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o6755
    for key, value in more.items():
        setattr(info, key, value)
    return info


def packed(members: list[tarfile.TarInfo]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info in members:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return made.getvalue()


def layout(place: Path, *layers: bytes, **lies: str) -> Path:
    """Write an OCI layout of these layers; `lies` replace digests that it says."""
    made = place / "layout"
    blobs = made / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> tuple[str, int]:
        name = sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return f"sha256:{name}", len(data)

    def said(kind: str, data: bytes, lie: str = "") -> dict[str, object]:
        digest, size = put(data)
        mime = f"application/vnd.oci.image.{kind}"
        return {"mediaType": mime, "digest": lie or digest, "size": size}

    diffs = [f"sha256:{sha256(data).hexdigest()}" for data in layers]
    config = {
        "architecture": arch.host_arch(), "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diffs},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "config": said("config.v1+json", json.dumps(config).encode()),
        "layers": [said("layer.v1.tar", data, lies.get("digest", "")) for data in layers],
    }
    index = {
        "schemaVersion": 2,
        "manifests": [said("manifest.v1+json", json.dumps(manifest).encode())],
    }
    (made / "index.json").write_text(json.dumps(index))
    (made / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return made


SYM, HARD, DIR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
CORPUS = {
    "dots": [member("."), member("/", DIR), member("./../planted"), member("a/../../planted")],
    "absolute": [member("{host}/planted"), member("/../../../../../{host}/planted")],
    "up": [member("../../host/planted")],
    "through a link": [member("l", SYM, "{host}"), member("l/planted")],
    "through a link up": [member("l", SYM, "../../../.."), member("l/{host}/planted")],
    "onto a link": [member("l", SYM, "{host}/canary"), member("l", size=5)],
    "hard link": [member("h", HARD, "{host}/canary"), member("h", size=5)],
    "hard link up": [member("h", HARD, "../../host/canary"), member("h", size=5)],
    "hard link to a link": [member("l", SYM, "{host}/canary"), member("h", HARD, "l"), member("h")],
    "whiteouts": [member("l", SYM, "{host}"), member("l/.wh.canary"), member("l/.wh..wh..opq")],
    "whiteout up": [member(".wh..."), member(".wh.."), member("../.wh.host"), member(".wh./etc")],
    "devices": [
        member("d", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("f", tarfile.FIFOTYPE),
        member("b", tarfile.BLKTYPE, devmajor=8, devminor=0),
    ],
    "attributes": [
        member("o", DIR, pax_headers={"SCHILY.xattr.user.overlay.redirect": "/../host"}),
        member("m", pax_headers={"SCHILY.xattr.trusted.overlay.metacopy": ""}),
        member("c", pax_headers={"SCHILY.xattr.security.capability": "\1\0\0\2"}),
    ],
    "two names": [member("good", pax_headers={"path": "../../host/planted"})],
    "names of case": [member("Name", SYM, "{host}"), member("name/planted"), member("NAME")],
    "owners": [member("n", uid=-1), member("h", uid=1 << 62), member("t", mtime=1 << 40)],
    "too large": [member("s", pax_headers={"size": str(1 << 62)})],
}  # fmt: skip


def with_places(member: tarfile.TarInfo, host: Path) -> tarfile.TarInfo:
    made = copy.copy(member)
    made.name = made.name.replace("{host}", str(host))
    made.linkname = made.linkname.replace("{host}", str(host))
    return made


@pytest.mark.parametrize("what", CORPUS)
def test_i05_layers_write_inside_only(own, place, what):
    host = place.parent / "host"
    entries = [with_places(entry, host) for entry in CORPUS[what]]
    made = layout(place, packed(entries))
    env = {"APPTAINER_TMPDIR": str(place)}
    done = own.run("build", "--sandbox", place / "box", f"oci:{made}", env=env, cwd=place)
    assert is_untouched(place)
    assert done.returncode == 0 or failed_in_words(done), done.stderr
    found = [path for path in place.rglob("*") if not path.is_symlink()]
    assert not [
        p for p in found if stat.S_ISCHR(p.stat().st_mode) or stat.S_ISBLK(p.stat().st_mode)
    ]
    for path in found:
        kept = [name for name in os.listxattr(path) if "overlay" in name or "security" in name]
        assert not kept, path


@pytest.mark.parametrize(
    ("data", "lies"),
    [
        (packed([member("a", size=5)])[:515], {}),
        (packed([member("a")]), {"digest": "sha256:" + "0" * 64}),
        (b"\x1f\x8b\x08\0" + bytes(20), {}),
        (b"(\xb5/\xfd" + bytes(20), {}),
    ],
)
def test_i05_a_layer_that_is_not_what_it_should_be(own, place, data, lies):
    made = layout(place, data, **lies)
    env = {"APPTAINER_TMPDIR": str(place)}
    before = sorted(os.listdir(place))
    done = own.run("build", "--sandbox", place / "box", f"oci:{made}", env=env, cwd=place)
    assert failed_in_words(done), done.stderr
    assert sorted(os.listdir(place)) == before


# Who may read or write archives of Python's own kinds, and why no name in one becomes a path.
ARCHIVES = {
    ("plugin_source.py", "zipfile"): "writes one",
    ("plugin_content.py", "zipfile"): "reads bytes; every name is checked before it is a path",
}
UNPACKING = {"extract", "extractall", "unpack_archive"}


def test_i06_no_archive_of_others_is_unpacked_by_python(repository):
    """Its filters were got around more than once; our own reader opens each name in the root."""
    users, calls = set(), []
    for path in (repository / "apptainer_py").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                users |= {(path.name, name) for name in names & {"tarfile", "zipfile"}}
            if isinstance(node, ast.Attribute) and node.attr in UNPACKING:
                calls.append(f"{path.name}:{node.lineno}")
    assert users == set(ARCHIVES)
    assert not calls


def test_i06_a_chain_of_links_longer_than_a_path(own, place):
    """CVE-2025-4517: directories and links that make a name which no check resolves."""
    step, entries, at = "d" * 240, [], ""
    for letter in "abcdefghijklmnop":
        entries += [member(f"{at}{step}", DIR), member(f"{at}{letter}", SYM, step)]
        at += f"{step}/"
    short = "/".join("abcdefghijklmnop")
    way = "../" * 16
    entries += [
        member(f"{short}/{'l' * 240}", SYM, way),
        member("escape", SYM, f"{short}/{'l' * 240}/../../.."),
    ]
    entries += [member(f"escape{place.parent}/host/planted", size=3), member("escape/planted")]
    made = layout(place, packed(entries))
    env = {"APPTAINER_TMPDIR": str(place)}
    done = own.run("build", "--sandbox", place / "box", f"oci:{made}", env=env, cwd=place)
    assert is_untouched(place)
    assert done.returncode == 0 or failed_in_words(done), done.stderr


# ---- SIF ----


def hostile() -> dict[str, bytes]:
    size = len(sif_bytes.SQUASHFS)
    part, at = sif_bytes.partition, sif_bytes.PARTITION_OFFSET
    largest = (1 << 63) - 1
    twice = [part(1), part(2, at + size // 2, part=4)]
    return {
        "minus one": sif_bytes.sif(total=-1),
        "2^31": sif_bytes.sif(total=1 << 31, table_bytes=largest),
        "2^63-1": sif_bytes.sif(total=largest, table_bytes=largest),
        "a table at the end of numbers": sif_bytes.sif(table_offset=largest),
        "a table before the file": sif_bytes.sif(table_offset=-585),
        "overlapping": sif_bytes.sif(twice, content=sif_bytes.SQUASHFS * 2),
        "over the table": sif_bytes.sif([part(1, 4096)]),
        "an end above all numbers": sif_bytes.sif([part(1, at, largest)]),
        "an offset above all numbers": sif_bytes.sif([part(1, largest, size)]),
        "negative": sif_bytes.sif([part(1, -4096)]),
        "beyond the end": sif_bytes.sif([part(1, at + 4096)]),
        "cut short": sif_bytes.sif()[:-1],
    }


@pytest.mark.parametrize("flow", FLOWS)
def test_i07_numbers_of_a_sif_file(own, place, flow):
    image = place / "x.sif"
    for what, data in hostile().items():
        image.write_bytes(data)
        before = files(place)
        done = three_flows.run(own.program, flow, ["exec", image, "true"])
        assert failed_in_words(done), (what, done.stderr)
        assert files(place) == before, what


def test_i07_a_file_that_is_two_things(own, place):
    """The launcher line of a SIF file is never run, and the file is one kind only."""
    good = images.own_sif(images.shared_folder()).read_bytes()
    image = place / "x.sif"
    image.write_bytes(f"#!/bin/touch {place}/ran\n".encode()[:31].ljust(32, b"\0") + good[32:])
    image.chmod(0o755)
    own.configure("allow container squashfs = no")
    assert own.run("exec", image, "true").returncode == 0
    # A squashfs's magic in front, the rest a SIF file: C and Python see the same kind.
    image.write_bytes(b"hsqs" + good[4:])
    own.configure("allow container sif = no")
    assert failed_in_words(own.run("exec", image, "true"))
    own.configure("allow container sif = no\nallow container squashfs = no")
    assert failed_in_words(own.run("exec", image, "true"))
    own.restore()
    assert os.listdir(place) == ["x.sif"]
