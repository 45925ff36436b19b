"""Seccomp profiles as programs, run in an interpreter."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path

import pytest

from apptainer_py.host import seccomp, seccomp_rules
from apptainer_py.host.seccomp import SeccompError, program

SPEC = importlib.util.spec_from_file_location("bpf_run", Path(__file__).with_name("bpf_run.py"))
assert SPEC and SPEC.loader
bpf_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bpf_run)
run = bpf_run.run_classic

ALLOW, KILL_PROCESS, KILL_THREAD = 0x7FFF0000, 0x80000000, 0
READ, WRITE, MKDIR, OPENAT2, PERSONALITY = 0, 1, 83, 437, 135
I386 = 0x40000003


def failed(number: int) -> int:
    return 0x00050000 | number


def code_of(*calls: dict[str, object], **more: object) -> bytes:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list(calls), **more}
    return program(profile, None)[0]


def call(action: str, *names: str, **more: object) -> dict[str, object]:
    return {"names": list(names), "action": action, **more}


@pytest.mark.parametrize(
    ("action", "errno_value", "answer"),
    [
        ("SCMP_ACT_KILL", None, KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", None, KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", None, KILL_PROCESS),
        ("SCMP_ACT_TRAP", None, 0x00030000),
        ("SCMP_ACT_ERRNO", None, failed(errno.EPERM)),
        ("SCMP_ACT_ERRNO", 0, failed(0)),
        ("SCMP_ACT_ERRNO", errno.EXDEV, failed(errno.EXDEV)),
        ("SCMP_ACT_TRACE", None, 0x7FF00000 | errno.EPERM),
        ("SCMP_ACT_TRACE", 7, 0x7FF00007),
        ("SCMP_ACT_LOG", None, 0x7FFC0000),
        ("SCMP_ACT_NOTIFY", None, 0x7FC00000),
    ],
)
def test_every_action(action, errno_value, answer):
    more = {} if errno_value is None else {"errnoRet": errno_value}
    code = code_of(call(action, "mkdir", **more))
    assert run(code, MKDIR) == answer
    assert run(code, READ) == ALLOW


@pytest.mark.parametrize(
    ("operator", "value", "second", "matching", "others"),
    [
        ("SCMP_CMP_NE", 5, 0, [4, 1 << 40], [5]),
        ("SCMP_CMP_LT", 5, 0, [4, 0], [5, 1 << 40]),
        ("SCMP_CMP_LE", 5, 0, [5, 0], [6, 1 << 40]),
        ("SCMP_CMP_EQ", 1 << 40, 0, [1 << 40], [0, 5]),
        ("SCMP_CMP_GE", 5, 0, [5, 1 << 40], [4]),
        ("SCMP_CMP_GT", 5, 0, [6, 1 << 40], [5]),
        ("SCMP_CMP_MASKED_EQ", 0xFF, 0x0A, [0x0A, 0x10A], [0x0B]),
    ],
)
def test_every_operator(operator, value, second, matching, others):
    test = {"index": 0, "op": operator, "value": value, "valueTwo": second}
    code = code_of(call("SCMP_ACT_ERRNO", "personality", args=[test]))
    assert {run(code, PERSONALITY, number) for number in matching} == {failed(errno.EPERM)}
    assert {run(code, PERSONALITY, number) for number in others} == {ALLOW}


def test_tests_of_several_arguments_must_all_hold():
    tests = [{"index": n, "op": "SCMP_CMP_EQ", "value": n + 1} for n in range(3)]
    code = code_of(call("SCMP_ACT_ERRNO", "personality", args=tests))
    assert run(code, PERSONALITY, 1, 2, 3) == failed(errno.EPERM)
    assert run(code, PERSONALITY, 1, 2, 4) == ALLOW


def test_tests_of_one_argument_are_alternatives():
    tests = [{"index": 0, "op": "SCMP_CMP_EQ", "value": n} for n in (3, 5)]
    code = code_of(call("SCMP_ACT_ERRNO", "personality", args=tests))
    assert [run(code, PERSONALITY, n) == ALLOW for n in (3, 4, 5)] == [False, True, False]


def test_a_rule_that_changes_nothing_and_unknown_names_are_left_out():
    code = code_of(call("SCMP_ACT_ALLOW", "read"), call("SCMP_ACT_ERRNO", "no_such_call", "mkdir"))
    assert run(code, MKDIR) == failed(errno.EPERM)


def test_more_architectures():
    code = code_of(
        call("SCMP_ACT_ERRNO", "mkdir"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    )
    assert run(code, 39, architecture=I386) == failed(errno.EPERM)
    assert run(code, MKDIR) == failed(errno.EPERM)
    assert run(code, 39) == ALLOW


def test_calls_newer_than_the_profile_are_unknown():
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [call("SCMP_ACT_ALLOW", "read", "openat2")],
    }
    code, _ = program(profile, None)
    assert run(code, READ) == ALLOW
    assert run(code, OPENAT2) == ALLOW
    assert run(code, MKDIR) == failed(errno.EPERM)
    assert run(code, OPENAT2 + 1) == failed(errno.ENOSYS)
    assert run(code, OPENAT2 + 1, architecture=I386) == failed(errno.ENOSYS)
    assert run(code, 3, architecture=I386) == ALLOW
    assert run(code, 1 << 30 | READ) == ALLOW
    assert run(code, 1 << 30 | MKDIR) == failed(errno.EPERM)
    assert run(code, 1 << 30 | 700) == failed(errno.ENOSYS)


def test_calls_newer_than_a_profile_without_x32_stay_killed_there():
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [call("SCMP_ACT_ALLOW", "openat2")]}
    code, _ = program(profile, None)
    assert run(code, OPENAT2 + 1) == failed(errno.ENOSYS)
    assert run(code, 1 << 30 | OPENAT2 + 1) in (KILL_PROCESS, KILL_THREAD)


@pytest.mark.parametrize("default", ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"])
def test_a_permissive_default_stays(default):
    code, _ = program(
        {"defaultAction": default, "syscalls": [call("SCMP_ACT_KILL", "mkdir")]}, None
    )
    assert run(code, 600) == seccomp_rules._action(default, None)


def test_default_errno():
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 77,
        "syscalls": [call("SCMP_ACT_ALLOW", "openat2")],
    }
    assert run(program(profile, None)[0], MKDIR) == failed(77)
    profile["defaultErrnoRet"] = errno.ENOSYS
    assert run(program(profile, None)[0], OPENAT2 + 1) == failed(errno.ENOSYS)


def test_s390_multiplexes_through_zero():
    code = seccomp_rules.unknown_calls({0x80000016: 400})
    code += seccomp_rules._instruction(0x06, ALLOW)
    answers = [run(code, number, architecture=0x80000016) for number in (0, 5, 400, 401)]
    assert answers == [failed(errno.ENOSYS), ALLOW, ALLOW, failed(errno.ENOSYS)]
    assert run(code, 401) == ALLOW


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (None, 1 << 2),
        ([], 0),
        (["SECCOMP_FILTER_FLAG_TSYNC"], 0),
        (["SECCOMP_FILTER_FLAG_LOG"], 1 << 1),
        (["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"], 6),
    ],
)
def test_flags(flags, expected):
    more = {} if flags is None else {"flags": flags}
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [call("SCMP_ACT_KILL", "mkdir")]}
    assert program({**profile, **more}, None)[1] == expected


def test_notify_asks_for_a_listener():
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        "syscalls": [call("SCMP_ACT_NOTIFY", "mkdir")],
    }
    assert program(profile, None)[1] == seccomp.NEW_LISTENER | 1 << 5


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        ({"defaultAction": "SCMP_ACT_X"}, "string SCMP_ACT_X is not a valid action for seccomp"),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_Z80"]},
            "string SCMP_ARCH_Z80 is not a valid arch for seccomp",
        ),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["FLAG_X"]},
            "seccomp flag FLAG_X is not known to runc",
        ),
        (
            {"defaultAction": "SCMP_ACT_NOTIFY"},
            "SCMP_ACT_NOTIFY cannot be used as default action",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [call("SCMP_ACT_NOTIFY", "write")],
            },
            "SCMP_ACT_NOTIFY cannot be used for the write syscall",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [call("SCMP_ACT_KILL", "read", args=[{"index": 0, "op": "X"}])],
            },
            "string X is not a valid operator for seccomp",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    call("SCMP_ACT_KILL", "read", args=[{"index": 6, "op": "SCMP_CMP_EQ"}])
                ],
            },
            "error creating seccomp syscall condition for syscall read: "
            "syscalls only have up to 6 arguments",
        ),
    ],
)
def test_what_is_not_valid_is_named(profile, text):
    with pytest.raises(SeccompError) as caught:
        program(profile, None)
    assert str(caught.value) == text


def test_no_profile_at_all():
    assert program({}, None) == (b"", 0)


def test_a_compiled_program_is_kept_for_the_next(tmp_path, monkeypatch):
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [call("SCMP_ACT_KILL", "mkdir")]}
    place = tmp_path / "cache"
    first = program(profile, str(place))
    (file,) = place.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(seccomp_rules, "compile_profile", None)
    assert program(profile, str(place)) == first


@pytest.mark.parametrize("harm", ["mode", "size", "empty", "magic", "link"])
def test_a_file_that_others_may_have_made_is_not_used(tmp_path, harm):
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [call("SCMP_ACT_KILL", "mkdir")]}
    first = program(profile, str(tmp_path))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    bad = data[:24] + bytes(len(data) - 24)
    if harm == "mode":
        file.write_bytes(bad)
        file.chmod(0o666)
    elif harm == "link":
        file.unlink()
        (tmp_path / "other").write_bytes(bad)
        os.symlink("other", file)
    else:
        file.write_bytes({"size": bad[:-8], "empty": b"", "magic": b"X" + bad[1:]}[harm])
    assert program(profile, str(tmp_path)) == first
