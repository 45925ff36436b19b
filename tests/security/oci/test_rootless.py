"""Ordinary users: with subordinate ids and without, and what they cannot do to each other."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.own_install import Household, eventually
from tests.security.oci.rootless import Rootless, subordinate

SCRIPT = "id -u; id -g; cat /proc/self/uid_map /proc/self/setgroups"
OTHER = "apyother"


@pytest.fixture
def rootless(runtime: beds.Runtime, user: pwd.struct_passwd) -> Iterator[Rootless]:
    made = Rootless(runtime.program, user)
    yield made
    left = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(made.place) in line
    ]  # fmt: skip
    assert not made.names(), "a container is left"
    shutil.rmtree(made.place)
    assert left == []


@pytest.fixture(scope="session")
def other(require_root: None) -> Iterator[pwd.struct_passwd]:
    """A user without subordinate ids."""
    argv = ["useradd", "--no-create-home", "--user-group", "--shell", "/bin/sh", OTHER]
    subprocess.run(["userdel", OTHER], check=False, capture_output=True)  # of a run cut short
    subprocess.run(argv, check=True, capture_output=True)
    for name in ("subuid", "subgid"):
        path = Path(f"/etc/{name}")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(f"{OTHER}:")))
    yield pwd.getpwnam(OTHER)
    subprocess.run(["userdel", OTHER], check=True, capture_output=True)


def own(user: pwd.struct_passwd) -> tuple[int, int, int]:
    return (0, user.pw_uid, 1)


def test_without_subordinate_ids(rootless: Rootless, user: pwd.struct_passwd) -> None:
    bundle = rootless.hand_over(rootless.bundle(own(user)).args("sh", "-c", SCRIPT), user.pw_uid)
    done = rootless.call("run", "--bundle", bundle.path, "box")
    # CVE-2014-8989: who maps himself alone cannot drop a group that keeps him out.
    wanted = ["0", "0", "0", str(user.pw_uid), "1", "deny"]
    assert (done.returncode, done.stdout.split()) == (0, wanted), done


def test_with_subordinate_ids(rootless: Rootless, user: pwd.struct_passwd) -> None:
    first, count = subordinate(user)
    bundle = rootless.bundle(own(user), (1, first, count)).args("sh", "-c", SCRIPT)
    bundle.process["user"] = {"uid": 5, "gid": 6}
    rootless.hand_over(bundle, user.pw_uid)
    done = rootless.call("run", "--bundle", bundle.path, "box")
    wanted = ["5", "6", "0", str(user.pw_uid), "1", "1", str(first), str(count), "allow"]
    assert (done.returncode, done.stdout.split()) == (0, wanted), done


def refused(rootless: Rootless, bundle: beds.Bundle) -> str:
    """Create a container that must not come to be; nothing of it may be left."""
    rootless.hand_over(bundle, rootless.user.pw_uid)
    done = rootless.call("create", "--bundle", bundle.path, "box")
    assert done.returncode == 1, done
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert list(rootless.names()) == []
    return done.stderr


def test_ids_of_somebody_else(rootless: Rootless, user: pwd.struct_passwd) -> None:
    """newuidmap is asked, and says no: root, a neighbour's ids, one too many, an overflow."""
    first, count = subordinate(user)
    for line in [
        (1, 0, 1), (0, 0, 1), (1, user.pw_uid + 1, 1), (1, first - 1, 2), (1, first, count + 1),
        (1, first + count, 1), (1, 4294967295, 1), (4294967295, first, 1), (1, first, 4294967295),
    ]:  # fmt: skip
        maps = [line] if line[0] == 0 else [own(user), line]
        refused(rootless, rootless.bundle(*maps))


def test_nobody_has_ids_without_an_entry(
    runtime: beds.Runtime, other: pwd.struct_passwd, user: pwd.struct_passwd
) -> None:
    first, _ = subordinate(user)
    rootless = Rootless(runtime.program, other)
    try:
        for line in ((1, first, 1), (1, 100000, 65536), (1, 0, 1)):
            said = refused(rootless, rootless.bundle(own(other), line))
            assert "newuidmap" in said
        plain = rootless.bundle(own(other)).args("id", "-u")
        rootless.hand_over(plain, other.pw_uid)
        assert rootless.call("run", "--bundle", plain.path, "box").stdout == "0\n"
    finally:
        shutil.rmtree(rootless.place)


