"""Ranges of subordinate ids: nobody gets ids that are somebody else's (security.md B3, T-M07)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.e2e.subids import both, launch, range_of
from tests.own_install import Installation

REFUSED = (
    "FATAL:   container creation failed: cannot make the container: /etc/subuid or /etc/subgid has "
    "no range"
)
IDS = ("cat", "/proc/self/uid_map", "/proc/self/gid_map")
FLOWS = {"setuid": (), "userns": ("-u",)}


own = fixtures.own()


@pytest.fixture(scope="module")
def tree(own) -> Path:
    return images.small_tree(images.shared_folder())


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "text",
    [
        "{name}:100000:65536\nsomebody:165535:65536\n",
        "{name}:100000:65536\nsomebody:165535:65536:more\n",
        "{name}:100000:65536\nsomebody:165535:65536\r\n",
        "!somebody:100000:1\n{name}:100000:65536\n",
        "{name}:100000:65536\n0:34465:65536\n",
        "{name}:1:65536\n",
        "{name}:65000:65536\n",
        "{name}:{uid}:65536\n",
        "{name}:0:65536\n",
        "{name}:0:4294967295\n",
    ],
)
def test_ids_of_others_are_not_mapped(own, tree, flow, text):
    """Another user's range, the system's accounts (below 65000, and nobody), one's own id, root."""
    filled = text.format(name=own.user.pw_name, uid=own.user.pw_uid)
    for files in (
        both(filled),
        {"/etc/subuid": range_of(own), "/etc/subgid": filled},
        {"/etc/subuid": filled, "/etc/subgid": range_of(own)},
    ):
        done = launch(own, "exec", "-f", *FLOWS[flow], tree, *IDS, files=files)
        assert done.returncode == 255 and done.stdout == "", filled
        assert done.stderr.splitlines()[0].startswith(REFUSED)


@pytest.mark.parametrize(
    "line",
    [
        "{name}:100000:65535", "{name}:100000:0", "{name}:4294901760:65536", "{name}:-1:65536",
        "{name}:100000:-65536", "{name}:100000:99999999999999999999", "{name}: 100000:65536",
        "{name}:0x186a0:65536", "{name}:100000", "!{name}:100000:65536", " {name}:100000:65536",
        "{name}:100000:65536 ", "!{name}:100000:65536\n{name}:300000:65536",
        "{name}:300000:65537\n!{name}:100000:65538",
        "{name}x:100000:65536", ":100000:65536", "0{uid}x:100000:65536", "#{name}:100000:65536",
    ],
)  # fmt: skip
def test_a_line_of_another_form_gives_nothing(own, tree, line):
    text = line.format(name=own.user.pw_name, uid=own.user.pw_uid) + "\n"
    words = ["exec", "-f", "--ignore-fakeroot-command", tree, *IDS]
    done = launch(own, *words, files=both(text))
    rows = [row.split() for row in done.stdout.splitlines()]
    user, group = str(own.user.pw_uid), str(own.user.pw_gid)
    assert rows in ([["0", user, "1"], ["0", group, "1"]], []), done.stderr
    if not rows:
        assert done.returncode == 255 and "range count lower than 65536" in done.stderr


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "line", ["{name}:100000:65536:more", "{name}:100000:65536:", "{uid}:100000:65536"]
)
def test_fields_behind_the_third_are_nobodys(own, tree, flow, line):
    """newuidmap reads such a line as a range, so it is one for us."""
    text = line.format(name=own.user.pw_name, uid=own.user.pw_uid)
    done = launch(own, "exec", "-f", *FLOWS[flow], tree, *IDS, files=both(text))
    assert done.stdout.split()[3:6] == ["1", "100000", "65536"], done.stderr


def test_which_file_has_it_switched_off(own, tree):
    files = {"/etc/subuid": range_of(own), "/etc/subgid": "!" + range_of(own)}
    done = launch(own, "exec", "-f", tree, *IDS, files=files)
    assert (done.returncode, done.stdout) == (255, "")
    assert "disabled by the administrator in /etc/subgid" in done.stderr


def test_the_highest_range_that_there_is(own, tree):
    text = range_of(own, 4294967295 - 65536)
    done = launch(own, "exec", "-f", tree, *IDS, files=both(text))
    assert done.stdout.split()[3:6] == ["1", "4294901759", "65536"], done.stderr


