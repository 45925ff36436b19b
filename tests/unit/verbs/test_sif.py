"""`sif list|header|info|dump`, beside what the real Apptainer prints."""

from __future__ import annotations

import json
import os
import struct
import subprocess

import pytest

from apptainer_py.verbs import sif
from tests import images, sif_bytes
from tests.sif_bytes import entry, partition

TABLE = sif_bytes.TABLE_OFFSET
# Made by changing bytes of a good file: name, offset, format, value.
CHANGES = [
    ("no launcher", 0, "32s", b""),
    ("other launcher", 0, "32s", b"#!/bin/other"),
    ("unknown architecture", 45, "3s", b"00"),
    ("another architecture", 45, "3s", b"11"),
    ("times before 1970", 64, "<qq", (-1, -62135596801)),
    ("times far away", 64, "<qq", (253402300800, 1 << 62)),
    ("free descriptors", 80, "<q", -1),
    ("no descriptors", 80, "<qq", (0, 0)),
    ("two descriptors", 88, "<q", 2),
    ("too many descriptors", 88, "<q", 49),
    ("data of nothing", 120, "<q", 0),
    ("data of 1.5 KiB", 120, "<q", 1536),
    ("data of an exbibyte", 120, "<q", 1 << 60),
    ("magic", 32, "10s", b"SIF_MAGIX"),
    ("version", 42, "3s", b"02"),
    ("large numbers", TABLE + 5, "<III", (4294967295, 0xF0BC614E, 0xF0BC614E)),
    ("large offset", TABLE + 17, "<q", 1 << 60),
    ("negative offset", TABLE + 17, "<q", -5),
    ("negative size", TABLE + 25, "<q", -1),
    ("no group", TABLE + 9, "<I", 0xF0000000),
    ("link", TABLE + 13, "<I", 2),
    ("link to a group", TABLE + 13, "<I", 0xF0000001),
    ("used by two", TABLE + 4, "B", 2),
    ("not used", TABLE + 4, "B", 0),
    ("number twice", TABLE + 5, "<I", 2),
    ("unknown type", TABLE, "<i", 99),
]
TYPES = [
    *((f"type {number:x}", number, (1, 0x100)) for number in range(0x4001, 0x400A)),
    *((f"hash {number}", 0x4005, (number, 0xAABBCCDD)) for number in range(1, 6)),
    *((f"bill {number}", 0x4009, (number, 0)) for number in range(1, 8)),
    ("PEM", 0x4008, (2, 0x200)),
    ("unknown message", 0x4008, (9, 9)),
    *((f"partition {fs}/{part}", 0x4004, (fs, part)) for fs in range(8) for part in (0, 2, 4)),
]


def answers(path):
    """Return what each of our commands gives: text, or the message of its failure."""
    found = {}
    for words in (["list"], ["header"], ["info", "1"], ["info", "2"], ["info", "3"]):
        try:
            command = getattr(sif, f"sif_{words[0]}")
            found[" ".join(words)] = (0, command(path, *words[1:]), "")
        except sif.SifCommandFailed as error:
            found[" ".join(words)] = (error.exit_code, "", str(error))
    return found


def real_answers(path):
    found = {}
    for words in (["list"], ["header"], ["info", "1"], ["info", "2"], ["info", "3"]):
        argv = [str(images.REAL_APPTAINER), "sif", *words, path]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        failed = done.returncode != 0
        found[" ".join(words)] = (
            done.returncode,
            "" if failed else done.stdout,
            done.stderr.splitlines()[0] if failed else "",
        )
    return found


@pytest.fixture(scope="module")
def good():
    """A file with three objects and the names that real ones have."""
    return sif_bytes.sif(
        [
            entry(0x4001, 1, 32176, 33, created=1_700_000_000),
            entry(0x4006, 2, 32209, 60, created=1_700_000_000, name=b"inspect-metadata.json"),
            partition(3, created=1_700_000_000),
        ]
    )


@pytest.fixture
def real():
    if not images.have_real_apptainer():
        pytest.skip("did not run: there is no Apptainer to compare with")


@pytest.mark.parity
@pytest.mark.parametrize(("what", "offset", "layout", "value"), CHANGES)
def test_the_same_as_apptainer_for_changed_numbers(
    real, tmp_path, monkeypatch, good, what, offset, layout, value
):
    data = bytearray(good)
    struct.pack_into(layout, data, offset, *(value if isinstance(value, tuple) else (value,)))
    (tmp_path / "x.sif").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert answers("x.sif") == real_answers("x.sif"), what


