"""--security: what is asked for is in force in the payload, or nothing starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import fixtures, images

SHOW = "grep -e Uid -e Gid -e Groups -e Cap -e NoNewPrivs -e Seccomp: /proc/self/status"
FLOWS = {"setuid": ([], False), "userns": (["-u"], False), "root": ([], True)}
NO_CHMOD = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
}
TRY = "mkdir /tmp/$$; chmod 700 /tmp/$$; rmdir /tmp/$$"


own = fixtures.own()


@pytest.fixture(scope="module")
def sif() -> Path:
    return images.own_sif(images.shared_folder())


@pytest.fixture(params=sorted(FLOWS))
def run(request, own, sif):
    """Runs a shell line in each flow with these options."""
    options, root = FLOWS[request.param]

    def in_flow(*more: str, line: str = SHOW):
        return own.run("exec", *options, *more, sif, "sh", "-c", line, root=root)

    return in_flow


@pytest.fixture
def profile(readable_tmp):
    def write(content: object) -> str:
        file = readable_tmp / "profile.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        file.chmod(0o644)
        return f"seccomp:{file}"

    return write


def status(text: str) -> dict[str, list[str]]:
    rows = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.split() for name, _, value in rows}


# ---- the filter ----


@pytest.mark.parametrize("more", [[], ["-p"], ["-C"]])
def test_the_filter_is_in_force(run, profile, more):
    options = [*more, "--security", profile(NO_CHMOD)]
    done = run(*options, line=f"{SHOW}; {TRY}")
    found = status(done.stdout)
    assert found["Seccomp"] == ["2"], done.stderr
    assert "chmod" in done.stderr
    assert "No space left on device" in done.stderr
    without = run(*more, line=f"{SHOW}; {TRY}")
    assert (status(without.stdout)["Seccomp"], without.stderr) == (["0"], "")
    assert {**found, "Seccomp": []} == {**status(without.stdout), "Seccomp": []}


def test_a_payload_with_a_grant_is_filtered_too(own, sif, profile):
    own.grant("CAP_NET_RAW")
    words = ["--add-caps", "net_raw", "--security", profile(NO_CHMOD)]
    done = own.run("exec", *words, sif, "sh", "-c", f"{SHOW}; {TRY}")
    found = status(done.stdout)
    assert (found["Seccomp"], found["NoNewPrivs"]) == (["2"], ["1"])
    assert int(found["CapEff"][0], 16) == 1 << 13
    assert "No space left on device" in done.stderr
    # A second try at the program, by its interpreter, finds the filter in place.
    script = own.run("run", *words, sif)
    assert script.returncode == 0, script.stderr


def test_root_without_the_right_gains_nothing_either(own, sif, profile):
    words = ["--drop-caps", "sys_admin", "--security", profile(NO_CHMOD)]
    done = own.run("exec", *words, sif, "sh", "-c", SHOW, root=True)
    found = status(done.stdout)
    assert (found["Seccomp"], found["NoNewPrivs"]) == (["2"], ["1"]), done.stderr


def test_dockers_form_is_understood(run, profile):
    rules = [
        {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO",
         "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "includes": {"arches": ["nothing"]}},
    ]  # fmt: skip
    docker = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": rules,
    }
    done = run("--security", profile(docker), line=f"{SHOW}; {TRY}")
    held = int(status(done.stdout)["CapBnd"][0], 16) >> 21 & 1
    assert ("Operation not permitted" in done.stderr) is not bool(held)


WRONG = {
    "no JSON": "rubbish",
    "a list": [],
    "a misspelt key": {**NO_CHMOD, "syscall": []},
    "nothing": {},
    "no such action": {"defaultAction": "SCMP_ACT_NONSENSE"},
    "a wrong type": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": "chmod"}]},
    "a number": {"defaultAction": 7},
    "a listener": {**NO_CHMOD, "listenerPath": "/run/x"},
    "nobody listens": {"defaultAction": "SCMP_ACT_ALLOW",
                       "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_NOTIFY"}]},
    "no such architecture": {**NO_CHMOD, "architectures": ["SCMP_ARCH_NO"]},
    "deep": "[" * 100_000,
    "huge": " " * (1 << 21),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_profile_that_cannot_be_applied_starts_nothing(own, sif, profile, name):
    word = profile(WRONG[name])
    done = own.run("exec", "--security", word, sif, "echo", "started")
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.startswith("FATAL:   ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["/nonexistent", "/", "/dev/zero", "/root/x"])
def test_a_profile_that_cannot_be_read_starts_nothing(own, sif, name):
    done = own.run("exec", "--security", f"seccomp:{name}", sif, "echo", "started")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (255, "", 1)


def test_a_filter_that_forbids_the_start_starts_nothing(run, profile):
    rules = [{"names": ["execve"], "action": "SCMP_ACT_ERRNO"}]
    done = run(
        "--security",
        profile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}),
        line="echo started",
    )
    assert (done.returncode, done.stdout) == (255, "")
    assert "peration not permitted" in done.stderr


# ---- identity ----


@pytest.mark.parametrize(
    ("words", "uid", "gid", "groups"),
    [
        (["uid:1234"], 1234, 0, []),
        (["gid:5"], 0, 5, []),
        (["gid:0"], 0, 0, []),
        (["uid:1234,gid:5:6:7"], 1234, 5, [5, 6, 7]),
        (["uid:1234", "gid:20"], 1234, 20, []),
    ],
)
def test_root_starts_somebody_else(own, sif, words, uid, gid, groups):
    options = [word for value in words for word in ("--security", value)]
    for more in ([], ["-p"]):
        done = own.run(
            "exec", *more, *options, sif, "sh", "-c", SHOW, root=True, extra_groups=[4, 24]
        )
        found = status(done.stdout)
        assert found["Uid"] == [str(uid)] * 4, done.stderr
        assert found["Gid"] == [str(gid)] * 4
        assert found["Groups"] == [str(number) for number in groups]
        assert {int(found[name][0], 16) for name in found if name.startswith("Cap")} == {0}
        assert found["NoNewPrivs"] == ["1"]


def test_root_as_uid_0_stays_root(own, sif):
    done = own.run("exec", "--security", "uid:0", sif, "sh", "-c", SHOW, root=True)
    assert status(done.stdout)["NoNewPrivs"] == ["0"]
    assert int(status(done.stdout)["CapEff"][0], 16) != 0


def test_somebody_else_holds_what_root_names(own, sif):
    options = ["--security", "uid:1234", "--add-caps", "chown,net_raw", "--drop-caps", "net_raw"]
    done = own.run("exec", *options, sif, "sh", "-c", SHOW, root=True)
    found = status(done.stdout)
    assert {int(found[name][0], 16) for name in found if name.startswith("Cap")} == {1}
    for option in ("--keep-privs", "--allow-setuid"):
        done = own.run("exec", "--security", "uid:1234", option, sif, "true", root=True)
        assert (done.returncode, done.stdout) == (255, "")
        assert f"{option} requires root privileges" in done.stderr


@pytest.mark.parametrize("word", ["uid:0", "uid:1234", "gid:0", "gid:5:6"])
def test_a_user_stays_who_he_is(own, sif, word):
    done = own.run("exec", "--security", word, sif, "id")
    assert (done.returncode, done.stdout) == (255, "")
    assert "with suid mode requires root privileges" in done.stderr


@pytest.mark.parametrize(("words", "uid", "gid"), [
    ("uid:1234", 1234, None), ("uid:0", 0, None), ("gid:5", None, 5), ("uid:1234,gid:5", 1234, 5),
    ("gid:5:6,uid:7", 7, 5),
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["-p"], ["-C", "--writable-tmpfs"]])
@pytest.mark.parametrize("root", [False, True])
def test_in_a_user_namespace_ids_are_names(own, sif, words, uid, gid, more, root):
    """The payload is its caller still: it has nothing but other numbers."""
    if root and uid == 0:
        pytest.skip("root is called so already")
    user = (0, 0) if root else (own.user.pw_uid, own.user.pw_gid)
    uid, gid = user[0] if uid is None else uid, user[1] if gid is None else gid
    line = (
        f"{SHOW}; cat /proc/self/uid_map /proc/self/gid_map; touch $HOME/a; stat -c %u:%g $HOME/a"
    )
    script = f"{line}; rm -f $HOME/a"
    done = own.run("exec", "-u", *more, "--security", words, sif, "sh", "-c", script, root=root)
    found = status(done.stdout)
    assert found["Uid"] == [str(uid)] * 4, done.stderr
    assert found["Gid"] == [str(gid)] * 4
    assert {int(found[name][0], 16) for name in found if name.startswith("Cap")} == {0}
    assert found["NoNewPrivs"] == ["1"]
    lines = done.stdout.splitlines()[-3:]
    assert [row.split() for row in lines[:2]] == [
        [str(inside), str(outside), "1"] for inside, outside in zip((uid, gid), user, strict=True)
    ]
    assert lines[2] == f"{uid}:{gid}"
    assert ("no group but the first" in done.stderr) == (":6" in words)


@pytest.mark.parametrize("option", [("--add-caps", "chown"), ("--sharens",)])
def test_other_names_are_the_payloads_alone(own, sif, option):
    done = own.run("exec", "-u", *option, "--security", "uid:1234", sif, "echo", "started")
    assert (done.returncode, done.stdout) == (255, "")
    assert f"with {option[0]} is not supported yet" in done.stderr


def test_no_instance_has_other_names(own, sif):
    words = ("instance", "start", "-u", "--security", "uid:1234", sif, "named")
    done = own.run(*words)
    assert (done.returncode, done.stdout) == (255, "")
    assert "with an instance is not supported yet" in done.stderr
    assert "named" not in own.run("instance", "list").stdout


@pytest.mark.parametrize("value", ["x", "-1", "4294967295", "4294967296", "99999999999999999999"])
@pytest.mark.parametrize("key", ["uid", "gid"])
def test_what_is_no_id(own, sif, key, value):
    for root, flow in ((True, ()), (False, ("-u",))):
        done = own.run("exec", *flow, "--security", f"{key}:{value}", sif, "id", root=root)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (255, "", 1)
        assert f'parsing "{value}"' in done.stderr


# ---- labels, and what is no setting ----


@pytest.mark.parametrize("key", ["apparmor", "selinux"])
def test_a_label_that_cannot_be_applied_starts_nothing(run, key):
    done = run("--security", f"{key}:unconfined", line="echo started")
    assert (done.returncode, done.stdout) == (255, "")
    assert key in done.stderr


def test_both_labels_start_nothing(own, sif):
    done = own.run("exec", "--security", "apparmor:x,selinux:y", sif, "echo", "started")
    assert (done.returncode, done.stdout) == (255, "")
    assert "can't specify both an apparmor profile and a SELinux label" in done.stderr


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_who_joins_an_instance_has_its_filter(own, sif, profile, flow):
    options, root = FLOWS[flow]
    name = f"filtered-{flow}"
    words = ["--security", profile(NO_CHMOD), sif, name]
    done = own.run("instance", "start", *options, *words, root=root)
    try:
        assert done.returncode == 0, done.stderr
        done = own.run("exec", f"instance://{name}", "sh", "-c", f"{SHOW}; {TRY}", root=root)
        assert status(done.stdout)["Seccomp"] == ["2"], done.stderr
        assert "No space left on device" in done.stderr
    finally:
        own.run("instance", "stop", name, root=root)


@pytest.mark.parametrize(
    "word", ["nonsense", "nonsense:x", "Seccomp:/x", "seccomp", "seccomp:", "uid:", ":", "uid:1,x"]
)
def test_what_is_no_setting_starts_nothing(own, sif, word):
    done = own.run("exec", "--security", word, sif, "echo", "started")
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.startswith("FATAL:   ")


def test_the_same_twice_starts_nothing(run, profile):
    word = profile(NO_CHMOD)
    done = run("--security", f"{word},{word}", line="echo started")
    assert (done.returncode, done.stdout) == (255, "")
    assert "seccomp is there twice" in done.stderr


def test_the_environment_asks_for_it_too(own, sif, profile):
    variables = {"APPTAINER_SECURITY": profile(NO_CHMOD)}
    done = own.run("exec", sif, "sh", "-c", SHOW, env=variables)
    assert status(done.stdout)["Seccomp"] == ["2"]
