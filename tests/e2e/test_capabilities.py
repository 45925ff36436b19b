"""What --add-caps, --drop-caps, --keep-privs, --no-privs and --allow-setuid do in each flow."""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests import fixtures, images
from tests.e2e.identities import own_capabilities
from tests.own_install import HostState, Installation, assert_nothing_left, eventually, household

CHOWN, KILL, NET_RAW = 1 << 0, 1 << 5, 1 << 13
GRANT = CHOWN | NET_RAW
SHOW = "grep -e Cap -e NoNewPrivs -e Uid -e Gid -e Groups /proc/self/status"
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
LAST = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
ALL = (2 << LAST) - 1


def grants(own: Installation, text: object) -> None:
    """Write capability.json, as the administrator would."""
    file = own.sysconfdir / "capability.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text, indent="\t"))
    file.chmod(0o644)


own = fixtures.own()


@pytest.fixture
def granted(own) -> Installation:
    """An installation whose administrator has granted the ordinary user two capabilities."""
    grants(own, {"users": {own.user.pw_name: ["CAP_NET_RAW", "CAP_CHOWN"], "root": ["CAP_KILL"]}})
    own.configure()
    return own


@pytest.fixture(scope="module")
def sif() -> Path:
    return images.own_sif(images.shared_folder())


def facts(text: str) -> dict[str, list[str]]:
    rows = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.split() for name, _, value in rows}


def masks(text: str) -> set[int]:
    found = facts(text)
    return {int(found[name][0], 16) for name in SETS}


# ---- the setuid flow ----


@pytest.mark.parametrize(
    ("options", "held", "said"),
    [
        (["--add-caps", "CAP_NET_RAW"], NET_RAW, ""),
        (["--add-caps", "net_raw,chown"], GRANT, ""),
        (["--add-caps", "net_raw,chown", "--drop-caps", "chown"], NET_RAW, ""),
        (["--add-caps", "chown", "-p"], CHOWN, ""),
        (["--add-caps", "chown", "-p", "--no-init"], CHOWN, ""),
        (["--add-caps", "chown", "--no-privs"], CHOWN, ""),
        (["--add-caps", "chown", "-C", "--writable-tmpfs"], CHOWN, ""),
        (["--drop-caps", "chown"], 0, ""),
        ([], 0, ""),
        (["--add-caps", "kill"], 0, "not authorized to add capability: CAP_KILL"),
        (["--add-caps", "net_raw,kill"], NET_RAW, "not authorized to add capability: CAP_KILL"),
        (["--add-caps", "foo"], 0, "won't add unknown capability: CAP_FOO"),
        (["--drop-caps", "foo"], 0, "won't drop unknown capability: CAP_FOO"),
    ],
)
def test_a_user_gets_what_was_granted_and_asked_for(granted, sif, options, held, said):
    done = granted.run("exec", *options, sif, "sh", "-c", SHOW)
    assert done.returncode == 0, done.stderr
    assert masks(done.stdout) == {held}
    found = facts(done.stdout)
    assert found["NoNewPrivs"] == ["1"]
    assert found["Uid"] == [str(granted.user.pw_uid)] * 4
    assert found["Gid"] == [str(granted.user.pw_gid)] * 4
    assert done.stderr == (f"WARNING: {said}\n" if said else "")


def test_all_is_what_was_granted(granted, sif):
    done = granted.run("exec", "--add-caps", "all", sif, "sh", "-c", SHOW)
    assert masks(done.stdout) == {GRANT}
    assert "not authorized to add capability: CAP_DAC_OVERRIDE," in done.stderr


def test_a_group_is_granted_too(own, sif):
    other = grp.getgrnam("users")
    grants(own, {"groups": {other.gr_name: ["CAP_NET_RAW"]}, "users": {}})
    words = ("exec", "--add-caps", "net_raw", sif, "sh", "-c", SHOW)
    assert masks(own.run(*words).stdout) == {0}
    done = own.run(*words, groups=[other.gr_gid])
    assert (masks(done.stdout), done.stderr) == ({NET_RAW}, "")
    assert str(other.gr_gid) in facts(done.stdout)["Groups"]


