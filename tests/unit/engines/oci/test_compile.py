"""config.json to rows: the configuration of `runc spec` whole, then each key by itself."""

from __future__ import annotations

from typing import Any

import pytest

from apptainer_py.engines.oci.compile import compile_bundle, compile_tenant
from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.model import protocol
from apptainer_py.model.oci_plan import CreateOptions, ExecOptions, Hook, IdMap
from tests.oci_config import (
    GONE,
    HOST,
    SPACES,
    edited,
    plan_of,
    rows,
    short,
    spaces,
)

NEWTIME, NEWCGROUP, NEWUSER = 0x80, 0x02000000, 0x10000000
NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
FIVE = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
KILL_BIND_AUDIT = 1 << 5 | 1 << 10 | 1 << 29
MAPS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
WITH_USER = (
    ("linux/namespaces", spaces(*SPACES, "user")),
    ("linux/uidMappings", MAPS),
    ("linux/gidMappings", MAPS),
)


def test_bundle_of_runc_spec() -> None:
    plan = plan_of(edited())
    assert plan.new_spaces == FIVE
    assert plan.join_paths == ()
    assert plan.root == "/bundle/rootfs"
    assert plan.terminal
    assert plan.rlimits == ((7, 1024, 1024),)
    assert plan.process.capabilities == (
        KILL_BIND_AUDIT,
        KILL_BIND_AUDIT,
        0,
        KILL_BIND_AUDIT,
        0,
    )
    assert plan.process.no_new_privileges
    assert plan.process.umask == 0o022
    assert plan.process.groups == ()
    assert plan.cgroup.path == "box"
    assert plan.seccomp is None
    assert [short(row) for row in (*plan.prepare, plan.mapped, *plan.setup)] == [
        ("PREP", 2, ()),
        ("MAPPED", 2 | 8 | 16, ()),
        ("KEYRING", 0, (0x080000,), "_ses.box"),
        ("PROPAGATION", 0, (0,)),
        ("ROOT_BUNDLE", 1, (), "/bundle/rootfs"),
    ]
    assert [short(row) for row in plan.assemble] == [
        ("FS", 0, (), "proc", "proc"),
        ("PLACE", 4, (0,), "/proc"),
        ("FS", 0, (), "tmpfs", "tmpfs"),
        ("FSOPT", 0, (), "mode", "755"),
        ("FSOPT", 0, (), "size", "65536k"),
        ("ATTR", 0, (0x22, 0x70, 0)),
        ("PLACE", 0, (0,), "/dev"),
        ("FS", 0, (), "devpts", "devpts"),
        ("FSOPT", 0, (), "newinstance"),
        ("FSOPT", 0, (), "ptmxmode", "0666"),
        ("FSOPT", 0, (), "mode", "0620"),
        ("FSOPT", 0, (), "gid", "5"),
        ("ATTR", 0, (0x0A, 0, 0)),
        ("PLACE", 0, (0,), "/dev/pts"),
        ("FS", 0, (), "sysfs", "sysfs"),
        ("FSOPT", 0, (), "ro"),
        ("ATTR", 0, (0x0F, 0, 0)),
        ("PLACE", 0, (0,), "/sys"),
        ("FS", 0, (), "cgroup", "/sys/fs/cgroup nosuid,noexec,nodev,relatime,ro False"),
        ("MKNOD", 0, (0o20666, 1 << 32 | 3, 0, 0), "/dev/null"),
        ("MKNOD", 0, (0o20666, 1 << 32 | 8, 0, 0), "/dev/random"),
        ("MKNOD", 0, (0o20666, 1 << 32 | 7, 0, 0), "/dev/full"),
        ("MKNOD", 0, (0o20666, 5 << 32, 0, 0), "/dev/tty"),
        ("MKNOD", 0, (0o20666, 1 << 32 | 5, 0, 0), "/dev/zero"),
        ("MKNOD", 0, (0o20666, 1 << 32 | 9, 0, 0), "/dev/urandom"),
        ("LINK", 1, (), "pts/ptmx", "/dev/ptmx"),
        ("LINK", 0, (), "/proc/self/fd", "/dev/fd"),
        ("LINK", 0, (), "/proc/self/fd/0", "/dev/stdin"),
        ("LINK", 0, (), "/proc/self/fd/1", "/dev/stdout"),
        ("LINK", 0, (), "/proc/self/fd/2", "/dev/stderr"),
        ("LINK", 0, (), "/proc/kcore", "/dev/core"),
    ]
    assert [short(row) for row in plan.inside] == [
        ("ENTER", 0, (0, 0), "/"),
        ("CONSOLE", 1, (0, 0)),
        ("ROOT_READONLY", 0, ()),
        ("NAME", 0, (), "runc"),
        ("READONLY_PATH", 0, (), "/proc/bus"),
        ("READONLY_PATH", 0, (), "/proc/sys"),
        ("MASK_PATH", 0, (), "/proc/acpi"),
        ("MASK_PATH", 0, (), "/proc/kcore"),
    ]


