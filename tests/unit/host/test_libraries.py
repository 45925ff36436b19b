"""Libraries and programs of the host: lists, the loader's cache, machines."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from apptainer_py.base import build
from apptainer_py.host import libraries, programs

X86_64, I386, ARM64 = (2, 62), (1, 3), (2, 183)


def elf(path: Path, kind: tuple[int, int]) -> str:
    head = b"\x7fELF" + bytes([kind[0], 1, 1]) + bytes(9)
    path.write_bytes(head + struct.pack("<HH", 3, kind[1]) + bytes(40))
    return str(path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = elf(tmp_path / "libpython.so", X86_64)
    monkeypatch.setattr(libraries.build, "LIBPYTHON", ours)


def test_a_list_has_comments_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# a comment\n\n  libcuda.so \nnvidia-smi\n#x\n/a/file\n")
    assert libraries.read_list(str(tmp_path / "list")) == ["libcuda.so", "nvidia-smi", "/a/file"]


def test_the_cache_is_what_ldconfig_prints(tmp_path: Path) -> None:
    fake = tmp_path / "ldconfig"
    fake.write_text(
        "#!/bin/sh\n[ \"$1\" = -p ] || exit 1\necho '2 libs found in cache /etc/ld.so.cache'\n"
        "echo '\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1'\n"
        "echo '\tlibodd.so (libc6, OS ABI: Linux 3.2.0) => /usr/lib/with space/libodd.so'\n"
    )
    fake.chmod(0o755)
    assert libraries.cache(str(fake)) == [
        ("libcuda.so.1", "/usr/lib/libcuda.so.1"),
        ("libodd.so", "/usr/lib/with space/libodd.so"),
    ]
    fake.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(OSError, match="3"):
        libraries.cache(str(fake))


@pytest.mark.usefixtures("machine")
def test_a_library_is_found_by_the_beginning_of_its_name(tmp_path: Path) -> None:
    good = elf(tmp_path / "libcuda.so.1", X86_64)
    small = elf(tmp_path / "libcuda.so.1.32", I386)
    other = elf(tmp_path / "libcuda.so.2", ARM64)
    (tmp_path / "libcuda.so.text").write_text("no ELF file")
    known = [(Path(path).name, path) for path in (other, small, good)]
    known += [("libcuda.so.text", str(tmp_path / "libcuda.so.text")), ("libm.so.6", good + "x")]
    found = libraries.resolve(["libcuda.so"], known, "")
    assert (found.libraries, found.libraries32) == ([good], [])
    found = libraries.resolve(["libcuda.so"], known, "", compat32=True)
    assert (found.libraries, found.libraries32) == ([good], [small])


@pytest.mark.usefixtures("machine")
def test_the_first_library_of_a_name_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (elf(tmp_path / name / "libx.so.1", X86_64) for name in ("a", "b"))
    known = [("libx.so.1", first), ("libx.so.1", second)]
    assert libraries.resolve(["libx.so", "libx.so.1"], known, "").libraries == [first]


@pytest.mark.usefixtures("machine")
def test_an_absolute_library_brings_the_links_to_it(tmp_path: Path) -> None:
    real = elf(tmp_path / "libx.so.1.2", X86_64)
    (tmp_path / "libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "libx.so").symlink_to("libx.so.1")
    elf(tmp_path / "libx.so.9", X86_64)
    found = libraries.resolve([real, str(tmp_path / "missing.so")], [], "")
    assert found.libraries == [real, str(tmp_path / "libx.so"), str(tmp_path / "libx.so.1")]


@pytest.mark.usefixtures("machine")
def test_other_entries_are_programs_and_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tool = tmp_path / "two/nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    (tmp_path / "one/nvidia-smi").write_text("cannot be executed")
    tool.chmod(0o755)
    data = tmp_path / "icd.json"
    data.write_text("{}")
    search = f"relative:{tmp_path}/one:{tmp_path}/two"
    entries = ["nvidia-smi", "nvidia-smi", "absent", str(data), str(tmp_path / "absent.json")]
    found = libraries.resolve(entries, [], search)
    assert (found.programs, found.files) == ([str(tool)], [str(data)])
    assert found
    assert not libraries.resolve(["absent"], [], search)


def test_programs_come_from_binary_path(tmp_path: Path) -> None:
    for name in ("user", "system"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").write_text("")
        (tmp_path / name / "tool").chmod(0o755)
    user, system = str(tmp_path / "user"), str(tmp_path / "system")
    both = {"binary path": f"$PATH:{system}"}
    assert programs.find("tool", both, f".:{user}") == f"{user}/tool"
    assert programs.find("tool", both, "") == f"{system}/tool"
    assert programs.find("tool", {"binary path": system}, user) == f"{system}/tool"
    assert programs.find("absent", both, user) == ""


@pytest.mark.parametrize("wide", [True, False])
def test_the_name_that_a_library_gives_itself(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "libx.so.5.6"
    argv = ["gcc", "-shared", "-nostdlib", "-x", "c", "/dev/null", "-o", str(path)]
    argv += ["-Wl,-soname,libx.so.5"] if wide else ["-Wl,-soname,libx.so.5", "-m32"]
    if subprocess.run(argv, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("gcc cannot make a library of that class")
    assert libraries.soname(str(path)) == "libx.so.5"
    whole = path.read_bytes()
    assert libraries.machine(str(path))[0] == (2 if wide else 1)
    for length in range(0, 600, 7):
        path.write_bytes(whole[:length])
        assert libraries.soname(str(path)) in ("", "libx.so.5")


def test_names_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "libx.so.5.6"
    argv = ["gcc", "-shared", "-nostdlib", "-x", "c", "/dev/null", "-o", str(path)]
    for name in ("../../etc/passwd", ".."):
        subprocess.run([*argv, f"-Wl,-soname,{name}"], check=True, timeout=60)
        assert libraries.soname(str(path)) == ""
    subprocess.run(argv, check=True, timeout=60)
    assert libraries.soname(str(path)) == ""
    assert libraries.soname("/absent") == ""
    assert libraries.soname("/etc/passwd") == ""


@settings(max_examples=200, deadline=None)
@given(some.binary(max_size=60), some.integers(0, 500))
def test_any_bytes_are_read(noise: bytes, at: int) -> None:
    whole = bytearray(Path(build.LIBPYTHON).read_bytes()[:8192])
    whole[at : at + len(noise)] = noise
    with tempfile.NamedTemporaryFile() as file:
        file.write(whole)
        file.flush()
        assert "/" not in libraries.soname(file.name)
