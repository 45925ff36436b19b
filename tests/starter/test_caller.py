"""The starter of the oci engine: what it takes, and what it gives to starter-init."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base import build

STARTER = Path(__file__).resolve().parents[2] / "build/starter"
HEADER = struct.Struct("=8s2I64s3Ii8I4I")
SEALS = 0x1 | 0x2 | 0x4 | 0x8
CALLER, USERNS = 4, 2


def request(flow: int, engine: bytes = b"oci") -> int:
    parts = [b"apptainer-py-oci\0create\0", b"A=b\0", b"/\0", engine + b"\0", b"\0"]
    ends = [HEADER.size]
    for part in parts:
        ends.append(ends[-1] + len(part))
    head = HEADER.pack(
        b"APYREQ1\0",
        2,
        HEADER.size,
        build.BUILD_ID.encode(),
        flow,
        0,
        0,
        -1,
        2,
        1,
        *ends,
        0,
        0,
        0,
        0,
    )
    fd = os.memfd_create("request", os.MFD_ALLOW_SEALING)
    os.write(fd, head + b"".join(parts))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def start(flow: int, *words: str) -> subprocess.CompletedProcess[str]:
    fd = request(flow)
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