@pytest.mark.parametrize("fault", ["writable", "users", "link", "fifo", "large"])
def test_a_file_that_others_could_have_written_gives_nothing(own, tree, fault):
    """The setuid starter believes what root alone can have written, however it got there."""
    place = own.place / "forged"
    place.unlink(missing_ok=True)
    before = ""
    if fault == "fifo":
        os.mkfifo(place, 0o644)
    else:
        place.write_text(range_of(own) + ("# filler\n" * 500_000 if fault == "large" else ""))
        place.chmod(0o664 if fault == "writable" else 0o644)
    if fault == "users":
        os.chown(place, own.user.pw_uid, -1)
    files: dict[str, str | Path] = {"/etc/subuid": place, "/etc/subgid": range_of(own)}
    if fault == "link":
        # In a copy of /etc, as the machine's own is not to be touched.
        files = {}
        before = f"""
            mkdir -p {own.place}/etc-copy
            mount -t tmpfs tmpfs {own.place}/etc-copy
            cp -a /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.cache {own.place}/etc-copy
            ln -s {place} {own.place}/etc-copy/subuid
            cp {place} {own.place}/etc-copy/subgid
            mount --bind {own.place}/etc-copy /etc"""
    try:
        words = ["exec", "-f", "--ignore-fakeroot-command", tree, *IDS]
        done = launch(own, *words, files=files, before=before, program=_reach(own, before))
        if fault in ("fifo", "large"):
            assert "100000" not in done.stdout, done.stderr
        else:
            assert done.returncode == 255 and done.stdout == "", done.stderr
            assert done.stderr.splitlines()[0].startswith(REFUSED)
    finally:
        place.unlink()


def _reach(own: Installation, before: str) -> Path:
    """Return our program; its own configuration is not below /etc."""
    assert not before or not str(own.sysconfdir).startswith("/etc/")
    return own.program


def test_without_newuidmap_only_the_setuid_flow_has_ranges(own, tree):
    null = own.place / "nothing"
    null.mkdir(exist_ok=True)
    hidden = "\n".join(f"mount --bind /dev/null {path}" for path in _tools("newuidmap"))
    done = launch(own, "exec", "-f", "-u", tree, "id", files=both(range_of(own)), before=hidden)
    assert done.returncode == 255 and done.stdout == ""
    assert done.stderr.startswith("FATAL:   newuidmap was not found in ")
    done = launch(own, "exec", "-f", tree, *IDS, files=both(range_of(own)), before=hidden)
    assert done.stdout.split()[3:6] == ["1", "100000", "65536"], done.stderr


def _tools(name: str) -> list[str]:
    folders = ("/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/local/bin")
    return sorted({os.path.realpath(f"{f}/{name}") for f in folders if Path(f, name).exists()})


def test_a_newuidmap_that_is_not_roots_is_not_run(own, tree):
    """Where root's own program has been replaced by a script of the user's, it is left alone."""
    script = own.place / "newuidmap"
    mark = Path(own.user.pw_dir) / "ran"
    mark.unlink(missing_ok=True)
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o755)
    os.chown(script, own.user.pw_uid, -1)
    hidden = "\n".join(f"mount --bind {script} {path}" for path in _tools("newuidmap"))
    done = launch(own, "exec", "-f", "-u", tree, "id", files=both(range_of(own)), before=hidden)
    assert done.returncode == 255 and done.stdout == ""
    assert not mark.exists()


@pytest.mark.parametrize(
    "directive", ["limit container owners = root", "limit container paths = /"]
)
def test_inside_nobody_is_an_owner_that_the_administrator_meant(own, tree, directive):
    """The caller is root inside, and so are the caller's files: that makes no image root's."""
    own.configure(directive)
    try:
        done = launch(own, "exec", "-f", tree, "id", files=both(range_of(own)))
        assert done.returncode == 255 and done.stdout == ""
        assert "not owned by a permitted user" in done.stderr, done.stderr
    finally:
        own.configure()


def test_allow_user_ns(own, tree):
    own.configure("allow user ns = no")
    try:
        done = launch(own, "exec", "-f", tree, "id", files=both(range_of(own)))
        assert done.returncode == 255 and done.stdout == ""
        assert "User namespace required but not allowed" in done.stderr
    finally:
        own.configure()


def test_a_group_that_is_kept_out_stays_out_with_one_id(own, tree):
    """T-M07: who may not set groups cannot leave one that a file is closed to."""
    words = ["exec", "-f", "--ignore-subuid", "--ignore-fakeroot-command", tree]
    done = launch(own, *words, "cat", "/proc/self/setgroups", files=both(range_of(own)))
    assert done.stdout == "deny\n", done.stderr
