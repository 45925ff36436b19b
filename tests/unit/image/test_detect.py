"""From a path to a kind of image."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base.errors import ImageError
from apptainer_py.image import detect
from tests import images, sif_bytes

LAUNCHER = b"#!/usr/bin/env run-singularity\n"


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def kind(path):
    image = detect.open_image(str(path))
    os.close(image.fd)
    return image.kind, image.offset


def refusal(path):
    before = descriptors()
    with pytest.raises(detect.CannotOpen) as caught:
        detect.open_image(str(path))
    assert descriptors() == before
    assert caught.value.exit_code == 255
    return caught.value.facts["reason"]


def ext3_head(compat=0x4, incompat=0x2, ro_compat=0x1, magic=0xEF53):
    head = bytearray(2048)
    struct.pack_into("<H", head, 1024 + 56, magic)
    struct.pack_into("<III", head, 1024 + 92, compat, incompat, ro_compat)
    return bytes(head)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (sif_bytes.sif()[:2048], ("sif", 0)),
        (b"hsqs" + sif_bytes.sif()[4:2048], ("sif", 0)),
        (sif_bytes.SQUASHFS[:2048], ("squashfs", 0)),
        ((LAUNCHER + sif_bytes.SQUASHFS)[:2048], ("squashfs", len(LAUNCHER))),
        ((b"#!/bin/sh\n" + sif_bytes.SQUASHFS)[:2048], None),
        ((b"#!a\nb run-singularity\n" + sif_bytes.SQUASHFS)[:2048], None),
        (ext3_head(), ("ext3", 0)),
        (ext3_head(incompat=0x2 | 0x4 | 0x10, ro_compat=0x7), ("ext3", 0)),
        (ext3_head(compat=0), None),
        (ext3_head(incompat=0x42), None),
        (ext3_head(ro_compat=0x8), None),
        (ext3_head(magic=0), None),
        (sif_bytes.sif()[:2047], None),
        (sif_bytes.SQUASHFS[:1000], None),
        (b"", None),
        (bytes(2048), None),
    ],
)
def test_kind_of_file_from_its_first_bytes(head, expected):
    assert detect.kind_of(head) == expected


@pytest.mark.parametrize("number", [0, 7, 65535])
def test_squashfs_with_unknown_compression_is_refused(number):
    head = bytearray(sif_bytes.SQUASHFS)
    struct.pack_into("<H", head, 20, number)
    with pytest.raises(ImageError) as caught:
        detect.kind_of(bytes(head))
    text = f"corrupted image: unknown compression algorithm value {number}"
    assert caught.value.facts["reason"] == text


def test_squashfs_of_another_version_is_refused():
    head = bytearray(sif_bytes.SQUASHFS)
    struct.pack_into("<H", head, 28, 3)
    with pytest.raises(ImageError):
        detect.kind_of(bytes(head))


def test_facts_come_from_the_opened_file(tmp_path):
    target = tmp_path / "image.sif"
    target.write_bytes(sif_bytes.sif())
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    image = detect.open_image(str(link))
    try:
        facts = target.stat()
        assert image.path == str(link)
        assert image.realpath == str(target)
        assert (image.dev, image.ino) == (facts.st_dev, facts.st_ino)
        assert (image.uid, image.gid) == (os.getuid(), os.getgid())
        assert image.mode & 0o7777 == 0o640
        assert image.size_bytes == len(sif_bytes.sif())
        assert os.pread(image.fd, 9, 32) == b"SIF_MAGIC"
        assert not os.get_inheritable(image.fd)
        with pytest.raises(OSError, match="Bad file"):
            os.write(image.fd, b"x")
    finally:
        os.close(image.fd)


def test_a_directory_is_a_sandbox(tmp_path):
    assert kind(tmp_path) == ("sandbox", 0)


@pytest.mark.parametrize("path", ["/", "//", "/tmp/..", "/proc/self/root"])
def test_the_hosts_root_is_refused_under_every_name(path):
    before = descriptors()
    with pytest.raises(detect.RootRefused, match="/ as sandbox is not authorized"):
        detect.open_image(path)
    assert descriptors() == before


def test_the_hosts_root_can_be_inspected():
    image = detect.open_image("/", allow_root=True)
    os.close(image.fd)
    assert image.kind == "sandbox"


def test_what_is_missing_is_named_as_apptainer_does(tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    lost = "failed to retrieve path for {0}: lstat {1}: {2}"
    cases = [
        ("/x.sif", "/x.sif", "/x.sif", "no such file or directory"),
        ("/x/y.sif", "/x/y.sif", "/x", "no such file or directory"),
        ("x.sif", f"{tmp_path}/x.sif", f"{tmp_path}/x.sif", "no such file or directory"),
        ("dangling", f"{tmp_path}/dangling", f"{tmp_path}/nowhere", "no such file or directory"),
    ]
    for given, image, culprit, why in cases:
        assert refusal(given) == lost.format(image, culprit, why)
    assert refusal("loop").endswith("EvalSymlinks: too many links")
    assert "not a directory" in refusal("file/x")


def test_the_message_is_apptainers():
    with pytest.raises(detect.CannotOpen) as caught:
        detect.open_image("/x.sif")
    assert str(caught.value) == (
        "could not open image /x.sif: failed to retrieve path for /x.sif: "
        "lstat /x.sif: no such file or directory"
    )


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(4096), b"\xff" * 5000])
def test_other_files_are_not_recognized(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert refusal(tmp_path / "file") == "image format not recognized"


def test_nothing_but_files_and_directories_is_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    assert "it is a FIFO" in refusal(tmp_path / "fifo")
    assert "it is a socket" in refusal(tmp_path / "socket")
    assert "it is a character device" in refusal("/dev/tty")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_impossible_paths(path):
    assert refusal(path)


def test_an_unreadable_file_says_so(tmp_path):
    target = tmp_path / "secret.sif"
    target.write_bytes(sif_bytes.sif())
    target.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    was = os.geteuid()
    if was == 0:
        os.seteuid(images.ordinary_user().pw_uid)
    try:
        reason = refusal(target)
    finally:
        os.seteuid(was)
    assert reason == f"{target} is not readable by the current user, check permissions"


def test_a_real_ext3_file_system(tmp_path):
    program = shutil.which("mkfs.ext3", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("did not run: there is no mkfs.ext3")
    target = tmp_path / "image.ext3"
    with target.open("wb") as stream:
        stream.truncate(8 << 20)
    options = ["-O", "^resize_inode,^dir_index,^ext_attr"]
    subprocess.run([program, "-q", "-F", *options, str(target)], check=True)
    assert kind(target) == ("ext3", 0)
    subprocess.run([program.replace("ext3", "ext4"), "-q", "-F", str(target)], check=True)
    assert refusal(target) == "image format not recognized"


def test_image_kinds_that_others_wrote():
    folder = images.shared_folder()
    assert kind(images.bare_squashfs(folder)) == ("squashfs", 0)
    assert kind(images.own_sif(folder)) == ("sif", 0)
    assert kind(images.small_tree(folder)) == ("sandbox", 0)
