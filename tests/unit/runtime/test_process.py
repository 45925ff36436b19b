"""Process, before anything runs."""

from __future__ import annotations

import pytest

from apptainer_py.runtime.process import Process, ProcessError, ProcessSettings


def test_before_the_start() -> None:
    process = Process(ProcessSettings(args=("true",)))
    for ask in (process.pid, process.wait, lambda: process.signal(9)):
        with pytest.raises(ProcessError, match="invalid process"):
            ask()


def test_the_specification_has_what_is_given() -> None:
    settings = ProcessSettings(
        args=("sh",), uid=5, additional_groups=(7,), umask=0o77, console_width=80, console_height=24
    )
    assert settings.specification({}) == {
        "terminal": False,
        "user": {"uid": 5, "gid": 0, "additionalGids": [7], "umask": 0o77},
        "args": ["sh"],
        "consoleSize": {"height": 24, "width": 80},
    }


def test_what_is_not_given_is_as_configured() -> None:
    configured = {"args": ["a"], "env": ["A=1"], "cwd": "/x", "terminal": True, "user": {"uid": 9}}
    shown = ProcessSettings(args=("sh",), cwd="/y").specification(configured)
    assert shown == {
        "args": ["sh"], "env": ["A=1"], "cwd": "/y", "terminal": False, "user": {"uid": 9},
    }  # fmt: skip
    assert configured["args"] == ["a"]
    emptied = ProcessSettings(args=("sh",), env=(), no_new_privileges=False, rlimits=())
    shown = emptied.specification({**configured, "noNewPrivileges": True, "rlimits": [{}]})
    assert (shown["env"], shown["noNewPrivileges"], shown["rlimits"]) == ([], False, [])
