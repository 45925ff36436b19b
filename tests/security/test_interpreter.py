"""I-1: no CPython, and no script, in a process that holds or can regain privilege."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests import images, own_install
from tests.cni_host import PLUGINS, Host
from tests.security import forge, replay

RUNS = {
    "sif": ["exec", "{sif}", "true"],
    "sandbox": ["exec", "{tree}", "true"],
    "pid namespace": ["exec", "-p", "{sif}", "true"],
    "contained": ["exec", "-C", "--hostname", "h", "{sif}", "true"],
    "writable tmpfs": ["exec", "--writable-tmpfs", "{sif}", "true"],
    "bind": ["exec", "-B", "/var", "{sif}", "true"],
    "run": ["run", "{sif}"],
    "traced": ["--trace", "/dev/null", "exec", "{sif}", "true"],
    "user namespace": ["exec", "-u", "{sif}", "true"],
    "missing command": ["exec", "{sif}", "absent"],
    "failing command": ["exec", "{sif}", "false"],
    "missing image": ["exec", "/absent.sif", "true"],
    "bad image": ["exec", "/etc/passwd", "true"],
    "bad option": ["exec", "--absent", "{sif}", "true"],
    "refused option": ["exec", "--keep-privs", "{sif}", "true"],
    "no container": ["inspect", "{sif}"],
}
# Only these start the setuid starter; the rest goes to an interpreter, or to the plain starter.
UNPRIVILEGED = ("user namespace", "no container", "bad option")


@pytest.fixture
def watch(user):
    """Runs a program as the user under strace, which leaves set-user-id bits alive, and replays."""

    def run(
        program: str, words: list[str], folder: Path, *grant: str, before: Sequence[str] = ()
    ) -> replay.Findings:
        log = folder / "calls"
        argv = ["-f", "-y", "-s", "4096", "--decode-pids=pidns", "-e", f"trace={replay.CALLS}"]
        argv += ["-e", "signal=none", "-q", "-u", user.pw_name, "-o", str(log), program, *words]
        env = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir}
        line = [*before[1:], "/usr/bin/strace", *argv] if before else argv
        place = shutil.which(before[0]) if before else "/usr/bin/strace"
        done = forge.finish(forge.start(place, line, env=env))
        assert "strace:" not in done.err, done.err
        ids = ((user.pw_uid,) * 4, (user.pw_gid,) * 4)
        with log.open(errors="replace") as lines:
            return replay.Replay(lines, replay.Who(*ids), frozenset(grant)).findings

    return run


@pytest.fixture(scope="module")
def names(demo_sif) -> dict[str, str]:
    return {"sif": str(demo_sif), "tree": str(images.small_tree(images.shared_folder()))}


@pytest.mark.parametrize("name", RUNS)
def test_no_interpreter_with_privilege(watch, product, names, tmp_path, name):
    words = [word.format(**names) for word in RUNS[name]]
    found = watch(product.program, words, tmp_path)
    assert found.violations == []
    # A log in which nothing privileged, or no Python, was seen would prove nothing.
    assert found.interpreters > 0
    assert (found.privileged == 0) == (name in UNPRIVILEGED)


@pytest.mark.parametrize("options", [[], ["-p"], ["-p", "--no-init"]], ids=str)
def test_no_interpreter_with_a_granted_capability(watch, user, names, tmp_path, options):
    own = own_install.installation()
    own.grant("CAP_NET_RAW")
    words = ["exec", *options, "--add-caps", "CAP_NET_RAW", names["sif"], "true"]
    found = watch(str(own.program), words, tmp_path, "CAP_NET_RAW")
    unjudged = watch(str(own.program), words, tmp_path)
    own.restore()
    assert found.violations == []
    assert found.interpreters > 0
    assert found.privileged > 0
    assert found.bearers == 1
    # Nobody who holds a capability that was not granted executes anything, whatever its ids.
    assert len(unjudged.violations) == 1


ALLOWED = "allow net users = {}\nallow net networks = bridge"


@pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check")
def test_no_interpreter_where_root_undoes_a_users_network(watch, user, names, tmp_path):
    """What a janitor executes is opened before, so that the call names no path (execveat)."""
    own = own_install.installation()
    own.configure(ALLOWED.format(user.pw_name))
    host = Host(own, Path(names["sif"]))
    try:
        words = ["exec", "--net", names["sif"], "true"]
        found = watch(str(own.program), words, tmp_path, before=host.inside)
    finally:
        host.end()
        own.restore()
    assert found.violations == []
    assert found.launches == 1
    assert found.plugins >= 6  # bridge, firewall, portmap: each adds, and undoes


# ---- the functional suite ----

SUITE = "audit binds capabilities cve engine environment exec identity policy signals trace".split()
# A process that is watched stops in a way of its own, which these tests would see.
LEFT_OUT = ("stop_and_go_on", "job_control", "stops_the_job")
# Launches through the setuid starter; the suite may grow, and may not quietly shrink.
FEWEST_LAUNCHES = 850
FEWEST_BEARERS = 20
# What the suite's capability.json files grant.
GRANT = frozenset({"CAP_CHOWN", "CAP_NET_RAW"})


@pytest.mark.long
def test_no_interpreter_with_privilege_over_the_functional_suite(repository, tmp_path):
    """The suite as it is, with every process that it starts watched from outside."""
    log, preloaded = tmp_path / "calls", tmp_path / "no_restriction.so"
    source = repository / "tests/security/no_restriction.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", preloaded, source], check=True)
    argv = ["strace", "--seccomp-bpf", "-E", "LD_PRELOAD", "-f", "-y", "-s", "64", "-q"]
    argv += ["--decode-pids=pidns", "-e", f"trace={replay.CALLS}", "-e", "signal=none"]
    argv += ["-o", log, sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    argv += ["-m", "not long", "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    argv += [*(f"tests/e2e/test_{name}.py" for name in SUITE)]
    env = {**os.environ, "LD_PRELOAD": str(preloaded)}
    done = subprocess.run(
        argv, cwd=repository, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True, judged=False)
    with log.open(errors="replace") as lines:
        found = replay.Replay(lines, root, GRANT).findings
    assert found.violations == []
    assert found.launches >= FEWEST_LAUNCHES
    assert found.bearers >= FEWEST_BEARERS
    assert found.privileged >= found.launches
    # Master; and stage 2 where it is not lean.
    assert found.interpreters > found.launches


@pytest.fixture
def elsewhere(require_root, user) -> Iterator[Path]:
    """A directory that root and the ordinary user can reach, and nobody else."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-test-", dir="/opt"))
    os.chown(made, 0, user.pw_gid)
    made.chmod(0o750)
    yield made
    shutil.rmtree(made)


