"""`process` of config.json: what the payload finds is what was asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from tests.oci.bed import PROBE

CAPABILITIES = {"CAP_AUDIT_WRITE": 29, "CAP_KILL": 5, "CAP_NET_BIND_SERVICE": 10, "CAP_CHOWN": 0}
SETS = ("effective", "permitted", "inheritable", "bounding", "ambient")


def mask(*names: str) -> int:
    return sum(1 << CAPABILITIES[name] for name in names)


def test_args_are_the_whole_argument_vector(bed, bundle):
    words = ["", " a b ", "-x", "--", "ü", 'quo"te', "line\nbreak", "*"]
    found = json.loads(bed.output(bundle.args(PROBE, *words)))
    assert found["argv"] == [PROBE, *(word.encode().decode("latin-1") for word in words)]


def test_args_are_required(bed, bundle):
    bundle.process["args"] = []
    assert "args must not be empty" in bed.refused(bundle)


def test_the_program_is_looked_up_in_the_path_of_the_process(bed, bundle):
    (bundle.rootfs / "opt").mkdir()
    (bundle.rootfs / "opt/tool").write_text("#!/bin/sh\necho found in opt\n")
    (bundle.rootfs / "opt/tool").chmod(0o755)
    bundle.process["env"] = ["PATH=/nowhere:/opt:/bin"]
    assert bed.output(bundle.args("tool")) == "found in opt\n"


def test_a_program_that_is_not_in_the_path(bed, bundle):
    said = bed.refused(bundle.args("no-such-program"))
    assert "executable file not found in $PATH" in said


def test_a_program_that_does_not_exist(bed, bundle):
    assert "no such file or directory" in bed.refused(bundle.args("/no/such"))


def test_a_program_that_is_not_executable(bed, bundle):
    assert "permission denied" in bed.refused(bundle.args("/etc/passwd"))


def test_a_program_that_is_a_directory(bed, bundle):
    assert re.search("is a directory|permission denied", bed.refused(bundle.args("/etc")))


def test_env_is_what_was_given_and_no_more(bed, bundle):
    bundle.process["env"] = ["PATH=/bin", "A=1", "B=", "C=two words", "HOME=/h"]
    assert sorted(bed.facts(bundle)["env"]) == sorted(bundle.process["env"])


def test_the_later_of_two_equal_names_wins(bed, bundle):
    bundle.process["env"] = ["PATH=/bin", "A=1", "A=2", "HOME=/h"]
    assert sorted(bed.facts(bundle)["env"]) == ["A=2", "HOME=/h", "PATH=/bin"]


def test_home_comes_from_the_accounts_of_the_container(bed, bundle):
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    assert "HOME=/home/worker" in bed.facts(bundle)["env"]


def test_home_of_an_unknown_user(bed, bundle):
    bundle.process["user"] = {"uid": 4321, "gid": 4321}
    assert "HOME=/" in bed.facts(bundle)["env"]


def test_cwd(bed, bundle):
    bundle.process["cwd"] = "/usr/bin"
    assert bed.facts(bundle)["cwd"] == "/usr/bin"


def test_cwd_is_made_where_it_lacks(bed, bundle):
    bundle.process["cwd"] = "/new/folder"
    bundle.config["root"]["readonly"] = False
    assert bed.facts(bundle)["cwd"] == "/new/folder"
    assert (bundle.rootfs / "new/folder").stat().st_mode & 0o777 == 0o755


def test_cwd_must_be_absolute(bed, bundle):
    bundle.process["cwd"] = "tmp"
    assert "Cwd must be an absolute path" in bed.refused(bundle)


def test_cwd_must_be_there(bed, bundle):
    bundle.process["cwd"] = ""
    assert "Cwd property must not be empty" in bed.refused(bundle)


def test_cwd_that_is_a_file(bed, bundle):
    bundle.process["cwd"] = "/etc/passwd"
    assert "not a directory" in bed.refused(bundle)


def test_cwd_of_the_user_alone(bed, bundle):
    """Only the user may enter it, not root without CAP_DAC_OVERRIDE."""
    (bundle.rootfs / "home/worker").mkdir(mode=0o700)
    os.chown(bundle.rootfs / "home/worker", 1000, 1000)
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    bundle.process["cwd"] = "/home/worker"
    assert bed.facts(bundle)["cwd"] == "/home/worker"


def test_user(bed, bundle):
    bundle.process["user"] = {"uid": 1234, "gid": 5678}
    found = bed.facts(bundle)
    assert (found["uid"], found["gid"], found["groups"]) == ([1234] * 3, [5678] * 3, [])


def test_additional_gids(bed, bundle):
    bundle.process["user"] = {"uid": 1, "gid": 2, "additionalGids": [5, 4000000, 7]}
    assert sorted(bed.facts(bundle)["groups"]) == [5, 7, 4000000]


def test_umask_is_0022_unless_given(bed, bundle):
    assert bed.facts(bundle)["umask"] == 0o22


@pytest.mark.parametrize("value", [0, 0o27, 0o777])
def test_umask(bed, bundle, value):
    bundle.process["user"]["umask"] = value
    assert bed.facts(bundle)["umask"] == value


def test_process_is_required_at_start(bed, bundle):
    del bundle.config["process"]
    assert "process property must not be empty" in bed.refused(bundle)


@pytest.mark.parametrize("name", SETS)
def test_each_capability_set(bed, bundle, name):
    wanted = {"bounding": ["CAP_CHOWN", "CAP_KILL"]}
    wanted["permitted"] = ["CAP_KILL"] if name != "effective" else ["CAP_CHOWN", "CAP_KILL"]
    wanted["effective"] = ["CAP_KILL"]
    if name in ("inheritable", "ambient"):
        wanted["inheritable"] = ["CAP_KILL"]
    if name == "ambient":
        wanted["ambient"] = ["CAP_KILL"]
    bundle.process["capabilities"] = wanted
    # As root, execve would give what is in the bounding set.
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    found = bed.facts(bundle)["capabilities"]
    assert found["bounding"] == mask("CAP_CHOWN", "CAP_KILL")
    assert found["inheritable"] == (mask("CAP_KILL") if "inheritable" in wanted else 0)
    assert found["ambient"] == (mask("CAP_KILL") if name == "ambient" else 0)
    assert found["effective"] == found["permitted"] == found["ambient"]


def test_capabilities_of_root(bed, bundle):
    wanted = mask("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
    found = bed.facts(bundle)["capabilities"]
    assert [found[name] for name in SETS] == [wanted, wanted, 0, wanted, 0]


def test_no_capabilities_at_all(bed, bundle):
    bundle.process["capabilities"] = {}
    assert set(bed.facts(bundle)["capabilities"].values()) == {0}


def test_an_unknown_capability_is_a_warning(bed, bundle):
    for name in ("bounding", "effective", "permitted"):
        bundle.process["capabilities"][name] = ["CAP_KILL", "CAP_UNHEARD_OF"]
    done = bed.run(bundle.args(PROBE))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["capabilities"]["bounding"] == mask("CAP_KILL")
    assert "CAP_UNHEARD_OF" in done.stderr
    assert "level=warning" in done.stderr


def test_no_new_privileges(bed, bundle):
    for wanted in (True, False):
        bundle.process["noNewPrivileges"] = wanted
        assert bed.facts(bundle)["no_new_privs"] == int(wanted)


LIMITS = {
    "CPU": 0, "FSIZE": 1, "DATA": 2, "STACK": 3, "CORE": 4, "RSS": 5, "NPROC": 6, "NOFILE": 7,
    "MEMLOCK": 8, "AS": 9, "LOCKS": 10, "SIGPENDING": 11, "MSGQUEUE": 12, "NICE": 13,
    "RTPRIO": 14, "RTTIME": 15,
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_rlimit(bed, bundle, name):
    import resource

    hard = resource.getrlimit(LIMITS[name])[1]
    value = 1 << 29 if hard in (-1, resource.RLIM_INFINITY) else hard
    limit = {"type": f"RLIMIT_{name}", "soft": value // 2, "hard": value}
    bundle.process["rlimits"] = [limit]
    assert bed.facts(bundle)["rlimits"][LIMITS[name]] == [value // 2, value]


def test_an_unknown_rlimit(bed, bundle):
    bundle.process["rlimits"] = [{"type": "RLIMIT_FOO", "soft": 1, "hard": 1}]
    assert "RLIMIT_FOO" in bed.refused(bundle)


def test_the_same_rlimit_twice(bed, bundle):
    limit = {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
    bundle.process["rlimits"] = [limit, dict(limit, hard=1)]
    bed.refused(bundle)


def test_an_rlimit_with_more_soft_than_hard(bed, bundle):
    bundle.process["rlimits"] = [{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]
    assert "rlimit" in bed.refused(bundle)


def test_oom_score_adj(bed, bundle):
    bundle.process["oomScoreAdj"] = 123
    assert bed.output(bundle.shell("cat /proc/self/oom_score_adj")) == "123\n"


def test_oom_score_adj_is_inherited_unless_given(bed, bundle):
    with open("/proc/self/oom_score_adj") as stream:
        own = stream.read()
    assert bed.output(bundle.shell("cat /proc/self/oom_score_adj")) == own


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"policy": "SCHED_BATCH", "nice": 5}, {"policy": 3, "nice": 5}),
        ({"policy": "SCHED_IDLE"}, {"policy": 5}),
        ({"policy": "SCHED_OTHER", "nice": 7}, {"policy": 0, "nice": 7}),
        (
            {"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
            {"policy": 3, "flags": 1},
        ),
    ],
    ids=["batch", "idle", "other", "reset"],
)
def test_scheduler(bed, bundle, wanted, expected):
    bundle.process["scheduler"] = wanted
    found = bed.facts(bundle)["scheduler"]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "wanted",
    [
        {"policy": "SCHED_UNHEARD"},
        {"nice": 1},
        {"policy": "SCHED_OTHER", "nice": 99},
        {"policy": "SCHED_OTHER", "priority": 3},
        {"policy": "SCHED_OTHER", "runtime": 3},
        {"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UNHEARD"]},
    ],
    ids=["policy", "none", "nice", "priority", "runtime", "flags"],
)
def test_a_wrong_scheduler(bed, bundle, wanted):
    bundle.process["scheduler"] = wanted
    bed.refused(bundle)


@pytest.mark.parametrize(
    ("name", "priority", "number"),
    [("BE", 4, 2), ("IDLE", 0, 3), ("RT", 2, 1)],
    ids=["be", "idle", "rt"],
)
def test_io_priority(bed, bundle, name, priority, number):
    bundle.process["ioPriority"] = {"class": f"IOPRIO_CLASS_{name}", "priority": priority}
    assert bed.facts(bundle)["io_priority"] == number << 13 | priority


@pytest.mark.parametrize(
    "wanted",
    [
        {"class": "IOPRIO_CLASS_BE", "priority": 8},
        {"class": "IOPRIO_CLASS_BE", "priority": -1},
        {"class": "IOPRIO_CLASS_UNHEARD", "priority": 1},
    ],
    ids=["large", "negative", "class"],
)
def test_a_wrong_io_priority(bed, bundle, wanted):
    bundle.process["ioPriority"] = wanted
    bed.refused(bundle)


def test_selinux_label_without_selinux(bed, bundle):
    if os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("did not run: SELinux is on")
    bundle.process["selinuxLabel"] = "system_u:system_r:container_t:s0"
    assert "selinux" in bed.refused(bundle)


def test_apparmor_profile_without_apparmor(bed, bundle):
    if os.path.isdir("/sys/kernel/security/apparmor"):
        pytest.skip("did not run: AppArmor is on")
    bundle.process["apparmorProfile"] = "some-profile"
    assert "apparmor" in bed.refused(bundle)


def test_no_terminal_by_default(bed, bundle):
    assert bed.facts(bundle)["terminal"] is None


def test_a_terminal_needs_a_socket(bed, bundle):
    bundle.process["terminal"] = True
    assert "console socket" in bed.refused(bundle)


def test_a_socket_needs_a_terminal(bed, bundle):
    assert "console socket" in bed.refused(bundle, "--console-socket", str(bed.place / "none"))


def test_only_standard_streams_are_open(bed, bundle):
    readers = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(3)]
    try:
        found = bed.facts(bundle, pass_fds=readers)
    finally:
        for fd in readers:
            os.close(fd)
    assert sorted(found["fds"], key=int) == ["0", "1", "2"]


def test_signals_are_as_a_new_process_has_them(bed, bundle):
    found = bed.facts(bundle)["signals"]
    assert found == {"blocked": [], "ignored": []}


def test_the_payload_is_dumpable_and_outlives_its_parent(bed, bundle):
    found = bed.facts(bundle)
    assert (found["dumpable"], found["pdeathsig"]) == (1, 0)


def test_the_payload_leads_a_session(bed, bundle):
    found = bed.facts(bundle)
    assert (found["pid"], found["sid"]) == (1, 1)


def test_the_session_keyring_is_the_containers_own(bed, bundle):
    found = bed.facts(bundle)["keyring"]
    assert found.endswith(f";_ses.{bed.ids[-1]}")


def test_no_new_keyring(bed, bundle):
    assert ";_ses." not in bed.facts(bundle, "--no-new-keyring")["keyring"]


@pytest.mark.parametrize("status", [0, 1, 77, 255])
def test_the_status_of_run_is_the_payloads(bed, bundle, status):
    assert bed.run(bundle.args(PROBE, "status", str(status))).returncode == status


def test_the_status_of_run_after_a_signal(bed, bundle):
    bundle.without_space("pid")
    assert bed.run(bundle.shell("kill -TERM $$")).returncode == 128 + 15


def test_standard_streams_reach_the_payload(bed, bundle):
    done = bed.run(bundle.shell("cat; echo wrong >&2; exit 3"), input="hello")
    assert (done.returncode, done.stdout) == (3, "hello")
    assert "wrong" in done.stderr


def test_preserved_descriptors(bed, bundle):
    (bundle.path / "three").write_text("passed on\n")
    (bundle.path / "four").write_text("as well\n")
    bundle.args("sh", "-c", "cat <&3 && cat <&4 && ls /proc/self/fd").write()
    argv = bed.argv("run", "--preserve-fds", "2", "--bundle", bundle.path, bed.name())
    script = 'exec "$@" 3<three 4<four 5<four'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *argv], cwd=bundle.path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["passed on", "as well"]
    # `ls` opens the directory itself; the next free number is then 5.
    assert done.stdout.split()[4:] == ["0", "1", "2", "3", "4", "5"]


def test_a_descriptor_to_preserve_that_is_not_there(bed, bundle):
    assert "preserved-fd" in bed.refused(bundle, "--preserve-fds", "9")
