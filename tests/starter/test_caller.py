"""The starter of the oci engine: what it takes, and what it gives to starter-init."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base import build
from tests.own_install import request_bytes, sealed

STARTER = Path(__file__).resolve().parents[2] / "build/starter"
CALLER, USERNS = 4, 2


def start(flow: int, *words: str) -> subprocess.CompletedProcess[str]:
    words_of_it = ["apptainer-py-oci", "create"]
    content = request_bytes(
        build.BUILD_ID, words_of_it, {"A": "b"}, flow=flow, cwd="/", engine="oci"
    )
    fd = sealed(content)
    try:
        return subprocess.run(
            [str(STARTER), str(fd), *words],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("flow", "words", "status", "form"),
    [
        (CALLER, (), 255, "FATAL:   {}\n"),
        (USERNS, ("caller",), 1, 'msg="runc create failed: {}"\n'),
    ],
)
def test_flow_and_way_of_calling_must_agree(flow, words, status, form):
    """Who calls for this flow reads runc's form; another build's request is told of in it too."""
    done = start(flow, *words)
    assert done.returncode == status
    assert done.stderr.endswith(form.format("this request is not for this starter"))


def test_a_setuid_start_never_serves_this_engine(as_user, readable_tmp):
    program = readable_tmp / "starter"
    program.write_bytes(STARTER.read_bytes())
    program.chmod(0o4755)
    done = as_user([str(program), "0", "caller"])
    assert done.returncode == 255
    assert done.stderr == "FATAL:   the starter of this engine runs without the setuid bit\n"
