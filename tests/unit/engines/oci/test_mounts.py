"""Every option word of a mount, and what goes where."""

from __future__ import annotations

from typing import Any

import pytest

from apptainer_py.engines.oci import mounts
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.mounts import clean, parse_options
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import IdMap
from tests.oci_config import GONE, HOST, SPACES, edited, plan_of, rows, short, spaces, with_mount

ALL = 0x20000F
BIND = {"source": "/src"}


def mount_rows(**mount: Any) -> list[tuple[Any, ...]]:
    plan = plan_of(with_mount(**mount))
    return [
        short(row) for row in plan.assemble if row.op not in (protocol.OP_MKNOD, protocol.OP_LINK)
    ]


FLAGS = [
    (["ro"], 1, 0),
    (["ro", "rw"], 0, 1),
    (["nosuid", "suid"], 0, 2),
    (["suid", "nosuid"], 2, 0),
    (["nodev"], 4, 0),
    (["dev"], 0, 4),
    (["noexec"], 8, 0),
    (["exec"], 0, 8),
    (["sync"], 16, 0),
    (["async"], 0, 16),
    (["remount"], 32, 0),
    (["mand"], 64, 0),
    (["nomand"], 0, 64),
    (["dirsync"], 128, 0),
    (["nosymfollow"], 256, 0),
    (["symfollow"], 0, 256),
    (["noatime"], 1024, 0),
    (["atime"], 0, 1024),
    (["nodiratime"], 2048, 0),
    (["diratime"], 0, 2048),
    (["bind"], 4096, 0),
    (["rbind"], 4096 | 16384, 0),
    (["silent"], 32768, 0),
    (["loud"], 0, 32768),
    (["relatime"], 1 << 21, 0),
    (["norelatime"], 0, 1 << 21),
    (["iversion"], 1 << 23, 0),
    (["noiversion"], 0, 1 << 23),
    (["strictatime"], 1 << 24, 0),
    (["nostrictatime"], 0, 1 << 24),
    (["lazytime"], 1 << 25, 0),
    (["nolazytime"], 0, 1 << 25),
    (["defaults"], 0, 0),
]


@pytest.mark.parametrize(("words", "flags", "cleared"), FLAGS)
def test_flags(words: list[str], flags: int, cleared: int) -> None:
    options = parse_options(words)
    assert (options.flags, options.cleared, options.data) == (flags, cleared, ())


def test_words_of_the_file_system_stay_in_order() -> None:
    assert parse_options(["b=1", "ro", "a", "c="]).data == ("b=1", "a", "c=")


@pytest.mark.parametrize(
    ("words", "to_set", "to_clear"),
    [
        (["rro"], 1, 0),
        (["rrw"], 0, 1),
        (["rro", "rrw"], 0, 1),
        (["rrw", "rro"], 1, 0),
        (["rnosuid", "rnodev", "rnoexec"], 14, 0),
        (["rsuid", "rdev", "rexec"], 0, 14),
        (["rnodiratime"], 0x80, 0),
        (["rdiratime"], 0, 0x80),
        (["rrelatime"], 0, 0x70),
        (["rnoatime"], 0x10, 0x70),
        (["rstrictatime"], 0x20, 0x70),
        (["rnoatime", "rstrictatime"], 0x20, 0x70),
        (["rnosymfollow"], 0x200000, 0),
        (["rsymfollow"], 0, 0x200000),
    ],
)
def test_attributes_of_the_whole_tree(words: list[str], to_set: int, to_clear: int) -> None:
    options = parse_options(words)
    assert (options.recursive_set, options.recursive_clear) == (to_set, to_clear)
    assert ("ATTR", 1, (to_set, to_clear, 0)) in mount_rows(**BIND, options=["rbind", *words])


def test_every_word_of_runc_is_known() -> None:
    runc = (
        "async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime"
        " nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid"
        " nosymfollow private ratime rbind rdev rdiratime relatime remount rexec rnoatime rnodev"
        " rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate"
        " rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared"
        " silent slave strictatime suid symfollow sync tmpcopyup unbindable"
    )
    assert {*runc.split(), "idmap", "ridmap"} == set(mounts.MOUNT_OPTIONS)
    for word in mounts.MOUNT_OPTIONS:
        assert parse_options([word]).data == ()