def test_the_smallest_configuration() -> None:
    config: dict[str, Any] = {
        "root": {"path": "r"},
        "process": {"args": ["x"], "cwd": "/"},
    }
    plan = plan_of(config)
    assert plan.new_spaces == 0
    assert plan.process.capabilities is None
    assert [row.op for row in plan.inside] == [protocol.OP_ENTER]
    assert plan.inside[0].numbers[0] == 2  # chroot: there is no mount namespace
    assert not rows(plan.setup, protocol.OP_PROPAGATION)


def test_unknown_properties_are_ignored() -> None:
    changes = (("x-new", {"deep": [1]}), ("linux/x-new", 1), ("process/user/x", {}))
    assert plan_of(edited(*changes)) == plan_of(edited())


def test_null_is_as_good_as_absent() -> None:
    changes = (("hooks", None), ("linux/seccomp", None), ("process/capabilities/ambient", None))
    assert plan_of(edited(*changes)) == plan_of(edited())


def test_root_path_from_root() -> None:
    assert plan_of(edited(("root/path", "/a/../b/"))).root == "/b"


def test_writable_root() -> None:
    plan = plan_of(edited(("root/readonly", GONE)))
    assert not rows(plan.inside, protocol.OP_ROOT_READONLY)


class TestSpaces:
    def test_joined(self) -> None:
        entries = spaces(
            "pid",
            "mount",
            {"type": "network", "path": "/run/netns/x"},
            {"type": "ipc", "path": "/proc/7/ns/ipc"},
        )
        config = edited(("linux/namespaces", entries), ("hostname", GONE))
        plan = plan_of(config)
        assert plan.new_spaces == NEWPID | NEWNS
        assert plan.join_paths == ((NEWNET, "/run/netns/x"), (NEWIPC, "/proc/7/ns/ipc"))
        assert not plan.mapped.flags & 16  # only a network of its own has its lo brought up

    def test_cgroup_is_unshared_later(self) -> None:
        plan = plan_of(edited(("linux/namespaces", spaces(*SPACES, "cgroup"))))
        assert plan.new_spaces == FIVE
        assert plan.mapped.flags & 4
        assert plan.cgroup.private_namespace

    def test_user_with_maps(self) -> None:
        plan = plan_of(edited(*WITH_USER))
        assert plan.new_spaces == FIVE | NEWUSER
        assert plan.uid_maps == (IdMap(inside=0, outside=100000, count=65536),)
        assert plan.gid_maps == plan.uid_maps
        assert plan.mapped.flags & 1
        assert plan.process.in_user_namespace
        node = rows(plan.assemble, protocol.OP_MKNOD)[0]
        assert (node.flags, node.second) == (1, b"/dev/null")

    def test_joined_user(self) -> None:
        maps = (IdMap(inside=0, outside=5, count=9),)
        host = HOST.replace(joined_maps=lambda _path: (maps, maps))
        entries = spaces(*SPACES, {"type": "user", "path": "/u"})
        plan = plan_of(edited(("linux/namespaces", entries)), host=host)
        assert plan.uid_maps == ()
        assert plan.join_paths == ((NEWUSER, "/u"),)
        given = [{"containerID": 0, "hostID": 5, "size": 9}]
        both = (("linux/uidMappings", given), ("linux/gidMappings", given))
        plan = plan_of(edited(("linux/namespaces", entries), *both), host=host)
        assert plan.warnings
        with pytest.raises(ConfigWrong, match="non-matching mapping"):
            plan_of(edited(("linux/namespaces", entries), *WITH_USER[1:]), host=host)

    def test_time_offsets(self) -> None:
        offsets = {"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 9}}
        entries = spaces(*SPACES, "time")
        config = edited(("linux/namespaces", entries), ("linux/timeOffsets", offsets))
        plan = plan_of(config)
        assert plan.new_spaces == FIVE | NEWTIME
        assert plan.time_offsets == (-5, 7, 9, 0)


class TestRoot:
    @pytest.mark.parametrize(
        ("word", "before", "after"),
        [
            ("rslave", 1 << 19 | 16384, 0),
            ("private", 1 << 18, 0),
            ("rshared", 1 << 20 | 16384, 1 << 20 | 16384),
            ("unbindable", 0, 1 << 17),
        ],
    )
    def test_propagation(self, word: str, before: int, after: int) -> None:
        plan = plan_of(edited(("linux/rootfsPropagation", word)))
        assert rows(plan.setup, protocol.OP_PROPAGATION)[0].numbers == (before,)
        assert plan.inside[0].numbers == (0, after)

    def test_no_pivot(self) -> None:
        assert plan_of(edited(), no_pivot=True).inside[0].numbers == (1, 0)

    def test_no_keyring(self) -> None:
        options = CreateOptions(container_id="box", no_new_keyring=True)
        plan = compile_bundle(edited(), "/b", HOST, options)
        assert not rows(plan.setup, protocol.OP_KEYRING)

    def test_names(self) -> None:
        plan = plan_of(edited(("domainname", "dom")))
        assert [short(row) for row in rows(plan.inside, protocol.OP_NAME)] == [
            ("NAME", 0, (), "runc"),
            ("NAME", 1, (), "dom"),
        ]

    def test_mount_label_is_for_masks_too(self) -> None:
        plan = plan_of(edited(("linux/mountLabel", "a:b:c")))
        masks = rows(plan.inside, protocol.OP_MASK_PATH)
        assert {row.second for row in masks} == {b"a:b:c"}


class TestDevices:
    def test_kinds(self) -> None:
        own = [
            {"path": "/dev/a", "type": "u", "major": 10, "minor": 229, "uid": 3, "gid": 4},
            {"path": "/dev/b", "type": "b", "major": 7, "minor": 0, "fileMode": 0o60600},
            {"path": "/dev/p", "type": "p"},
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600},
        ]
        plan = plan_of(edited(("linux/devices", own)))
        nodes = [short(row) for row in rows(plan.assemble, protocol.OP_MKNOD)]
        assert nodes[:5] == [
            ("MKNOD", 0, (0o20666, number, 0, 0), f"/dev/{name}")
            for name, number in (
                ("random", 1 << 32 | 8),
                ("full", 1 << 32 | 7),
                ("tty", 5 << 32),
                ("zero", 1 << 32 | 5),
                ("urandom", 1 << 32 | 9),
            )
        ]
        assert nodes[5:] == [
            ("MKNOD", 0, (0o20666, 10 << 32 | 229, 3, 4), "/dev/a"),
            ("MKNOD", 0, (0o60600, 7 << 32, 0, 0), "/dev/b"),
            ("MKNOD", 0, (0o10666, 0, 0, 0), "/dev/p"),
            ("MKNOD", 0, (0o20600, 1 << 32 | 3, 0, 0), "/dev/null"),
        ]

    def test_a_fifo_has_no_host_node_to_bind(self) -> None:
        own = [{"path": "/dev/p", "type": "p"}]
        plan = plan_of(edited(*WITH_USER, ("linux/devices", own)))
        assert rows(plan.assemble, protocol.OP_MKNOD)[-1].flags == 0

    def test_no_kcore(self) -> None:
        plan = plan_of(edited(), host=HOST.replace(kcore=False))
        assert b"/dev/core" not in {row.second for row in plan.assemble}

    def test_bound_dev_is_left_alone(self) -> None:
        mount = {"destination": "/dev/", "source": "/dev", "options": ["rbind"]}
        plan = plan_of(edited(("mounts", [mount])))
        assert not rows(plan.assemble, protocol.OP_MKNOD, protocol.OP_LINK)


