"""config-linux.md: namespaces, id maps, devices, paths, sysctl, propagation, personality."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.oci import bed as beds

SPACES = {
    "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "mount": "mnt", "user": "user",
    "cgroup": "cgroup", "time": "time",
}  # fmt: skip


def spaces_of(pid: int | str) -> dict[str, str]:
    return {kind: os.readlink(f"/proc/{pid}/ns/{name}") for kind, name in SPACES.items()}


# ---- namespaces ----


@pytest.mark.parametrize("kind", SPACES)
def test_a_new_namespace(bed, bundle, kind):
    if kind == "user":
        bundle.user_space()
    elif kind != "mount":
        bundle.linux["namespaces"] = [{"type": "mount"}]
        del bundle.config["hostname"]
        bundle.without_mount("/dev/mqueue").without_mount("/sys")
        bundle.space(kind)
        bundle.linux["cgroupsPath"] = f"/{bed.name()}"
    container = bed.create(bundle.args("true"))
    assert spaces_of(container.pid)[kind] != spaces_of("self")[kind]
    container.delete("--force")


@pytest.mark.parametrize("kind", [kind for kind in SPACES if kind != "mount"])
def test_a_namespace_that_is_not_listed_is_inherited(bed, bundle, kind):
    if kind == "uts":
        del bundle.config["hostname"]
    bundle.without_space(kind)
    container = bed.create(bundle.args("true"))
    assert spaces_of(container.pid)[kind] == spaces_of("self")[kind]
    container.delete("--force")


@pytest.mark.parametrize("kind", ["pid", "network", "ipc", "uts", "cgroup"])
def test_a_namespace_to_join(bed, bundle, kind):
    first = bed.sleeping(bed.bundle().space("cgroup"))
    bundle.space(kind, f"/proc/{first.pid}/ns/{SPACES[kind]}")
    if kind == "uts":
        del bundle.config["hostname"]
    second = bed.create(bundle.args("true"))
    assert spaces_of(second.pid)[kind] == spaces_of(first.pid)[kind]
    second.delete("--force")
    # A pid namespace does not end before the last of its processes is reaped.
    second.wait()


def test_a_user_namespace_to_join(bed, bundle):
    first = bed.sleeping(bed.bundle().user_space())
    bundle.user_space()
    del bundle.linux["uidMappings"], bundle.linux["gidMappings"]
    bundle.space("user", f"/proc/{first.pid}/ns/user")
    second = bed.create(bundle.args("true"))
    assert spaces_of(second.pid)["user"] == spaces_of(first.pid)["user"]
    second.delete("--force")


def test_a_time_namespace_to_join(bed, bundle):
    bundle.space("time")
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 5000}}
    first = bed.sleeping(bundle)
    second = bed.bundle().space("time", f"/proc/{first.pid}/ns/time")
    made = bed.create(second.args("true"))
    assert spaces_of(made.pid)["time"] == spaces_of(first.pid)["time"]
    made.delete("--force")


def test_a_namespace_of_another_kind(bed, bundle):
    bundle.space("network", "/proc/self/ns/uts")
    bed.refused(bundle)


def test_a_namespace_path_to_nothing(bed, bundle):
    bundle.space("network", "/no/such/namespace")
    assert "no such file or directory" in bed.refused(bundle)


def test_a_namespace_path_to_a_file(bed, bundle):
    bundle.space("network", "/etc/passwd")
    bed.refused(bundle)


def test_a_namespace_path_that_is_relative(bed, bundle):
    (bundle.path / "net").symlink_to("/proc/self/ns/net")
    bundle.space("network", "net")
    bed.refused(bundle)


def test_an_unknown_namespace(bed, bundle):
    bundle.space("unheard")
    assert "does not exist" in bed.refused(bundle)


def test_a_namespace_listed_twice(bed, bundle):
    bundle.linux["namespaces"].append({"type": "pid"})
    assert "malformed spec file: duplicated ns" in bed.refused(bundle)


def test_the_loopback_of_a_new_network_is_up(bed, bundle):
    assert "UP" in bed.output(bundle.args("ip", "link", "show", "lo"))


def test_without_a_mount_namespace(bed, bundle):
    bundle.without_space("mount")
    bed.refused(bundle)


# ---- user namespaces ----


def test_id_maps(bed, bundle):
    bundle.user_space(100000, 65536)
    said = bed.output(bundle.shell("cat /proc/self/uid_map /proc/self/gid_map; id -u"))
    assert said.split() == ["0", "100000", "65536"] * 2 + ["0"]


def test_id_maps_of_many_lines(bed, bundle):
    """T-C05: more than fits into a small buffer."""
    bundle.user_space(1000)
    for name in ("uidMappings", "gidMappings"):
        bundle.linux[name] = [{"containerID": n, "hostID": 1000 + n, "size": 1} for n in range(330)]
    said = bed.output(bundle.shell("wc -l </proc/self/uid_map; wc -l </proc/self/gid_map"))
    assert said.split() == ["330", "330"]


def test_files_of_a_user_namespace(bed, bundle):
    bundle.user_space()
    bundle.config["root"]["readonly"] = False
    bed.output(bundle.shell("echo >/file; chown 5:6 /file 2>/dev/null; echo >/other"))
    assert (bundle.rootfs / "other").stat().st_uid == 100000


def test_maps_without_a_user_namespace(bed, bundle):
    bundle.linux["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    assert "user namespace" in bed.refused(bundle)


def test_a_user_namespace_without_maps(bed, bundle):
    bundle.space("user")
    assert "user namespaces enabled, but no" in bed.refused(bundle)


def test_an_unmapped_user(bed, bundle):
    bundle.user_space(100000, 10)
    bundle.process["user"] = {"uid": 4242, "gid": 0}
    assert "cannot setuid to unmapped uid 4242 in user namespace" in bed.refused(bundle)


def test_devices_in_a_user_namespace(bed, bundle):
    bundle.user_space()
    said = bed.output(bundle.shell("echo x >/dev/null; head -c 4 /dev/zero | wc -c; ls /dev"))
    assert said.split()[0] == "4"
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx"} <= set(said.split())


# ---- time ----


def test_time_offsets(bed, bundle):
    bundle.space("time")
    bundle.linux["timeOffsets"] = {
        "monotonic": {"secs": 7881, "nanosecs": 2718281},
        "boottime": {"secs": 1337, "nanosecs": 3141519},
    }
    said = bed.output(bundle.args("cat", "/proc/self/timens_offsets")).split()
    assert said == ["monotonic", "7881", "2718281", "boottime", "1337", "3141519"]


def test_time_offsets_in_a_user_namespace(bed, bundle):
    bundle.user_space().space("time")
    bundle.linux["timeOffsets"] = {"boottime": {"secs": 1337}}
    assert "1337" in bed.output(bundle.args("cat", "/proc/self/timens_offsets")).split()


def test_time_offsets_without_a_namespace(bed, bundle):
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 1}}
    assert "time namespace" in bed.refused(bundle)


# ---- devices ----

DEFAULT_DEVICES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
    "tty": (5, 0),
}  # fmt: skip


def test_the_default_devices(bed, bundle):
    words = " ".join(f"/dev/{name}" for name in DEFAULT_DEVICES)
    said = bed.output(bundle.shell(f"stat -c '%n %t %T %a %u %g' {words}")).splitlines()
    for line, (name, (major, minor)) in zip(said, DEFAULT_DEVICES.items(), strict=True):
        assert line == f"/dev/{name} {major:x} {minor:x} 666 0 0"


def test_the_links_in_dev(bed, bundle):
    said = bed.output(
        bundle.shell("cd /dev; for n in fd stdin stdout stderr ptmx; do readlink $n; done")
    )
    assert said.split() == [
        "/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "pts/ptmx"
    ]  # fmt: skip


def test_dev_is_left_alone_when_it_is_a_bind(bed, bundle):
    folder = bed.place / "dev"
    folder.mkdir()
    bundle.config["mounts"] = [
        one for one in bundle.config["mounts"] if not one["destination"].startswith("/dev")
    ]
    bundle.mount("/dev", "bind", str(folder), "bind")
    bundle.linux["maskedPaths"] = []
    bed.output(bundle.args("true"))
    assert os.listdir(folder) == []


@pytest.mark.parametrize("letter", ["c", "u", "b", "p"])
def test_a_device(bed, bundle, letter):
    device = {"path": "/dev/deep/thing", "type": letter, "fileMode": 0o640, "uid": 7, "gid": 8}
    if letter != "p":
        device |= {"major": 1, "minor": 3}
    bundle.linux["devices"] = [device]
    said = bed.output(bundle.args("stat", "-c", "%F %a %u %g", "/dev/deep/thing"))
    kind = {"c": "character special file", "u": "character special file"}
    kind |= {"b": "block special file", "p": "fifo"}
    assert said == f"{kind[letter]} 640 7 8\n"


def test_a_device_has_mode_0666_by_default(bed, bundle):
    bundle.linux["devices"] = [{"path": "/dev/thing", "type": "c", "major": 1, "minor": 5}]
    assert bed.output(bundle.args("stat", "-c", "%a", "/dev/thing")) == "666\n"


def test_a_default_device_that_is_configured(bed, bundle):
    device = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600}
    bundle.linux["devices"] = [device]
    bundle.linux["resources"]["devices"].append(
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    )
    assert bed.output(bundle.args("stat", "-c", "%a", "/dev/null")) == "600\n"


# ---- paths ----


def test_a_masked_file(bed, bundle):
    bundle.linux["maskedPaths"] = ["/etc/passwd"]
    assert bed.output(bundle.shell("cat /etc/passwd; stat -c %F /etc/passwd")) == (
        "character special file\n"
    )


def test_a_masked_directory(bed, bundle):
    (bundle.rootfs / "secret/deep").mkdir(parents=True)
    bundle.linux["maskedPaths"] = ["/secret"]
    done = bed.run(bundle.shell("ls -A /secret; touch /secret/file"))
    assert done.stdout == ""
    assert "Read-only" in done.stderr


def test_a_masked_path_that_is_not_there(bed, bundle):
    bundle.linux["maskedPaths"] = ["/no/such", "/proc/no/such"]
    bed.output(bundle.args("true"))


def test_the_default_masked_paths(bed, bundle):
    said = bed.output(
        bundle.shell("head -c 10 /proc/kcore; ls -A /proc/acpi /sys/firmware; cat /proc/keys")
    )
    assert not [line for line in said.splitlines() if line and not line.endswith(":")]


def test_a_readonly_path(bed, bundle):
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "fixed").mkdir()
    bundle.linux["readonlyPaths"] = ["/fixed", "/etc/passwd", "/no/such"]
    done = bed.run(bundle.shell("touch /fixed/file; echo >>/etc/passwd; echo >>/etc/group"))
    assert done.returncode == 0
    assert done.stderr.count("Read-only") == 2


def test_the_default_readonly_paths(bed, bundle):
    bundle.process["capabilities"] = {
        name: ["CAP_SYS_ADMIN"] for name in ("bounding", "effective", "permitted")
    }
    done = bed.run(bundle.shell("echo 1 >/proc/sys/kernel/domainname"))
    assert done.returncode != 0
    assert "Read-only" in done.stderr


@pytest.mark.parametrize("key", ["maskedPaths", "readonlyPaths"])
def test_a_path_that_is_relative(bed, bundle, key):
    bundle.linux[key] = ["etc/passwd"]
    bed.refused(bundle)


# ---- sysctl ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("net.ipv4.ip_forward", "1"),
        ("net/ipv4/ip_forward", "1"),
        ("kernel.shmmax", "65536"),
        ("kernel.msgmax", "9000"),
        ("fs.mqueue.msg_max", "20"),
        ("kernel.domainname", "of.it"),
        ("kernel.sem", "100 200 32 64"),
    ],
)
def test_a_sysctl(bed, bundle, key, value):
    bundle.linux["sysctl"] = {key: value}
    path = "/proc/sys/" + (key if "/" in key else key.replace(".", "/"))
    assert bed.output(bundle.args("cat", path)).split() == value.split()


def test_a_sysctl_of_an_interface_with_a_dot(bed, bundle):
    bundle.linux["sysctl"] = {"net/ipv4/conf/lo/forwarding": "1"}
    assert bed.output(bundle.args("cat", "/proc/sys/net/ipv4/conf/lo/forwarding")) == "1\n"


@pytest.mark.parametrize(
    "key", ["vm.swappiness", "kernel.core_pattern", "kernel.hostname", "unheard.of", "net.unheard"]
)
def test_a_sysctl_that_is_not_the_containers(bed, bundle, key):
    bundle.linux["sysctl"] = {key: "1"}
    bed.refused(bundle)


@pytest.mark.parametrize(
    ("space", "key"), [("network", "net.ipv4.ip_forward"), ("ipc", "kernel.shmmax")]
)
def test_a_sysctl_of_the_host(bed, bundle, space, key):
    bundle.without_space(space)
    bundle.linux["sysctl"] = {key: "1"}
    assert "sysctl" in bed.refused(bundle)


# ---- the root's propagation ----


@pytest.mark.parametrize(
    "name", ["private", "slave", "shared", "unbindable", "rprivate", "rslave", "rshared"]
)
def test_propagation_of_the_root(bed, bundle, name):
    bundle.linux["rootfsPropagation"] = name
    said = bed.output(bundle.args("cat", "/proc/self/mountinfo"))
    tags = next(line.split()[6] for line in said.splitlines() if line.split()[4] == "/")
    expected = {"shared": "shared", "unbindable": "unbindable"}.get(name.removeprefix("r"), "-")
    assert tags.split(":")[0] in ((expected,) if expected != "-" else ("-", "master"))


def test_an_unknown_propagation(bed, bundle):
    bundle.linux["rootfsPropagation"] = "unheard"
    assert "rootfsPropagation=unheard is not supported" in bed.refused(bundle)


def test_without_pivot(bed, bundle):
    bed.output(bundle.args("true"), "--no-pivot")


# ---- the rest ----


def test_personality(bed, bundle):
    bundle.linux["personality"] = {"domain": "LINUX32"}
    found = bed.facts(bundle)
    assert (found["personality"], found["machine"]) == (8, "i686")
    bundle.linux["personality"] = {"domain": "LINUX"}
    assert bed.facts(bundle)["personality"] == 0


def test_an_unknown_personality(bed, bundle):
    bundle.linux["personality"] = {"domain": "UNHEARD"}
    assert "personality" in bed.refused(bundle)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"mode": "MPOL_BIND", "nodes": "0"}, [2, 1]),
        ({"mode": "MPOL_INTERLEAVE", "nodes": "0"}, [3, 1]),
        ({"mode": "MPOL_PREFERRED", "nodes": "0"}, [1, 1]),
        ({"mode": "MPOL_LOCAL"}, [4, 0]),
    ],
    ids=["bind", "interleave", "preferred", "local"],
)
def test_memory_policy(bed, bundle, wanted, expected):
    bundle.linux["memoryPolicy"] = wanted
    assert bed.facts(bundle)["memory_policy"] == expected


@pytest.mark.parametrize(
    "wanted",
    [{"mode": "MPOL_UNHEARD"}, {"mode": "MPOL_BIND"}, {"mode": "MPOL_LOCAL", "nodes": "0"}],
    ids=["mode", "none", "too many"],
)
def test_a_wrong_memory_policy(bed, bundle, wanted):
    bundle.linux["memoryPolicy"] = wanted
    bed.refused(bundle)


def test_intel_rdt_where_there_is_none(bed, bundle):
    if Path("/sys/fs/resctrl/schemata").exists():
        pytest.skip("did not run: resctrl is mounted")
    bundle.linux["intelRdt"] = {"closID": "a", "l3CacheSchema": "L3:0=f"}
    assert "intelRdt" in bed.refused(bundle)


def test_a_mount_label_without_selinux(bed, bundle):
    if Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("did not run: SELinux is on")
    bundle.linux["mountLabel"] = "system_u:object_r:container_file_t:s0"
    bed.refused(bundle)


@pytest.fixture
def device():
    """A network device of the host's."""
    name = f"apy{os.getpid() % 100000}"
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", f"{name}p"], check=True)
    subprocess.run(["ip", "addr", "add", "192.0.2.7/24", "dev", name], check=True)
    yield name
    subprocess.run(["ip", "link", "del", f"{name}p"], check=False, capture_output=True)


def test_a_network_device(bed, bundle, device):
    bundle.linux["netDevices"] = {device: {"name": "inside0"}}
    said = bed.output(bundle.args("ip", "addr", "show", "inside0"))
    assert "192.0.2.7/24" in said
    assert "UP" in said


def test_a_network_device_that_is_not_there(bed, bundle):
    bundle.linux["netDevices"] = {"unheard0": {}}
    bed.refused(bundle)


def test_a_network_device_without_a_namespace(bed, bundle, device):
    bundle.without_space("network").without_mount("/sys")
    bundle.linux["netDevices"] = {device: {}}
    assert "network devices" in bed.refused(bundle)
    assert Path(f"/sys/class/net/{device}").exists()


def test_the_stat_of_dev(bed, bundle):
    container = bed.sleeping(bundle)
    facts = os.stat(f"/proc/{container.pid}/root/dev/null")
    assert stat.S_ISCHR(facts.st_mode)
    assert beds.mounts_below(bundle.path) == []
