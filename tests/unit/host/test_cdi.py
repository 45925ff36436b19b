"""CDI: which device of which file counts, and what it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from apptainer_py.host import cdi

EDITS = {
    "env": ["A=1", "B=x=y", "EMPTY="],
    "deviceNodes": [{"path": "/dev/a"}, {"path": "/dev/b", "hostPath": "/dev/c/../null"}],
    "mounts": [
        {"hostPath": "/h", "containerPath": "/c", "options": ["ro", "nosuid"]},
        {"hostPath": "/w", "containerPath": "/w", "type": "bind"},
    ],
    "hooks": [{"hookName": "createContainer", "path": "/usr/bin/hook", "args": ["hook", "do"]}],
    "additionalGids": [44],
}


def write(
    folder: Path, name: str, *devices: object, kind: str = "v.com/gpu", version: str = "0.6.0",
    **more: object,
) -> None:  # fmt: skip
    folder.mkdir(exist_ok=True)
    value = {"cdiVersion": version, "kind": kind, "devices": list(devices), **more}
    (folder / name).write_text(json.dumps(value))


def device(name: str, **edits: object) -> dict[str, object]:
    return {"name": name, "containerEdits": edits}


def found(folder: Path, *names: str) -> cdi.Edits:
    return cdi.find(names, (str(folder),))


def test_all_that_a_device_asks_for(tmp_path: Path) -> None:
    write(tmp_path, "a.json", device("0", **EDITS))
    edits = found(tmp_path, "v.com/gpu=0")
    assert edits.environment == {"A": "1", "B": "x=y", "EMPTY": ""}
    assert [(node.host, node.path) for node in edits.nodes] == [
        ("/dev/a", "/dev/a"),
        ("/dev/null", "/dev/b"),
    ]
    shown = [(mount.source, mount.target, mount.read_only) for mount in edits.mounts]
    assert shown == [("/h", "/c", True), ("/w", "/w", False)]
    assert [(hook.path, hook.arguments) for hook in edits.hooks] == [
        ("/usr/bin/hook", ("hook", "do"))
    ]
    assert edits.groups == [44]


@pytest.mark.parametrize(
    "version", ["0.3.0", "0.4.0", "v0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "1.1.1"]
)
def test_every_version_with_every_field(tmp_path: Path, version: str) -> None:
    node = {"path": "/dev/a", "type": "c", "major": 1, "minor": 3, "fileMode": 438,
            "permissions": "rw", "uid": 0, "gid": 0}  # fmt: skip
    hook = {"hookName": "prestart", "path": "/h", "args": [], "env": ["A=1"], "timeout": 3}
    given = device("0", deviceNodes=[node], hooks=[hook], additionalGids=[7])
    write(tmp_path, "a.json", {**given, "annotations": {"a": "b"}}, annotations={}, version=version)
    edits = found(tmp_path, "v.com/gpu=0")
    assert [each.path for each in (*edits.nodes, *edits.hooks)] == ["/dev/a", "/h"]


def test_what_all_devices_of_a_file_ask_for_comes_once(tmp_path: Path) -> None:
    common = {"deviceNodes": [{"path": "/dev/ctl"}]}
    write(tmp_path, "a.json", device("0", env=["N=0"]), device("1", env=["N=1"]),
          containerEdits=common)  # fmt: skip
    edits = found(tmp_path, "v.com/gpu=0", "v.com/gpu=1")
    assert [node.path for node in edits.nodes] == ["/dev/ctl"]
    assert edits.environment == {"N": "1"}


def test_the_last_directory_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    write(first, "a.json", device("0", env=["FROM=one"]), device("1", env=["ONLY=one"]))
    write(second, "b.json", device("0", env=["FROM=two"]))
    edits = cdi.find(("v.com/gpu=0", "v.com/gpu=1"), (str(first), str(second), "/absent"))
    assert edits.environment == {"FROM": "two", "ONLY": "one"}


def test_yaml(tmp_path: Path) -> None:
    tmp_path.joinpath("a.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: v.com/gpu\ndevices:\n- name: all\n  containerEdits:\n"
        "    env: [N=yaml]\n    deviceNodes:\n    - path: /dev/x\n"
    )
    edits = found(tmp_path, "v.com/gpu=all")
    assert (edits.environment, edits.nodes[0].host) == ({"N": "yaml"}, "/dev/x")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "{", "Expecting property name"),
        ("a.json", "[]", "no CDI specification"),
        ("a.json", '{"kind": "v.com/gpu", "devices": []}', "'cdiVersion' is missing"),
        ("a.json", '{"cdiVersion": "0.3.0", "kind": "v.com/gpu"}', "'devices' is missing"),
        ("a.json", '{"cdiVersion": "0.3.0", "devices": 3}', "not iterable"),
        ("a.json", '{"cdiVersion": "2.0.0", "devices": []}', "'2.0.0' is not supported"),
        ("a.json", '{"cdiVersion": 1, "devices": []}', "cdiVersion 1 is not supported"),
        ("a.json", '{"cdiVersion": "0.6.0", "device": []}', "unknown field 'device'"),
        ("a.json", '{"cdiVersion": "0.6.0", "devices": ["0"]}', "must be an object"),
        ("a.yaml", "a: [", "while parsing"),
        ("a.yaml", "!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a.json", "[" * 200_000, "recursion"),
    ],
)
def test_a_file_that_is_wrong_is_named_if_its_device_is_missing(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    tmp_path.joinpath(name).write_text(text)
    with pytest.raises(cdi.CdiError) as caught:
        found(tmp_path, "v.com/gpu=0")
    assert str(tmp_path / name) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    write(tmp_path, "b.json", device("0"))
    assert found(tmp_path, "v.com/gpu=0").nodes == []


def test_two_files_of_a_directory_exclude_each_other(tmp_path: Path) -> None:
    write(tmp_path, "a.json", device("0"), device("1"))
    write(tmp_path, "b.json", device("0"))
    with pytest.raises(cdi.CdiError, match=r"another file has v\.com/gpu=0 too"):
        found(tmp_path, "v.com/gpu=0")
    assert found(tmp_path, "v.com/gpu=1").environment == {}


@pytest.mark.parametrize(
    "name", ["", "0", "gpu=0", "v.com/gpu", "v.com/gpu=", "/gpu=0", "v.com/=0"]
)
def test_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(cdi.CdiError, match="invalid CDI device name"):
        found(tmp_path, name)


def test_a_missing_device(tmp_path: Path) -> None:
    with pytest.raises(cdi.CdiError, match=r"unresolvable CDI device v\.com/gpu=9: nothing in"):
        found(tmp_path, "v.com/gpu=9")


@pytest.mark.parametrize(
    "edits",
    [
        {"env": ["NOVALUE"]}, {"env": [3]}, {"deviceNodes": [{}]}, {"deviceNodes": ["/dev/x"]},
        {"deviceNodes": [{"path": "relative"}]}, {"mounts": [{"hostPath": "/x"}]},
        {"mounts": [{"hostPath": "/x", "containerPath": "/y", "type": "tmpfs"}]},
        {"hooks": [{"path": "/x"}]}, {"deviceNode": []}, {"mounts": [{"source": "/x"}]},
        {"intelRdt": {"closID": "x"}}, {"additionalGids": ["x"]},
    ],
)  # fmt: skip
def test_edits_that_cannot_be_used(tmp_path: Path, edits: dict[str, object]) -> None:
    write(tmp_path, "a.json", device("0", **edits))
    with pytest.raises(cdi.CdiError, match=r"CDI device v\.com/gpu=0: cannot be used"):
        found(tmp_path, "v.com/gpu=0")


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(max_size=5),
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.dictionaries(
            some.sampled_from(
                [
                    "env",
                    "mounts",
                    "deviceNodes",
                    "hooks",
                    "path",
                    "hostPath",
                    "options",
                    "args",
                    "name",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON, JSON)
def test_any_json_is_read_or_refused(edits: object, common: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), "a.json", {"name": "0", "containerEdits": edits}, containerEdits=common)
        try:
            result = found(Path(folder), "v.com/gpu=0")
        except cdi.CdiError:
            return
        assert all(node.host.startswith("/") for node in result.nodes)
