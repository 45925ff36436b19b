"""`linux.seccomp`: each action, condition and flag, tried by system calls of the payload."""

from __future__ import annotations

import array
import json
import os
import socket

import pytest

from tests.oci.bed import DEADLINE_S, PROBE

ERRNO_DEFAULT = 1
ENOSYS = 38


def profile(*rules: dict, default: str = "SCMP_ACT_ALLOW", **more: object) -> dict:
    architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    found = {"defaultAction": default, "architectures": architectures, "syscalls": list(rules)}
    return {**found, **more}


def rule(action: str, *names: str, **more: object) -> dict:
    return {"names": list(names), "action": action, **more}


def error_of(bed, bundle, *words: str) -> int:
    return int(bed.output(bundle.args(PROBE, "call", *words)))


@pytest.fixture(params=[True, False], ids=["nnp", "privs"])
def nnp(request, bundle):
    bundle.process["noNewPrivileges"] = request.param
    return request.param


def test_errno(bed, bundle, nnp):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat"))
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == ERRNO_DEFAULT


def test_errno_of_a_number(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", errnoRet=77))
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == 77


def test_the_default_action_and_its_number(bed, bundle):
    allowed = [
        "read", "write", "close", "fstat", "newfstatat", "lseek", "mmap", "mprotect", "munmap",
        "brk",
        "rt_sigaction", "rt_sigprocmask", "ioctl", "access", "execve", "exit", "exit_group",
        "arch_prctl", "uname", "readlink", "prlimit64", "set_tid_address", "set_robust_list",
        "rseq",
        "getrandom", "openat", "fcntl", "futex", "sched_yield", "getpid", "capset", "prctl",
        "chdir",
        "setuid", "setgid", "setgroups", "setresuid", "setresgid", "capget", "close_range",
        "getcwd",
        "epoll_ctl", "epoll_pwait", "nanosleep", "tgkill", "madvise", "sigaltstack", "gettid",
        "openat2", "faccessat", "faccessat2", "stat", "lstat", "statx", "fstatfs", "statfs", "poll",
        "ppoll", "rt_sigreturn", "dup", "dup2", "dup3", "getppid", "pread64", "writev", "open",
        "keyctl", "getdents64", "fchdir", "fchown", "rt_sigtimedwait", "signalfd4", "pipe2",
        "clone",
        "getuid", "getgid", "geteuid", "getegid", "eventfd2", "epoll_create1", "waitid", "getxattr",
    ]  # fmt: skip
    bundle.linux["seccomp"] = profile(
        rule("SCMP_ACT_ALLOW", *allowed), default="SCMP_ACT_ERRNO", defaultErrnoRet=99
    )
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == 99


def test_a_call_newer_than_the_profile_is_enosys(bed, bundle):
    """Not the default's number: programs fall back to the older call only for ENOSYS."""
    test_the_default_action_and_its_number(bed, bundle)
    assert error_of(bed, bundle, "number", "600") == ENOSYS


@pytest.mark.parametrize(
    "action", ["SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD"]
)
def test_kill(bed, bundle, action):
    bundle.linux["seccomp"] = profile(rule(action, "mkdir"))
    assert bed.run(bundle.args(PROBE, "call", "mkdir", "/tmp/x")).returncode == 128 + 31


def test_trap(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_TRAP", "mkdir"))
    assert bed.run(bundle.args(PROBE, "call", "mkdir", "/tmp/x")).returncode == 128 + 31


def test_trace_without_a_tracer(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_TRACE", "mkdir"))
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == ENOSYS


@pytest.mark.parametrize("action", ["SCMP_ACT_LOG", "SCMP_ACT_ALLOW"])
def test_an_action_that_lets_pass(bed, bundle, action):
    bundle.linux["seccomp"] = profile(rule(action, "mkdir"))
    assert error_of(bed, bundle, "mkdir", "/dev/shm/x") == 0


OPERATORS = {
    "SCMP_CMP_EQ": (8, None, {8: 1, 9: 0}),
    "SCMP_CMP_NE": (8, None, {8: 0, 0: 1}),
    "SCMP_CMP_LT": (8, None, {0: 1, 8: 0}),
    "SCMP_CMP_LE": (8, None, {8: 1, 0x400000: 0}),
    "SCMP_CMP_GT": (8, None, {8: 0, 0x400000: 1}),
    "SCMP_CMP_GE": (8, None, {0: 0, 8: 1}),
    "SCMP_CMP_MASKED_EQ": (8, 8, {8: 1, 0: 0}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_condition(bed, bundle, name):
    value, second, cases = OPERATORS[name]
    condition = {"index": 0, "value": value, "op": name}
    if second is not None:
        condition["valueTwo"] = second
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "personality", args=[condition]))
    for argument, expected in cases.items():
        found = error_of(bed, bundle, "personality", str(argument))
        assert (found == ERRNO_DEFAULT) == bool(expected), argument


def test_two_conditions_on_one_argument_are_alternatives(bed, bundle):
    both = [{"index": 0, "value": number, "op": "SCMP_CMP_EQ"} for number in (8, 0x400000)]
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "personality", args=both))
    assert error_of(bed, bundle, "personality", "8") == ERRNO_DEFAULT
    assert error_of(bed, bundle, "personality", str(0x400000)) == ERRNO_DEFAULT
    assert error_of(bed, bundle, "personality", "0") == 0


def test_an_unknown_system_call_is_ignored(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "unheard_of", "mkdir"))
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == ERRNO_DEFAULT


