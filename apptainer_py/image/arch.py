"""Names of processor architectures, and which of them this host can run."""

from __future__ import annotations

import os

# Two digits in a SIF file to the name that Apptainer prints (SIF specification 1.0).
SIF_CODES = {
    b"01": "386",
    b"02": "amd64",
    b"03": "arm",
    b"04": "arm64",
    b"05": "ppc64",
    b"06": "ppc64le",
    b"07": "mips",
    b"08": "mipsle",
    b"09": "mips64",
    b"10": "mips64le",
    b"11": "s390x",
    b"12": "riscv64",
    b"13": "loong64",
}

_MACHINES = {
    "i386": "386",
    "i486": "386",
    "i586": "386",
    "i686": "386",
    "x86_64": "amd64",
    "armv6l": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
    "aarch64": "arm64",
    "loongarch64": "loong64",
}

# What a build may be for.
BUILT_FOR = ("arm", "arm64", "amd64", "386", "ppc64le", "s390x", "riscv64")

_RUNS_TOO = {"amd64": "386", "arm64": "arm", "mips64": "mips", "mips64le": "mipsle"}

# ELF class (1: 32 bit, 2: 64 bit), byte order (1: little, 2: big) and e_machine.
_ELF = {
    "386": (1, 1, 3),
    "amd64": (2, 1, 62),
    "arm": (1, 1, 40),
    "arm64": (2, 1, 183),
    "ppc64": (2, 2, 21),
    "ppc64le": (2, 1, 21),
    "mips": (1, 2, 8),
    "mipsle": (1, 1, 8),
    "mips64": (2, 2, 8),
    "mips64le": (2, 1, 8),
    "s390x": (2, 2, 22),
    "riscv64": (2, 1, 243),
    "loong64": (2, 1, 258),
}

_ELF_BYTES = 20
_BINFMT_FOLDER = "/proc/sys/fs/binfmt_misc"


def host_arch() -> str:
    """Return the name of this kernel's architecture, as Go spells it."""
    machine = os.uname().machine
    return _MACHINES.get(machine, machine)


def can_run(image_arch: str, host: str, *, binfmt_folder: str = _BINFMT_FOLDER) -> bool:
    """Return whether a host runs programs of an image, itself or by a registered emulator.

    An emulator counts only if the kernel keeps it open (flag F): one that is found by its path
    would be searched for inside the container.
    """
    if image_arch in (host, _RUNS_TOO.get(host)):
        return True
    if image_arch not in _ELF:
        return False
    try:
        entries = sorted(os.listdir(binfmt_folder))
    except OSError:
        return False
    wanted = _elf_start(image_arch)
    return any(
        _entry_matches(_read_small(os.path.join(binfmt_folder, entry)), wanted)
        for entry in entries
        if entry not in ("register", "status")
    )


def is_variant(variant: object, wanted: str) -> bool:
    """Return whether a platform's variant (`v7`) is the one that is wanted; any is, for ""."""
    return not wanted or variant == f"v{wanted.removeprefix('v')}"


def of_program(start: bytes) -> str:
    """Return whose program an ELF file is by its first bytes, "" where they say nothing."""
    if start[:4] != b"\x7fELF" or len(start) < _ELF_BYTES:
        return ""
    order = "little" if start[5] == 1 else "big"
    facts = (start[4], start[5], int.from_bytes(start[18:20], order))  # type: ignore[arg-type]
    return next((name for name, wanted in _ELF.items() if wanted == facts), "")


def _elf_start(arch: str) -> bytes:
    bits, order, machine = _ELF[arch]
    ending = "little" if order == 1 else "big"
    return (
        b"\x7fELF"
        + bytes((bits, order, 1))
        + bytes(9)
        + (2).to_bytes(2, ending)  # type: ignore[arg-type]
        + machine.to_bytes(2, ending)  # type: ignore[arg-type]
    )


def _read_small(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _entry_matches(text: str, start: bytes) -> bool:
    lines = text.splitlines()
    words = dict(line.split(" ", 1) for line in lines if " " in line)
    if not lines or lines[0] != "enabled" or "F" not in words.get("flags:", ""):
        return False
    try:
        magic = bytes.fromhex(words.get("magic", ""))
        mask = bytes.fromhex(words["mask"]) if "mask" in words else b"\xff" * len(magic)
        offset = int(words.get("offset", "0"))
    except ValueError:
        return False
    if not magic or offset != 0 or len(mask) != len(magic):
        return False
    padded = start.ljust(len(magic), b"\0")
    return all(have & m == want & m for have, want, m in zip(padded, magic, mask, strict=False))