def test_plain_bind_keeps_the_flags_of_its_source() -> None:
    assert mount_rows(**BIND, options=["bind"]) == [
        ("TREE", 0, (), "/src"),
        ("PLACE", 0, (0,), "/x"),
    ]


def test_bind_with_flags_has_exactly_these() -> None:
    assert mount_rows(**BIND, options=["rbind", "ro", "nosuid", "rslave"]) == [
        ("TREE", 1, (), "/src"),
        ("ATTR", 0, (3, ALL & ~3, 0)),
        ("PLACE", 0, (1 << 19 | 16384,), "/x"),
    ]


def test_bind_tells_what_was_cleared_on_purpose() -> None:
    assert ("ATTR", 0, (0, ALL, 0, 1)) in mount_rows(**BIND, options=["bind", "rw"])


def test_bind_with_access_times() -> None:
    assert ("ATTR", 0, (0x10, ALL | 0x70 | 0x80, 0)) in mount_rows(
        **BIND, options=["bind", "noatime"]
    )
    assert ("ATTR", 0, (0x80, ALL | 0x70, 0)) in mount_rows(**BIND, options=["bind", "nodiratime"])


def test_type_of_a_bind_means_nothing() -> None:
    assert mount_rows(type="tmpfs", source="/s", options=["bind"])[0] == ("TREE", 0, (), "/s")


def test_relative_source_lies_in_the_bundle() -> None:
    assert mount_rows(source="d/../e", options=["bind"])[0] == ("TREE", 0, (), "/bundle/e")


def test_two_propagations_are_two_steps() -> None:
    assert mount_rows(**BIND, options=["bind", "rshared", "slave"])[1:] == [
        ("ATTR", 1, (0, 0, 1 << 20)),
        ("PLACE", 0, (1 << 19,), "/x"),
    ]


def test_tmpfs_takes_the_mode_of_its_target_unless_told() -> None:
    assert mount_rows(type="tmpfs", source="t")[-1] == ("PLACE", 2, (0,), "/x")
    assert mount_rows(type="tmpfs", source="t", options=["mode=700"])[-1] == (
        "PLACE",
        0,
        (0,),
        "/x",
    )


def test_tmpfs_becomes_read_only_when_it_is_filled() -> None:
    plan = plan_of(with_mount(type="tmpfs", source="t", options=["ro", "nosuid", "tmpcopyup"]))
    assert [short(row) for row in plan.assemble[:4]] == [
        ("FS", 0, (), "tmpfs", "t"),
        ("ATTR", 0, (2, 0, 0)),
        ("COPYUP", 0, (), "/x"),
        ("PLACE", 2, (0,), "/x"),
    ]
    assert [short(row) for row in rows(plan.inside, protocol.OP_REMOUNT)] == [
        ("REMOUNT", 0, (1, 0), "/x")
    ]


def test_superblock_flags_and_parameters() -> None:
    words = ["sync", "dirsync", "mand", "lazytime", "iversion", "ro", "a=b=c", "d"]
    assert mount_rows(type="ext4", source="/dev/loop0", options=words) == [
        ("FS", 0, (), "ext4", "/dev/loop0"),
        *(
            ("FSOPT", 0, (), word)
            for word in ("ro", "sync", "dirsync", "mand", "iversion", "lazytime")
        ),
        ("FSOPT", 0, (), "a", "b=c"),
        ("FSOPT", 0, (), "d"),
        ("ATTR", 0, (1, 0, 0)),
        ("PLACE", 0, (0,), "/x"),
    ]


def test_commas_inside_a_word() -> None:
    lower = "lowerdir=/a\\,b:/c"
    assert mount_rows(type="overlay", source="o", options=[f"{lower},index=off"])[1:3] == [
        ("FSOPT", 0, (), "lowerdir", "/a\\,b:/c"),
        ("FSOPT", 0, (), "index", "off"),
    ]


def test_a_value_too_long_for_fsconfig_goes_whole() -> None:
    lower = "lowerdir=" + ":".join(f"/layer{number}" for number in range(60))
    found = mount_rows(type="overlay", source="o", options=[lower, "index=off"])
    assert found[1] == ("FSOPT", 0, (), "", f"{lower},index=off")
    assert found[2][0] == "PLACE"


def test_label() -> None:
    mounted = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/x", "type": "tmpfs", "source": "t"},
        {"destination": "/y", "source": "/y", "options": ["bind"]},
    ]
    plan = plan_of(edited(("mounts", mounted), ("linux/mountLabel", "a:b:c:d")))
    assert [short(row) for row in rows(plan.assemble, protocol.OP_FSOPT)] == [
        ("FSOPT", 0, (), "context", "a:b:c:d")
    ]


