"""Limits of the command line and of TOML files, as `linux.resources`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apptainer_py.host.cgroups import limits

NONE: dict[str, Any] = {
    "blkio_weight": 0, "blkio_weight_device": (), "cpu_shares": -1, "cpus": "", "cpuset_cpus": "",
    "cpuset_mems": "", "memory": "", "memory_reservation": "", "memory_swap": "",
    "oom_kill_disable": False, "pids_limit": 0,
}  # fmt: skip
ALL_DEVICES = {"allow": True, "access": "rwm"}


def resources(**flags: Any) -> dict[str, Any]:
    return limits.from_flags({**NONE, **flags}, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("64k", 65536), ("64K", 65536), ("10mb", 10 << 20), ("1.5GiB", 3 << 29),
     ("2 t", 2 << 40), ("1p", 1 << 50), ("0", 0), ("7b", 7), ("0.5m", 1 << 19)],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert limits.size("memory", text) == expected


@pytest.mark.parametrize(
    "text",
    ["bad", "-1", "", "1x", "1.2.3", ".5", "5.", "m", "1e9", "٣", "9999999p", "1 2", "0x10", "1mm"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(limits.LimitWrong) as caught:
        limits.size("memory", text)
    assert str(caught.value) == f"invalid memory value: invalid size: '{text}'"


@pytest.mark.parametrize(
    ("text", "expected"), [("1", 100000), ("0.01", 1000), ("4", 400000), ("1.5", 150000)]
)
def test_processors_become_a_quota(text: str, expected: int) -> None:
    assert resources(cpus=text)["cpu"] == {"quota": expected, "period": 100000}


@pytest.mark.parametrize("text", ["0", "0.001", "4.1", "99999999999", "-1"])
def test_more_processors_than_there_are(text: str) -> None:
    with pytest.raises(limits.LimitWrong, match=r"cpus value must be in range 0.01 - 4"):
        resources(cpus=text)


@pytest.mark.parametrize("text", ["x", "--1", "1e", " 1", "1_0", "inf", "nan", "0x1", "1.2.3", "²"])
def test_what_is_no_number_of_processors(text: str) -> None:
    with pytest.raises(limits.LimitWrong, match="invalid cpus value: can't convert"):
        resources(cpus=text)


def test_flags_end_in_the_keys_of_config_json() -> None:
    found = resources(
        blkio_weight=10, cpu_shares=5, cpuset_cpus="0-1", cpuset_mems="0", memory="1m",
        memory_reservation="2k", memory_swap="-1", oom_kill_disable=True, pids_limit=-1,
    )  # fmt: skip
    assert found == {
        "devices": [ALL_DEVICES],
        "cpu": {"shares": 5, "cpus": "0-1", "mems": "0"},
        "memory": {
            "limit": 1 << 20, "reservation": 2048, "swap": -1, "disableOOMKiller": True,
        },
        "pids": {"limit": -1},
        "blockIO": {"weight": 10},
    }  # fmt: skip
    assert resources() == {"devices": [ALL_DEVICES]}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"blkio_weight": 5}, "blkio-weight must be in range 10-1000"),
        ({"blkio_weight": 1001}, "blkio-weight must be in range 10-1000"),
        ({"blkio_weight_device": ("/dev/sda",)},
         "blkio-weight-device specifications must be in <device>:<weight> format"),
        ({"blkio_weight_device": ("/nope:10",)}, "while examining device: no such file"),
        ({"blkio_weight_device": ("/dev/null:10",)}, "/dev/null is not a block device"),
        ({"pids_limit": -2}, "invalid pids-limit: -2"),
        ({"memory_swap": "-2"}, "invalid memory-swap value"),
        ({"memory": "64"}, "invalid memory value: nothing runs in less than 4096 bytes"),
        ({"memory_reservation": "-1"}, "invalid memory-reservation value"),
    ],
)  # fmt: skip
def test_what_a_flag_may_not_say(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(limits.LimitWrong) as caught:
        resources(**flags)
    assert text in str(caught.value)


def test_a_file_is_read_and_lets_devices_be(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text('[memory]\nlimit = 1048576\n[[devices]]\nallow = false\naccess = "rwm"\n')
    found = limits.with_devices(limits.read_file(str(path)))
    assert found["memory"] == {"limit": 1048576}
    assert found["devices"] == [ALL_DEVICES, {"allow": False, "access": "rwm"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a b c", "expected '='"), (b"\xff", "codec"), (b"[a", "expected"),
     (b"a = " + b"[" * 5000, "recursion"), (b"#" * ((1 << 20) + 1), "too long")],
)  # fmt: skip
def test_what_is_no_file_of_limits(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_bytes(content)
    with pytest.raises(limits.LimitWrong) as caught:
        limits.read_file(str(path))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path, text in ((tmp_path / "no", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(limits.LimitWrong, match=text):
            limits.read_file(str(path))
