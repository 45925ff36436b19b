"""Names of architectures and what runs on what."""

from __future__ import annotations

import platform

import pytest

from apptainer_py.image import arch

QEMU = """\
enabled
interpreter /usr/bin/qemu-aarch64-static
flags: {flags}
offset 0
magic 7f454c460201010000000000000000000200b700
mask ffffffffffffff00fffffffffffffffffeffffff
"""


@pytest.mark.parametrize(
    ("image", "host", "runs"),
    [
        ("amd64", "amd64", True),
        ("386", "amd64", True),
        ("amd64", "386", False),
        ("arm", "arm64", True),
        ("arm64", "amd64", False),
        ("nonsense", "amd64", False),
    ],
)
def test_without_emulators(tmp_path, image, host, runs):
    assert arch.can_run(image, host, binfmt_folder=str(tmp_path)) is runs


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        (QEMU.format(flags="F"), True),
        (QEMU.format(flags="OCF"), True),
        (QEMU.format(flags="OC"), False),
        (QEMU.format(flags="F").replace("enabled", "disabled"), False),
        (QEMU.format(flags="F").replace("b700", "f300"), False),
        (QEMU.format(flags="F").replace("offset 0", "offset 9"), False),
        (QEMU.format(flags="F").replace("magic 7f", "magic zz"), False),
        ("", False),
    ],
)
def test_an_emulator_counts_if_the_kernel_keeps_it_open(tmp_path, text, runs):
    (tmp_path / "qemu-aarch64").write_text(text)
    assert arch.can_run("arm64", "amd64", binfmt_folder=str(tmp_path)) is runs


def test_no_folder_means_no_emulator(tmp_path):
    assert not arch.can_run("arm64", "amd64", binfmt_folder=str(tmp_path / "nothing"))


def test_this_host_has_a_code():
    assert arch.host_arch() in arch.SIF_CODES.values()
    if platform.machine() == "x86_64":
        assert arch.host_arch() == "amd64"