class TestCgroup:
    @pytest.mark.parametrize(
        ("path", "cleaned"),
        [
            ("/a/b", "/a/b"),
            ("/../a/./b//", "/a/b"),
            ("a/b", "a/b"),
            ("../../x", "x"),
            ("", "box"),
        ],
    )
    def test_path(self, path: str, cleaned: str) -> None:
        assert plan_of(edited(("linux/cgroupsPath", path))).cgroup.path == cleaned

    def test_systemd(self) -> None:
        config = edited(("linux/cgroupsPath", "system.slice:docker:1234"))
        wish = plan_of(config, systemd=True).cgroup
        assert (wish.slice_parent, wish.scope_prefix, wish.path) == (
            "system.slice",
            "docker",
            "1234",
        )
        wish = plan_of(edited(), systemd=True).cgroup
        assert (wish.slice_parent, wish.scope_prefix, wish.path) == ("", "runc", "box")

    def test_owner_of_a_writable_group(self) -> None:
        mount = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}
        base = (
            *WITH_USER[1:],
            ("mounts", [mount]),
            ("linux/namespaces", spaces(*SPACES, "user", "cgroup")),
        )
        assert plan_of(edited(*base, ("process/user/uid", 7))).cgroup.owner == (100007, -1)
        with pytest.raises(ConfigWrong, match="cannot setuid to unmapped uid 99999"):
            plan_of(edited(*base, ("process/user/uid", 99999)))
        read_only = [{**mount, "options": ["ro"]}]
        assert plan_of(edited(*base, ("mounts", read_only))).cgroup.owner is None

    def test_resources_are_passed_on(self) -> None:
        resources = {"memory": {"limit": 5, "kernel": 6}, "x": 1}
        plan = plan_of(edited(("linux/resources", resources)))
        assert plan.cgroup.resources == resources
        assert plan.warnings == ("Kernel memory settings are ignored and will be removed",)