def test_a_group_without_a_name_takes_nothing_away(granted, sif):
    done = granted.run("exec", "--add-caps", "chown", sif, "sh", "-c", SHOW, groups=[54321])
    assert (masks(done.stdout), done.stderr) == ({CHOWN}, "")


@pytest.mark.parametrize("text", ["", "\n", "{}", '{"users": null}', None])
def test_a_file_that_grants_nothing(own, sif, text):
    if text is None:
        (own.sysconfdir / "capability.json").unlink(missing_ok=True)
    else:
        grants(own, text)
    done = own.run("exec", "--add-caps", "net_raw", sif, "sh", "-c", SHOW)
    assert (masks(done.stdout), done.returncode) == ({0}, 0)
    assert "not authorized to add capability: CAP_NET_RAW" in done.stderr


@pytest.mark.parametrize(
    "text", ["x", "[]", '{"users": {"NAME": "CAP_CHOWN"}}', '{"others": {"a": []}}']
)
def test_a_file_of_another_form_is_refused(own, sif, text):
    grants(own, text.replace("NAME", own.user.pw_name))
    done = own.run("exec", "--add-caps", "chown", sif, "true")
    assert done.returncode == 255
    assert done.stderr.count("\n") == 1
    assert "capability.json: is not JSON of the form users, groups" in done.stderr
    assert own.run("exec", sif, "true").returncode == 0


def test_a_file_that_others_could_write_is_refused(granted, sif):
    file = granted.sysconfdir / "capability.json"
    words = ("exec", "--add-caps", "chown", sif, "true")
    for mode, owner in ((0o664, 0), (0o646, 0), (0o644, granted.user.pw_uid)):
        os.chown(file, owner, 0)
        file.chmod(mode)
        done = granted.run(*words)
        assert (done.returncode, done.stderr.count("\n")) == (255, 1), done.stderr
        assert "capability.json: must be owned by root" in done.stderr
    os.chown(file, 0, 0)
    file.chmod(0o644)
    assert granted.run(*words).returncode == 0
    aside = granted.sysconfdir / "aside"
    file.rename(aside)
    file.symlink_to(aside)
    assert granted.run(*words).returncode == 255
    file.unlink()
    aside.unlink()


def test_the_capability_works_and_only_that_one(granted, sif, user_tmp):
    target = user_tmp / "file"
    target.touch()
    os.chown(target, granted.user.pw_uid, granted.user.pw_gid)
    words = ("-B", user_tmp, sif, "/bin/busybox", "chown", "0", target)
    assert granted.run("exec", *words).returncode != 0
    assert granted.run("exec", "--add-caps", "net_raw", *words).returncode != 0
    assert target.stat().st_uid == granted.user.pw_uid
    done = granted.run("exec", "--add-caps", "chown", *words)
    assert done.returncode == 0, done.stderr
    assert target.stat().st_uid == 0


@pytest.mark.parametrize("options", [[], ["-p"], ["-p", "--no-init"]], ids="".join)
def test_everything_else_is_as_without(granted, sif, user_tmp, options):
    """Directory, umask, limits, signals, streams, descriptors and environment."""
    script = (
        "pwd; umask; ulimit -Sn; ulimit -Sc; ls -l /proc/self/fd | grep -c .; env | sort;"
        "grep -e 'Sig[PBIC]' -e Shd /proc/self/status; cat; echo said >&2; exit 7"
    )
    runs = []
    for caps in ([], ["--add-caps", "chown"]):
        words = [granted.program, "exec", *options, *caps, sif, "sh", "-c", script]
        inner = f"cd {user_tmp}; umask 027; ulimit -Sn 99; trap '' USR1; exec \"$@\""
        done = subprocess.run(
            ["bash", "-c", inner, "bash", *words], input="typed\n", env=granted.environment(),
            capture_output=True, text=True, check=False, timeout=60, **granted.identity(),
        )  # fmt: skip
        runs.append((done.returncode, done.stdout, done.stderr))
    assert runs[0] == runs[1]
    assert runs[0][0] == 7
    assert "\n0027\n99\n" in runs[0][1]


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["shared", "pid-namespace"])
def test_the_payload_has_no_child_that_it_did_not_start(granted, sif, options):
    show = "read line < /proc/$$/task/$$/children; echo [$line]"
    done = granted.run("exec", *options, "--add-caps", "chown", sif, "sh", "-c", show)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM, ""),
        (["sh", "-c", "exit 3"], 3, ""),
        (["absent"], 255, 'FATAL:   "absent": executable file not found in $PATH\n'),
        (["/etc/passwd"], 255, "FATAL:   permission denied\n"),
    ],
)
def test_status_and_messages(granted, sif, command, status, said):
    with household() as home:
        host = HostState(granted.session)
        done = granted.run("exec", "--add-caps", "chown", sif, *command)
        assert (done.returncode, done.stderr, done.stdout) == (status, said, "")
        assert_nothing_left(home, host)