def test_newuidmap_is_the_systems(rootless: Rootless, user: pwd.struct_passwd) -> None:
    """Not one of the caller's PATH, and without the caller's environment."""
    first, count = subordinate(user)
    shims = rootless.place / "shims"
    shims.mkdir()
    for name in ("newuidmap", "newgidmap"):
        (shims / name).write_text(f"#!/bin/sh\ntouch {rootless.runtime}/shim\nexit 1\n")
        (shims / name).chmod(0o755)
    bundle = rootless.bundle(own(user), (1, first, count)).args("true")
    rootless.hand_over(bundle, user.pw_uid)
    done = rootless.call("run", "--bundle", bundle.path, "box", env={"PATH": f"{shims}:/usr/bin"})
    assert done.returncode == 0, done
    assert not (rootless.runtime / "shim").exists()


def test_a_container_without_a_user_namespace(rootless: Rootless, user: pwd.struct_passwd) -> None:
    bundle = rootless.bundle(own(user)).without_space("user")
    for name in ("uidMappings", "gidMappings"):
        del bundle.linux[name]
    assert "rootless container requires user namespaces" in refused(rootless, bundle)


# ---- state


def test_state_lies_in_the_runtime_directory(
    rootless: Rootless, user: pwd.struct_passwd, home: Household
) -> None:
    bundle = rootless.bundle(own(user)).args("sleep", "600")
    rootless.run_detached("box", rootless.hand_over(bundle, user.pw_uid))
    assert list(rootless.names()) == ["box"]
    assert rootless.state.stat().st_mode & 0o7777 == 0o1700
    state = json.loads(rootless.call("state", "box").stdout)
    assert state["status"] == "running"
    listed = json.loads(rootless.call("list", "--format", "json").stdout)
    assert [(one["id"], one["owner"]) for one in listed] == [("box", user.pw_name)]
    assert rootless.call("delete", "--force", "box").returncode == 0
    eventually(lambda: not home.alive(), "all have ended")


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_runtime_directory(
    rootless: Rootless, user: pwd.struct_passwd, value: str | None
) -> None:
    """Then the directory is root's, and that is said."""
    bundle = rootless.hand_over(rootless.bundle(own(user)).args("true"), user.pw_uid)
    how = rootless.how()
    del how["env"]["XDG_RUNTIME_DIR"]
    if value is not None:
        how["env"]["XDG_RUNTIME_DIR"] = value
    for words in (("run", "--bundle", bundle.path, "box"), ("state", "box"), ("list",)):
        done = subprocess.run(
            [rootless.program, *words], capture_output=True, text=True, check=False, **how
        )
        assert "Traceback" not in done.stderr
        if words[0] != "list":
            assert done.returncode == 1, done
            assert len(done.stderr.splitlines()) == 1
    assert list(rootless.names()) == []


def test_a_runtime_directory_of_somebody_else(
    rootless: Rootless, user: pwd.struct_passwd, other: pwd.struct_passwd
) -> None:
    """Nothing is made there, and what lies there is not believed."""
    bundle = rootless.hand_over(rootless.bundle(own(user)).args("true"), user.pw_uid)
    theirs = rootless.place / "theirs"
    (theirs / "apptainer-py-oci/box").mkdir(parents=True)
    (theirs / "apptainer-py-oci/box/record").write_bytes(b"x" * 200)
    for path in [theirs, *theirs.rglob("*")]:
        os.chown(path, other.pw_uid, other.pw_gid)
        path.chmod(0o777)
    environment = {"XDG_RUNTIME_DIR": str(theirs)}
    for words in (("state", "box"), ("kill", "box", "KILL"), ("delete", "--force", "box")):
        done = rootless.call(*words, env=environment)
        assert done.returncode == 1
        assert "belongs to another user" in done.stderr
    done = rootless.call("run", "--bundle", bundle.path, "new", env=environment)
    assert done.returncode == 0, done
    assert sorted(os.listdir(theirs / "apptainer-py-oci")) == ["box"]
    assert (theirs / "apptainer-py-oci").stat().st_mode & 0o7777 == 0o777


