"""The libraries that a program asks for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from apptainer_py.image import elf


def needed(path: Path) -> list[str]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return elf.needed(fd)
    finally:
        os.close(fd)


def test_a_program_s_libraries() -> None:
    assert "libc.so.6" in needed(Path("/bin/ls").resolve())


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_program(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert needed(file) == []


def test_no_byte_makes_it_fail(tmp_path: Path) -> None:
    whole = Path(shutil.which("true") or "/bin/true").resolve().read_bytes()
    file = tmp_path / "file"
    for at in range(0, 1024, 3):
        file.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        assert isinstance(needed(file), list)