def test_what_execve_refuses_comes_back_to_stage_2(granted, readable_tmp):
    tree = readable_tmp / "odd"
    if not tree.exists():
        shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    for name, text in (("bare", 'echo "ran $1"\n'), ("lost", "#!/nonexistent\n")):
        (tree / "bin" / name).write_text(text)
        (tree / "bin" / name).chmod(0o755)
    done = granted.run("exec", "--add-caps", "chown", tree, "bare", "x")
    assert (done.stdout, done.returncode) == ("ran x\n", 0), done.stderr
    done = granted.run("exec", "--add-caps", "chown", tree, "lost")
    assert done.returncode == 255
    assert "FATAL:   exec /bin/lost failed: a shared library is likely missing" in done.stderr
    done = granted.run("exec", "--add-caps", "chown", "--env", f"A={'y' * 100_000}", tree, "env")
    assert f"A={'y' * 100_000}\n" in done.stdout


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["shared", "pid-namespace"])
def test_it_dies_with_keeper(granted, sif, options):
    with household() as home:
        host = HostState(granted.session)
        words = ["exec", *options, "--add-caps", "chown", sif, "sh", "-c", "echo up; exec sleep 99"]
        process = home.adopt(granted.start(*words))
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        eventually(lambda: "sleep" in {facts[2] for facts in home.alive().values()}, "it sleeps")
        process.kill()
        process.wait(timeout=15)
        assert_nothing_left(home, host)


def test_who_holds_the_grant(granted, sif, user_tmp):
    """The process in C that waits, and nobody else; Python has nothing of it."""
    trace = user_tmp / "trace"
    words = ("--trace", trace, "exec", "-p", "--add-caps", "chown", sif, "true")
    assert granted.run(*words).returncode == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    found = {
        line["process"]: (line["uid"], line["caps"], line["no_new_privs"], line["dumpable"])
        for line in lines
        if line["event"] == "process"
    }
    user = [granted.user.pw_uid] * 4
    assert found["BEARER"] == (user, [0, CHOWN, CHOWN, CHOWN, CHOWN], 1, 0)
    for process in ("STAGE2", "SHIM", "MASTER", "KEEPER", "IMAGE_SERVER"):
        assert found[process] == (user, [0] * 5, 1, 0), process
    hooks = [line for line in lines if line["event"] == "hook"]
    assert {line["process"] for line in hooks} == {"MASTER", "STAGE2"}
    assert all(line["caps"] == [0] * 5 for line in hooks)
    births = [line["process"] for line in lines if line.get("name") == "EXEC_PAYLOAD"]
    assert births == ["BEARER"]


def test_without_a_grant_there_is_no_such_process(granted, sif, user_tmp):
    trace = user_tmp / "trace"
    assert granted.run("--trace", trace, "exec", "--add-caps", "kill", sif, "true").returncode == 0
    assert "BEARER" not in trace.read_text()


def test_the_record_says_what_was_given(granted, sif, user_tmp):
    sink = granted.place / "audit.log"
    granted.configure(f"audit log = {sink}")
    assert granted.run("exec", "--add-caps", "chown", sif, "true").returncode == 0
    granted.configure()
    records = [json.loads(line) for line in sink.read_text().splitlines()]
    sink.unlink()
    assert [(r["decision"], r["payload_caps"]) for r in records] == [("allowed", CHOWN)]


# ---- the other flows ----


