"""The container's passwd and group: the image's own lines, and the caller's."""

from __future__ import annotations

import grp
import os
import pwd

import pytest

from apptainer_py.engines.apptainer import accounts
from apptainer_py.engines.apptainer.mounts import User

ROOT = b"root:x:0:0:root:/root:/bin/sh\n"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with one user, in the groups 50, 60 and one without a name."""
    users = {7: pwd.struct_passwd(("ann", "x", 7, 50, "Ann", "/home/ann", "/bin/zsh"))}
    groups = {50: "staff", 60: "lab"}
    monkeypatch.setattr(pwd, "getpwuid", users.__getitem__)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((groups[gid], "x", gid, [])))
    monkeypatch.setattr(os, "getgroups", lambda: [60, 50, 70])


def ann(home: str = "/home/ann", name: str = "ann") -> User:
    return User(name, home, home, 7, 50)


def test_a_user_that_the_image_lacks_is_added() -> None:
    line = b"ann:x:7:50:Ann:/home/ann:/bin/zsh\n"
    assert accounts.passwd(ROOT, ann()) == ROOT + line
    assert accounts.passwd(ROOT.rstrip(b"\n"), ann()) == ROOT + line
    assert accounts.passwd(b"", ann()) == line


def test_a_uid_of_the_image_keeps_group_and_shell() -> None:
    before = ROOT + b"bob:x:7:99:Bob:/home/bob:/bin/ash\nlast:x:9:9::/:\n"
    after = ROOT + b"ann:x:7:99:Ann:/other:/bin/ash\nlast:x:9:9::/:\n"
    assert accounts.passwd(before, ann("/other")) == after


def test_root_keeps_its_name() -> None:
    root = User("toor", "/r", "/r", 0, 0)
    assert accounts.passwd(ROOT, root) == b"root:x:0:0:root:/r:/bin/sh\n"


def test_no_field_begins_a_line_or_another_field() -> None:
    after = accounts.passwd(ROOT, ann("/h\nroot::0:0::/:/bin/sh", "a:b"))
    assert after.count(b"\n") == 2
    assert after.splitlines()[1].count(b":") == 6


def test_odd_lines_of_the_image_are_kept() -> None:
    before = b"# comment\n\nshort:x:7\n\xff\xfe:x:1:1::/:\n"
    assert accounts.passwd(before, ann()).startswith(before)


def test_groups_are_added_once_and_nameless_ones_left_out() -> None:
    assert accounts.group(b"root:x:0:\nl:x:60:\n", ann()) == (
        b"root:x:0:\nl:x:60:\nstaff:x:50:ann\n"
    )
    assert accounts.group(b"", ann()) == b"staff:x:50:ann\nlab:x:60:ann\n"
