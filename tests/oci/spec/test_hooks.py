"""`hooks`: when, where and with what each of the six kinds runs, and what a failure does."""

from __future__ import annotations

import json
import os

import pytest

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture
def log(bed):
    """A file that hooks on both sides of the root can write."""
    path = bed.place / "log"
    path.mkdir()
    path.chmod(0o777)
    return path


def told(log) -> list[str]:
    return sorted(os.listdir(log), key=lambda name: (log / name).stat().st_mtime_ns)


def test_all_kinds_run_in_order(bed, bundle, log):
    bundle.mount(str(log), "bind", str(log), "bind")
    for kind in reversed(KINDS):
        bundle.hook(kind, f"cat >{log}/{kind}")
    container = bed.create(bundle.args("true"))
    assert told(log)[:3] == ["prestart", "createRuntime", "createContainer"]
    assert "startContainer" not in told(log)
    container.start()
    container.wait()
    assert sorted(told(log)) == sorted(set(KINDS) - {"poststop"})
    container.delete()
    assert told(log)[-1] == "poststop"


def test_poststart_hooks_run_at_start(bed, bundle, log):
    bundle.hook("poststart", f"cat >{log}/poststart")
    container = bed.create(bundle.args("sleep", "600"))
    assert told(log) == []
    container.start()
    assert told(log) == ["poststart"]
    assert json.loads((log / "poststart").read_text())["status"] == "running"


def test_each_hook_gets_the_state(bed, bundle, log):
    bundle.mount(str(log), "bind", str(log), "bind")
    bundle.config["annotations"] = {"a": "b"}
    for kind in KINDS:
        bundle.hook(kind, f"cat >{log}/{kind}")
    container = bed.create(bundle.args("true"))
    container.start()
    container.wait()
    container.delete()
    for kind in KINDS:
        state = json.loads((log / kind).read_text())
        assert state["id"] == container.id, kind
        assert state["bundle"] == str(bundle.path), kind
        assert state["annotations"] == {"a": "b"}, kind
        assert state["ociVersion"].startswith("1."), kind
        if kind == "poststop":
            assert (state["status"], state.get("pid", 0)) == ("stopped", 0)
        elif kind in ("prestart", "createRuntime", "poststart"):
            assert state["pid"] == container.pid, kind


@pytest.mark.parametrize(("kind", "status"), [
    ("prestart", "creating"), ("createRuntime", "creating"), ("createContainer", "creating"),
    ("startContainer", "created"),
])  # fmt: skip
def test_the_status_that_a_hook_is_told(bed, bundle, log, kind, status):
    bundle.mount(str(log), "bind", str(log), "bind")
    bundle.hook(kind, f"cat >{log}/state")
    bed.output(bundle.args("true"))
    assert json.loads((log / "state").read_text())["status"] == status


def test_hooks_of_one_kind_run_in_the_listed_order(bed, bundle, log):
    for number in range(4):
        bundle.hook("createRuntime", f"echo {number} >>{log}/order")
    bed.output(bundle.args("true"))
    assert (log / "order").read_text().split() == ["0", "1", "2", "3"]


def test_the_arguments_and_environment_of_a_hook(bed, bundle, log):
    bundle.config["hooks"] = {
        "createRuntime": [
            {
                "path": "/bin/sh",
                "args": ["zero", "-c", f'echo "$0" "$@" >{log}/args; env >{log}/env', "a", "b c"],
                "env": ["ONE=1"],
            }
        ]
    }
    bed.output(bundle.args("true"))
    assert (log / "args").read_text() == "a b c\n"
    words = (log / "env").read_text().splitlines()
    assert {word.split("=")[0] for word in words} <= {"ONE", "PWD", "OLDPWD", "SHLVL", "_"}
    assert "ONE=1" in words


def test_a_hook_without_environment(bed, bundle, log):
    bundle.hook("createRuntime", f"/usr/bin/env >{log}/env", env=[])
    bed.output(bundle.args("true"))
    words = (log / "env").read_text().splitlines()
    assert {word.split("=")[0] for word in words} <= {"PWD", "OLDPWD", "SHLVL", "_"}


