"""The capability commands on a file of the test's own; identities and the lock are e2e's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apptainer_py.engines.apptainer import capabilities
from apptainer_py.model import protocol
from apptainer_py.model.capability_texts import TEXTS
from apptainer_py.verbs import capability
from apptainer_py.verbs.capability import CapabilityError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = tmp_path / "capability.json"
    name.write_text("")
    monkeypatch.setattr(capabilities, "FILE", str(name))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(capabilities, "read_file", name.read_bytes)
    return name


def test_every_capability_has_a_text() -> None:
    assert sorted(TEXTS) == sorted(protocol.CAPABILITY_NAMES.values())


def test_what_is_granted_is_in_the_file(file: Path) -> None:
    warnings = capability.add(" chown,CAP_net_raw,bogus", user="root")
    assert json.loads(file.read_text()) == {"users": {"root": ["CAP_CHOWN", "CAP_NET_RAW"]}}
    assert warnings[0] == "Ignoring unknown capabilities: [CAP_BOGUS]"
    assert warnings[1].startswith("Adding 'CAP_CHOWN' capability will likely allow user root")
    assert capability.add("kill", group="root") == []
    assert capability.add("chown,kill", user="root")[0] == (
        "Won't add capability 'CAP_CHOWN', already assigned to user root"
    )
    assert capability.listing(None) == (
        "root [user]: CAP_CHOWN,CAP_NET_RAW,CAP_KILL\nroot [group]: CAP_KILL\n"
    )
    assert capability.drop("net_raw,fowner", user="root") == [
        "Won't drop capability 'CAP_FOWNER', not assigned to user root"
    ]
    assert capability.listing("root", as_json=True) == (
        json.dumps(
            {"users": {"root": ["CAP_CHOWN", "CAP_KILL"]}, "groups": {"root": ["CAP_KILL"]}},
            indent="\t",
        )
        + "\n"
    )
    capability.drop("all", user="root")
    capability.drop("all", group="root")
    assert json.loads(file.read_text()) == {}


def test_a_name_that_this_version_does_not_know_is_kept(file: Path) -> None:
    file.write_text('{"users": {"root": ["CAP_LATER"], "gone": ["CAP_KILL"]}}')
    capability.add("chown", user="root")
    assert json.loads(file.read_text()) == {
        "users": {"root": ["CAP_LATER", "CAP_CHOWN"], "gone": ["CAP_KILL"]}
    }


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("add", {}, "Unable to add capabilities: no user or group specified"),
        ("drop", {}, "Unable to drop capabilities: no user or group specified"),
        ("add", {"user": "no such"}, "for user no such: user does not exist"),
        ("add", {"group": "no such"}, "for group no such: group does not exist"),
        ("drop", {"user": "root"}, "user root: user 'root' doesn't have any capability assigned"),
    ],
)
def test_refused_in_the_words_of_the_real_one(file: Path, command, options, text) -> None:
    with pytest.raises(CapabilityError) as caught:
        getattr(capability, command)("chown", **options)
    assert str(caught.value).endswith(text)
    assert file.read_text() == ""


def test_one_wrong_name_changes_nothing(file: Path) -> None:
    with pytest.raises(CapabilityError):
        capability.add("chown", user="root", group="no such")
    assert file.read_text() == ""


@pytest.mark.parametrize("text", ["rubbish", '{"other": {}}', '{"users": {"a": "CAP_KILL"}}'])
def test_a_file_of_another_form_is_not_written_over(file: Path, text: str) -> None:
    file.write_text(text)
    for doing in (lambda: capability.add("chown", user="root"), lambda: capability.listing(None)):
        with pytest.raises(CapabilityError, match="while parsing capability config data"):
            doing()
    assert file.read_text() == text


def test_it_never_grows_beyond_what_the_starter_reads(file: Path) -> None:
    entries = {f"user{number}": ["CAP_KILL"] for number in range(3000)}
    text = json.dumps({"users": entries})
    file.write_text(text)
    with pytest.raises(CapabilityError, match="larger than the starter reads"):
        capability.add("chown", user="root")
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (None, "no capability set for users or groups"),
        ("root", "no capability set for user/group root"),
        ("", "while listing capabilities: must specify a user or a group"),
    ],
)
def test_nothing_to_list(file: Path, name, text) -> None:
    with pytest.raises(CapabilityError) as caught:
        capability.listing(name)
    assert str(caught.value) == f"Unable to list capabilities: {text}"


def test_what_capabilities_allow() -> None:
    assert capability.avail("chown,CAP_CHOWN").startswith("CAP_CHOWN: ")
    assert capability.avail("chown,CAP_CHOWN").count("\n") == 1
    assert capability.avail("").count("\n") == len(TEXTS)
    assert json.loads(capability.avail("kill", as_json=True)) == {"CAP_KILL": TEXTS["KILL"]}
    with pytest.raises(CapabilityError, match="unknown capabilities found in: CAP_BOGUS,CAP_B2"):
        capability.avail("bogus,kill,b2")