class TestProcess:
    def test_user(self) -> None:
        user = {"uid": 5, "gid": 6, "umask": 0o77, "additionalGids": [7, 8], "username": "x"}
        spec = plan_of(edited(("process/user", user))).process
        assert (spec.uid, spec.gid, spec.umask, spec.groups) == (5, 6, 0o77, (7, 8))

    def test_later_variable_wins_and_takes_the_later_place(self) -> None:
        words = ["A=1", "B=2", "A=3", "C=", "B=é=4"]
        spec = plan_of(edited(("process/env", words))).process
        assert spec.environment == (b"A=3", b"C=", "B=é=4".encode())

    def test_capabilities(self) -> None:
        sets = {"bounding": ["CAP_KILL", "CAP_X", "cap_chown"], "ambient": ["CAP_CHOWN"]}
        plan = plan_of(edited(("process/capabilities", sets)))
        assert plan.process.capabilities == (0, 0, 0, 1 << 5, 1)
        assert plan.warnings == (
            "ignoring unknown or unavailable capabilities: [CAP_X cap_chown]",
            "can't raise ambient capability CAP_CHOWN: operation not permitted",
        )

    def test_capability_that_the_kernel_lacks(self) -> None:
        sets = {"bounding": ["CAP_CHECKPOINT_RESTORE", "CAP_BPF"]}
        plan = plan_of(
            edited(("process/capabilities", sets)), host=HOST.replace(last_capability=39)
        )
        assert plan.process.capabilities == (0, 0, 0, 1 << 39, 0)
        assert "CAP_CHECKPOINT_RESTORE" in plan.warnings[0]

    def test_oom_score(self) -> None:
        row = plan_of(edited(("process/oomScoreAdj", -3))).prepare[0]
        assert (row.flags, row.numbers) == (3, (2**64 - 3,))

    def test_scheduler(self) -> None:
        value = {
            "policy": "SCHED_DEADLINE",
            "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_RECLAIM"],
            "runtime": 1,
            "deadline": 2,
            "period": 3,
        }
        spec = plan_of(edited(("process/scheduler", value))).process
        assert spec.scheduler == (6, 0, 0, 3, 1, 2, 3)
        value = {"policy": "SCHED_BATCH", "nice": -4}
        spec = plan_of(edited(("process/scheduler", value))).process
        assert spec.scheduler == (3, -4, 0, 0, 0, 0, 0)

    def test_io_priority(self) -> None:
        value = {"class": "IOPRIO_CLASS_IDLE", "priority": 4}
        assert plan_of(edited(("process/ioPriority", value))).process.io_priority == 3 << 13 | 4

    def test_personality(self) -> None:
        plan = plan_of(edited(("linux/personality", {"domain": "LINUX32", "flags": ["A"]})))
        assert plan.process.personality == 8
        assert "personality flags: [A]" in plan.warnings[0]

    def test_memory_policy(self) -> None:
        value = {
            "mode": "MPOL_INTERLEAVE",
            "nodes": "0-2,5",
            "flags": ["MPOL_F_STATIC_NODES"],
        }
        spec = plan_of(edited(("linux/memoryPolicy", value))).process
        assert spec.memory_policy == (3 | 1 << 15, 0b100111)

    def test_console(self) -> None:
        size = {"height": 24, "width": 80}
        plan = plan_of(edited(("process/consoleSize", size)))
        assert short(rows(plan.inside, protocol.OP_CONSOLE)[0]) == ("CONSOLE", 1, (24, 80))
        plan = plan_of(edited(("process/terminal", False)))
        assert not rows(plan.inside, protocol.OP_CONSOLE)

    def test_labels_and_affinity(self) -> None:
        host = HOST.replace(selinux=True)
        plan = plan_of(
            edited(
                ("process/apparmorProfile", "prof"),
                ("process/selinuxLabel", "a:b"),
                ("process/execCPUAffinity", {"initial": "0-1", "final": "2"}),
            ),
            host=host,
        )
        assert plan.process.selinux_label == "a:b"
        assert short(rows(plan.inside, protocol.OP_APPARMOR)[0]) == ("APPARMOR", 0, (), "prof")
        assert plan.affinity == ("0-1", "2")