@pytest.mark.parametrize(
    ("options", "held"),
    [
        (["--add-caps", "chown"], CHOWN),
        (["--add-caps", "all", "--drop-caps", "chown"], ALL & ~CHOWN),
        (["--drop-caps", "chown"], 0),
        (["--no-privs", "--add-caps", "chown"], CHOWN),
    ],
)
def test_a_users_namespace(granted, sif, options, held):
    done = granted.run("exec", "-u", *options, sif, "sh", "-c", SHOW)
    assert (masks(done.stdout), facts(done.stdout)["NoNewPrivs"]) == ({held}, ["1"])


ROOT = [
    # directive, options, what is held of everything, no_new_privs
    ("full", [], ALL, 0),
    ("full", ["--drop-caps", "chown"], ALL & ~CHOWN, 0),
    ("full", ["--drop-caps", "all", "--add-caps", "chown"], 0, 0),
    ("full", ["--no-privs"], 0, 1),
    ("full", ["--no-privs", "--add-caps", "chown"], CHOWN, 1),
    ("full", ["--no-privs", "--keep-privs"], 0, 1),
    ("no", [], 0, 1),
    ("no", ["--add-caps", "chown"], CHOWN, 1),
    ("no", ["--keep-privs"], ALL, 0),
    ("file", [], KILL, 0),
    ("file", ["--add-caps", "chown"], KILL | CHOWN, 0),
    ("file", ["--keep-privs", "--drop-caps", "kill"], ALL & ~KILL, 0),
    ("file", ["--no-privs"], 0, 1),
]


@pytest.mark.parametrize("flow", ["root", "userns"])
@pytest.mark.parametrize(("default", "options", "held", "no_new_privs"), ROOT)
def test_root(granted, sif, flow, default, options, held, no_new_privs):
    granted.configure(f"root default capabilities = {default}")
    words = ["-u"] if flow == "userns" else []
    done = granted.run("exec", *words, *options, sif, "sh", "-c", SHOW, root=True)
    granted.configure()
    here = ALL if flow == "userns" else own_capabilities()
    found = facts(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    for name in SETS:
        # The real one fills these two as well, which a change to another user would leave.
        wanted = 0 if name in ("CapInh", "CapAmb") else held & here
        assert int(found[name][0], 16) == wanted, name
    assert found["NoNewPrivs"] == [str(no_new_privs)]


@pytest.mark.parametrize("option", ["--keep-privs", "--allow-setuid"])
@pytest.mark.parametrize("flow", [[], ["-u"]], ids=["setuid", "userns"])
def test_roots_options_are_roots(granted, sif, flow, option):
    done = granted.run("exec", *flow, option, sif, "true")
    said = f"FATAL:   Could not configure {option}: {option} requires root privileges\n"
    assert (done.returncode, done.stderr) == (255, said)


@pytest.fixture(scope="module")
def who_am_i(own) -> Path:
    """A program without libraries that prints its effective user id."""
    made = own.place / "who"
    source = own.place / "who.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(void) { return printf("%u\\n", (unsigned)geteuid()) < 0; }\n'
    )
    subprocess.run(["gcc", "-static", "-o", made, source], check=True)
    os.chown(made, own.user.pw_uid, own.user.pw_gid)
    made.chmod(0o4755)
    return made


@pytest.mark.parametrize("options", [[], ["--underlay"], ["--writable-tmpfs"]], ids=str)
def test_allow_setuid_lets_such_programs_work(granted, who_am_i, readable_tmp, options):
    tree = readable_tmp / "bits"
    if not tree.exists():
        shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
        shutil.copy(who_am_i, tree / "bin/who")
        os.chown(tree / "bin/who", granted.user.pw_uid, granted.user.pw_gid)
        (tree / "bin/who").chmod(0o4755)
    for more, ids in (([], "0"), (["--allow-setuid"], str(granted.user.pw_uid))):
        for program in ("/bin/who", who_am_i):
            words = [*options, *more, "-B", who_am_i, tree, program]
            done = granted.run("exec", *words, root=True)
            assert done.stdout.strip() == ids, (program, more, done.stderr)
    done = granted.run("exec", "--allow-setuid", "--no-privs", tree, "/bin/who", root=True)
    assert done.stdout == "0\n"
    done = granted.run("exec", "-u", "--allow-setuid", tree, "/bin/who", root=True)
    assert done.stdout == "0\n"
