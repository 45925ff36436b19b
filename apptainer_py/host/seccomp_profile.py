"""A seccomp profile as users have it in a file: Docker's form, or that of config.json.

What Docker's form leaves to the machine and to the payload's capabilities (`archMap`, `includes`,
`excludes`) is decided here; what is left has the form of config.json.
"""

from __future__ import annotations

import os

from apptainer_py.host.seccomp import SeccompError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

FILE_BYTES = 1 << 20
# What uname(2) calls a machine: libseccomp's name, and the word of Docker's conditions.
_MACHINES = {
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "i686": ("SCMP_ARCH_X86", "x86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
    "armv7l": ("SCMP_ARCH_ARM", "arm"),
    "ppc64le": ("SCMP_ARCH_PPC64LE", "ppc64le"),
    "s390x": ("SCMP_ARCH_S390X", "s390x"),
    "riscv64": ("SCMP_ARCH_RISCV64", "riscv64"),
    "loongarch64": ("SCMP_ARCH_LOONGARCH64", "loong64"),
}
# What Docker's form and that of config.json have; another name may be one of these, misspelt.
_REMARKS = ("comment", "$schema")
_KEYS = {
    "the profile": ("defaultAction", "defaultErrnoRet", "defaultErrno", "flags", "architectures",
                    "archMap", "syscalls", "listenerPath", "listenerMetadata"),
    "archMap": ("architecture", "subArchitectures"),
    "syscalls": ("name", "names", "action", "errnoRet", "errno", "args", "includes", "excludes"),
    "args": ("index", "value", "valueTwo", "op"),
    "includes": ("arches", "caps", "minKernel"),
    "excludes": ("arches", "caps", "minKernel"),
}  # fmt: skip


def read(path: str) -> object:
    """Return what is in a profile's file.

    Raises:
        SeccompError: it cannot be read, or is no JSON.
    """
    import json
    import stat

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise SeccompError(text=f"open {path}: {reason.lower()}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SeccompError(text=f"{path}: a seccomp profile is a regular file")
        data = os.pread(fd, FILE_BYTES + 1, 0)
    finally:
        os.close(fd)
    if len(data) > FILE_BYTES:
        raise SeccompError(text=f"{path}: a seccomp profile has at most {FILE_BYTES} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SeccompError(text=f"decoding seccomp profile failed: {path}: {error}") from None


def resolve(profile: object, capabilities: frozenset[str], machine: str) -> dict[str, Any]:
    """Return the profile in the form of config.json, for a payload with these capabilities.

    Raises:
        SeccompError: it has another form.
    """
    whole = _object(profile, "the profile")
    if not _text(whole, "defaultAction"):
        raise SeccompError(text="decoding seccomp profile failed: it has no defaultAction")
    if whole.get("listenerPath") or whole.get("listenerMetadata"):
        raise SeccompError(text="a seccomp profile with a listener is not supported")
    resolved = {name: whole[name] for name in ("defaultAction", "flags") if whole.get(name)}
    if (number := _number(whole, "defaultErrnoRet", "defaultErrno")) is not None:
        resolved["defaultErrnoRet"] = number
    resolved["architectures"] = _architectures(whole, machine)
    resolved["syscalls"] = [
        _rule(rule)
        for rule in map(_rule_object, _list(whole, "syscalls"))
        if _applies(rule, capabilities, _MACHINES.get(machine, ("", machine))[1])
    ]
    for word in _list(resolved, "flags"):
        if not isinstance(word, str):
            raise _wrong("flags")
    return resolved


def _wrong(name: str) -> SeccompError:
    return SeccompError(text=f"decoding seccomp profile failed: {name} has the wrong type")


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name)
    if extra := value.keys() - {*_KEYS[name], *_REMARKS}:
        word = min(extra)
        known = next((key for key in _KEYS[name] if key.lower() == word.lower()), "")
        text = f"decoding seccomp profile failed: {word} in {name} is unknown"
        raise SeccompError(text=f"{text}: it is {known}" if known else text)
    return value


def _rule_object(value: object) -> Mapping[str, Any]:
    return _object(value, "syscalls")


def _list(whole: Mapping[str, Any], name: str) -> list[Any]:
    value = whole.get(name)
    if not isinstance(value, list | None):
        raise _wrong(name)
    return value or []


def _texts(whole: Mapping[str, Any], name: str) -> list[str]:
    found = _list(whole, name)
    if not all(isinstance(word, str) for word in found):
        raise _wrong(name)
    return found


def _text(whole: Mapping[str, Any], name: str) -> str:
    value = whole.get(name)
    if not isinstance(value, str | None):
        raise _wrong(name)
    return value or ""


def _number(whole: Mapping[str, Any], name: str, named: str = "") -> int | None:
    """Return a number, or the errno that `named` gives by name."""
    import errno

    value = whole.get(name)
    if isinstance(value, bool) or not isinstance(value, int | None) or (value or 0) < 0:
        raise _wrong(name)
    if value is not None or not named or not (word := _text(whole, named)):
        return value
    number = getattr(errno, word, None)
    if not isinstance(number, int):
        raise SeccompError(text=f"decoding seccomp profile failed: {word} is no errno")
    return number


def _architectures(whole: Mapping[str, Any], machine: str) -> list[str]:
    given = _texts(whole, "architectures")
    maps = [_object(entry, "archMap") for entry in _list(whole, "archMap")]
    if given and maps:
        text = "a seccomp profile has either architectures or archMap, not both"
        raise SeccompError(text=text)
    native = _MACHINES.get(machine, ("", ""))[0]
    for entry in maps:
        if _text(entry, "architecture") == native:
            return [native, *_texts(entry, "subArchitectures")]
    return given


def _applies(rule: Mapping[str, Any], capabilities: frozenset[str], word: str) -> bool:
    includes = _object(rule.get("includes") or {}, "includes")
    excludes = _object(rule.get("excludes") or {}, "excludes")
    arches, caps = _texts(includes, "arches"), _texts(includes, "caps")
    if (arches and word not in arches) or not capabilities.issuperset(caps):
        return False
    if not _kernel_has(_text(includes, "minKernel")):
        return False
    if _text(excludes, "minKernel") and _kernel_has(_text(excludes, "minKernel")):
        return False
    return word not in _texts(excludes, "arches") and capabilities.isdisjoint(
        _texts(excludes, "caps")
    )


def _kernel_has(version: str) -> bool:
    if not version:
        return True
    try:
        wanted = [int(part) for part in version.split(".")[:2]]
        running = [int(part) for part in os.uname().release.split("-")[0].split(".")[:2]]
    except ValueError:
        raise _wrong("minKernel") from None
    return running >= wanted


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    names = _texts(rule, "names") or [name for name in (_text(rule, "name"),) if name]
    found: dict[str, Any] = {"names": names, "action": _text(rule, "action"), "args": []}
    if (number := _number(rule, "errnoRet", "errno")) is not None:
        found["errnoRet"] = number
    for argument in _list(rule, "args"):
        given = _object(argument, "args")
        numbers = {name: _number(given, name) for name in ("index", "value", "valueTwo")}
        found["args"].append({**numbers, "op": _text(given, "op")})
    if found["action"] == "SCMP_ACT_NOTIFY":
        raise SeccompError(text="invalid action 'SCMP_ACT_NOTIFY' specified: nobody would listen")
    return found