WRONG = {
    "action": profile(rule("SCMP_ACT_UNHEARD", "mkdir")),
    "default": profile(default="SCMP_ACT_UNHEARD"),
    "operator": profile(
        rule("SCMP_ACT_ERRNO", "mkdir", args=[{"index": 0, "value": 0, "op": "UNHEARD"}])
    ),
    "architecture": profile() | {"architectures": ["SCMP_ARCH_UNHEARD"]},
    "flag": profile(rule("SCMP_ACT_ERRNO", "mkdir"), flags=["SECCOMP_FILTER_FLAG_UNHEARD"]),
    "notify default": profile(default="SCMP_ACT_NOTIFY"),
    "notify write": profile(rule("SCMP_ACT_NOTIFY", "write"), listenerPath="/no/such"),
    "no listener": profile(rule("SCMP_ACT_NOTIFY", "mkdir")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_profile_that_is_wrong(bed, bundle, name):
    bundle.linux["seccomp"] = WRONG[name]
    bed.refused(bundle)


FLAGS = {
    "SECCOMP_FILTER_FLAG_LOG": "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC": "SECCOMP_FILTER_FLAG_TSYNC",
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag(bed, bundle, name):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir"), flags=[name])
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == ERRNO_DEFAULT


def test_the_filter_holds_for_exec_too(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", errnoRet=77))
    container = bed.sleeping(bundle)
    assert container.exec(PROBE, "call", "mkdir", "/tmp/x").stdout == "77\n"


def test_one_filter_and_no_more(bed, bundle):
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir"))
    said = bed.output(bundle.shell("grep -i seccomp /proc/self/status"))
    fields = dict(line.split(":\t") for line in said.splitlines())
    assert fields["Seccomp"] == "2"
    assert fields["Seccomp_filters"] == "1"


def test_without_a_profile_there_is_no_filter(bed, bundle):
    assert "Seccomp:\t0" in bed.output(bundle.args("cat", "/proc/self/status"))


def test_the_listener(bed, bundle):
    path = bed.place / "listener"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(2)
    listener.settimeout(DEADLINE_S)
    bundle.linux["seccomp"] = profile(
        rule("SCMP_ACT_NOTIFY", "mkdir"), listenerPath=str(path), listenerMetadata="some words"
    )
    container = bed.create(bundle.args("sleep", "600"))
    with listener:
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(DEADLINE_S)
        data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(16))
    state = json.loads(data)
    numbers = array.array("i")
    numbers.frombytes(ancillary[0][2])
    for number in numbers:
        assert "seccomp" in os.readlink(f"/proc/self/fd/{number}")
        os.close(number)
    assert state["fds"] == ["seccompFd"]
    assert state["metadata"] == "some words"
    assert state["pid"] == container.pid
    assert state["state"]["id"] == container.id
    assert state["ociVersion"].startswith("1.")


def test_many_rules(bed, bundle):
    """More than a jump of eight bits reaches."""
    rules = [
        rule("SCMP_ACT_ERRNO", "socket", errnoRet=9, args=[
            {"index": 0, "value": number, "op": "SCMP_CMP_EQ"},
            {"index": 1, "value": number + 1, "op": "SCMP_CMP_EQ"},
        ])
        for number in range(50, 250)
    ]  # fmt: skip
    bundle.linux["seccomp"] = profile(*rules, rule("SCMP_ACT_ERRNO", "mkdir", errnoRet=77))
    assert error_of(bed, bundle, "mkdir", "/tmp/x") == 77