SPOILED = """\
    if (!dlopen(APY_LIBPYTHON, RTLD_LAZY | RTLD_GLOBAL))
        _exit(255);
"""
DROP = "    if (privs_drop(&target) < 0)\n"


def test_the_checker_fails_a_starter_that_loads_python_before_the_drop(
    watch, repository, elsewhere, names, tmp_path
):
    ignored = shutil.ignore_patterns("build", ".git", "generated", "__pycache__", "*.so", "tests")
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy, ignore=ignored)
    stage = copy / "starter/stage.c"
    text = stage.read_text()
    at = text.index(DROP, text.index("static void take_identity("))
    stage.write_text(text[:at] + SPOILED + text[at:])
    prefix = elsewhere / "prefix"
    argv = [copy / "install", "--prefix", prefix, "--sysconfdir", elsewhere / "etc"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = ["exec", names["sif"], "true"]
    found = watch(str(prefix / "bin/apptainer-py"), words, tmp_path)
    assert len(found.violations) >= 2  # master and stage 2
    assert all("libpython" in line for line in found.violations)


# ---- the replay itself ----

USER = replay.Who((1000,) * 4, (1000,) * 4)


def findings(text: str, who: replay.Who = USER) -> replay.Findings:
    return replay.Replay(text.splitlines(), who).findings


MAP = "mmap(NULL, 4096, PROT_READ|PROT_EXEC, MAP_PRIVATE, 3</usr/lib/libpython3.11.so.1.0>, 0)"


@pytest.mark.parametrize(
    ("steps", "bad"),
    [
        ([], False),
        (['execve("{suid}", ["x"], []) = 0'], True),
        (['execve("{suid}", ["x"], []) = 0', "setresuid(1000, 1000, 1000) = 0"], False),
        (['execve("{suid}", ["x"], []) = 0', "setresuid(1000, 1000, 0) = 0"], True),
        (['execve("{suid}", ["x"], []) = 0', "setresuid(-1, 1000, -1) = 0"], True),
        (['execve("{suid}", ["x"], []) = 0', "setresuid(1000, 1000, 1000) = -1 EPERM (x)"], True),
        (
            [
                'execve("{suid}", ["x"], []) = 0',
                "prctl(PR_SET_KEEPCAPS, 1) = 0",
                "setresuid(1000, 1000, 1000) = 0",
            ],
            True,
        ),
        (
            [
                'execve("{suid}", ["x"], []) = 0',
                "prctl(PR_SET_KEEPCAPS, 1) = 0",
                "setresuid(1000, 1000, 1000) = 0",
                "capset({{version=3, pid=0}}, {{effective=0, permitted=0, inheritable=0}}) = 0",
            ],
            False,
        ),
        (["prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) = 0", 'execve("{suid}", ["x"], []) = 0'], False),
    ],
)
def test_the_replay_follows_ids_and_capabilities(tmp_path, steps, bad):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o4755)
    lines = [f"10 {step.format(suid=program)}" for step in [*steps, MAP + " = 0x7f0000000000"]]
    assert bool(findings("\n".join(lines)).violations) == bad


