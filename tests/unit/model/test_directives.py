from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from apptainer_py.model import directive_table
from apptainer_py.model.directives import (
    ADVISORY,
    ENFORCED,
    REFUSES,
    Person,
    Surroundings,
    changed,
    config_from,
    decisions,
    directives,
    kernel_squashfs,
    setuid_decision,
    unenforceable,
    value_text,
)

TREE = Path(__file__).resolve().parents[3]
TABLE = TREE / "starter/config.def"
SHIPPED = TREE / "etc/apptainer-py.conf"
Config = directive_table.Config
ALICE = Person(name="alice", uid=1007, groups=(("alice", 1007), ("physics", 50)))


def generator():
    spec = importlib.util.spec_from_file_location("gen", TREE / "tools/gen_directives.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_the_generated_one() -> None:
    assert generator().rows(TABLE.read_text()) == directive_table.ROWS


@pytest.mark.parametrize(
    "row",
    [
        'CONFIG(A, "b", BOOL, "yes", "yes|no", ENFORCED, "x")',
        'CONFIG(A, "a", BOOL, "perhaps", "yes|no", ENFORCED, "x")',
        'CONFIG(A, "a", BOOL, "yes", "no|yes", ENFORCED, "x")',
        'CONFIG(A, "a", FLOAT, "1", "", ENFORCED, "x")',
        'CONFIG(A, "a", UINT, "5", "6|7", ENFORCED, "x")',
        'CONFIG(A, "a", STRING, "", "", SOMEHOW, "x")',
        'CONFIG(A, "a", STRING, "", "", ENFORCED, "")',
        'CONFIG(A, "a", STRING, "", "", ENFORCED, "x")\n' * 2,
        'CONFIG(A, "a", STRING, "", "")',
        "int x;",
    ],
)
def test_bad_rows_are_refused(row: str) -> None:
    module = generator()
    with pytest.raises(module.BadRow):
        module.rows(row)


def test_generated_module_is_that_of_the_table() -> None:
    text = generator().python_module(TABLE.read_text())
    assert Path(directive_table.__file__).read_text() == text


def test_all_directives_of_apptainer_are_there() -> None:
    keys = {row.key for row in directives()}
    assert {"allow setuid users", "allow setuid groups", "audit log"} <= keys
    real = Path("/etc/apptainer/apptainer.conf")
    if real.exists():
        lines = (line for line in real.read_text().splitlines() if not line.startswith("#"))
        assert {line.split(" =")[0] for line in lines if line} <= keys


def slots() -> list[str]:
    lines = SHIPPED.read_text().splitlines()
    return [line.removeprefix("# ").split(" =")[0] for line in lines if " =" in line]


def test_shipped_file_has_each_directive_once() -> None:
    found = [key for key in slots() if key != "directive"]
    found = [key for key in found if "`" not in key]
    assert sorted(set(found)) == sorted(row.key for row in directives())
    assert {key for key in found if found.count(key) > 1} == {"bind path"}


@pytest.mark.parametrize("row", directives(), ids=lambda row: row.key)
def test_shipped_file_explains_and_defaults(row) -> None:
    lines = SHIPPED.read_text().splitlines()
    own = [line for line in lines if line.removeprefix("# ").startswith(f"{row.key} =")]
    values = [line.split(" =", 1)[1].strip() for line in own]
    assert ",".join(values) == row.default
    place = lines.index(own[0])
    block = lines[: place + 1]
    while block and block[-1]:
        block.pop()
    comment = [line for line in lines[len(block) : place] if line.startswith("# ")]
    assert len([line for line in comment if " =" not in line]) >= 2


@pytest.mark.parametrize("row", directives(), ids=lambda row: row.key)
def test_every_directive_says_what_becomes_of_it(row) -> None:
    assert row.enforcement in (ENFORCED, ADVISORY, REFUSES)
    assert len(row.sentence.split()) >= 4
    if row.enforcement == REFUSES:
        says = "refuse" in row.sentence or "has no effect" in row.sentence
        assert says or row.key.startswith("apptheus")


def test_config_has_a_field_for_each_directive() -> None:
    defaults = Config().asdict()
    assert list(defaults) == [row.field for row in directives()]
    values = {row.key: defaults[row.field] for row in directives()}
    assert config_from(values) == Config()
    with pytest.raises(TypeError):
        config_from({**values, "allow setid": True})


def test_values_as_the_file_has_them() -> None:
    assert [value_text(v) for v in (True, False, 64, ("a", "b"), (), "x")] == [
        "yes",
        "no",
        "64",
        "a, b",
        "",
        "x",
    ]


@pytest.mark.parametrize(
    ("rules", "answer", "rule"),
    [
        ({}, "allowed", "allow setuid"),
        ({"allow_setuid": False, "allow_setuid_users": ("alice",)}, "refused", "allow setuid"),
        ({"allow_setuid_users": ("alice",)}, "allowed", "allow setuid users"),
        ({"allow_setuid_users": ("1007",)}, "allowed", "allow setuid users"),
        ({"allow_setuid_users": ("bob", "100", "٣")}, "refused", "allow setuid users"),
        ({"allow_setuid_groups": ("physics",)}, "allowed", "allow setuid groups"),
        ({"allow_setuid_groups": ("050",)}, "allowed", "allow setuid groups"),
        ({"allow_setuid_groups": ("wheel",)}, "refused", "allow setuid groups"),
        (
            {"allow_setuid_users": ("bob",), "allow_setuid_groups": ("50",)},
            "allowed",
            "allow setuid groups",
        ),
        ({"allow_setuid_users": ("9" * 5000,)}, "refused", "allow setuid users"),
    ],
)
def test_who_may_use_the_setuid_flow(rules, answer, rule) -> None:
    found = setuid_decision(Config(**rules), ALICE)
    assert (found.answer, found.rule) == (answer, rule)


def test_root_needs_no_permission() -> None:
    config = Config(allow_setuid=False)
    assert setuid_decision(config, Person(name="root", uid=0)).answer == "not needed"


@pytest.mark.parametrize(
    ("rules", "kernel"),
    [
        ({}, False),
        ({"limit_container_owners": ("root",)}, True),
        ({"limit_container_paths": ("/opt",)}, True),
        ({"allow_setuid_mount_squashfs": "no", "limit_container_groups": ("x",)}, False),
        ({"allow_setuid_mount_squashfs": "yes"}, True),
    ],
)
def test_who_reads_squashfs(rules, kernel) -> None:
    assert kernel_squashfs(Config(**rules)) is kernel


def test_changed_names_only_what_was_changed() -> None:
    assert changed(Config(), ENFORCED, ADVISORY, REFUSES) == ()
    config = Config(image_driver="x", allow_user_ns=False, mount_tmp=False)
    assert [row.key for row in changed(config, REFUSES)] == ["image driver"]
    assert [row.key for row in changed(config, ADVISORY, REFUSES)] == [
        "allow user ns",
        "image driver",
    ]
    # A file without the directive leaves the list empty: nothing was asked for.
    assert changed(Config(bind_path=()), ENFORCED) == ()


def test_what_a_user_namespace_escapes() -> None:
    assert unenforceable(Config()) == ()
    config = Config(limit_container_paths=("/opt",), allow_container_dir=False, mount_tmp=False)
    assert unenforceable(config) == ("limit container paths", "allow container dir")


def answers(config, around=None) -> dict[str, str]:
    found = decisions(config, ALICE, around or Surroundings())
    return {one.subject: one.answer for one in found}


def test_decisions_by_default() -> None:
    found = answers(Config())
    assert found["setuid flow"] == found["user-namespace flow"] == "allowed"
    assert found["SIF image"] == found["sandbox directory"] == "allowed"
    assert found["encrypted image"] == "allowed"
    assert found["squashfs is read by"] == "image server"
    assert found["session directory"] == "64 MiB"
    assert "any image" not in found


def test_decisions_follow_the_file_and_the_host() -> None:
    config = Config(
        allow_container_sif=False,
        allow_container_extfs=False,
        limit_container_owners=("root", "1"),
        memory_fs_type="ramfs",
        allow_user_ns=False,
        user_bind_control=False,
    )
    found = answers(config, Surroundings(setuid_obstacles=("no bit",)))
    assert found["setuid flow"] == found["user-namespace flow"] == "refused"
    assert found["SIF image"] == found["ext3 image"] == found["binds by the user"] == "refused"
    assert found["any image"] == "only owners root, 1"
    assert found["squashfs is read by"] == "kernel"
    assert found["session directory"] == "no limit"
    blocked = decisions(Config(), ALICE, Surroundings(user_namespaces=False))
    assert blocked[1].answer == "refused"
    assert "kernel" in blocked[1].rule


def test_decisions_name_a_directive_or_a_fact() -> None:
    keys = {row.key for row in directives()}
    assert {one.rule for one in decisions(Config(), ALICE, Surroundings())} <= keys
