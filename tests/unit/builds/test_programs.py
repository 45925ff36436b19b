"""Whose programs an image has."""

from __future__ import annotations

from pathlib import Path

from apptainer_py.builds.programs import machine_of
from apptainer_py.image import arch

ARM64 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00"
S390X = b"\x7fELF\x02\x02\x01" + bytes(9) + b"\x00\x02\x00\x16"


def test_machines_of_programs() -> None:
    assert arch.of_program(ARM64) == "arm64"
    assert arch.of_program(S390X) == "s390x"
    assert arch.of_program(ARM64[:19]) == arch.of_program(b"#!/bin/sh" + bytes(20)) == ""
    assert arch.of_program(ARM64[:18] + b"\xff\xff") == ""


def test_the_shell_says_it_and_then_any_program(tmp_path: Path) -> None:
    assert machine_of(str(tmp_path)) == ""
    (tmp_path / "data").write_bytes(S390X)
    assert machine_of(str(tmp_path)) == ""
    (tmp_path / "program").write_bytes(S390X)
    (tmp_path / "program").chmod(0o755)
    assert machine_of(str(tmp_path)) == "s390x"
    (tmp_path / "bin").mkdir()
    (tmp_path / "shell").write_bytes(ARM64)
    # Inside the image: nothing of the host is looked at.
    (tmp_path / "bin/sh").symlink_to("/shell")
    assert machine_of(str(tmp_path)) == "arm64"