def test_the_replay_gives_a_child_what_its_parent_had_at_the_fork(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o4755)
    log = f"""\
10 execve("{program}", ["x"], []) = 0
10 clone(child_stack=NULL, flags=CLONE_NEWPID|SIGCHLD <unfinished ...>
11 {MAP} = 0x7f0000000000
10 <... clone resumed>) = 11
10 setresuid(1000, 1000, 1000) = 0
10 clone(child_stack=NULL, flags=SIGCHLD) = 2 /* 12 in strace's PID NS */
12 {MAP} = 0x7f0000000000
"""
    found = findings(log)
    assert [line.split(":")[0] for line in found.violations] == ["11"]
    assert found.processes == 3


def test_the_replay_sees_scripts_and_pythons(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True)
    for path in (script, "/usr/bin/python3"):
        log = f'10 execve("{path}", ["x"], []) = 0'
        assert len(findings(log, root).violations) == 2
        assert not findings(log).violations


def test_the_replay_sees_whatever_is_executed_with_privilege():
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True)
    log = '10 execve("/bin/true", ["x"], []) = 0'
    assert len(findings(log, root).violations) == 1
    assert not findings(log).violations


CAPSET = "capset({{version=3, pid=0}}, {{effective=0, permitted={0}, inheritable={0}}}) = 0"


@pytest.mark.parametrize(
    ("held", "ids", "no_new_privs", "bad"),
    [
        ("1<<CAP_CHOWN", "1000, 1000, 1000", True, False),
        ("1<<CAP_CHOWN|1<<CAP_KILL", "1000, 1000, 1000", True, False),
        ("1<<CAP_CHOWN", "1000, 1000, 1000", False, True),
        ("1<<CAP_CHOWN", "1000, 1000, 0", True, True),
        ("1<<CAP_SYS_ADMIN", "1000, 1000, 1000", True, True),
        ("1<<CAP_CHOWN|1<<CAP_SYS_ADMIN", "1000, 1000, 1000", True, True),
        ("0xffffffffff", "1000, 1000, 1000", True, True),
    ],
)
def test_the_replay_knows_a_bearer(held, ids, no_new_privs, bad):
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True)
    log = ["prctl(PR_SET_KEEPCAPS, 1) = 0", "setresgid(1000, 1000, 1000) = 0"]
    log += [f"setresuid({ids}) = 0", CAPSET.format(held)]
    log += ["prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) = 0"] * no_new_privs
    log += ['execve("/bin/true", ["x"], []) = 0']
    lines = [f"10 {line}" for line in log]
    found = replay.Replay(lines, root, frozenset({"CAP_CHOWN", "CAP_KILL"})).findings
    assert (bool(found.violations), found.bearers) == (bad, int(not bad))


def test_the_replay_judges_what_an_ordinary_user_starts_of_ours(tmp_path):
    """And takes a number that is used again for another process."""
    suid = "/opt/x/libexec/apptainer-py/starter-suid"
    log = f"""\
10 execve("/usr/bin/python3", ["x"], []) = 0
10 vfork( <unfinished ...>
11 setresuid(1000, 1000, 1000) = 0
11 setresgid(1000, 1000, 1000) = 0
11 execve("{suid}", ["x"], []) = 0
10 <... vfork resumed>) = 11
11 +++ exited with 0 +++
10 vfork() = 11
11 {MAP} = 0x7f0000000000
11 +++ exited with 0 +++
10 vfork() = 11
11 setresgid(1000, 1000, 1000) = 0
11 setresuid(1000, 1000, 1000) = 0
11 execve("{suid}", ["x"], []) = 0
11 {MAP} = 0x7f0000000000
11 +++ killed by SIGKILL +++
10 +++ exited with 0 +++
"""
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True, judged=False)
    found = findings(log, root)
    assert len(found.violations) == 1
    assert (found.launches, found.privileged) == (2, 2)