class TestSysctl:
    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
            ("net/ipv4/conf/eno2.100/rp_filter", "net/ipv4/conf/eno2.100/rp_filter"),
            ("net.ipv4.conf.eno2/100.rp_filter", "net/ipv4/conf/eno2.100/rp_filter"),
            ("kernel.shmmax", "kernel/shmmax"),
            ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
            ("kernel.domainname", "kernel/domainname"),
        ],
    )
    def test_namespaced(self, name: str, path: str) -> None:
        plan = plan_of(edited(("linux/sysctl", {name: "1"})))
        row = rows(plan.inside, protocol.OP_SYSCTL)[0]
        assert short(row) == ("SYSCTL", 0, (), path, "1")

    def test_joined_network_that_is_the_hosts(self) -> None:
        entries = spaces("uts", "mount", {"type": "network", "path": "/n"})
        config = edited(("linux/namespaces", entries), ("linux/sysctl", {"net.x": "1"}))
        plan = plan_of(config, host=HOST.replace(inode_of=lambda _path: 1))
        assert rows(plan.inside, protocol.OP_SYSCTL)
        with pytest.raises(ConfigWrong, match="not allowed in host network namespace"):
            plan_of(config, host=HOST.replace(inode_of=lambda _path: 4026531840))


def test_net_devices() -> None:
    devices = {"eth9": {"name": "in0"}, "eth8": {}}
    plan = plan_of(edited(("linux/netDevices", devices)))
    assert plan.netdevs == {"eth9": "in0", "eth8": "eth8"}
    assert [row.first for row in rows(plan.setup, protocol.OP_NETDEV)] == [b"in0", b"eth8"]


def test_hooks_in_the_order_of_the_specification() -> None:
    hooks = {
        "poststop": [{"path": "/p"}],
        "prestart": [{"path": "/a", "args": ["x", "y"], "env": ["K=V"], "timeout": 5}],
        "createContainer": [{"path": "/c", "env": []}, {"path": "/d"}],
    }
    assert plan_of(edited(("hooks", hooks))).hooks == (
        Hook(
            kind="prestart",
            path="/a",
            arguments=("x", "y"),
            environment=("K=V",),
            timeout_seconds=5,
        ),
        Hook(kind="createContainer", path="/c", environment=()),
        Hook(kind="createContainer", path="/d"),
        Hook(kind="poststop", path="/p"),
    )


