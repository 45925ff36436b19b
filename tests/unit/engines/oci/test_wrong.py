"""Configurations that cannot be: the sentences are those of runc 1.3.6 for the same bundle.

In wrong.json "runc" was made by running runc; "ours" is what runc accepts, or says in the words of
a failed system call, and we refuse before anything is made.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.engines.oci import texts
from apptainer_py.engines.oci.compile import compile_bundle
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import CreateOptions, Row
from tests.oci_config import GONE, HOST, edited, plan_of


def _no_such(path: str) -> int:
    raise FileNotFoundError(2, "No such file or directory", path)


TABLE: dict[str, list[Any]] = json.loads((Path(__file__).parent / "wrong.json").read_text())
ABSENT = {"absent": True}


def told(config: dict[str, Any]) -> ConfigWrong:
    with pytest.raises(ConfigWrong) as caught:
        plan_of(config, host=HOST.replace(inode_of=_no_such))
    return caught.value


@pytest.mark.parametrize(("path", "value", "text"), TABLE["runc"] + TABLE["ours"])
def test_sentence(path: str, value: Any, text: str) -> None:
    error = told(edited((path, GONE if value == ABSENT else value)))
    assert re.sub("0x[0-9a-f]+", "0x1", str(error)).strip() == text
    assert error.exit_code == 1


@pytest.mark.parametrize(("changes", "text"), TABLE["runc with several keys"])
def test_rules_of_namespaces(changes: dict[str, Any], text: str) -> None:
    assert str(told(edited(*changes.items()))) == text


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("process/user/uid", "x", "process.user.uid"),
        ("linux/seccomp/defaultAction", "X", "linux.seccomp.defaultAction"),
        ("mounts/1/source", "a\0", "mounts[1]"),
        ("hooks/prestart", [{"path": "/x"}, {}], "hooks.prestart[1]"),
        ("linux/sysctl", {"kernel.panic": "1"}, "linux.sysctl.kernel.panic"),
        ("linux/resources/devices", [{"access": "r"}, {}], "linux.resources.devices[1]"),
    ],
)
def test_key_is_named(path: str, value: Any, key: str) -> None:
    assert told(edited((path, value))).key == key


@pytest.mark.parametrize("config", [[], "x", 3, True])
def test_no_object(config: Any) -> None:
    assert "json: cannot unmarshal" in str(told(config))
    with pytest.raises(ConfigWrong, match="config cannot be null"):
        plan_of(None)  # type: ignore[arg-type] # what JSON may be


def test_private_root_needs_pivot() -> None:
    config = edited(("linux/rootfsPropagation", "rprivate"))
    with pytest.raises(ConfigWrong) as caught:
        plan_of(config, no_pivot=True)
    assert str(caught.value) == "rootfsPropagation of [r]private is not safe without pivot_root"


def test_systemd_path() -> None:
    with pytest.raises(ConfigWrong) as caught:
        plan_of(edited(("linux/cgroupsPath", "/a/b")), systemd=True)
    assert str(caught.value) == (
        'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups,'
        ' got "/a/b" instead'
    )


def _every_place(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        if isinstance(value, (dict, list)):
            found += _every_place(value, (*path, key))
        else:
            found.append((*path, key))
    return found


_ODD = (None, True, -1, 1 << 70, "", "\0", "x" * 5000, [], [None], [[]], {}, {"": None}, [{}])


@pytest.mark.parametrize("place", _every_place(edited())[1:], ids=str)
def test_whatever_stands_anywhere_gives_a_plan_or_one_sentence(place: tuple[Any, ...]) -> None:
    for odd in _ODD:
        config = edited()
        node: Any = config
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = copy.deepcopy(odd)
        try:
            compile_bundle(config, "/b", HOST, CreateOptions(container_id="box"))
        except ConfigWrong as error:
            assert str(error)


class TestTexts:
    def test_errno_in_go_words(self) -> None:
        row = Row(op=protocol.OP_FS, says="mounting: {error}")
        assert texts.row_failed(row, protocol.ERR_SYSTEM, 19) == "mounting: no such device"
        assert texts.row_failed(row, protocol.ERR_CANCELLED, 0) == (
            "mounting: an earlier step failed"
        )

    def test_braces_in_a_name_are_no_template(self) -> None:
        row = Row(op=protocol.OP_FS, says="{x}: {error}")
        assert texts.row_failed(row, protocol.ERR_SYSTEM, 1) == "{x}: operation not permitted"

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (0, ": mount src=a, dst=/y: operation not permitted"),
            (3, ': create mountpoint for /y mount: mountpoint "/y" is on the top of rootfs'),
            (
                4,
                ": create mountpoint for /y mount: check proc-safety of /y mount:"
                ' "/y" cannot be mounted because it is inside /proc',
            ),
            (5, ': filesystem "proc" must be mounted on ordinary directory'),
        ],
    )
    def test_why_a_place_is_refused(self, value: int, shown: str) -> None:
        says = 'error mounting "a" to rootfs at "/y": mount src=a, dst=/y: {error}'
        row = Row(op=protocol.OP_PLACE, first=b"/y", says=says)
        text = texts.row_failed(row, protocol.ERR_SYSTEM, 1, value)
        assert text == f'error mounting "a" to rootfs at "/y"{shown}'

    def test_a_working_directory_that_cannot_be(self) -> None:
        row = Row(op=protocol.OP_ENTER, first=b"/f/x", says="jailing: {error}")
        assert texts.row_failed(row, protocol.ERR_SYSTEM, 20, 3) == "mkdir /f/x: not a directory"

    def test_missing_sysctl(self) -> None:
        row = Row(op=protocol.OP_SYSCTL, first=b"net/nope", says="write: {error}")
        assert texts.row_failed(row, protocol.ERR_SYSTEM, 2) == (
            "open sysctl net.nope file: no such file or directory"
        )

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a b", '"a b"'),
            ('a"\\', '"a\\"\\\\"'),
            ("\n\0\x7f\u200b\U000e0001", '"\\n\\x00\\x7f\\u200b\\U000e0001"'),
            ("é", '"é"'),
        ],
    )
    def test_quoted(self, text: str, shown: str) -> None:
        assert texts.quoted(text) == shown
