"""`instance stats`: numbers of control groups, from directory trees as the kernel has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apptainer_py.verbs import instance_stats
from apptainer_py.verbs.instance_stats import Usage

V2 = {
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
    "memory.current": "4096\n",
    "memory.max": "8192\n",
    "memory.stat": "anon 4096\nfile 0\n",
    "memory.swap.max": "max\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n8:16 rbytes=5 wbytes=0\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
}
V1 = {
    "memory": {"memory.usage_in_bytes": "4096\n", "memory.limit_in_bytes": "8192\n"},
    "cpuacct": {"cpuacct.usage": "1500000\n"},
    "pids": {"pids.current": "3\n", "pids.max": "max\n"},
    "blkio": {
        "blkio.throttle.io_serviced": "8:0 Read 1\n8:0 Write 1\n8:0 Total 2\nTotal 2\n",
        "blkio.throttle.io_service_bytes": "8:0 Read 15\n8:0 Write 20\n8:0 Total 35\nTotal 35\n",
    },
}
EXPECTED = Usage(cpu_ns=1_500_000, memory=4096, limit=8192, read=15, written=20, pids=3)


def write(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


def test_version_two(tmp_path: Path) -> None:
    found = instance_stats.usage_of({"": write(tmp_path / "one", V2)}, unified=True)
    assert found == EXPECTED


def test_version_one(tmp_path: Path) -> None:
    paths = {name: write(tmp_path / name, files) for name, files in V1.items()}
    assert instance_stats.usage_of(paths, unified=False) == EXPECTED


def test_no_limit_is_the_machines_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "one", {**V2, "memory.max": "max\n"})
    found = instance_stats.usage_of({"": path}, unified=True)
    assert 1 << 20 < found.limit < 1 << 60


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (10137600, "9.668MiB"), (1 << 28, "256MiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert instance_stats.size_text(count) == text


def test_the_table_and_the_json_are_apptainers() -> None:
    head, row = instance_stats.table("r4s", EXPECTED, 12.345).splitlines()
    assert head == "INSTANCE NAME    CPU USAGE    MEM USAGE / LIMIT    MEM %     BLOCK I/O    PIDS"
    assert row == "r4s              12.35%       4KiB / 8KiB          50.00%    15B / 20B    3"
    found = json.loads(instance_stats._json(EXPECTED))
    assert found["cpu_stats"]["cpu_usage"]["total_usage"] == 1_500_000
    assert found["memory_stats"]["usage"] == {"usage": 4096, "limit": 8192}
    assert found["pids_stats"]["current"] == 3
