"""`mounts` of config.json: each option by what the container sees of it."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest


def mount_table(bed, bundle) -> dict[str, dict[str, object]]:
    """Return the container's mounts: point → type, own flags, those of the file system, tags."""
    found = {}
    for line in bed.output(bundle.args("cat", "/proc/self/mountinfo")).splitlines():
        words = line.split()
        dash = words.index("-")
        found[words[4]] = {
            "flags": set(words[5].split(",")),
            "tags": words[6:dash],
            "type": words[dash + 1],
            "data": set(words[dash + 3].split(",")),
            "root": words[3],
        }
    return found


@pytest.fixture
def folder(bed) -> Path:
    made = bed.place / "folder"
    made.mkdir()
    (made / "file").write_text("content\n")
    return made


def test_the_mounts_of_the_default_configuration(bed, bundle):
    found = mount_table(bed, bundle)
    types = {point: found[point]["type"] for point in found}
    assert types["/proc"] == "proc"
    assert types["/dev"] == types["/dev/shm"] == "tmpfs"
    assert types["/dev/pts"] == "devpts"
    assert types["/dev/mqueue"] == "mqueue"
    assert types["/sys"] == "sysfs"
    assert "ro" in found["/sys"]["flags"]
    assert {"nosuid", "nodev", "noexec"} <= found["/dev/shm"]["flags"]
    assert {"mode=755", "size=65536k"} <= found["/dev"]["data"]


def test_mounts_are_made_in_the_listed_order(bed, bundle, folder):
    bundle.mount("/m", "tmpfs", "tmpfs").mount("/m/inner", "bind", str(folder), "bind")
    assert bed.output(bundle.shell("cat /m/inner/file")) == "content\n"


