"""`inspect`, beside what the real Apptainer prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base.errors import NotSupported
from apptainer_py.verbs.inspect import CannotInspect, ReadingFailed, Wanted, inspect
from tests import images, sif_bytes
from tests.sif_bytes import entry, partition

WORDS = {
    "-d": "deffile",
    "-e": "environment",
    "-H": "helpfile",
    "-r": "runscript",
    "-s": "startscript",
    "-t": "test",
    "-l": "labels",
    "-j": "json",
    "--list-apps": "list_apps",
    "--all": "all",
}
LINES = """
-l|-d|-e|-H|-r|-s|-t|-j|--all|--list-apps|--app foo|--app nope|--app foo --all|--app foo -e
--app foo -r|--app foo -d|--app foo -H|--app foo -t|--app foo -s|--app foo -j|-j -e|-e -r -H
-l -j -d|--list-apps -j|-l -r|--list-apps -r|--app foo --list-apps -j|--all -j
"""
COMMAND_LINES = ["", *LINES.replace("\n", "|").strip("|").split("|")]


def wanted(line):
    facts = {}
    words = line.split()
    while words:
        word = words.pop(0)
        if word == "--app":
            facts["app"] = words.pop(0)
        else:
            facts[WORDS[word]] = True
    return Wanted(**facts)


def sif_without_metadata(folder, *, deffile):
    """The real image with its JSON object renamed, and its deffile object hidden or not."""
    target = folder / f"plain-{deffile}.sif"
    if not target.exists():
        data = bytearray(images.real_sif(folder).read_bytes())
        at = sif_bytes.TABLE_OFFSET + sif_bytes.ENTRY_BYTES + 73
        data[at : at + 7] = b"another"
        if not deffile:
            data[sif_bytes.TABLE_OFFSET : sif_bytes.TABLE_OFFSET + 2] = b"\x07\x40"
        target.write_bytes(data)
        target.chmod(0o755)
    return target


def image_of(kind):
    folder = images.shared_folder()
    if kind.startswith("plain"):
        return sif_without_metadata(folder, deffile=kind == "plain, deffile")
    return getattr(images, kind)(folder)


@pytest.mark.parity
@pytest.mark.parametrize("line", COMMAND_LINES)
@pytest.mark.parametrize(
    "kind",
    [
        "real_sif",
        "real_sandbox",
        "own_sif",
        "small_tree",
        "described_tree",
        "bare_squashfs",
        "plain, deffile",
        "plain",
    ],
)
def test_the_same_as_apptainer(kind, line):
    if not images.have_real_apptainer():
        pytest.skip("did not run: there is no Apptainer to compare with")
    path = image_of(kind)
    if kind in ("bare_squashfs", "plain, deffile", "plain") and (
        os.stat("/dev/fuse").st_mode & 0o006 != 0o006
    ):
        pytest.skip("did not run: /dev/fuse is closed to ordinary users")
    real = images.real_apptainer("inspect", *line.split(), path)
    ours = inspect(str(path), wanted(line))
    assert (0, ours.text) == (real.returncode, real.stdout)
    assert [f"WARNING: {text}" for text in ours.warnings] == real.stderr.splitlines()


@pytest.mark.parity
@pytest.mark.parametrize("content", [None, b"", b"text\n", bytes(5000)])
def test_the_same_refusals_as_apptainer(content):
    if not images.have_real_apptainer():
        pytest.skip("did not run: there is no Apptainer to compare with")
    path = images.shared_folder() / "broken"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o644)
    with pytest.raises(CannotInspect) as caught:
        inspect(str(path), Wanted())
    real = images.real_apptainer("inspect", path)
    assert real.stderr == f"FATAL:   {caught.value}\n"
    assert caught.value.exit_code == real.returncode == 255


@pytest.fixture
def tree(tmp_path):
    target = tmp_path / "tree"
    shutil.copytree(images.described_tree(images.shared_folder()), target, symlinks=True)
    return target


def test_links_of_a_sandbox_stay_inside(tmp_path, tree):
    (tmp_path / "secret").write_text("of the host")
    script = tree / ".singularity.d/runscript"
    script.unlink()
    script.symlink_to("../../secret")
    assert inspect(str(tree), Wanted(runscript=True)).text == ""
    script.unlink()
    script.symlink_to(str(tmp_path / "secret"))
    assert inspect(str(tree), Wanted(runscript=True)).text == ""


@pytest.mark.parametrize("app", ["../../..", "..", ".", "foo/../foo", "a\0b", "*"])
def test_an_app_is_a_name_and_no_path(tree, app):
    assert inspect(str(tree), Wanted(app=app, runscript=True)).text == ""


def test_a_large_file_is_refused(tree):
    (tree / ".singularity.d/runscript").write_bytes(b"x" * (5 << 20))
    with pytest.raises(ReadingFailed, match="larger than"):
        inspect(str(tree), Wanted(runscript=True))


@pytest.mark.parametrize(
    ("labels", "shown", "warnings"),
    [
        ('{"a": "b"}', "a: b\n", 0),
        ('{"a": 1, "b": "c"}', "b: c\n", 1),
        ("[]", "", 1),
        ("{", "", 1),
        ("[" * 100_000, "", 1),
        ('{"a": "\\ud800"}', "a: ?\n", 0),
    ],
)
def test_strange_labels(tree, labels, shown, warnings):
    (tree / ".singularity.d/labels.json").write_text(labels)
    found = inspect(str(tree), Wanted())
    assert (found.text, len(found.warnings)) == (shown, warnings)


def test_bytes_that_are_no_text(tree):
    (tree / ".singularity.d/runscript").write_bytes(b"\xff\0\xfe\n")
    assert inspect(str(tree), Wanted(runscript=True)).text == "\ufffd\ufffd\n"


def test_json_is_written_as_go_does(tree):
    (tree / ".singularity.d/runscript").write_text("a < b && c > d \u2028 é\t\x01\n")
    text = inspect(str(tree), Wanted(runscript=True, json=True)).text
    assert '"a \\u003c b \\u0026\\u0026 c \\u003e d \\u2028 é\\t\\u0001"' in text


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"data": []}',
        b'{"data": {"attributes": 1}}',
        b"\xff\xff",
    ],
)
def test_a_strange_metadata_object_is_a_warning_or_no_answer(tmp_path, metadata):
    start = sif_bytes.PARTITION_OFFSET + len(sif_bytes.SQUASHFS)
    content = sif_bytes.SQUASHFS + metadata
    entries = [entry(0x4006, 1, start, len(metadata), name=b"inspect-metadata.json"), partition()]
    path = tmp_path / "x.sif"
    path.write_bytes(sif_bytes.sif(entries, content=content))
    # The squashfs is an empty one that unsquashfs does not accept.
    with pytest.raises(ReadingFailed):
        inspect(str(path), Wanted())


def test_wrong_types_in_the_metadata_are_left_out(tmp_path):
    attributes = {
        "labels": {"a": 1, "b": "c"},
        "runscript": {"x": "y"},
        "environment": "z",
        "apps": {"foo": 1, "bar": {"runscript": 1, "labels": []}},
        "test": "t",
    }
    metadata = json.dumps({"data": {"attributes": attributes}}).encode()
    start = sif_bytes.PARTITION_OFFSET + len(sif_bytes.SQUASHFS)
    entries = [entry(0x4006, 1, start, len(metadata), name=b"inspect-metadata.json"), partition()]
    path = tmp_path / "x.sif"
    path.write_bytes(sif_bytes.sif(entries, content=sif_bytes.SQUASHFS + metadata))
    shown = json.loads(inspect(str(path), Wanted(all=True)).text)
    assert shown == {
        "data": {"attributes": {"apps": {"bar": {}}, "labels": {"b": "c"}, "test": "t"}},
        "type": "container",
    }


def test_metadata_outside_of_the_file(tmp_path):
    entries = [entry(0x4006, 1, 1 << 40, 9, name=b"inspect-metadata.json"), partition()]
    path = tmp_path / "x.sif"
    path.write_bytes(sif_bytes.sif(entries))
    with pytest.raises(CannotInspect, match="ends at byte"):
        inspect(str(path), Wanted())


def test_an_encrypted_image_without_metadata(tmp_path):
    path = tmp_path / "x.sif"
    path.write_bytes(sif_bytes.sif([partition(fs=5)]))
    with pytest.raises(NotSupported):
        inspect(str(path), Wanted())


def ext3_of(tree: Path, target: Path) -> Path:
    program = "/usr/sbin/mkfs.ext3"
    if not os.path.exists(program):
        pytest.skip(f"did not run: no {program}")
    with target.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([program, "-q", "-d", tree, target], check=True, stdout=subprocess.DEVNULL)
    return target


@pytest.mark.parametrize("line", ["", "--all", "-r -H -e", "--list-apps", "--app foo -j"])
def test_an_ext3_image_says_what_its_directory_says(line, tmp_path):
    tree = images.described_tree(images.shared_folder())
    image = ext3_of(tree, tmp_path / "x.ext3")
    assert inspect(str(image), wanted(line)) == inspect(str(tree), wanted(line))


def test_hostile_ext3_images(tmp_path):
    tree = tmp_path / "tree"
    (tree / 'scif/apps/a"b\n; quit/scif').mkdir(parents=True)
    (tree / ".singularity.d").mkdir()
    with (tree / ".singularity.d/runscript").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tree / ".singularity.d/test")
    (tree / ".singularity.d/startscript").symlink_to("/etc/hostname")
    image = ext3_of(tree, tmp_path / "x.ext3")
    assert inspect(str(image), wanted("--list-apps")).text == ""
    assert inspect(str(image), wanted("-s -t")).text == ""
    with pytest.raises(ReadingFailed, match="larger than"):
        inspect(str(image), wanted("-r"))
    with image.open("r+b") as file:
        file.truncate(2048)
    with pytest.raises(ReadingFailed, match="damaged"):
        inspect(str(image), wanted("-r"))


def test_what_reads_ext3_is_bounded(tmp_path, monkeypatch):
    program = tmp_path / "debugfs"
    program.write_text("#!/bin/sh\nexec tr '\\0' x 3>&1 </dev/zero >&2\n")
    program.chmod(0o755)
    monkeypatch.setattr("apptainer_py.verbs.inspect._DEBUGFS", str(program))
    (tmp_path / "tree").mkdir()
    image = ext3_of(tmp_path / "tree", tmp_path / "x.ext3")
    with pytest.raises(ReadingFailed, match="too much, or too slowly"):
        inspect(str(image), wanted("-r"))


def test_no_descriptor_is_left_open(tmp_path):
    path = tmp_path / "x.sif"
    path.write_bytes(sif_bytes.sif([]))
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(CannotInspect):
        inspect(str(path), Wanted())
    inspect(str(images.described_tree(images.shared_folder())), Wanted(all=True))
    assert sorted(os.listdir("/proc/self/fd")) == before
