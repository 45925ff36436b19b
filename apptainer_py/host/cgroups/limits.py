"""Limits as the command line and a TOML file name them, made into `linux.resources`."""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import LaunchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CPU_PERIOD_US = 100_000
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_INT64_MAX = (1 << 63) - 1
_FILE_BYTES_MAX = 1 << 20
# What a container may do with devices where nobody says otherwise: that is for other rules to say.
_ALL_DEVICES = {"allow": True, "access": "rwm"}


class LimitWrong(LaunchError):
    """A limit, or the file that has them, cannot be understood."""


def size(flag: str, text: str) -> int:
    """Return the bytes that a number with a unit (`512m`, `1.5 GiB`) means.

    Raises:
        LimitWrong: it is none.
    """
    wrong = LimitWrong(text=f"invalid {flag} value: invalid size: '{text}'")
    word = text.strip().lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz").rstrip(" ")
    unit = word[len(number) :].strip()
    for ending in ("ib", "b", "i"):
        if unit.endswith(ending):
            unit = unit[: -len(ending)]
            break
    whole, _, part = number.partition(".")
    if unit not in _UNITS or not (whole + part).isascii() or not (whole + "0").isdigit():
        raise wrong
    if not whole or (part and not part.isdigit()) or number.endswith("."):
        raise wrong
    shift = _UNITS[unit]
    found = (int(whole) << shift) + (int(part or 0) << shift) // int("1" + "0" * len(part))
    if found > _INT64_MAX:
        raise wrong
    return found


def cpu_quota_us(text: str, processors: int) -> int:
    """Return how much of each period so many processors are.

    Raises:
        LimitWrong: it is no number, or more than there are.
    """
    import decimal
    import re

    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?", text):
        raise LimitWrong(text=f"invalid cpus value: can't convert {text} to decimal")
    number = decimal.Decimal(text)
    if not decimal.Decimal("0.01") <= number <= processors:
        raise LimitWrong(text=f"cpus value must be in range 0.01 - {processors}")
    return int(number * CPU_PERIOD_US)


def weight_of_device(text: str) -> dict[str, int]:
    """Return an entry of `blockIO.weightDevice` for `path:weight`.

    Raises:
        LimitWrong: it has another form, or names no block device.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path:
        form = "blkio-weight-device specifications must be in <device>:<weight> format"
        raise LimitWrong(text=form)
    try:
        found = os.stat(path)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise LimitWrong(text=f"while examining device: {reason}") from None
    if not stat.S_ISBLK(found.st_mode):
        raise LimitWrong(text=f"while examining device: {path} is not a block device")
    if not number.isascii() or not number.isdigit() or not 10 <= int(number) <= 1000:
        raise LimitWrong(text="blkio-weight-device weight must be in range 10-1000")
    return {
        "major": os.major(found.st_rdev),
        "minor": os.minor(found.st_rdev),
        "weight": int(number),
    }


def from_flags(flags: dict[str, Any], processors: int) -> dict[str, Any]:
    """Return `linux.resources` for the options of a command line, by their names as fields.

    Raises:
        LimitWrong: one has a value that is none.
    """
    found = {
        "cpu": _cpu(flags, processors),
        "memory": _memory(flags),
        "pids": _pids(flags["pids_limit"]),
        "blockIO": _block(flags),
    }
    return {"devices": [_ALL_DEVICES], **{key: value for key, value in found.items() if value}}


def _cpu(flags: dict[str, Any], processors: int) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    if flags["cpu_shares"] >= 0:
        cpu["shares"] = flags["cpu_shares"]
    if flags["cpus"]:
        cpu["quota"] = cpu_quota_us(flags["cpus"], processors)
        cpu["period"] = CPU_PERIOD_US
    for name in ("cpus", "mems"):
        if flags[f"cpuset_{name}"]:
            cpu[name] = flags[f"cpuset_{name}"]
    return cpu


def _memory(flags: dict[str, Any]) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    for name, key in (
        ("memory", "limit"),
        ("memory_reservation", "reservation"),
        ("memory_swap", "swap"),
    ):
        text = flags[name]
        if text:
            endless = name == "memory_swap" and text.strip() == "-1"
            memory[key] = -1 if endless else size(name.replace("_", "-"), text)
    page = os.sysconf("SC_PAGESIZE")
    if 0 < memory.get("limit", 0) < page:  # the kernel would make it none at all
        raise LimitWrong(text=f"invalid memory value: nothing runs in less than {page} bytes")
    if flags["oom_kill_disable"]:
        memory["disableOOMKiller"] = True
    return memory


def _pids(limit: int) -> dict[str, Any]:
    if limit < -1:
        raise LimitWrong(text=f"invalid pids-limit: {limit}")
    return {"limit": limit} if limit else {}


def _block(flags: dict[str, Any]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    weight = flags["blkio_weight"]
    if weight:
        if not 10 <= weight <= 1000:
            raise LimitWrong(text="blkio-weight must be in range 10-1000")
        block["weight"] = weight
    if flags["blkio_weight_device"]:
        block["weightDevice"] = [weight_of_device(one) for one in flags["blkio_weight_device"]]
    return block


def read_file(path: str) -> dict[str, Any]:
    """Return what a TOML file says, which has the names of `linux.resources`.

    Raises:
        LimitWrong: there is no such file, or it is no TOML.
    """
    import tomllib

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise LimitWrong(text=f"{path} is not a regular file")
            data = os.read(fd, _FILE_BYTES_MAX + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise LimitWrong(text=f"open {path}: {(error.strerror or '').lower()}") from None
    if len(data) > _FILE_BYTES_MAX:
        raise LimitWrong(text=f"{path} is too long for a file of limits")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise LimitWrong(text=f"{path}: {reason[:1].lower()}{reason[1:]}") from None


def with_devices(resources: dict[str, Any]) -> dict[str, Any]:
    """Return the resources with every device allowed that they say nothing of."""
    return {**resources, "devices": [_ALL_DEVICES, *(resources.get("devices") or ())]}