def test_the_later_mount_covers_the_earlier(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind").mount("/m", "tmpfs", "tmpfs")
    assert bed.output(bundle.shell("ls /m")) == ""


FLAGS = {
    "ro": ("ro", None), "nosuid": ("nosuid", None), "nodev": ("nodev", None),
    "noexec": ("noexec", None), "noatime": ("noatime", None), "nodiratime": ("nodiratime", None),
    "relatime": ("relatime", None), "nosymfollow": ("nosymfollow", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_a_tmpfs(bed, bundle, name):
    flag = FLAGS[name][0]
    bundle.mount("/m", "tmpfs", "tmpfs", name)
    assert flag in mount_table(bed, bundle)["/m"]["flags"]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_a_bind(bed, bundle, folder, name):
    flag = FLAGS[name][0]
    bundle.mount("/m", "bind", str(folder), "bind", name)
    found = mount_table(bed, bundle)["/m"]["flags"]
    assert flag in found


@pytest.mark.parametrize("name", ["sync", "dirsync", "lazytime", "mand", "iversion", "silent"])
def test_a_flag_of_a_file_system(bed, bundle, name):
    bundle.mount("/m", "tmpfs", "tmpfs", name)
    found = mount_table(bed, bundle)["/m"]
    if name in ("sync", "dirsync", "lazytime"):
        assert name in found["data"] | found["flags"]


INVERSES = {
    "rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "atime": "noatime",
    "diratime": "nodiratime", "symfollow": "nosymfollow", "async": "sync", "nolazytime": "lazytime",
}  # fmt: skip


@pytest.mark.parametrize("name", INVERSES)
def test_the_later_of_two_contrary_options_wins(bed, bundle, name):
    bundle.mount("/m", "tmpfs", "tmpfs", INVERSES[name], name)
    found = mount_table(bed, bundle)["/m"]
    assert INVERSES[name] not in found["flags"] | found["data"]


@pytest.mark.parametrize(
    "name", ["norelatime", "strictatime", "nostrictatime", "loud", "noiversion", "nomand"]
)
def test_an_option_that_changes_nothing_to_see(bed, bundle, name):
    bundle.mount("/m", "tmpfs", "tmpfs", name)
    assert "rw" in mount_table(bed, bundle)["/m"]["flags"]


def test_strictatime(bed, bundle):
    bundle.mount("/m", "tmpfs", "tmpfs", "strictatime")
    assert not {"relatime", "noatime"} & mount_table(bed, bundle)["/m"]["flags"]


def test_data_of_a_file_system(bed, bundle):
    bundle.mount("/m", "tmpfs", "tmpfs", "size=1024k", "mode=0710", "uid=7", "gid=8")
    said = bed.output(bundle.shell("stat -c '%a %u %g' /m; df -k /m | tail -1"))
    assert said.split("\n")[0] == "710 7 8"
    assert said.split("\n")[1].split()[1] == "1024"


def test_data_that_is_wrong(bed, bundle):
    bundle.mount("/m", "tmpfs", "tmpfs", "size=many")
    assert "/m" in bed.refused(bundle)


def test_an_unknown_type(bed, bundle):
    bundle.mount("/m", "unheardfs", "none")
    assert "no such device" in bed.refused(bundle)


def test_a_tmpfs_has_the_mode_of_the_directory_beneath(bed, bundle):
    (bundle.rootfs / "m").mkdir()
    (bundle.rootfs / "m").chmod(0o1751)
    bundle.mount("/m", "tmpfs", "tmpfs")
    assert bed.output(bundle.args("stat", "-c", "%a", "/m")) == "1751\n"


def test_a_bind_of_a_directory(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind")
    assert bed.output(bundle.shell("cat /m/file; echo new >/m/new")) == "content\n"
    assert (folder / "new").exists()


def test_a_bind_of_a_file(bed, bundle, folder):
    bundle.mount("/deep/est/name", "bind", str(folder / "file"), "bind")
    assert bed.output(bundle.args("cat", "/deep/est/name")) == "content\n"


def test_a_bind_without_a_type(bed, bundle, folder):
    bundle.mount("/m", "none", str(folder), "rbind", "rprivate")
    assert bed.output(bundle.args("ls", "/m")) == "file\n"


def test_a_relative_source_is_of_the_bundle(bed, bundle):
    (bundle.path / "data").mkdir()
    (bundle.path / "data/here").touch()
    bundle.mount("/m", "bind", "data", "bind")
    assert bed.output(bundle.args("ls", "/m")) == "here\n"


def test_a_bind_of_nothing(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder / "no"), "bind")
    assert "no such file or directory" in bed.refused(bundle)


def test_a_bind_of_a_directory_on_a_file(bed, bundle, folder):
    bundle.mount("/etc/passwd", "bind", str(folder), "bind")
    assert "not a directory" in bed.refused(bundle)


def test_a_bind_with_data_of_a_file_system(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind", "size=1k")
    assert "filesystem-specific options" in bed.refused(bundle)


def test_a_bind_that_is_read_only(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind", "ro")
    done = bed.run(bundle.shell("touch /m/file2"))
    assert done.returncode == 1
    assert "Read-only" in done.stderr


@pytest.fixture
def nested(bed, folder):
    """A directory with a tmpfs mounted inside."""
    inner = folder / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "inner", str(inner)], check=True)
    (inner / "deep").touch()
    yield folder
    subprocess.run(["umount", str(inner)], check=True)


def test_rbind_has_what_is_mounted_below(bed, bundle, nested):
    bundle.mount("/m", "bind", str(nested), "rbind")
    assert bed.output(bundle.args("ls", "/m/inner")) == "deep\n"


def test_bind_has_not(bed, bundle, nested):
    bundle.mount("/m", "bind", str(nested), "bind")
    assert bed.output(bundle.args("ls", "/m/inner")) == ""


def test_ro_is_of_the_top_alone(bed, bundle, nested):
    bundle.mount("/m", "bind", str(nested), "rbind", "ro")
    found = mount_table(bed, bundle)
    assert "ro" in found["/m"]["flags"]
    assert "rw" in found["/m/inner"]["flags"]


RECURSIVE = {
    "rro": "ro", "rnosuid": "nosuid", "rnodev": "nodev", "rnoexec": "noexec",
    "rnoatime": "noatime", "rnodiratime": "nodiratime", "rnosymfollow": "nosymfollow",
    "rrelatime": "relatime",
}  # fmt: skip


@pytest.mark.parametrize("name", RECURSIVE)
def test_a_recursive_flag(bed, bundle, nested, name):
    bundle.mount("/m", "bind", str(nested), "rbind", name)
    found = mount_table(bed, bundle)
    assert RECURSIVE[name] in found["/m"]["flags"]
    assert RECURSIVE[name] in found["/m/inner"]["flags"]


@pytest.mark.parametrize(
    "name",
    ["rrw", "rsuid", "rdev", "rexec", "ratime", "rdiratime", "rstrictatime", "rsymfollow",
     "rnorelatime", "rnostrictatime"],
)  # fmt: skip
def test_a_recursive_flag_that_allows(bed, bundle, nested, name):
    bundle.mount("/m", "bind", str(nested), "rbind", name)
    flags = mount_table(bed, bundle)["/m/inner"]["flags"]
    assert "rw" in flags
    assert not {"nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"} & flags


PROPAGATION = {
    "shared": ["shared:"], "slave": ["master:"], "private": [], "unbindable": ["unbindable"],
    "rshared": ["shared:"], "rslave": ["master:"], "rprivate": [], "runbindable": ["unbindable"],
}  # fmt: skip


@pytest.mark.parametrize("name", PROPAGATION)
def test_propagation_of_a_mount(bed, bundle, folder, name):
    bundle.linux["rootfsPropagation"] = "shared"
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "--make-shared", str(folder)], check=True)
    try:
        bundle.mount("/m", "bind", str(folder), "bind", name)
        tags = mount_table(bed, bundle)["/m"]["tags"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    kinds = [tag.split(":")[0] + (":" if ":" in tag else "") for tag in tags]
    assert [kind for kind in kinds if kind != "propagate_from:"] == PROPAGATION[name]


def test_remount(bed, bundle):
    bundle.mount("/m", "tmpfs", "tmpfs").mount("/m", "tmpfs", "tmpfs", "remount", "ro")
    found = mount_table(bed, bundle)["/m"]
    assert "ro" in found["flags"] | found["data"]


def test_tmpcopyup(bed, bundle):
    (bundle.rootfs / "m/sub").mkdir(parents=True)
    (bundle.rootfs / "m/file").write_text("beneath\n")
    (bundle.rootfs / "m/file").chmod(0o644)
    os.chown(bundle.rootfs / "m/file", 5, 6)
    (bundle.rootfs / "m/sub/link").symlink_to("../file")
    bundle.mount("/m", "tmpfs", "tmpfs", "tmpcopyup")
    script = "cat /m/sub/link; stat -c '%a %u %g' /m/file; echo >/m/new && rm /m/file"
    assert bed.output(bundle.shell(script)) == "beneath\n644 5 6\n"
    assert (bundle.rootfs / "m/file").exists()
    assert not (bundle.rootfs / "m/new").exists()


def test_an_id_mapped_mount(bed, bundle, folder):
    os.chown(folder / "file", 0, 0)
    bundle.mount("/m", "bind", str(folder), "bind", "idmap")
    line = [{"containerID": 0, "hostID": 1000, "size": 10}]
    bundle.config["mounts"][-1].update(uidMappings=line, gidMappings=line)
    assert bed.output(bundle.args("stat", "-c", "%u %g", "/m/file")) == "1000 1000\n"


def test_an_id_mapped_mount_needs_both_maps(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind", "idmap")
    line = [{"containerID": 0, "hostID": 1000, "size": 10}]
    bundle.config["mounts"][-1].update(uidMappings=line)
    assert "mappings" in bed.refused(bundle)


def test_only_binds_are_id_mapped(bed, bundle):
    bundle.mount("/m", "tmpfs", "tmpfs", "idmap")
    line = [{"containerID": 0, "hostID": 1000, "size": 10}]
    bundle.config["mounts"][-1].update(uidMappings=line, gidMappings=line)
    assert "bind" in bed.refused(bundle)


def test_a_missing_target_is_made(bed, bundle, folder):
    bundle.mount("/x/y/z", "bind", str(folder), "bind")
    bed.output(bundle.args("true"))
    assert stat.S_IMODE((bundle.rootfs / "x/y").stat().st_mode) == 0o755


def test_a_relative_target(bed, bundle, folder):
    bundle.mount("m/n", "bind", str(folder), "bind")
    assert bed.output(bundle.args("ls", "/m/n")) == "file\n"


def test_a_target_behind_a_link_stays_in_the_root(bed, bundle, folder):
    (bundle.rootfs / "real").mkdir()
    (bundle.rootfs / "link").symlink_to("/real")
    bundle.mount("/link/m", "bind", str(folder), "bind")
    assert bed.output(bundle.args("ls", "/real/m")) == "file\n"


def test_a_target_with_dots(bed, bundle, folder):
    bundle.mount("/a/../../../b", "bind", str(folder), "bind")
    assert bed.output(bundle.args("ls", "/b")) == "file\n"


def test_the_root_is_no_target(bed, bundle, folder):
    bundle.mount("/", "bind", str(folder), "bind")
    bed.refused(bundle)


@pytest.mark.parametrize("point", ["/proc/sys", "/proc/self", "/proc/1/attr"])
def test_a_target_in_proc(bed, bundle, folder, point):
    bundle.mount(point, "bind", str(folder), "bind")
    assert "/proc" in bed.refused(bundle)


@pytest.mark.parametrize("name", ["cpuinfo", "meminfo", "stat", "uptime", "loadavg", "swaps"])
def test_a_file_in_proc_that_may_be_covered(bed, bundle, folder, name):
    bundle.mount(f"/proc/{name}", "bind", str(folder / "file"), "bind")
    assert bed.output(bundle.args("cat", f"/proc/{name}")) == "content\n"


def test_nothing_but_proc_on_proc(bed, bundle):
    bundle.without_mount("/proc").mount("/proc", "tmpfs", "tmpfs")
    assert "/proc" in bed.refused(bundle)


def test_nothing_of_it_is_seen_outside(bed, bundle, folder):
    bundle.mount("/m", "bind", str(folder), "bind")
    container = bed.sleeping(bundle)
    with open("/proc/self/mountinfo") as stream:
        assert str(bundle.rootfs) not in stream.read()
    container.kill()


def test_what_is_unmounted_inside_stays_outside(bed, bundle, nested):
    bundle.process["capabilities"] = {
        name: ["CAP_SYS_ADMIN"] for name in ("bounding", "effective", "permitted")
    }
    bundle.mount("/m", "bind", str(nested), "rbind", "rslave")
    bed.output(bundle.args("umount", "/m/inner"))
    assert (nested / "inner/deep").exists()


def test_a_null_byte_in_a_mount(bed, bundle):
    bundle.mount("/m\0x", "tmpfs", "tmpfs")
    bed.refused(bundle)


def test_a_cgroup_mount(bed, bundle):
    found = mount_table(bed, bundle)
    below = {point: found[point] for point in found if point.startswith("/sys/fs/cgroup")}
    if found["/sys/fs/cgroup"]["type"] != "cgroup2":
        assert "/sys/fs/cgroup/memory" in below
        assert "/sys/fs/cgroup/systemd" in below
        groups = [mount for mount in below.values() if mount["type"] == "cgroup"]
        assert all("ro" in mount["flags"] for mount in groups)


def test_a_cgroup_mount_with_a_namespace(bed, bundle):
    bundle.space("cgroup")
    said = bed.output(bundle.shell("cat /proc/self/cgroup; ls -d /sys/fs/cgroup/*"))
    assert ":/\n" in said
    assert bed.ids[-1] not in said


def test_long_data(bed, bundle, folder):
    """More than fsconfig(2) takes in one value."""
    layers = []
    for number in range(12):
        layer = folder / f"a-name-of-a-layer-that-is-rather-long-{number}"
        layer.mkdir()
        (layer / f"of-{number}").touch()
        layers.append(str(layer))
    for name in ("upper", "work"):
        (folder / name).mkdir()
    data = [f"lowerdir={':'.join(layers)}", f"upperdir={folder}/upper", f"workdir={folder}/work"]
    bundle.mount("/m", "overlay", "overlay", *data)
    assert len(bed.output(bundle.args("ls", "/m")).split()) == 12
