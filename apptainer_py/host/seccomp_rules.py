"""From the words of a seccomp profile to libseccomp's numbers, and what runc puts in front."""

from __future__ import annotations

import os
import struct

from apptainer_py.base import log
from apptainer_py.host.seccomp import NEW_LISTENER, SeccompError
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Condition = tuple[int, int, int, int]
    Rule = tuple[bytes, int, list[Condition]]

_EPERM, _ENOSYS = 1, 38
_ERRNO, _TRACE, _NOTIFY = 0x00050000, 0x7FF00000, 0x7FC00000
_ACTIONS = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": _ERRNO,
    "SCMP_ACT_TRACE": _TRACE,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_NOTIFY": _NOTIFY,
}
# A good tracer answers ENOSYS by itself, so tracing counts among what lets a call through.
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_X86_64, _X32 = 0xC000003E, 0x4000003E
_S390 = (0x16, 0x80000016)
_ARCHITECTURES = {
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X86_64": _X86_64,
    "SCMP_ARCH_X32": _X32,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
    "SCMP_ARCH_LOONGARCH64": 0xC0000102,
    "SCMP_ARCH_M68K": 0x4,
    "SCMP_ARCH_MIPS": 0x8,
    "SCMP_ARCH_MIPS64": 0x80000008,
    "SCMP_ARCH_MIPS64N32": 0xA0000008,
    "SCMP_ARCH_MIPSEL": 0x40000008,
    "SCMP_ARCH_MIPSEL64": 0xC0000008,
    "SCMP_ARCH_MIPSEL64N32": 0xE0000008,
    "SCMP_ARCH_PARISC": 0xF,
    "SCMP_ARCH_PARISC64": 0x8000000F,
    "SCMP_ARCH_PPC": 0x14,
    "SCMP_ARCH_PPC64": 0x80000015,
    "SCMP_ARCH_PPC64LE": 0xC0000015,
    "SCMP_ARCH_RISCV64": 0xC00000F3,
    "SCMP_ARCH_S390": 0x16,
    "SCMP_ARCH_S390X": 0x80000016,
    "SCMP_ARCH_SH": 0x4000002A,
    "SCMP_ARCH_SHEB": 0x2A,
}
_NATIVE = {
    "x86_64": _X86_64,
    "i686": 0x40000003,
    "aarch64": 0xC00000B7,
    "armv7l": 0x40000028,
    "ppc64le": 0xC0000015,
    "s390x": 0x80000016,
    "riscv64": 0xC00000F3,
    "loongarch64": 0xC0000102,
}
_FLAGS = {
    # One thread is all that there is when the filter is loaded.
    "SECCOMP_FILTER_FLAG_TSYNC": 0,
    "SECCOMP_FILTER_FLAG_LOG": 1 << 1,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 1 << 2,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 1 << 5,
}
_SPEC_ALLOW, _WAIT_KILLABLE = 1 << 2, 1 << 5
_ARGUMENTS_MAX = 6
# A binary tree pays off from here on, and is not to be had for an empty list.
_TREE_FROM = 32
# The first libseccomp interface level that knows SCMP_ACT_NOTIFY.
_NOTIFY_LEVEL = 6
_LOAD, _JUMP, _EQUAL, _GREATER, _BITS, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32_BIT = 1 << 30


def _look_up(table: dict[str, int], word: object, kind: str) -> int:
    if not isinstance(word, str) or word not in table:
        raise SeccompError(text=f"string {word} is not a valid {kind} for seccomp")
    return table[word]


def _action(word: object, errno_value: int | None) -> int:
    action = _look_up(_ACTIONS, word, "action")
    if action in (_ERRNO, _TRACE):
        return action | ((_EPERM if errno_value is None else errno_value) & 0xFFFF)
    return action


def flags_of(profile: dict[str, Any]) -> int:
    """Return the flags for seccomp(2); a profile that says nothing asks for SPEC_ALLOW.

    Raises:
        SeccompError: one is not known.
    """
    wanted = profile.get("flags")
    flags = _SPEC_ALLOW if wanted is None else 0
    for word in wanted or ():
        if word not in _FLAGS:
            raise SeccompError(text=f"seccomp flag {word} is not known to runc")
        flags |= _FLAGS[word]
    if any(call.get("action") == "SCMP_ACT_NOTIFY" for call in profile.get("syscalls") or ()):
        flags |= NEW_LISTENER
    elif flags & _WAIT_KILLABLE:
        text = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a rule with SCMP_ACT_NOTIFY"
        raise SeccompError(text=text)
    return flags


def _condition(name: str, argument: dict[str, Any]) -> Condition:
    index = argument.get("index") or 0
    if not 0 <= index < _ARGUMENTS_MAX:
        text = (
            f"error creating seccomp syscall condition for syscall {name}: "
            f"syscalls only have up to {_ARGUMENTS_MAX} arguments"
        )
        raise SeccompError(text=text)
    operator = _look_up(_OPERATORS, argument.get("op"), "operator")
    mask = (1 << 64) - 1
    return (
        index,
        operator,
        (argument.get("value") or 0) & mask,
        (argument.get("valueTwo") or 0) & mask,
    )


