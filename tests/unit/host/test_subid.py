"""Id maps and the ranges of /etc/subuid."""

from __future__ import annotations

import pytest

from apptainer_py.host import subid
from apptainer_py.model.oci_plan import IdMap

MAPS = (IdMap(inside=0, outside=1000, count=1), IdMap(inside=1, outside=100000, count=65536))


def test_the_kernels_text():
    assert subid.map_text(MAPS) == b"0 1000 1\n1 100000 65536\n"


def test_the_tools_words():
    words = ["newuidmap", "77", "0", "1000", "1", "1", "100000", "65536"]
    assert subid.tool_arguments("newuidmap", 77, MAPS) == words


@pytest.fixture
def written(monkeypatch):
    found = []
    monkeypatch.setattr(subid, "_write", lambda pid, name, data: found.append((name, data)))
    return found


def test_one_id_of_ones_own_costs_setgroups(written, monkeypatch):
    monkeypatch.setattr(subid.os, "getegid", lambda: 1000)
    subid.write_maps(5, MAPS[:1], MAPS[:1], rootless=True)
    assert written == [
        ("setgroups", b"deny"),
        ("uid_map", b"0 1000 1\n"),
        ("gid_map", b"0 1000 1\n"),
    ]


def test_root_keeps_setgroups(written):
    subid.write_maps(5, MAPS, MAPS, rootless=False)
    assert [name for name, _ in written] == ["uid_map", "gid_map"]


def test_what_the_kernel_refuses_shadow_may_allow(monkeypatch, tmp_path):
    def refuse(pid: int, name: str, data: bytes) -> None:
        raise subid.MapError(text="failed", errno=1)

    ran = []
    monkeypatch.setattr(subid, "_write", refuse)
    monkeypatch.setattr(subid, "find_program", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subid, "_run", lambda program, words: ran.append((program, words[1])))
    subid.write_maps(5, MAPS, MAPS, rootless=True)
    assert ran == [("/bin/newuidmap", "5"), ("/bin/newgidmap", "5")]
    monkeypatch.setattr(subid, "find_program", lambda name: None)
    with pytest.raises(subid.MapError, match="newuidmap is not installed"):
        subid.write_maps(5, MAPS, MAPS, rootless=True)


def test_what_a_tool_says_is_in_the_error(tmp_path):
    tool = tmp_path / "newuidmap"
    tool.write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    tool.chmod(0o755)
    assert subid.find_program("newuidmap", [str(tmp_path)]) == str(tool)
    assert subid.find_program("nothing", [str(tmp_path)]) is None
    with pytest.raises(subid.MapError, match="newuidmap failed: not allowed"):
        subid._run(str(tool), ["newuidmap", "5"])
    tool.write_text("#!/bin/sh\nexit 0\n")
    subid._run(str(tool), ["newuidmap", "5"])


def test_ranges(tmp_path):
    file = tmp_path / "subuid"
    file.write_text("me:1000:5\nyou:1:2\n77:9:9\nme:x:5\nme:5\nme:7:0\nme:-1:4\n# me:1:1\n")
    assert subid.sub_ranges(str(file), "me", 77) == [(1000, 5), (9, 9)]
    assert subid.sub_ranges(str(tmp_path / "none"), "me", 77) == []