def test_where_each_hook_runs(bed, bundle, log):
    bundle.mount(str(log), "bind", str(log), "bind")
    for kind in KINDS:
        bundle.hook(kind, f"readlink /proc/self/ns/mnt >{log}/{kind}")
    container = bed.create(bundle.args("true"))
    inside = os.readlink(f"/proc/{container.pid}/ns/mnt")
    outside = os.readlink("/proc/self/ns/mnt")
    container.start()
    container.wait()
    container.delete()
    for kind in KINDS:
        expected = inside if kind in ("createContainer", "startContainer") else outside
        assert (log / kind).read_text().split()[0] == expected, kind


def test_create_container_hooks_see_the_root_of_the_host(bed, bundle, log):
    bundle.hook("createContainer", f"ls -d {bundle.path}/config.json >{log}/seen; pwd >{log}/pwd")
    bed.output(bundle.args("true"))
    assert (log / "seen").read_text().strip() == f"{bundle.path}/config.json"


def test_start_container_hooks_see_the_containers(bed, bundle):
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "hook").write_text("#!/bin/sh\necho inside >/told\n")
    (bundle.rootfs / "hook").chmod(0o755)
    bundle.config["hooks"] = {"startContainer": [{"path": "/hook", "args": ["hook"]}]}
    assert bed.output(bundle.args("cat", "/told")) == "inside\n"


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_in_create(bed, bundle, log, kind):
    bundle.hook(kind, "echo out; echo err >&2; exit 3")
    bundle.hook("poststop", f"touch {log}/poststop")
    said = bed.refused(bundle.args("true"))
    assert f"error running {kind} hook #0: exit status 3" in said
    assert "stdout: out" in said
    assert "stderr: err" in said


def test_a_start_container_hook_that_fails(bed, bundle):
    bundle.hook("startContainer", "exit 3")
    container = bed.create(bundle.shell("echo ran"))
    bed.call("start", container.id)
    assert container.wait() != 0
    assert "ran\n" not in container.said().splitlines(keepends=True)
    assert container.status() == "stopped"


def test_a_poststart_hook_that_fails(bed, bundle):
    bundle.hook("poststart", "exit 3")
    container = bed.create(bundle.args("sleep", "600"))
    assert "poststart" in bed.bad("start", container.id)


def test_a_poststop_hook_that_fails(bed, bundle, log):
    bundle.hook("poststop", "exit 3").hook("poststop", f"touch {log}/second")
    container = bed.create(bundle)
    bed.call("delete", "--force", container.id)
    assert (log / "second").exists()
    assert "container does not exist" in bed.bad("state", container.id)


def test_a_timeout(bed, bundle):
    bundle.hook("createRuntime", "exec sleep 600", timeout=1)
    assert "hook ran past specified timeout of 1" in bed.refused(bundle)


def test_a_hook_that_is_not_there(bed, bundle):
    bundle.config["hooks"] = {"createRuntime": [{"path": "/no/such"}]}
    assert "no such file or directory" in bed.refused(bundle)


def test_a_hook_with_a_relative_path(bed, bundle):
    bundle.config["hooks"] = {"createRuntime": [{"path": "bin/true"}]}
    bed.refused(bundle)


@pytest.mark.parametrize("value", [0, -1])
def test_a_timeout_that_is_none(bed, bundle, value):
    bundle.hook("createRuntime", "true", timeout=value)
    bed.refused(bundle)


def test_createruntime_hooks_come_before_the_root_changes(bed, bundle, log):
    """The mount namespace is there, pivot_root is not done: what a hook mounts is seen inside."""
    source = bed.place / "source"
    source.mkdir()
    (source / "file").touch()
    (bundle.rootfs / "m").mkdir()
    bundle.hook(
        "createRuntime",
        f"pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); "
        f"nsenter -t $pid -m mount --bind {source} {bundle.rootfs}/m",
    )
    assert bed.output(bundle.args("ls", "/m")) == "file\n"
