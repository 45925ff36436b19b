"""Two small interpreters: classic BPF as seccomp runs it, eBPF as a device check of cgroup2."""

from __future__ import annotations

import struct

_X86_64 = 0xC000003E


def run_classic(code: bytes, number: int, *arguments: int, architecture: int = _X86_64) -> int:
    """Return what a seccomp filter answers for one system call."""
    values = [value & (1 << 64) - 1 for value in arguments] + [0] * (6 - len(arguments))
    data = struct.pack("=IIQ6Q", number, architecture, 0, *values)
    program = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    accumulator, place = 0, 0
    while True:
        operation, if_true, if_false, value = program[place]
        place += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return value
        elif operation == 0x05:
            place += value
        elif operation == 0x54:
            accumulator &= value
        else:
            tests = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }
            place += if_true if tests[operation] else if_false


def run_device(  # noqa: C901
    code: bytes, kind: int, access: int, major: int, minor: int
) -> int:
    """Return what a BPF_PROG_TYPE_CGROUP_DEVICE program answers for one access."""
    memory = struct.pack("=III", access << 16 | kind, major, minor)
    program = [struct.unpack_from("=BBhi", code, at) for at in range(0, len(code), 8)]
    registers: dict[int, int] = {1: 0}
    place = 0
    for _ in range(len(program) + 1):
        operation, both, offset, value = program[place]
        target, source = both & 15, both >> 4
        place += 1
        if operation == 0x61:
            (registers[target],) = struct.unpack_from("=I", memory, registers[source] + offset)
        elif operation in (0xB4, 0xB7):
            registers[target] = value & 0xFFFFFFFF
        elif operation in (0xBC, 0xBF):
            registers[target] = registers[source]
        elif operation == 0x54:
            registers[target] &= value & 0xFFFFFFFF
        elif operation == 0x74:
            registers[target] >>= value
        elif operation == 0x15:
            place += offset if registers[target] == value else 0
        elif operation == 0x55:
            place += offset if registers[target] != value else 0
        elif operation == 0x5D:
            place += offset if registers[target] != registers[source] else 0
        elif operation == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"unknown operation {operation:#x}")
    raise AssertionError("the program does not end")
