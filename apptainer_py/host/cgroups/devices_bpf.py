"""Rules for devices as an eBPF program: cgroup2 has no files for them."""

from __future__ import annotations

import os
import struct

from apptainer_py.host.cgroups.devices import ANY
from apptainer_py.host.cgroups.driver import CgroupError, why
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.host.cgroups.devices import Device, Rules

# linux/bpf.h: the program's type, where it is attached, and how.
_TYPE_DEVICE, _ATTACH_DEVICE = 15, 6
_ALLOW_MULTI, _REPLACE = 2, 4
_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ALL = 7
# Opcodes, all on 32 bits but the jumps.
_LOAD, _AND, _SHIFT, _COPY, _SET = 0x61, 0x54, 0x74, 0xBC, 0xB4
_JUMP_EQUAL, _JUMP_OTHER, _JUMP_OTHER_REGISTER, _EXIT = 0x15, 0x55, 0x5D, 0x95
# What the registers hold: r1 is the argument at first, then of use for one test.
_ANSWER, _SCRATCH, _KIND, _WANTED, _MAJOR, _MINOR = 0, 1, 2, 3, 4, 5


def _one(code: int, target: int, value: int = 0, *, source: int = 0, jump: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, jump, value)


def _answer(allow: bool) -> list[bytes]:  # noqa: FBT001
    return [_one(_SET, _ANSWER, int(allow)), _one(_EXIT, 0)]


def _test(device: Device, access: str, *, allow: bool) -> list[bytes]:
    kind, major, minor = device
    mask = sum(_ACCESS[letter] for letter in access)
    # Each leads to the next rule if it fails.
    tests: list[tuple[int, int, int, int]] = [(_JUMP_OTHER, _KIND, _KINDS[kind], 0)]
    before = [_one(_COPY, _SCRATCH, source=_WANTED), _one(_AND, _SCRATCH, mask)]
    if mask != _ALL:
        # All that is wanted must be allowed; any of it may be denied.
        if allow:
            tests.append((_JUMP_OTHER_REGISTER, _SCRATCH, 0, _WANTED))
        else:
            tests.append((_JUMP_EQUAL, _SCRATCH, 0, 0))
    if major != ANY:
        tests.append((_JUMP_OTHER, _MAJOR, major, 0))
    if minor != ANY:
        tests.append((_JUMP_OTHER, _MINOR, minor, 0))
    rest = _answer(allow)
    for code, target, value, source in reversed(tests):
        if code in (_JUMP_EQUAL, _JUMP_OTHER_REGISTER):
            rest = [*before, _one(code, target, value, source=source, jump=len(rest)), *rest]
        else:
            rest = [_one(code, target, value, jump=len(rest)), *rest]
    return rest


def device_program(rules: Rules) -> bytes:
    """Return the program that answers 1 for what the rules allow, else 0."""
    code = [
        _one(_LOAD, _KIND, source=_SCRATCH),
        _one(_AND, _KIND, 0xFFFF),
        _one(_LOAD, _WANTED, source=_SCRATCH),
        _one(_SHIFT, _WANTED, 16),
        _one(_LOAD, _MAJOR, source=_SCRATCH, jump=4),
        _one(_LOAD, _MINOR, source=_SCRATCH, jump=8),
    ]
    for device, access in rules.exceptions.items():
        code += _test(device, access, allow=not rules.default_allow)
    return b"".join([*code, *_answer(rules.default_allow)])


def attach_rules(directory: str, rules: Rules) -> None:
    """Put the rules in force for a group, in place of those before, without a moment of neither.

    Raises:
        CgroupError: the kernel refuses.
    """
    opened: list[int] = []
    try:
        target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.append(target)
        old = [_container.bpf_by_id(n) for n in _container.bpf_query(target, _ATTACH_DEVICE)]
        opened += old
        new = _container.bpf_load(_TYPE_DEVICE, device_program(rules))
        opened.append(new)
        if len(old) == 1:
            _container.bpf_attach(target, new, _ATTACH_DEVICE, _ALLOW_MULTI | _REPLACE, old[0])
            return
        _container.bpf_attach(target, new, _ATTACH_DEVICE, _ALLOW_MULTI)
        for program in old:
            _container.bpf_detach(target, program, _ATTACH_DEVICE)
    except OSError as error:
        text = f"unable to set the device rules of {directory}: {why(error)}"
        raise CgroupError(text=text, errno=error.errno) from None
    finally:
        for fd in opened:
            os.close(fd)
