"""The PROCESS frame: what Python writes is what C reads."""

from __future__ import annotations

import subprocess

import pytest

from apptainer_py.model.oci_plan import ProcessSpec
from apptainer_py.model.process_frame import FrameRefused, failure_text, process_frame
from tests.starter.test_parsers import FLAGS, HERE

FULL = ProcessSpec(
    arguments=(b"sh", b"", b"a b\n\xff"),
    environment=(b"PATH=/bin", b"X="),
    cwd=b"/work",
    uid=1000,
    gid=1001,
    groups=(5, 4294967294),
    umask=0o27,
    capabilities=(1, 2, 3, 1 << 40, 5),
    no_new_privileges=True,
    selinux_label="system_u:object_r:x",
    scheduler=(6, -5, 7, 1, 10, 20, 1 << 60),
    io_priority=2 << 13 | 6,
    personality=8,
    memory_policy=(0x8002, 1 << 1023 | 6),
    preserve_fds=3,
    in_user_namespace=True,
    tenant=True,
)
SMALL = ProcessSpec(arguments=(b"true",), environment=(), cwd=b"", uid=0, gid=0)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("dump")
    program = folder / "dump"
    source = str(HERE / "dump_process.c")
    subprocess.run(["gcc", *FLAGS, source, "-o", str(program)], check=True)

    def read(frame: bytes) -> bytes | None:
        (folder / "frame").write_bytes(frame)
        done = subprocess.run([program, folder / "frame"], capture_output=True, check=False)
        assert done.stderr == b""
        return done.stdout if done.returncode == 0 else None

    return read


def test_every_field(dump) -> None:
    frame = process_frame(FULL, bytes(24), b"hooks", program_flags=8)
    expected = [
        *(b"flags=2047", b"ids=1000 1001", b"umask=27", b"keep=3"),
        *(b"caps=1", b"caps=2", b"caps=3", b"caps=10000000000", b"caps=5"),
        *(b"filter_flags=8", b"personality=8", b"io=16390"),
        *(b"policy=32770 6 8000000000000000", b"sched=6 -5 7 1 10 20 1152921504606846976"),
        *(b"group=5", b"group=4294967294", b"filter=3 24", b"hooks=1 5"),
        *(b"arg=sh", b"arg=", b"arg=a b", b"\xff", b"env=PATH=/bin", b"env=X="),
        *(b"cwd=/work", b"label=system_u:object_r:x", b""),
    ]
    assert dump(frame).split(b"\n") == expected


def test_the_least_that_there_can_be(dump) -> None:
    said = dump(process_frame(SMALL, b"", b""))
    assert b"flags=0\n" in said
    assert said.endswith(b"filter=0 0\nhooks=0 0\narg=true\n")


def test_what_is_no_frame(dump) -> None:
    frame = process_frame(FULL, bytes(24), b"hooks")
    assert dump(frame[:-1]) is None
    assert dump(frame + b"\0") is None
    assert dump(b"") is None
    assert dump(frame.replace(b"APYPRC1", b"APYPRC2")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": (b"a\0b",)},
        {"environment": (b"A=\0",)},
        {"cwd": b"/\0"},
        {"uid": 1 << 32},
        {"gid": -1},
        {"groups": (1 << 32,)},
        {"memory_policy": (1, 1 << 1024)},
        {"arguments": (b"x" * (17 << 20),)},
    ],
)
def test_what_cannot_be_told_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(FrameRefused):
        process_frame(SMALL.replace(**change), b"", b"")


def test_failures_have_runcs_words() -> None:
    assert failure_text(FULL, 10, "permission denied") == (
        'chdir to cwd ("/work") set in config.json failed: permission denied'
    )
    assert failure_text(FULL, 19, "") == 'exec: "sh": executable file not found in $PATH'
