"""Changing /etc/subuid and /etc/subgid: one user's line and nothing else, whole and locked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apptainer_py.base.errors import ConfigError
from apptainer_py.host import subid_edit, subid_file

FILE = "/etc/subuid"
TEXT = """\
# people

alice:100000:65536
bob:200000:65536:x\r
carol:1:5
!1004:300000:65536
odd line
"""


def test_add_takes_the_highest_free_range_and_leaves_the_rest():
    made = subid_edit.add(TEXT, "eve", 1005, FILE)
    assert made == f"{TEXT}1005:4294836224:65536\n"
    again = subid_edit.add(made, "frank", 1006, FILE)
    assert again == f"{made}1006:4294770688:65536\n"
    assert subid_edit.add(again, "eve", 1005, FILE) == again
    assert subid_edit.add("x:1:2", "eve", 1005, FILE) == "x:1:2\n1005:4294836224:65536\n"
    assert subid_edit.add("", "eve", 1005, FILE) == "1005:4294836224:65536\n"


def test_add_for_a_user_whose_range_is_too_small():
    assert subid_edit.add(TEXT, "carol", 1003, FILE).endswith("\n1003:4294836224:65536\n")


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("x:4294836224:1", 4294770688),
        ("x:4294901759:65535", 4294770688),
        ("!x:4294836224:65536", 4294770688),
        ("x:4294770688:65536", 4294836224),
        ("x:4294000000:900000", 4293918720),
        ("x:0:4294967294", 0),
    ],
)
def test_ranges_of_others_are_passed_over(line, first):
    entry = subid_file.parse_line(line)
    assert entry is not None
    assert subid_edit.free_start([entry], []) == first


def test_accounts_are_passed_over_and_a_full_file_says_so():
    assert subid_edit.free_start([], [4294836224 + 65535]) == 4294770688
    with pytest.raises(subid_edit.NoRoom, match="no range of 65536 ids is left in /etc/subuid"):
        subid_edit.add("x:0:4294967294\n", "eve", 1005, FILE)


def test_remove_disable_and_enable_touch_their_lines_alone():
    assert subid_edit.remove(TEXT, "alice", 1001, FILE) == TEXT.replace("alice:100000:65536\n", "")
    off = subid_edit.disable(TEXT, "bob", 1002, FILE)
    assert off == TEXT.replace("bob:", "!bob:")
    assert subid_edit.disable(off, "bob", 1002, FILE) == off
    assert subid_edit.enable(off, "bob", 1002, FILE) == off.replace("!bob", "bob")
    assert subid_edit.enable(TEXT, "dave", 1004, FILE) == TEXT.replace("!1004", "1004")


@pytest.mark.parametrize("change", [subid_edit.remove, subid_edit.disable, subid_edit.enable])
@pytest.mark.parametrize("user", [("eve", 1005), ("carol", 1003), ("ali", 100), ("odd", 7)])
def test_who_is_not_there_is_named(change, user):
    with pytest.raises(subid_edit.NoEntry, match=f"no mapping entry found in {FILE} for {user[0]}"):
        change(TEXT, *user, FILE)


@pytest.mark.parametrize(
    "line",
    ["", "#x:1:2", "x:1", " x:1:2", "x:1:2 ", "x:1:2\t", "x:1: 2", "x:1:2\r\r",
     "x::2", "x:-1:2", "x:1:0", "x:1:4294967295", "x:\u0661:2",
     "x:99999999999:1", "!:1:2", ":1:2"],
)  # fmt: skip
def test_lines_that_are_none(line):
    entry = subid_file.parse_line(line)
    # What begins with another character is a name that nobody has.
    assert entry is None or entry.owner[0] in "# "


@pytest.mark.parametrize(
    ("text", "first", "listed"),
    [
        ("", None, False),
        ("7:100:65536\na:1:65536", 100, True),
        ("a:1:200000\na:300000:65536", 300000, True),
        ("a:1:65537\na:300000:65538", 300000, True),
        ("a:1:5", 1, True),
        ("!a:1:5", 1, True),
        ("!a:1:65536", 1, False),
        ("!a:1:65536\na:300000:65536", 1, False),
        ("a:1:5\n!a:300000:65536", 300000, False),
        ("a:1:65537\n!a:300000:65538", 300000, False),
        ("a:300000:65536\n!a:1:65536", 300000, True),
        ("a:1:2:3\r\nb:5:65536", 1, True),
    ],
)
def test_which_line_counts(text, first, listed):
    entries = [one for line in text.split("\n") if (one := subid_file.parse_line(line))]
    found = subid_file.find(entries, "a", 7)
    assert (found.first if found else None) == first
    assert subid_file.is_listed(found) == listed


def test_a_file_is_replaced_as_a_whole(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    file = tmp_path / "subuid"
    file.write_text("a:1:2\n")
    file.chmod(0o640)
    before = file.stat().st_ino
    text, facts = subid_edit.read_text(str(file))
    subid_edit.replace(str(file), text + "b:3:4\n", facts)
    assert file.read_text() == "a:1:2\nb:3:4\n"
    assert file.stat().st_ino != before and file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["subuid"]


@pytest.mark.parametrize("fault", ["link", "writable", "owner", "directory"])
def test_a_file_of_somebody_elses_is_left_alone(tmp_path, fault):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    file, target = tmp_path / "subuid", tmp_path / "target"
    target.write_text("a:1:2\n")
    if fault == "link":
        file.symlink_to(target)
    elif fault == "directory":
        file.mkdir()
    else:
        file.write_text("a:1:2\n")
    if fault == "writable":
        file.chmod(0o666)
    if fault == "owner":
        os.chown(file, 65534, 0)
    with pytest.raises(ConfigError):
        subid_edit.read_text(str(file))
    assert target.read_text() == "a:1:2\n"


def test_one_at_a_time(tmp_path, monkeypatch):
    file = tmp_path / "subuid"
    lock = Path(f"{file}.lock")
    monkeypatch.setattr(subid_edit, "_LOCK_S", 0)
    with subid_edit.Lock(str(file)):
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(ConfigError, match="somebody else changes this file"):
            subid_edit.Lock(str(file)).__enter__()
    assert not lock.exists()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    lock.write_text(f"{child}\n")
    with subid_edit.Lock(str(file)):
        assert lock.read_text() == str(os.getpid())