def test_remount() -> None:
    assert mount_rows(source="none", options=["remount", "ro"]) == [
        ("REMOUNT", 0, (1, ALL & ~1), "/x")
    ]


def test_cgroup_is_for_those_who_know() -> None:
    assert mount_rows(type="cgroup", source="cgroup", options=["ro"]) == [
        ("FS", 0, (), "cgroup", "/x ro False")
    ]


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [("x", "/x"), ("/a//b/", "/a/b"), ("//a", "/a"), ("/../../a", "/a"), ("a/./b", "/a/b")],
)
def test_targets_are_cleaned(given: str, cleaned: str) -> None:
    assert clean(given) == cleaned


def test_relative_target_is_warned_of() -> None:
    plan = plan_of(with_mount(destination="x", type="tmpfs", source="t"))
    assert plan.warnings[0].startswith("mount destination x is not absolute.")


@pytest.mark.parametrize("name", ["cpuinfo", "meminfo", "sys/kernel/ns_last_pid"])
def test_files_of_proc_that_may_be_replaced(name: str) -> None:
    found = mount_rows(**BIND, destination=f"/proc/{name}", options=["bind"])
    assert found[-1] == ("PLACE", 4, (0,), f"/proc/{name}")


class TestIdMaps:
    MAP = [{"containerID": 0, "hostID": 7, "size": 3}]
    RECORD = (IdMap(inside=0, outside=7, count=3),)

    def test_own_maps_are_shared(self) -> None:
        entry = {"source": "/s", "options": ["bind"]}
        maps = {"uidMappings": self.MAP, "gidMappings": self.MAP}
        mounted = [
            {"destination": "/a", **entry, **maps},
            {"destination": "/b", "source": "/s", "options": ["rbind", "ridmap"], **maps},
        ]
        plan = plan_of(edited(("mounts", mounted)))
        assert plan.idmaps == (("idmap0", self.RECORD, self.RECORD),)
        found = rows(plan.assemble, protocol.OP_ATTR)
        assert [(row.flags, row.numbers, row.fd) for row in found] == [
            (0, (0x100000, 0, 0), "idmap0"),
            (1, (0x100000, 0, 0), "idmap0"),
        ]

    def test_maps_of_the_container(self) -> None:
        plan = plan_of(
            edited(
                ("linux/namespaces", spaces(*SPACES, "user")),
                ("linux/uidMappings", self.MAP),
                ("linux/gidMappings", self.MAP),
                ("mounts", [{"destination": "/a", "source": "/s", "options": ["bind", "idmap"]}]),
            )
        )
        assert plan.idmaps == (("idmap0", self.RECORD, self.RECORD),)

    def test_joined_namespace(self) -> None:
        entries = spaces(*SPACES, {"type": "user", "path": "/u"})
        mount = {"destination": "/a", "source": "/s", "options": ["bind", "idmap"]}
        plan = plan_of(edited(("linux/namespaces", entries), ("mounts", [mount])))
        assert plan.idmaps == (("/u", (), ()),)
        assert rows(plan.assemble, protocol.OP_ATTR)[0].fd == "/u"

    def test_rootless(self) -> None:
        maps = (("linux/uidMappings", self.MAP), ("linux/gidMappings", self.MAP))
        entries = ("linux/namespaces", spaces(*SPACES, "user"))
        mount = {"destination": "/a", "source": "/s", "options": ["bind", "idmap"]}
        config = edited(entries, *maps, ("mounts", [mount]))
        with pytest.raises(ConfigWrong, match="not supported for rootless containers"):
            plan_of(config, host=HOST.replace(rootless=True))

    def test_ids_of_a_rootless_mount_must_be_there(self) -> None:
        maps = (("linux/uidMappings", self.MAP), ("linux/gidMappings", self.MAP))
        entries = ("linux/namespaces", spaces(*SPACES, "user"))
        mount = {"destination": "/a", "type": "tmpfs", "source": "t", "options": ["gid=5"]}
        config = edited(entries, *maps, ("mounts", [mount]), ("process/user", GONE))
        with pytest.raises(ConfigWrong, match="cannot specify gid=5 mount option"):
            plan_of(config, host=HOST.replace(rootless=True))
