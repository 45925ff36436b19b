"""Operations and lifecycle of the runtime specification (runtime.md)."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess

import pytest

from tests.oci import bed as beds

# ---- state ----


def test_state_of_a_created_container(bed, bundle):
    container = bed.create(bundle)
    state = container.state()
    assert re.fullmatch(r"1\.\d+\.\d+.*", state["ociVersion"])
    assert state["id"] == container.id
    assert state["status"] == "created"
    assert state["pid"] == container.pid
    assert state["bundle"] == str(bundle.path)


def test_state_of_a_running_container(bed, bundle):
    container = bed.sleeping(bundle)
    assert (container.status(), container.state()["pid"]) == ("running", container.pid)


def test_state_of_a_stopped_container(bed, bundle):
    container = bed.started(bundle.args("true"))
    container.wait()
    state = container.state()
    assert (state["status"], state.get("pid", 0)) == ("stopped", 0)


def test_state_has_the_annotations(bed, bundle):
    bundle.config["annotations"] = {"org.example.key": "value", "other": ""}
    assert bed.create(bundle).state()["annotations"] == bundle.config["annotations"]


def test_state_is_indented_json_without_a_last_newline(bed, bundle):
    container = bed.create(bundle)
    said = bed.good("state", container.id).stdout
    assert said.startswith('{\n  "ociVersion": ')
    assert said.endswith("\n}")
    found = list(json.loads(said))
    assert found == [
        "ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"
    ]  # fmt: skip


def test_state_of_no_such_container(bed):
    assert "container does not exist" in bed.bad("state", "nobody")


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete", "create", "run", "exec"])
def test_an_operation_without_an_id(bed, command):
    bed.bad(command)


@pytest.mark.parametrize("command", ["start", "kill", "delete", "pause", "resume", "ps"])
def test_an_operation_on_no_such_container(bed, command):
    assert "container does not exist" in bed.bad(command, "nobody")


def test_exec_in_no_such_container(bed):
    done = bed.call("exec", "nobody", "true")
    assert done.returncode != 0
    assert "container does not exist" in done.stderr


# ---- create ----


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".", "a b", "ü", "a\nb", "", "x" * 1100], ids=lambda name: ascii(name)[:8]
)
def test_an_id_that_is_none(bed, bundle, name):
    bundle.write()
    said = bed.bad("create", "--bundle", bundle.path, "--", name)
    assert said
    assert not bed.root.exists() or os.listdir(bed.root) == []


@pytest.mark.parametrize("name", ["a", "A.b", "0_1+2-3", "x" * 200, "_", "..."])
def test_an_id_that_is_one(bed, bundle, name):
    bundle.write()
    bed.ids.append(name)
    bed.good("run", "--bundle", bundle.args("true").write().path, name)


def test_the_same_id_twice(bed, bundle):
    container = bed.sleeping(bundle)
    before = container.state()
    other = bed.bundle().write()
    said = bed.bad("create", "--bundle", other.path, container.id)
    assert "container with given ID already exists" in said
    assert container.state() == before


def test_an_id_may_be_used_again_after_delete(bed, bundle):
    container = bed.create(bundle)
    container.kill()
    container.wait()
    container.delete()
    bed.good("run", "--bundle", bundle.args("true").write().path, container.id)


def test_no_such_bundle(bed):
    bed.bad("create", "--bundle", bed.place / "nothing", "nobody")
    assert "container does not exist" in bed.bad("state", "nobody")


def test_a_bundle_without_configuration(bed, bundle):
    said = bed.bad("create", "--bundle", bundle.path, "nobody")
    assert "config.json" in said


def test_the_bundle_is_by_default_here(bed, bundle):
    done = bed.run(bundle.args("true"))
    assert done.returncode == 0
    bed.good("run", bed.name(), cwd=bundle.path)


def test_create_does_not_run_the_program(bed, bundle):
    container = bed.create(bundle.shell("echo ran"))
    assert container.status() == "created"
    assert container.said() == ""
    container.start()
    assert container.wait() == 0
    assert container.said() == "ran\n"


def test_what_is_changed_in_the_bundle_after_create_has_no_effect(bed, bundle):
    container = bed.create(bundle.shell("hostname; echo first"))
    bundle.config["hostname"] = "changed"
    bundle.shell("echo second").write()
    container.start()
    container.wait()
    assert container.said() == "runc\nfirst\n"


def test_all_of_the_configuration_but_args_is_applied_by_create(bed, bundle):
    container = bed.create(bundle.args("true"))
    space = f"/proc/{container.pid}/ns/uts"
    assert os.readlink(space) != os.readlink("/proc/self/ns/uts")
    said = subprocess.run(
        ["nsenter", "-t", str(container.pid), "-u", "hostname"], capture_output=True, text=True
    )
    assert said.stdout == "runc\n"
    with open(f"/proc/{container.pid}/mountinfo") as stream:
        assert len(stream.readlines()) > 7


def test_the_pid_file_has_digits_alone(bed, bundle):
    container = bed.create(bundle)
    text = (bundle.path / f"{container.id}.pid").read_text()
    assert text == str(container.pid)
    assert not [name for name in os.listdir(bundle.path) if name.startswith(".")]


def test_the_state_directory(bed, bundle):
    container = bed.create(bundle)
    folder = bed.root / container.id
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711
    assert stat.S_ISFIFO((folder / "exec.fifo").stat().st_mode)
    stored = json.loads((folder / "state.json").read_text())
    assert stored["id"] == container.id
    assert stored["init_process_pid"] == container.pid
    container.start()
    assert not (folder / "exec.fifo").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ociVersion": 1}', "null", "\0", "{} {}"])
def test_a_configuration_that_is_none(bed, bundle, text):
    (bundle.path / "config.json").write_text(text)
    bed.bad("create", "--bundle", bundle.path, "nobody")
    assert "container does not exist" in bed.bad("state", "nobody")


# ---- start ----


def test_start_runs_the_program(bed, bundle):
    container = bed.started(bundle.shell("echo hello; exit 5"))
    assert container.wait() == 5
    assert container.said() == "hello\n"


def test_start_of_a_running_container(bed, bundle):
    container = bed.sleeping(bundle)
    assert "cannot start an already running container" in bed.bad("start", container.id)
    assert container.status() == "running"


def test_start_of_a_stopped_container(bed, bundle):
    container = bed.started(bundle.args("true"))
    container.wait()
    assert "cannot start a container that has stopped" in bed.bad("start", container.id)


def test_two_starts_at_once(bed, bundle):
    container = bed.create(bundle.shell("echo x; exec sleep 600"))
    both = [
        subprocess.Popen(bed.argv("start", container.id), stderr=subprocess.PIPE) for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    assert container.lines("x") == "x\n"


# ---- kill ----


def test_kill_sends_the_signal(bed, bundle):
    script = "trap 'echo usr1; exit 9' USR1; echo ready; while :; do sleep 1 & wait $!; done"
    container = bed.started(bundle.shell(script))
    container.lines("ready")
    container.kill("USR1")
    assert container.wait() == 9
    assert "usr1" in container.said()


@pytest.mark.parametrize("word", ["USR1", "SIGUSR1", "10", "usr1", "sigusr1"])
def test_spellings_of_a_signal(bed, bundle, word):
    container = bed.started(
        bundle.shell("trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done")
    )
    container.lines("ready")
    container.kill(word)
    assert container.wait() == 9


def test_kill_sends_term_by_default(bed, bundle):
    container = bed.started(
        bundle.shell("trap 'exit 4' TERM; echo ready; while :; do sleep 0.1; done")
    )
    container.lines("ready")
    bed.good("kill", container.id)
    assert container.wait() == 4


def test_kill_of_a_created_container(bed, bundle):
    container = bed.create(bundle)
    container.kill("KILL")
    assert container.wait() == 128 + signal.SIGKILL
    assert container.status() == "stopped"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_created_container_ends_by_a_signal_that_its_init_does_not_catch(bed, bundle, name):
    container = bed.create(bundle)
    container.kill(name)
    assert container.wait() != 0
    assert container.status() == "stopped"


def test_kill_of_a_stopped_container(bed, bundle):
    container = bed.started(bundle.args("true"))
    container.wait()
    assert "container not running" in bed.bad("kill", container.id, "TERM")


def test_kill_with_all_of_a_stopped_container(bed, bundle):
    container = bed.started(bundle.args("true"))
    container.wait()
    bed.good("kill", "--all", container.id, "KILL")


@pytest.mark.parametrize("word", ["FOO", "-3", "99999", "SIG"])
def test_a_signal_that_is_none(bed, bundle, word):
    container = bed.sleeping(bundle)
    bed.bad("kill", "--", container.id, word)
    assert container.status() == "running"


def test_a_negative_number_is_no_signal_and_the_container_no_other(bed, bundle):
    container = bed.sleeping(bundle)
    assert "unable to signal init: invalid argument" in bed.bad("kill", container.id, "-1")
    assert container.status() == "running"


def test_kill_without_a_pid_namespace_ends_all_processes(bed, bundle):
    bundle.without_space("pid")
    bundle.linux["cgroupsPath"] = f"/{bed.name()}"
    container = bed.started(bundle.shell("sleep 600 & echo started $!; wait"))
    child = int(container.lines("started").split()[1])
    container.kill("KILL")
    container.wait()
    container.delete()
    beds.reap()
    beds.eventually(lambda: not os.path.exists(f"/proc/{child}"), "the child has ended")


# ---- delete ----


def test_delete_of_a_stopped_container_removes_all(bed, bundle):
    bundle.linux["cgroupsPath"] = f"/{bed.name()}"
    container = bed.started(bundle.args("true"))
    container.wait()
    container.delete()
    assert not (bed.root / container.id).exists()
    assert not beds.cgroups_named(bed.ids[0])
    assert "container does not exist" in bed.bad("state", container.id)


def test_delete_of_a_running_container(bed, bundle):
    container = bed.sleeping(bundle)
    said = bed.bad("delete", container.id)
    assert f"cannot delete container {container.id} that is not stopped: running" in said
    assert container.status() == "running"


def test_delete_of_a_created_container(bed, bundle):
    container = bed.create(bundle)
    container.delete()
    assert container.wait() == 128 + signal.SIGKILL
    assert not (bed.root / container.id).exists()


def test_delete_by_force(bed, bundle):
    container = bed.sleeping(bundle)
    container.delete("--force")
    assert container.wait() == 128 + signal.SIGKILL
    assert not (bed.root / container.id).exists()


def test_delete_by_force_of_no_such_container(bed):
    done = bed.good("delete", "--force", "nobody")
    assert done.stdout + done.stderr == ""


def test_delete_leaves_what_it_did_not_make(bed, bundle):
    folder = bed.place / "folder"
    folder.mkdir()
    (folder / "file").write_text("here")
    bundle.mount("/data", "bind", str(folder), "rbind", "rw")
    bed.output(bundle.shell("echo more >/data/more"))
    assert sorted(os.listdir(folder)) == ["file", "more"]
    assert (bundle.rootfs / "bin/sh").exists()


# ---- the whole ----


def test_a_container_that_a_killed_caller_left(bed, bundle):
    """The init process outlives whoever called `create`."""
    container = bed.create(bundle.shell("echo alive; exec sleep 600"))
    container.start()
    container.lines("alive")
    assert container.status() == "running"


def test_two_containers_of_one_bundle(bed, bundle):
    first = bed.sleeping(bundle)
    second = bed.sleeping(bundle)
    assert (first.status(), second.status()) == ("running", "running")
    first.kill()
    first.wait()
    assert second.status() == "running"


def test_run_detached(bed, bundle):
    bundle.args("sleep", "600").write()
    name = bed.name()
    pid_file = bundle.path / "pid"
    argv = bed.argv("run", "--detach", "--bundle", bundle.path, "--pid-file", pid_file, name)
    # The payload keeps the streams: a pipe would never end.
    with open(bundle.path / "output", "w") as stream:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=60
        )
    assert done.returncode == 0, (bundle.path / "output").read_text()
    container = json.loads(bed.good("state", name).stdout)
    assert (container["status"], container["pid"]) == ("running", int(pid_file.read_text()))


def test_run_removes_the_container_at_its_end(bed, bundle):
    bed.output(bundle.args("true"))
    assert os.listdir(bed.root) == []


def test_run_with_keep(bed, bundle):
    bed.output(bundle.args("true"), "--keep")
    assert json.loads(bed.good("state", bed.ids[-1]).stdout)["status"] == "stopped"


def test_signals_to_run_reach_the_payload(bed, bundle):
    script = "trap 'echo got; exit 6' TERM; echo ready; while :; do sleep 0.1; done"
    bundle.shell(script).write()
    argv = bed.argv("run", "--bundle", bundle.path, bed.name())
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (6, "got\n")
