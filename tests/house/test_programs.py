"""What the built programs need at run time, and how they are hardened."""

from __future__ import annotations

import re
import subprocess

import pytest

PROGRAMS = ["starter", "starter-steps", "launcher"]
LIBC_ONLY = [*PROGRAMS, "unpack.so"]
# What enters a container, or is called for each: no loader and no library.
STATIC = ["starter-init", "starter-monitor", "apptainer-py-oci", "apptainer-py"]


@pytest.fixture(scope="module")
def dynamic(tool, repository):
    """Reads a built program's dynamic section."""

    def read(name: str) -> str:
        program = repository / "build" / name
        if not program.exists():
            pytest.fail(f"{program} is not built: run ./check")
        argv = [tool("readelf"), "--wide", "--dynamic", "--program-headers", str(program)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    return read


def needed(text: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


@pytest.mark.parametrize("name", LIBC_ONLY)
def test_needs_libc_and_nothing_else(dynamic, name):
    assert needed(dynamic(name)) == ["libc.so.6"]


def test_only_the_stage_host_needs_libpython(dynamic):
    libraries = needed(dynamic("stagehost.so"))
    assert [name for name in libraries if name != "libc.so.6"] == ["libpython3.11.so.1.0"]


@pytest.mark.parametrize("name", STATIC)
def test_static_programs_load_nothing(dynamic, name):
    text = dynamic(name)
    assert needed(text) == []
    assert "INTERP" not in text


@pytest.mark.parametrize("name", [*LIBC_ONLY, *STATIC, "stagehost.so"])
def test_is_hardened_and_searches_no_path_of_its_own(dynamic, name):
    text = dynamic(name)
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    assert "BIND_NOW" in text
    assert "GNU_RELRO" in text
    assert re.search(r"GNU_STACK.* RW +0x", text)


@pytest.mark.parametrize("name", [*PROGRAMS, *STATIC])
def test_is_position_independent(dynamic, name):
    assert re.search(r"FLAGS_1.*\bPIE\b", dynamic(name))