def test_resctrl() -> None:
    rdt = {"closID": "g", "l3CacheSchema": "L3:0=f"}
    plan = plan_of(edited(("linux/intelRdt", rdt)), host=HOST.replace(resctrl=("L3",)))
    assert plan.resctrl == rdt


def test_seccomp_is_passed_on() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "listenerPath": "/s",
        "syscalls": [{"names": ["getcwd"], "action": "SCMP_ACT_NOTIFY"}],
    }
    assert plan_of(edited(("linux/seccomp", profile))).seccomp == profile
    assert plan_of(edited(("linux/seccomp", {}))).seccomp is None


def test_annotations() -> None:
    assert plan_of(edited(("annotations", {"a": "b"}))).annotations == {"a": "b"}


def test_rootless() -> None:
    host = HOST.replace(uid=1000, rootless=True)
    plan = plan_of(edited(*WITH_USER), host=host)
    assert plan.process.groups is None
    assert not plan.mapped.flags & 2
    with pytest.raises(ConfigWrong, match="rootless container requires user namespaces"):
        plan_of(edited(), host=host)


class TestTenant:
    OPTIONS = ExecOptions(container_id="box", preserve_fds=2)

    def test_takes_capabilities_and_filter_of_the_container(self) -> None:
        profile = {"defaultAction": "SCMP_ACT_ALLOW"}
        config = edited(("linux/seccomp", profile))
        process = {"args": ["id"], "cwd": "/tmp", "terminal": True}
        plan = compile_tenant(config, process, HOST, self.OPTIONS)
        spec = plan.process
        assert spec.tenant
        assert spec.umask is None
        assert spec.preserve_fds == 2
        assert spec.arguments == (b"id",)
        assert spec.capabilities is not None
        assert spec.capabilities[3] == KILL_BIND_AUDIT
        assert plan.seccomp == profile
        assert [short(row) for row in plan.setup] == [
            ("KEYRING", 0, (0x080000,), "_ses.box"),
            ("TENANT", 0, ()),
        ]
        assert [short(row) for row in plan.inside] == [("CONSOLE", 0, (0, 0))]

    def test_umask_of_the_container(self) -> None:
        config = edited(("process/user/umask", 0o77))
        process: dict[str, Any] = {"args": ["id"], "cwd": "/", "user": {"uid": 1}}
        assert compile_tenant(config, process, HOST, self.OPTIONS).process.umask == 0o77
        process["user"]["umask"] = 0
        assert compile_tenant(config, process, HOST, self.OPTIONS).process.umask == 0

    def test_sentence_of_no_init(self) -> None:
        process = {"args": ["id"], "cwd": "/", "env": ["x"]}
        with pytest.raises(ConfigWrong) as caught:
            compile_tenant(edited(), process, HOST, self.OPTIONS)
        assert str(caught.value) == (
            "unable to start container process: invalid environment variable: missing '='"
        )

    def test_own_capabilities(self) -> None:
        process = {"args": ["id"], "cwd": "/", "capabilities": {"bounding": ["CAP_CHOWN"]}}
        plan = compile_tenant(edited(), process, HOST, self.OPTIONS)
        assert plan.process.capabilities == (0, 0, 0, 1, 0)

    def test_affinity(self) -> None:
        process = {"args": ["id"], "cwd": "/", "execCPUAffinity": {"initial": "1", "final": "0"}}
        plan = compile_tenant(edited(), process, HOST, self.OPTIONS)
        assert short(plan.prepare[0]) == ("PREP", 4, (), "1")
        assert plan.affinity == ("1", "0")

    @pytest.mark.parametrize(
        ("process", "text"),
        [
            ({"cwd": "/"}, "args must not be empty"),
            ({"args": ["x"]}, "Cwd property must not be empty"),
            (None, "process property must not be empty"),
            (
                {"args": "x"},
                "json: cannot unmarshal string into Go struct field Process.args of type []string",
            ),
        ],
    )
    def test_wrong(self, process: Any, text: str) -> None:
        with pytest.raises(ConfigWrong) as caught:
            compile_tenant(edited(), process, HOST, self.OPTIONS)
        assert str(caught.value) == text