LOST = {
    "resumed": "10 <... clone resumed> <unfinished ...>) = ?",
    "never resumed": "",
    "at once": "",
}


@pytest.mark.parametrize("form", LOST)
def test_the_replay_finds_the_child_of_one_that_was_killed_in_its_fork(tmp_path, form):
    """And takes its number, when it comes again, for another process."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o4755)
    fork = "10 clone(child_stack=NULL, flags=SIGCHLD" + (
        ") = ?" if form == "at once" else " <unfinished ...>"
    )
    log = f"""\
9 clone(child_stack=NULL, flags=SIGCHLD) = 10
10 execve("{program}", ["x"], []) = 0
{fork}
11 setresuid(-1, -1, -1) = 0
{LOST[form]}
10 +++ killed by SIGKILL +++
11 {MAP} = 0x7f0000000000
11 +++ exited with 255 +++
9 clone(child_stack=NULL, flags=SIGCHLD) = 11
11 {MAP} = 0x7f0000000000
11 +++ exited with 0 +++
"""
    found = findings("\n".join(line for line in log.splitlines() if line))
    assert [line.split(":")[0] for line in found.violations] == ["11"]
    assert found.interpreters == 2


def test_the_replay_needs_no_line_for_an_end():
    """Of one that is killed in a pid namespace there is none, at times."""
    log = f"""\
9 setresgid(-1, 1000, -1) = 0
9 clone(child_stack=NULL, flags=SIGCHLD) = 10
10 capset({{version=3, pid=0}}, {{effective=0, permitted=0, inheritable=0}}) = 0
10 setresgid(1000, 1000, 1000) = 0
10 setresuid(1000, 1000, 1000) = 0
9 clone(child_stack=NULL, flags=SIGCHLD <unfinished ...>
10 {MAP} = 0x7f0000000000
9 <... clone resumed>) = 10
10 +++ exited with 0 +++
9 clone(child_stack=NULL, flags=SIGCHLD) = 10
10 setresgid(1000, 1000, 1000) = 0
10 +++ exited with 0 +++
"""
    root = replay.Who((0,) * 4, (0,) * 4, permitted=True)
    assert [line.split(":")[0] for line in findings(log, root).violations] == ["10"]


def test_a_log_with_a_process_from_nowhere_is_no_proof():
    with pytest.raises(ValueError, match="without a parent"):
        findings("10 setuid(1000) = 0\n99 setuid(1000) = 0")


JANITOR = replay.Who((0,) * 4, (0,) * 4, permitted=True, no_new_privs=True)
BY_DESCRIPTOR = '10 execveat(5<{}>, "", ["plugin"], ["PATH=/"], AT_EMPTY_PATH) = 0'


def test_the_replay_sees_what_execveat_executes(elsewhere):
    """The call's path is empty: it is the descriptor that says which program."""
    program, anybodys = elsewhere / "program", elsewhere / "anybodys"
    for path in (program, anybodys):
        path.write_bytes(b"\x7fELF")
        path.chmod(0o755)
    anybodys.chmod(0o757)
    judge = BY_DESCRIPTOR.format
    allowed = findings(judge(program), JANITOR)
    assert (allowed.violations, allowed.plugins) == ([], 1)
    # What it starts in its turn is the administrator's own affair; so is its end of privileges.
    assert not findings(f"{judge(program)}\n10 {MAP} = 0x7f0000000000", JANITOR).violations
    assert len(findings(judge(anybodys), JANITOR).violations) == 1
    assert len(findings(judge(elsewhere / "absent"), JANITOR).violations) == 1
    assert findings(judge("/usr/bin/python3"), JANITOR).violations
    # A keeper, which could still become its user, executes nothing.
    keeper = replay.Who((1000, 0, 0, 1000), (1000,) * 4, permitted=True)
    assert len(findings(judge(program), keeper).violations) == 1
    assert len(findings(judge(program), replace(JANITOR, no_new_privs=False)).violations) == 1


def test_the_replay_sees_a_set_user_id_program_by_descriptor(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o4755)
    log = f"{BY_DESCRIPTOR.format(program)}\n10 {MAP} = 0x7f0000000000"
    assert len(findings(log).violations) == 1
