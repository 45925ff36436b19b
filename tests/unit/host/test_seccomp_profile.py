"""From a profile's file to the form of config.json."""

from __future__ import annotations

import pytest

from apptainer_py.host import seccomp_profile
from apptainer_py.host.seccomp import SeccompError

ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}


def rules(*calls: dict[str, object], caps: frozenset[str] = frozenset(), machine: str = "x86_64"):
    found = seccomp_profile.resolve({**ALLOW, "syscalls": list(calls)}, caps, machine)
    return [rule["names"] for rule in found["syscalls"]]


@pytest.mark.parametrize(
    ("condition", "caps", "there"),
    [
        ({}, (), True),
        ({"includes": {"arches": ["amd64"]}}, (), True),
        ({"includes": {"arches": ["arm64"]}}, (), False),
        ({"includes": {"caps": ["CAP_BPF"]}}, (), False),
        ({"includes": {"caps": ["CAP_BPF"]}}, ("CAP_BPF",), True),
        ({"includes": {"caps": ["CAP_BPF", "CAP_KILL"]}}, ("CAP_BPF",), False),
        ({"includes": {"minKernel": "2.6"}}, (), True),
        ({"includes": {"minKernel": "999.0"}}, (), False),
        ({"excludes": {"minKernel": "2.6"}}, (), False),
        ({"excludes": {"minKernel": "999.0"}}, (), True),
        ({"excludes": {"caps": ["CAP_BPF"]}}, ("CAP_BPF",), False),
        ({"excludes": {"caps": ["CAP_BPF"]}}, (), True),
        ({"excludes": {"arches": ["amd64"]}}, (), False),
        ({"includes": None, "excludes": None, "args": None, "comment": "x"}, (), True),
    ],
)
def test_conditions(condition: dict[str, object], caps: tuple[str, ...], there: bool) -> None:
    rule = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", **condition}
    assert rules(rule, caps=frozenset(caps)) == ([["chmod"]] if there else [])


def test_the_machine_has_its_own_architectures() -> None:
    maps = [
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": None},
    ]
    profile = {**ALLOW, "archMap": maps}
    for machine, wanted in (
        ("x86_64", ["SCMP_ARCH_X86_64"]),
        ("aarch64", ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        ("s390x", []),
    ):
        found = seccomp_profile.resolve(profile, frozenset(), machine)
        assert found["architectures"] == wanted


def test_old_names_of_a_rule() -> None:
    rule = {"name": "chmod", "action": "SCMP_ACT_ERRNO", "errno": "ENOSYS"}
    profile = {**ALLOW, "defaultErrno": "EACCES", "syscalls": [rule]}
    found = seccomp_profile.resolve(profile, frozenset(), "x86_64")
    assert found["defaultErrnoRet"] == 13
    assert found["syscalls"] == [
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [], "errnoRet": 38}
    ]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"defaultAction": None}, "no defaultAction"),
        ({"defaultAction": 1}, "defaultAction has the wrong type"),
        ({"syscalls": {}}, "syscalls has the wrong type"),
        ({"syscalls": ["x"]}, "syscalls has the wrong type"),
        ({"syscalls": [{"names": [1]}]}, "names has the wrong type"),
        ({"syscalls": [{"args": [1]}]}, "args has the wrong type"),
        ({"syscalls": [{"args": [{"index": "1"}]}]}, "index has the wrong type"),
        ({"syscalls": [{"args": [{"index": True}]}]}, "index has the wrong type"),
        ({"syscalls": [{"args": [{"value": -1}]}]}, "value has the wrong type"),
        ({"syscalls": [{"includes": {"cpus": []}}]}, "cpus in includes is unknown"),
        ({"syscalls": [{"includes": []}]}, None),
        ({"syscalls": [{"includes": {"minKernel": "x"}}]}, "minKernel has the wrong type"),
        ({"syscalls": [{"errno": "ENONE"}]}, "ENONE is no errno"),
        ({"flags": ["x", 1]}, "flags has the wrong type"),
        ({"archMap": [{}], "architectures": ["x"]}, "not both"),
        ({"syscall": []}, "syscall in the profile is unknown"),
        ({"Flags": []}, "Flags in the profile is unknown: it is flags"),
        ({"syscalls": [{"arg": []}]}, "arg in syscalls is unknown"),
        ({"archMap": [{"sub": []}]}, "sub in archMap is unknown"),
        ({"syscalls": [{"args": [{"val": 1}]}]}, "val in args is unknown"),
        ({"listenerPath": "/x"}, "listener is not supported"),
    ],
)
def test_another_form(more: dict[str, object], text: str | None) -> None:
    if text is None:
        assert seccomp_profile.resolve({**ALLOW, **more}, frozenset(), "x86_64")["syscalls"]
        return
    with pytest.raises(SeccompError, match=text):
        seccomp_profile.resolve({**ALLOW, **more}, frozenset(), "x86_64")