def _rules_of_call(call: dict[str, Any], default: int) -> list[Rule]:
    action = _action(call.get("action"), call.get("errnoRet"))
    rules: list[Rule] = []
    names = call.get("names") or ()
    if not names:
        raise SeccompError(text="empty string is not a valid syscall")
    for name in names:
        if not name:
            raise SeccompError(text="empty string is not a valid syscall")
        if action == _NOTIFY and name == "write":
            # The number of the listener is said with write(2), by who is already filtered.
            text = "SCMP_ACT_NOTIFY cannot be used for the write syscall"
            raise SeccompError(text=text)
        conditions = [_condition(name, argument) for argument in call.get("args") or ()]
        if action == default:
            # libseccomp refuses what would change nothing.
            continue
        word = name.encode("utf-8", "surrogateescape")
        if len({index for index, *_ in conditions}) < len(conditions):
            # Two tests of one argument cannot be in one rule: any of them is enough then.
            rules += [(word, action, [condition]) for condition in conditions]
        else:
            rules.append((word, action, conditions))
    return rules


def rules_of(profile: dict[str, Any], default: int) -> list[Rule]:
    """Return the rules of a profile in libseccomp's numbers.

    Raises:
        SeccompError: a word in it is not known.
    """
    rules: list[Rule] = []
    for call in profile.get("syscalls") or ():
        rules += _rules_of_call(call, default)
    return rules


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _newer_than(last: int) -> list[bytes]:
    return [
        _instruction(_GREATER, last, 0, 1),
        _instruction(_RETURN, _ERRNO | _ENOSYS),
    ]


def unknown_calls(last: dict[int, int]) -> bytes:
    """Return the start of a program in which calls newer than a profile's are unknown, not denied.

    `last` has the largest number that the profile names for each architecture. A C library that
    gets EPERM for a call it has just learnt gives up; for ENOSYS it takes the older one.
    """
    sections: list[list[bytes]] = []
    for architecture in last:
        if architecture == _X32:
            if _X86_64 in last:
                continue
            tests = [_instruction(_BITS, _X32_BIT, 0, 2), *_newer_than(last[_X32])]
        elif architecture == _X86_64:
            known = _newer_than(last[_X86_64])
            extra = _newer_than(last[_X32]) if _X32 in last else []
            # After the tests of one kind of number, past those of the other.
            tests = [_instruction(_BITS, _X32_BIT, len(known) + (1 if extra else 0), 0), *known]
            tests += [_instruction(_JUMP, len(extra)), *extra] if extra else []
        else:
            tests = _newer_than(last[architecture])
            if architecture in _S390:
                # A number that the kernel does not know arrives as setup(2), which nobody uses.
                tests = [
                    _instruction(_EQUAL, 0, 0, 1),
                    _instruction(_RETURN, _ERRNO | _ENOSYS),
                    *tests,
                ]
        audit = _X86_64 if architecture == _X32 else architecture
        body = [_instruction(_LOAD, _NUMBER_AT), *tests]
        sections.append([_instruction(_EQUAL, audit, 0, len(body) + 1), *body])
    if not sections:
        return b""
    code: list[bytes] = []
    for section in reversed(sections):
        # Each ends with a jump to where the filter itself begins.
        code = [*section, _instruction(_JUMP, len(code)), *code]
    return b"".join([_instruction(_LOAD, _ARCHITECTURE_AT), *code])


def _last_numbers(profile: dict[str, Any], architectures: list[int]) -> dict[int, int]:
    names = [
        name.encode("utf-8", "surrogateescape")
        for call in profile.get("syscalls") or ()
        for name in call.get("names") or ()
    ]
    found = {}
    for architecture in architectures:
        number = max(_container.seccomp_numbers(architecture, names), default=0)
        if number > 0:
            found[architecture] = number
        else:
            log.debug(f"could not find any syscalls for arch {architecture:#x}")
    return found


def compile_profile(profile: dict[str, Any]) -> tuple[bytes, int]:
    """Return the filter and the flags for a profile that asks for something.

    Raises:
        SeccompError: it is not valid, or libseccomp is not there or refuses a rule.
    """
    flags = flags_of(profile)
    architectures = [
        _look_up(_ARCHITECTURES, word, "arch") for word in profile.get("architectures") or ()
    ]
    word = profile.get("defaultAction")
    default = _action(word, profile.get("defaultErrnoRet"))
    rules = rules_of(profile, default)
    if default == _NOTIFY:
        raise SeccompError(text="SCMP_ACT_NOTIFY cannot be used as default action")
    try:
        if flags & NEW_LISTENER:
            level = _container.seccomp_version()[3]
            if level < _NOTIFY_LEVEL:
                text = f"seccomp notify unsupported: API level: got {level}, want at least 6"
                raise SeccompError(text=text)
        code = _container.seccomp_compile(default, architectures, rules, len(rules) > _TREE_FROM)
        if word in _PERMISSIVE or default == _ERRNO | _ENOSYS:
            return code, flags
        native = _NATIVE.get(os.uname().machine)
        every = dict.fromkeys([*architectures, *([native] if native is not None else [])])
        return unknown_calls(_last_numbers(profile, list(every))) + code, flags
    except OSError as error:
        rule = error.filename
        where = f" rule for syscall {rule.decode()}" if isinstance(rule, bytes) else ""
        raise SeccompError(text=f"error adding seccomp filter{where}: {error.strerror}") from None