@pytest.mark.parity
@pytest.mark.parametrize(("what", "data_type", "numbers"), TYPES)
def test_the_same_as_apptainer_for_every_type(
    real, tmp_path, monkeypatch, good, what, data_type, numbers
):
    data = bytearray(good)
    struct.pack_into("<i", data, TABLE + 585, data_type)
    struct.pack_into("<II", data, TABLE + 585 + 201, *numbers)
    (tmp_path / "x.sif").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert answers("x.sif") == real_answers("x.sif"), what


@pytest.mark.parity
@pytest.mark.parametrize("name", ["real_sif", "own_sif"])
def test_the_same_as_apptainer_for_whole_images(real, name):
    path = str(getattr(images, name)(images.shared_folder()))
    assert answers(path) == real_answers(path)
    for number in ("1", "2", "3"):
        pieces: list[bytes] = []
        sif.sif_dump(path, number, pieces.append)
        argv = [str(images.REAL_APPTAINER), "sif", "dump", number, path]
        assert b"".join(pieces) == subprocess.run(argv, capture_output=True, check=True).stdout


@pytest.mark.parity
@pytest.mark.parametrize(
    "ident", ["x", "", "-1", "+1", "0", "01", "0x1", "1_0", "9", "4294967296", "99999999999", "٣"]
)
def test_the_same_as_apptainer_for_strange_numbers(real, tmp_path, good, ident):
    path = tmp_path / "x.sif"
    path.write_bytes(good)
    argv = [str(images.REAL_APPTAINER), "sif", "info", "--", ident, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        ours = (0, sif.sif_info(str(path), ident), "")
    except sif.SifCommandFailed as error:
        ours = (error.exit_code, "", str(error))
    if ident == "٣":
        assert ours[0] == done.returncode == 1
        return
    failed = done.returncode != 0
    first = done.stderr.splitlines()[0] if failed else ""
    assert ours == (done.returncode, "" if failed else done.stdout, first)


@pytest.mark.parity
@pytest.mark.parametrize("length", [0, 1, 127, 128, 4096, 10000])
def test_the_same_as_apptainer_for_short_files(real, tmp_path, monkeypatch, good, length):
    (tmp_path / "x.sif").write_bytes(good[:length])
    monkeypatch.chdir(tmp_path)
    assert answers("x.sif") == real_answers("x.sif")


@pytest.mark.parity
@pytest.mark.parametrize("path", ["/nonexistent", "/", "/etc/passwd"])
def test_the_same_as_apptainer_for_what_is_no_sif(real, path):
    assert answers(path) == real_answers(path)


def test_list_without_apptainer_beside_it(tmp_path, good):
    (tmp_path / "x.sif").write_bytes(good)
    lines = sif.sif_list(str(tmp_path / "x.sif")).splitlines()
    assert lines[0] == lines[2] == "-" * 78
    assert lines[5] == (
        "3    |1       |NONE    |36864-40960               |FS (Squashfs/*System/amd64)"
    )


def test_a_name_cannot_move_the_cursor(tmp_path):
    name = b"a\nb\x1b[31m\xff\xe2\x80\xae"
    content = sif_bytes.sif([entry(0x4006, 1, 32176, 1, name=name)], launch=b"#!\x1b]0;x\x07")
    (tmp_path / "x.sif").write_bytes(content)
    path = str(tmp_path / "x.sif")
    for text in (sif.sif_info(path, "1"), sif.sif_header(path)):
        assert all(line.isprintable() for line in text.splitlines())
    assert "a\\nb\\x1b[31m\\xff\\u202e" in sif.sif_info(path, "1")


def test_dump_is_all_or_an_error(tmp_path):
    content = sif_bytes.sif([entry(0x4007, 1, 36864, 5000)])
    (tmp_path / "x.sif").write_bytes(content)
    pieces: list[bytes] = []
    with pytest.raises(sif.SifCommandFailed, match="ends at byte"):
        sif.sif_dump(str(tmp_path / "x.sif"), "1", pieces.append)
    assert not pieces


def test_a_fifo_does_not_make_us_wait(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(sif.SifCommandFailed, match="is not a regular file"):
        sif.sif_list(str(tmp_path / "fifo"))


def test_json(tmp_path, good):
    (tmp_path / "x.sif").write_bytes(good)
    document = json.loads(sif.sif_list_json(str(tmp_path / "x.sif")))
    assert document["header"]["descriptors_total"] == "48"
    assert [found["data_type"] for found in document["objects"]] == [
        "Def.FILE",
        "JSON.Generic",
        "FS",
    ]
    assert document["objects"][1]["name"] == "inspect-metadata.json"