def test_another_users_container_is_out_of_reach(
    rootless: Rootless, user: pwd.struct_passwd, other: pwd.struct_passwd, home: Household
) -> None:
    bundle = rootless.bundle(own(user)).args("sleep", "600")
    rootless.run_detached("box", rootless.hand_over(bundle, user.pw_uid))
    pid = json.loads(rootless.call("state", "box").stdout)["pid"]
    stranger = Rootless(rootless.program, other)
    # Even where the directory itself can be entered.
    rootless.runtime.chmod(0o755)
    try:
        for words in (
            ("state", "box"), ("kill", "box", "KILL"), ("kill", "--all", "box", "KILL"),
            ("delete", "--force", "box"), ("exec", "box", "true"), ("pause", "box"),
            ("ps", "box"), ("update", "--pids-limit", "3", "box"), ("start", "box"),
        ):  # fmt: skip
            done = stranger.call("--root", rootless.state, *words)
            if words[:2] != ("delete", "--force"):
                assert done.returncode in (1, 255), (words, done)
            assert "Traceback" not in done.stderr
        assert stranger.call("--root", rootless.state, "list", "-q").stdout == ""
    finally:
        shutil.rmtree(stranger.place)
    assert json.loads(rootless.call("state", "box").stdout)["status"] == "running"
    assert os.stat(f"/proc/{pid}").st_uid in (0, user.pw_uid)
    assert rootless.call("delete", "--force", "box").returncode == 0
    eventually(lambda: not home.alive(), "all have ended")


# ---- what is inside


def test_r09_groups_of_the_host_are_read_only(rootless: Rootless, user: pwd.struct_passwd) -> None:
    """CVE-2023-25809: without a cgroup namespace /sys/fs/cgroup is the host's."""
    bundle = rootless.bundle(own(user))
    bundle.replace_mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "rw")
    script = (
        "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do"
        " mkdir $d/made 2>/dev/null && echo made $d;"
        " for f in $d/cgroup.procs $d/tasks $d/memory.max $d/release_agent; do"
        " test -e $f && (echo 0 >$f) 2>/dev/null && echo wrote $f; done; done;"
        " grep -c ' /sys/fs/cgroup' /proc/self/mountinfo"
    )
    rootless.hand_over(bundle.args("sh", "-c", script), user.pw_uid)
    done = rootless.call("run", "--bundle", bundle.path, "box")
    assert done.returncode == 0, done
    assert "made" not in done.stdout
    assert "wrote" not in done.stdout
    assert int(done.stdout.strip()) >= 1


def test_x01_locked_mounts_stay_locked(rootless: Rootless, user: pwd.struct_passwd) -> None:
    """The container's root can neither remount, unmount nor cover what masks and is read-only."""
    first, count = subordinate(user)
    bundle = rootless.bundle(own(user), (1, first, count))
    script = (
        "mount -o remount,rw /proc/sys && echo remounted; umount /proc/kcore && echo unmounted;"
        " umount /proc/sys && echo unmounted sys; umount /sys && echo unmounted sysfs;"
        " echo x >/proc/sys/kernel/core_pattern && echo wrote; true"
    )
    rootless.hand_over(bundle.args("sh", "-c", f"unshare -Urm sh -c '{script}' || true; {script}"),
                       user.pw_uid)  # fmt: skip
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    done = rootless.call("run", "--bundle", bundle.path, "box")
    assert "wrote" not in done.stdout
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern


def test_files_of_the_host_keep_their_owners(rootless: Rootless, user: pwd.struct_passwd) -> None:
    """T-M07: what the user may not read on the host, the container's root may not either."""
    secret = rootless.place / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    group = rootless.place / "group-negative"
    group.write_text("secret")
    os.chown(group, 0, user.pw_gid)
    group.chmod(0o604)
    bundle = rootless.bundle(own(user))
    bundle.mount("/mnt", "bind", str(rootless.place), "rbind", "ro")
    rootless.hand_over(bundle, user.pw_uid)
    (bundle.rootfs / "mnt").mkdir(exist_ok=True)
    bundle.args("sh", "-c", "cat /mnt/secret /mnt/group-negative; true").write()
    done = rootless.call("run", "--bundle", bundle.path, "box")
    assert done.returncode == 0, done
    assert "secret" not in done.stdout


def test_a_root_who_is_a_subordinate_id(
    rootless: Rootless, user: pwd.struct_passwd, home: Household
) -> None:
    """Nothing in the container is the user's own id; `create` and `start` work all the same."""
    first, count = subordinate(user)
    bundle = rootless.bundle((0, first, count)).args("sleep", "600")
    rootless.hand_over(bundle, first)
    out = rootless.place / "out"
    words = ("create", "--bundle", bundle.path, "box")
    assert rootless.start(*words, out=out).wait(timeout=60) == 0, out.read_bytes()
    assert rootless.call("start", "box").returncode == 0
    pid = json.loads(rootless.call("state", "box").stdout)["pid"]
    eventually(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the payload runs")
    assert os.stat(f"/proc/{pid}").st_uid == first
    assert rootless.call("delete", "--force", "box").returncode == 0
    eventually(lambda: not home.alive(), "all have ended")
