"""runc's command line: flags, texts, logs, statuses, and the commands that only tell."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

COMMANDS = (
    "checkpoint create delete events exec features kill list pause ps restore resume run spec "
    "start "
    "state update"
).split()


def test_version(bed):
    said = subprocess.run([bed.runtime.program, "--version"], capture_output=True, text=True)
    assert said.returncode == 0
    assert re.search(r"^\w\S* version \d+\.\d+", said.stdout)
    assert re.search(r"^spec: 1\.\d+\.\d+", said.stdout, re.MULTILINE)


def test_help_names_every_command(bed):
    said = subprocess.run([bed.runtime.program, "--help"], capture_output=True, text=True)
    assert said.returncode == 0
    assert "USAGE:" in said.stdout
    for name in COMMANDS:
        assert re.search(rf"^\s+{name}\b", said.stdout, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(bed, name):
    said = subprocess.run([bed.runtime.program, name, "--help"], capture_output=True, text=True)
    assert said.returncode == 0
    assert "USAGE:" in said.stdout


def test_an_unknown_command(bed):
    done = bed.call("unheard")
    assert done.returncode == 3
    assert "unheard" in done.stdout + done.stderr


def test_an_unknown_flag(bed):
    done = bed.call("state", "--unheard", "x")
    assert done.returncode == 1
    assert "unheard" in done.stderr + done.stdout


def test_too_many_words(bed):
    done = bed.call("state", "a", "b")
    assert done.returncode == 1
    assert "requires exactly 1 argument" in done.stderr


def test_an_error_as_text(bed):
    said = bed.bad("state", "nobody")
    form = r'time="\d{4}-\d\d-\d\dT[^"]*" level=error msg="container does not exist"\n'
    assert re.fullmatch(form, said)


def test_an_error_as_json(bed):
    done = bed.call("--log-format", "json", "state", "nobody")
    assert done.returncode == 1
    found = json.loads(done.stderr)
    assert (found["level"], found["msg"]) == ("error", "container does not exist")
    assert re.match(r"\d{4}-\d\d-\d\dT", found["time"])


def test_an_error_in_a_file(bed):
    log = bed.place / "log"
    done = bed.call("--log", str(log), "--log-format=json", "state", "nobody")
    assert done.returncode == 1
    assert done.stderr == "container does not exist\n"
    assert json.loads(log.read_text())["msg"] == "container does not exist"


def test_the_log_is_appended_to(bed):
    log = bed.place / "log"
    for _ in range(2):
        bed.call("--log", str(log), "state", "nobody")
    assert len(log.read_text().splitlines()) == 2


def test_an_error_of_create_in_a_file(bed, bundle):
    """podman reads it to choose between 126 and 127."""
    log = bed.place / "log"
    bundle.args("/no/such").write()
    words = ("--log", log, "--log-format=json", "create", "--bundle", bundle.path, bed.name())
    done = subprocess.run(
        bed.argv(*words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 1
    messages = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("no such file or directory" in one["msg"] for one in messages)
    assert {one["level"] for one in messages} <= {"error", "warning", "fatal"}


def test_debug(bed, bundle):
    done = bed.call("--debug", "state", "nobody")
    assert done.returncode == 1
    assert "level=error" in done.stderr


def test_a_log_format_that_is_none(bed):
    done = bed.call("--log-format", "xml", "state", "nobody")
    assert done.returncode == 1


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_rootless(bed, value):
    done = bed.call("--rootless", value, "state", "nobody")
    assert "container does not exist" in done.stderr


def test_list(bed, bundle):
    container = bed.sleeping(bundle)
    lines = bed.good("list").stdout.splitlines()
    assert lines[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert lines[1].split()[:4] == [container.id, str(container.pid), "running", str(bundle.path)]
    assert lines[1].split()[-1] == "root"
    assert bed.good("list", "--quiet").stdout == container.id + "\n"
    found = json.loads(bed.good("list", "--format", "json").stdout)
    assert [one["id"] for one in found] == [container.id]
    assert found[0]["status"] == "running"
    assert found[0]["owner"] == "root"


def test_list_of_nothing_as_json(bed):
    bed.root.mkdir(mode=0o700)
    assert json.loads(bed.good("list", "--format", "json").stdout) in (None, [])


def test_spec(bed):
    folder = bed.place / "new"
    folder.mkdir()
    bed.good("spec", cwd=folder)
    found = json.loads((folder / "config.json").read_text())
    assert found["process"]["args"] == ["sh"]
    assert found["root"] == {"path": "rootfs", "readonly": True}
    assert {one["type"] for one in found["linux"]["namespaces"]} >= {"pid", "mount", "uts"}
    done = bed.call("spec", cwd=folder)
    assert done.returncode == 1
    assert "File config.json exists. Remove it first" in done.stderr


def test_spec_in_a_bundle(bed):
    folder = bed.place / "new"
    folder.mkdir()
    bed.good("spec", "--bundle", folder)
    assert (folder / "config.json").exists()


def test_spec_rootless(bed):
    folder = bed.place / "new"
    folder.mkdir()
    bed.good("spec", "--rootless", cwd=folder)
    found = json.loads((folder / "config.json").read_text())
    assert "user" in {one["type"] for one in found["linux"]["namespaces"]}
    assert found["linux"]["uidMappings"]


def test_what_spec_writes_runs(bed, bundle):
    (bundle.path / "config.json").unlink(missing_ok=True)
    bed.good("spec", "--bundle", bundle.path)
    found = json.loads((bundle.path / "config.json").read_text())
    found["process"].update(terminal=False, args=["echo", "ran"])
    bundle.config = found
    assert bed.output(bundle) == "ran\n"


def test_features(bed):
    found = json.loads(bed.good("features").stdout)
    assert found["ociVersionMin"] == "1.0.0"
    assert found["ociVersionMax"].startswith("1.")
    assert set(found["hooks"]) == {
        "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"
    }  # fmt: skip
    assert {"ro", "rro", "rbind", "nosuid", "tmpcopyup"} <= set(found["mountOptions"])
    linux = found["linux"]
    assert {"pid", "network", "mount", "ipc", "uts", "user", "cgroup"} <= set(linux["namespaces"])
    assert "CAP_SYS_ADMIN" in linux["capabilities"]
    assert linux["cgroup"]["v1"] is True
    assert linux["cgroup"]["v2"] is True
    assert linux["seccomp"]["enabled"] is True
    assert "SCMP_ACT_NOTIFY" in linux["seccomp"]["actions"]
    assert "SCMP_ARCH_X86_64" in linux["seccomp"]["archs"]
    assert "SCMP_CMP_MASKED_EQ" in linux["seccomp"]["operators"]


def test_the_root_directory(bed, bundle):
    bed.sleeping(bundle)
    assert bed.root.stat().st_mode & 0o777 == 0o700


def test_the_state_is_where_root_says(bed, bundle):
    container = bed.sleeping(bundle)
    other = bed.place / "other"
    argv = [bed.runtime.program, "--root", str(other), "state", container.id]
    assert subprocess.run(argv, capture_output=True).returncode == 1


def test_flags_with_one_dash_and_with_equals(bed, bundle):
    bundle.args("true").write()
    bed.good("run", f"-b={bundle.path}", bed.name())
    bed.good("run", f"--bundle={bundle.path}", bed.name())
    bed.good("run", "-b", bundle.path, bed.name())


def test_a_pid_file_that_cannot_be_written(bed, bundle):
    bundle.write()
    words = ("create", "--bundle", bundle.path, "--pid-file", "/no/such/pid", bed.name())
    with open(bed.place / "out", "w") as stream:
        done = subprocess.run(
            bed.argv(*words), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    assert done.returncode == 1
    assert not os.path.exists(bed.root / bed.ids[-1])


def test_cgroup_manager_disabled(bed, bundle):
    """podman --cgroups=disabled asks for it, of crun and of whatever says that it can."""
    bundle.args("true").write()
    argv = [bed.runtime.program, "--cgroup-manager", "disabled", "--root", str(bed.root)]
    done = subprocess.run(
        [*argv, "run", "--bundle", str(bundle.path), bed.name()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


DEBUG_LINES = ("nsexec", "container setup", "child process in init()")


@pytest.mark.parametrize("form", ["text", "json"])
def test_debug_lines_of_a_launch(bed, bundle, form):
    """What runc's own tests look for in the log of a launch; the payload's output has none."""
    log = bed.place / "log"
    bundle.args("true").write()
    words = ("--debug", "--log", log, "--log-format", form, "run", "--bundle", bundle.path)
    done = bed.good(*words, bed.name())
    assert "debug" not in done.stderr
    text = log.read_text()
    assert ('"level":"debug"' if form == "json" else "level=debug") in text
    for line in DEBUG_LINES:
        assert line in text


def test_a_failure_before_the_interpreter_is_logged(bed, bundle):
    log = bed.place / "log"
    bundle.write()
    name = bed.name()
    argv = bed.argv("--log", log, "--log-format=json", "create", "--bundle", bundle.path, name)
    done = subprocess.run(
        ["prlimit", "--nofile=16", *argv], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("runc create failed: the hard limit on open files")
    found = json.loads(log.read_text())
    assert (found["level"], found["msg"] + "\n") == ("error", done.stderr)


def test_list_of_a_root_that_is_not_there(bed):
    said = subprocess.run(
        [bed.runtime.program, "--root", str(bed.place / "none"), "list"],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert "none: no such file or directory" in said.stderr


def test_help_of_an_unknown_command(bed):
    assert bed.call("help", "unheard").returncode == 3
