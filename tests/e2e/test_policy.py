"""Every directive of the administrator's file, on and off, in a real launch."""

from __future__ import annotations

import grp
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.model.directive_table import ROWS
from tests import images
from tests.own_install import Completed, Installation, loop_devices

REAL_FILE = Path("/etc/apptainer/apptainer.conf")
SETUID, USERNS = (), ("-u",)
MOUNTS = ("cat", "/proc/self/mountinfo")
IDENTITY = ("sh", "-c", "readlink /proc/self/ns/user")
_covered: set[str] = set()


def covers(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note that a test sets these directives to more than one value, or tries what they refuse."""
    _covered.update(keys)
    return lambda test: test


@pytest.fixture(scope="module")
def image(installed) -> Iterator[SimpleNamespace]:
    """Images that belong to root, in a directory that everybody can read."""
    folder = images.shared_folder()
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-policy-", dir="/var/tmp"))
    place.chmod(0o755)
    found = SimpleNamespace(
        sif=images.own_sif(folder),
        squashfs=images.bare_squashfs(folder),
        sandbox=images.described_tree(folder),
        place=place,
    )
    found.ext3 = place / "image.ext3"
    with found.ext3.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext3", found.ext3], check=True, env={"PATH": "/sbin:/usr/sbin"}
    )
    found.encrypted = place / "encrypted.sif"
    found.encrypted.write_bytes(_encrypted(found.sif.read_bytes()))
    yield found
    shutil.rmtree(place)


def _encrypted(content: bytes) -> bytes:
    """The same SIF file with its system partition marked as encrypted (fs type 3, facts §5.2)."""
    descriptor, count = 4096, int.from_bytes(content[80:88], "little")
    changed = bytearray(content)
    for number in range(count):
        at = descriptor + number * 585
        if int.from_bytes(content[at : at + 4], "little") == 0x4004:
            extra = at + 585 - 384
            changed[extra : extra + 4] = (4).to_bytes(4, "little")
    return bytes(changed)


def ran(done: Completed) -> str:
    """Return what a launch printed; it must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: Completed, *words: str) -> str:
    """Assert that a launch was refused, with one FATAL line that holds these words."""
    assert done.returncode == 255, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL:")]
    assert len(fatal) == 1, done.stderr
    for word in words:
        assert word in fatal[0], done.stderr
    assert "Traceback" not in done.stderr
    return fatal[0]


def flow_of(done: Completed) -> str:
    """Return the flow, by the user namespace in which the payload found itself."""
    host = os.readlink("/proc/self/ns/user")
    return "setuid" if ran(done).strip() == host else "userns"


def mounted(table: str) -> dict[str, str]:
    """Return mount points of a mountinfo with the last line of each."""
    return {line.split()[4]: line for line in table.splitlines()}


# ---- who may use the setuid flow ----


@covers("allow setuid")
def test_allow_setuid(own, image):
    own.configure("allow setuid = yes")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    own.configure("allow setuid = no")
    done = own.run("exec", image.sif, *IDENTITY)
    assert flow_of(done) == "userns"
    told = [line for line in done.stderr.splitlines() if "user-namespace flow" in line]
    assert len(told) == 1
    assert "configuration does not allow the setuid flow" in told[0]


@covers("allow setuid users")
@pytest.mark.parametrize(
    ("value", "flow"),
    [
        ("{name}", "setuid"),
        ("{uid}", "setuid"),
        ("daemon, {name}", "setuid"),
        ("daemon", "userns"),
        ("0", "userns"),
        ("nobody-of-that-name", "userns"),
        ("{name}x", "userns"),
        ("{uid}0", "userns"),
        ("0{uid}", "userns"),
    ],
)
def test_allow_setuid_users(own, image, value, flow):
    text = value.format(name=own.user.pw_name, uid=own.user.pw_uid)
    own.configure(f"allow setuid users = {text}")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == flow


@covers("allow setuid groups")
def test_allow_setuid_groups(own, image):
    extra = grp.getgrnam("games")
    own_group = grp.getgrgid(own.user.pw_gid)
    for value in (own_group.gr_name, str(own_group.gr_gid)):
        own.configure(f"allow setuid groups = {value}")
        assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    for value in (extra.gr_name, str(extra.gr_gid)):
        own.configure(f"allow setuid groups = daemon\nallow setuid groups = {value}")
        assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "userns"
        done = own.run("exec", image.sif, *IDENTITY, groups=[extra.gr_gid])
        assert flow_of(done) == "setuid"


def test_either_list_is_enough(own, image):
    own.configure(f"allow setuid users = daemon\nallow setuid groups = {own.user.pw_gid}")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    own.configure(f"allow setuid users = {own.user.pw_uid}\nallow setuid groups = daemon")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    own.configure(f"allow setuid = no\nallow setuid users = {own.user.pw_uid}")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "userns"


@covers("allow user ns")
def test_allow_user_ns(own, image):
    own.configure("allow user ns = no")
    refused(own.run("exec", "-u", image.sif, "true"), "User namespace required but not allowed")
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    own.configure("allow user ns = no\nallow setuid = no")
    refused(own.run("exec", image.sif, "true"), "User namespace required but not allowed")


# ---- namespaces ----


@covers("allow pid ns", "allow ipc ns", "allow uts ns")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize(("name", "option"), [("pid", "-p"), ("ipc", "-i"), ("uts", "--uts")])
def test_namespaces(own, image, flow, name, option):
    link = ("readlink", f"/proc/self/ns/{name}")
    host = os.readlink(f"/proc/self/ns/{name}")
    own.configure(f"allow {name} ns = yes")
    assert ran(own.run("exec", *flow, option, image.sif, *link)).strip() != host
    own.configure(f"allow {name} ns = no")
    done = own.run("exec", *flow, option, image.sif, *link)
    assert ran(done).strip() == host
    assert f"Not virtualizing {name} namespace by configuration" in done.stderr


def test_hostname_without_uts_namespace(own, image):
    own.configure("allow uts ns = no")
    done = own.run("exec", "--hostname", "changed", image.sif, "cat", "/proc/sys/kernel/hostname")
    assert ran(done).strip() == os.uname().nodename


# ---- files ----


@covers("config passwd", "config group")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize("name", ["passwd", "group"])
def test_accounts(own, image, flow, name):
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"config {name} = {value}")
        done = own.run("exec", *flow, image.sif, "cat", f"/etc/{name}")
        assert (own.user.pw_name in ran(done)) == there


@covers("config resolv_conf")
def test_resolv_conf(own, image):
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"config resolv_conf = {value}")
        points = mounted(ran(own.run("exec", image.sif, *MOUNTS)))
        assert ("/etc/resolv.conf" in points) == there


# ---- mounts ----


@covers("mount proc", "mount sys")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize("name", ["proc/version", "sys/kernel"])
def test_kernel_file_systems(own, image, flow, name):
    look = ("sh", "-c", f"if [ -e /{name} ]; then echo there; fi")
    for value, there in (("yes", "there\n"), ("no", "")):
        own.configure(f"mount {name.split('/')[0]} = {value}")
        assert ran(own.run("exec", *flow, image.sif, *look)) == there


@covers("mount dev")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_dev(own, image, flow):
    own.configure("mount dev = yes")
    host = set(os.listdir("/dev"))
    assert set(ran(own.run("exec", *flow, image.sif, "ls", "/dev")).split()) == host
    own.configure("mount dev = minimal")
    found = set(ran(own.run("exec", *flow, image.sif, "ls", "/dev")).split())
    assert {"null", "zero", "random", "urandom", "tty", "shm", "pts", "ptmx", "fd"} <= found
    assert "loop0" not in found
    assert "fuse" not in found
    own.configure("mount dev = no")
    assert ran(own.run("exec", *flow, image.sif, "ls", "/dev")).split() == []


@covers("mount devpts")
def test_devpts(own, image):
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"mount dev = minimal\nmount devpts = {value}")
        points = mounted(ran(own.run("exec", image.sif, *MOUNTS)))
        assert ("/dev/pts" in points) == there


@covers("mount home")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_home(own, image, flow):
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"mount home = {value}")
        points = mounted(ran(own.run("exec", *flow, image.sif, *MOUNTS, cwd="/")))
        assert (own.user.pw_dir in points) == there
    # What the user asks for is no default mount.
    points = mounted(ran(own.run("exec", *flow, "-H", f"{image.place}:/h", image.sif, *MOUNTS)))
    assert "/h" in points


@covers("mount tmp")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_tmp(own, image, flow):
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"mount tmp = {value}")
        points = mounted(ran(own.run("exec", *flow, image.sif, *MOUNTS, cwd="/")))
        assert ("/tmp" in points) == ("/var/tmp" in points) == there


@covers("mount hostfs")
def test_hostfs(own, image):
    """A file system of the host's own, made for this test in a mount namespace of its own."""
    point = own.place / "hostfs"
    point.mkdir()
    script = (
        'mount -t tmpfs -o mode=755 tmpfs "$1"; touch "$1/seen"; shift; '
        'exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"'
    )
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"mount hostfs = {value}\nmount tmp = no")
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script,
                str(own.user.pw_uid), point, own.program, "exec", image.sif,
                *MOUNTS]  # fmt: skip
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, cwd="/", env=own.environment()
        )
        assert done.returncode == 0, done.stderr
        assert (str(point) in mounted(done.stdout)) == there
    point.rmdir()


@covers("mount slave")
@pytest.mark.parametrize("flow", [SETUID])
def test_slave(own, image, flow):
    """Slave mounts name their master; private ones name nobody. The host's must be shared."""
    script = 'mount --make-rshared /; exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"'
    for value, there in (("yes", True), ("no", False)):
        own.configure(f"mount slave = {value}")
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script,
                str(own.user.pw_uid), own.program, "exec", image.sif, *MOUNTS]  # fmt: skip
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, cwd="/", env=own.environment()
        )
        assert done.returncode == 0, done.stderr
        assert ("master:" in done.stdout) == there
        assert "shared:" not in done.stdout


@covers("bind path")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_bind_path(own, image, flow):
    given = image.place / "given"
    given.write_text("from the administrator")
    own.configure(f"bind path = /etc/hosts, {given}:/new/place\nbind path = {given}")
    done = own.run("exec", *flow, image.sif, "cat", "/new/place", given)
    assert ran(done) == "from the administrator" * 2
    points = mounted(ran(own.run("exec", *flow, image.sif, *MOUNTS)))
    assert "/etc/hosts" in points
    assert "/etc/localtime" not in points
    own.configure("")
    points = mounted(ran(own.run("exec", *flow, image.sif, *MOUNTS)))
    assert "/etc/hosts" not in points
    assert str(given) not in points


@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_bind_path_with_an_option(own, image, flow):
    given = own.place / "given"
    given.write_text("from the administrator\n")
    os.chown(given, own.user.pw_uid, own.user.pw_gid)
    for control in ("yes", "no"):
        own.configure(f"bind path = {given}:/given:ro\nuser bind control = {control}")
        done = own.run("exec", *flow, image.sif, "sh", "-c", "cat /given; echo x >/given")
        assert done.stdout == "from the administrator\n", done.stderr
        assert "ead-only file system" in done.stderr


@pytest.mark.parametrize("item", ["/etc/hosts:relative", "/etc/hosts:/x:odd", "/etc/hosts:/x:ro:y"])
def test_bind_path_that_is_none(own, image, item):
    own.configure(f"bind path = {item}")
    refused(own.run("exec", image.sif, "true"), f"`bind path = {item}` in the configuration")


@covers("user bind control")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_user_bind_control(own, image, flow):
    bind = ("-B", "/etc/hostname:/etc/given")
    look = ("sh", "-c", "ls /etc; pwd")
    own.configure("user bind control = yes")
    assert "given" in ran(own.run("exec", *flow, *bind, image.sif, *look)).split()
    own.configure("user bind control = no")
    for option in (bind, ("--mount", "type=bind,src=/etc/hostname,dst=/etc/given")):
        done = own.run("exec", *flow, *option, image.sif, *look)
        assert "given" not in ran(done).split()
        assert "user bind control disabled by system administrator" in done.stderr
    done = own.run("exec", *flow, "-S", "/scratch", image.sif, "ls", "/")
    assert "scratch" not in ran(done).split()
    refused(own.run("exec", *flow, "-H", "/tmp", image.sif, "true"), "user bind control")
    mine = image.place / "cwd"
    mine.mkdir(exist_ok=True)
    points = mounted(ran(own.run("exec", *flow, image.sif, *MOUNTS, cwd=mine)))
    assert str(mine) not in points


# ---- layers ----


def layer_of(done: Completed) -> str:
    """Return what the root is: overlay, underlay (a memory file system) or the image itself."""
    kind = mounted(ran(done))["/"].split(" - ")[1].split()[0]
    return {"overlay": "overlay", "tmpfs": "underlay"}.get(kind, "none")


@covers("enable overlay", "enable underlay")
@pytest.mark.parametrize(
    ("overlay", "underlay", "layer"),
    [
        ("yes", "yes", "overlay"),
        ("yes", "no", "overlay"),
        ("yes", "preferred", "underlay"),
        ("try", "yes", "overlay"),
        ("try", "no", "overlay"),
        ("try", "preferred", "underlay"),
        ("no", "yes", "underlay"),
        ("no", "no", "none"),
        ("no", "preferred", "underlay"),
    ],
)
@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_layers(own, image, flow, overlay, underlay, layer):
    own.configure(f"enable overlay = {overlay}\nenable underlay = {underlay}")
    assert layer_of(own.run("exec", *flow, image.sif, *MOUNTS)) == layer
    done = own.run("exec", *flow, "--underlay", image.sif, *MOUNTS)
    if underlay == "no":
        refused(done, "--underlay requires 'enable underlay'")
    else:
        assert layer_of(done) == "underlay"
    done = own.run("exec", *flow, "--writable-tmpfs", image.sif, "touch", "/file")
    if overlay == "no":
        refused(done, "--writable-tmpfs requires 'enable overlay'")
    else:
        ran(done)
    done = own.run("exec", *flow, "-B", "/etc/hostname:/new/place", image.sif, "cat", "/new/place")
    if layer == "none":
        refused(done, "/new/place")
    else:
        assert ran(done) == Path("/etc/hostname").read_text()


@pytest.mark.parametrize("underlay", ["yes", "no", "preferred"])
def test_overlay_driver_is_not_there(own, image, underlay):
    own.configure(f"enable overlay = driver\nenable underlay = {underlay}")
    refused(own.run("exec", image.sif, "true"), "`enable overlay = driver`", "not supported yet")


# ---- sizes ----


def session_size(done: Completed) -> str | None:
    """Return the size option of the session directory, as the mount table shows it."""
    found = re.search(r"\bsize=(\w+)", mounted(ran(done))["/etc/passwd"])
    return found[1] if found else None


@covers("sessiondir max size")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize(
    ("value", "size"),
    [("1", "1024k"), ("64", "65536k"), ("0x10", "16384k"), ("3_000_000", "3072000000k")],
)
def test_session_size(own, image, flow, value, size):
    own.configure(f"sessiondir max size = {value}")
    assert session_size(own.run("exec", *flow, image.sif, *MOUNTS)) == size
    script = "busybox dd if=/dev/zero of=/big bs=64k count=32 2>&1"
    done = own.run("exec", *flow, "--writable-tmpfs", image.sif, "sh", "-c", script)
    assert ("No space left" in done.stdout) == (value == "1")


@pytest.mark.parametrize("flow", [SETUID, USERNS])
def test_session_without_size(own, image, flow):
    """0 sets no limit of ours: the kernel's own, half of the memory, is what remains."""
    own.configure("sessiondir max size = 0\nmount dev = minimal")
    assert session_size(own.run("exec", *flow, image.sif, *MOUNTS)) is None


def test_greatest_session_size(own, image):
    own.configure("sessiondir max size = 8796093022207")
    ran(own.run("exec", image.sif, "true"))
    own.configure("sessiondir max size = 8796093022208")
    refused(own.run("exec", image.sif, "true"), "apptainer-py.conf:1", "sessiondir max size")


@covers("memory fs type")
def test_memory_fs_type(own, image):
    for value in ("tmpfs", "ramfs"):
        own.configure(f"memory fs type = {value}")
        table = mounted(ran(own.run("exec", image.sif, *MOUNTS)))
        assert f" - {value} " in table["/etc/passwd"]
        ran(own.run("exec", "--writable-tmpfs", image.sif, "touch", "/file"))


# ---- which images ----


@covers("allow container sif", "allow container squashfs", "allow container dir")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        ("sif", "sif", "unencrypted SIF containers"),
        ("squashfs", "squashfs", "squashFS containers"),
        ("dir", "sandbox", "sandbox containers"),
    ],
)
def test_image_kinds(own, image, flow, key, kind, words):
    own.configure(f"allow container {key} = yes")
    ran(own.run("exec", *flow, getattr(image, kind), "true"))
    own.configure(f"allow container {key} = no")
    done = own.run("exec", *flow, getattr(image, kind), "true")
    refused(done, f"configuration disallows users from running {words}")
    for other in {"sif", "squashfs", "sandbox"} - {kind}:
        ran(own.run("exec", *flow, getattr(image, other), "true"))


@covers("limit container owners")
@pytest.mark.parametrize("kind", ["sif", "squashfs", "sandbox"])
def test_limit_owners(own, image, kind):
    name = own.user.pw_name
    for value, good in (("root", True), ("0", True), (name, False), (f"{name}, root", True),
                        ("no-such-user", False)):  # fmt: skip
        own.configure(f"limit container owners = {value}")
        done = own.run("exec", getattr(image, kind), "true")
        if good:
            ran(done)
        else:
            refused(done, "image is not owned by required user(s)")


@covers("limit container groups")
@pytest.mark.parametrize("kind", ["sif", "sandbox"])
def test_limit_groups(own, image, kind):
    for value, good in (("root", True), ("0", True), ("games", False), ("games, root", True)):
        own.configure(f"limit container groups = {value}")
        done = own.run("exec", getattr(image, kind), "true")
        if good:
            ran(done)
        else:
            refused(done, "image is not owned by required group(s)")


@pytest.fixture
def places(image) -> Iterator[Path]:
    """A permitted directory and ways around it."""
    top = image.place / "limited"
    for name in ("safe/deep", "safe-but-unsafe", "outside"):
        (top / name).mkdir(parents=True)
    for name in ("safe/i.sif", "safe/deep/i.sif", "safe-but-unsafe/i.sif", "outside/i.sif"):
        shutil.copy(image.sif, top / name)
    (top / "link").symlink_to("safe")
    (top / "safe/out").symlink_to("../outside")
    (top / "safe/out.sif").symlink_to("../outside/i.sif")
    (top / "outside/in.sif").symlink_to("../safe/i.sif")
    shutil.copytree(image.sandbox, top / "safe/box", symlinks=True)
    shutil.copytree(image.sandbox, top / "safe-but-unsafe/box", symlinks=True)
    yield top
    shutil.rmtree(top)


@covers("limit container paths")
@pytest.mark.parametrize("flow", [SETUID, USERNS])
@pytest.mark.parametrize("limit", ["{top}/safe", "{top}/safe/", "{top}//safe", "{top}/./safe",
                                   "{top}/outside/../safe", "{top}/link"])  # fmt: skip
def test_limit_paths(own, places, flow, limit):
    """T-S26: by components, on the path of what was opened."""
    own.configure(f"limit container paths = {limit.format(top=places)}")
    inside = ["safe/i.sif", "safe/deep/i.sif", "safe/./i.sif", "safe//i.sif", "safe/box",
              "outside/../safe/i.sif", "link/i.sif", "outside/in.sif", "safe/box/"]  # fmt: skip
    for name in inside:
        ran(own.run("exec", *flow, f"{places}/{name}", "true"))
    outside = ["safe-but-unsafe/i.sif", "outside/i.sif", "safe/../outside/i.sif", "safe/out/i.sif",
               "safe/out.sif", "safe-but-unsafe/box", "safe/../safe-but-unsafe/box"]  # fmt: skip
    for name in outside:
        done = own.run("exec", *flow, f"{places}/{name}", "true")
        refused(done, "image is not in an allowed configured path")


def test_limit_paths_that_leads_nowhere(own, image):
    own.configure("limit container paths = /nonexistent/Place")
    refused(own.run("exec", image.sif, "true"), "failed to resolve path /nonexistent/Place")


def test_limit_paths_is_no_prefix_of_a_name(own, places):
    own.configure(f"limit container paths = {places}/safe/i")
    (places / "safe/i").mkdir()
    refused(own.run("exec", places / "safe/i.sif", "true"), "not in an allowed configured path")


def test_limit_paths_and_hard_links(own, places):
    """A hard link is the file under a permitted name: who may write there has put it there."""
    os.link(places / "outside/i.sif", places / "safe/hard.sif")
    os.link(places / "safe/i.sif", places / "outside/hard.sif")
    own.configure(f"limit container paths = {places}/safe")
    ran(own.run("exec", places / "safe/hard.sif", "true"))
    refused(own.run("exec", places / "outside/hard.sif", "true"), "not in an allowed")


def test_limit_paths_and_mounts_of_a_users_own(own, places):
    """What a user binds over a permitted directory in a namespace of its own stays the user's."""
    own.configure(f"limit container paths = {places}/safe")
    script = f'mount --bind {places}/outside {places}/safe; exec "$@"'
    argv = ["unshare", "--user", "--map-current-user", "--mount", "--keep-caps", "sh", "-euc",
            script, "sh", own.program, "exec", places / "safe/i.sif", *IDENTITY]  # fmt: skip
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=own.environment(), cwd="/",
        **own.identity(),
    )  # fmt: skip
    # In a user namespace of the user's own the setuid bit has no power: nothing is limited there.
    if done.returncode == 0:
        assert done.stdout.strip() != os.readlink("/proc/self/ns/user")


def test_limit_paths_and_a_bind_alias_of_roots(own, places):
    """Root's bind of an outside directory on a permitted one is root's word."""
    own.configure(f"limit container paths = {places}/safe")
    script = (
        f"mount --bind {places}/outside {places}/safe/deep; "
        f"mount --bind {places}/safe {places}/safe-but-unsafe; "
        'exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"'
    )

    def inside(name: str) -> Completed:
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script,
                str(own.user.pw_uid), own.program, "exec", places / name, "true"]  # fmt: skip
        return subprocess.run(
            argv, capture_output=True, text=True, check=False, env=own.environment(), cwd="/"
        )

    ran(inside("safe/deep/i.sif"))
    refused(inside("safe-but-unsafe/i.sif"), "not in an allowed")


def test_limit_paths_and_a_deleted_image(own, places):
    """It has no name any more; neither has it the name that the kernel makes up for it."""
    own.configure(f"limit container paths = {places}/safe")
    shutil.copy(places / "outside/i.sif", places / "safe/gone.sif (deleted)")
    fd = os.open(places / "outside/i.sif", os.O_RDONLY)
    os.unlink(places / "outside/i.sif")
    os.set_inheritable(fd, True)
    done = own.run("exec", f"/proc/self/fd/{fd}", "true", pass_fds=[fd])
    os.close(fd)
    refused(done)
    fd = os.open(places / "safe/i.sif", os.O_RDONLY)
    os.unlink(places / "safe/i.sif")
    os.set_inheritable(fd, True)
    done = own.run("exec", f"/proc/self/fd/{fd}", "true", pass_fds=[fd])
    os.close(fd)
    refused(done)


def test_limits_hold_together(own, places):
    own.configure(
        f"limit container paths = {places}/safe\nlimit container owners = root\n"
        "limit container groups = games"
    )
    refused(own.run("exec", places / "safe/i.sif", "true"), "required group(s)")
    shutil.chown(places / "safe/i.sif", "root", "games")
    ran(own.run("exec", places / "safe/i.sif", "true"))


# ---- who mounts a squashfs ----


@covers("allow setuid-mount squashfs")
@pytest.mark.parametrize(
    ("lines", "kernel"),
    [
        ("allow setuid-mount squashfs = yes", True),
        ("allow setuid-mount squashfs = no", False),
        ("allow setuid-mount squashfs = iflimited", False),
        ("", False),
        ("allow setuid-mount squashfs = iflimited\nlimit container owners = root", True),
        ("allow setuid-mount squashfs = iflimited\nlimit container groups = root", True),
        ("allow setuid-mount squashfs = iflimited\nlimit container paths = /", True),
        ("allow setuid-mount squashfs = no\nlimit container owners = root", False),
    ],
)
@pytest.mark.parametrize("kind", ["sif", "squashfs"])
def test_setuid_mount_squashfs(own, image, kind, lines, kernel):
    own.configure(lines + "\nenable overlay = no\nenable underlay = no")
    root = mounted(ran(own.run("exec", getattr(image, kind), *MOUNTS)))["/"]
    assert (" - squashfs /dev/loop" in root) == kernel, root
    assert (" - fuse squashfuse_ll " in root) != kernel, root
    root = mounted(ran(own.run("exec", "-u", getattr(image, kind), *MOUNTS)))["/"]
    assert " - fuse squashfuse_ll " in root


@covers("max loop devices", "shared loop devices")
def test_loop_devices(own, image):
    yes = "allow setuid-mount squashfs = yes\n"
    own.configure(yes + "max loop devices = 0")
    refused(own.run("exec", image.sif, "true"), "loop device")
    assert loop_devices() == {}
    own.configure(yes + "max loop devices = 256")
    ran(own.run("exec", image.sif, "true"))
    own.configure("max loop devices = 0")
    ran(own.run("exec", image.sif, "true"))
    own.configure(yes + "shared loop devices = yes")
    refused(own.run("exec", image.sif, "true"), "`shared loop devices = yes`", "not supported yet")
    ran(own.run("exec", image.sandbox, "true"))
    own.configure("shared loop devices = yes")
    ran(own.run("exec", image.sif, "true"))


# ---- root ----


@covers("root default capabilities")
@pytest.mark.parametrize("value", ["full", "no", "file"])
def test_root_default_capabilities(own, image, value):
    own.configure(f"root default capabilities = {value}")
    look = (
        "sh",
        "-c",
        "while read k v; do case $k in CapEff:) echo $v;; esac; done </proc/self/status",
    )
    found = int(ran(own.run("exec", image.sif, *look, root=True)), 16)
    # This test may itself run with fewer than all.
    ours = int(re.search(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())[1], 16)
    assert found == {"full": ours, "no": 0, "file": 0}[value]


@covers("always use nv", "always use rocm", "binary path")
@pytest.mark.parametrize("kind", ["nv", "rocm"])
def test_drivers_for_every_launch(own, image, kind):
    look = ("sh", "-c", "[ ! -e /.singularity.d/libs/libdrv.so.1 ] || echo there")
    tools = image.place / f"tools-{kind}"
    tools.mkdir()
    # Any library of this machine will do.
    libc = next(Path("/lib").glob("*-linux-gnu/libc.so.6"))
    (tools / "libdrv.so.1").write_bytes(libc.read_bytes())
    (tools / "ldconfig").write_text(f"#!/bin/sh\necho 'libdrv.so.1 (x) => {tools}/libdrv.so.1'\n")
    (tools / "ldconfig").chmod(0o755)
    (own.sysconfdir / f"{kind}liblist.conf").write_text("libdrv.so\n")
    for flow in (SETUID, USERNS):
        for answer, options in (("yes", ()), ("yes", (f"--no-{kind}",)), ("no", ())):
            own.configure(f"always use {kind} = {answer}\nbinary path = {tools}")
            done = own.run("exec", *flow, *options, image.sif, *look)
            assert (ran(done) == "there\n") == (answer == "yes" and not options), done.stderr


@covers("use nvidia-container-cli")
def test_use_nvidia_container_cli(own, image):
    own.configure("use nvidia-container-cli = yes")
    refused(own.run("exec", "--nv", image.sif, "true"), "not allowed in setuid mode")
    refused(own.run("exec", "-u", "--nv", image.sif, "true"), '"nvidia-container-cli": executable')
    ran(own.run("exec", image.sif, "true"))
    own.configure("use nvidia-container-cli = no")
    ran(own.run("exec", "--nv", image.sif, "true"))


# ---- what is not built ----


@covers("image driver", "allow monitoring")
@pytest.mark.parametrize("line", ["image driver = some-driver", "allow monitoring = yes"])
def test_refusing_values(own, image, line):
    for flow in (SETUID, USERNS):
        own.configure(line)
        refused(
            own.run("exec", *flow, image.sif, "true"), line.split(" = ")[0], "not supported yet"
        )
    own.configure(line.split(" = ")[0] + " =")
    ran(own.run("exec", image.sif, "true"))


def test_image_driver_is_for_image_files(own, image):
    own.configure("image driver = some-driver")
    ran(own.run("exec", image.sandbox, "true"))


@covers("allow container extfs", "allow setuid-mount extfs", "sync writable extfs",
        "allow container encrypted", "allow setuid-mount encrypted")  # fmt: skip
@pytest.mark.parametrize("value", ["yes", "no"])
def test_images_that_are_not_read_yet(own, image, value):
    keys = ("allow container extfs", "allow setuid-mount extfs", "sync writable extfs",
            "allow container encrypted", "allow setuid-mount encrypted")  # fmt: skip
    own.configure("\n".join(f"{key} = {value}" for key in keys))
    # The image is empty.
    read = "executable file not found" if value == "yes" else "extFS containers"
    refused(own.run("exec", image.ext3, "true"), read)
    written = "have write permissions" if value == "yes" else "extFS containers"
    refused(own.run("exec", "-w", image.ext3, "true"), written)
    refused(own.run("exec", image.encrypted, "true"))
    ran(own.run("exec", image.sif, "true"))


@covers("enable fusemount")
@pytest.mark.parametrize("value", ["yes", "no"])
def test_file_systems_of_the_users_own(own, image, open_fuse, value):
    own.configure(f"enable fusemount = {value}")
    words = ("exec", "--fusemount", f"host:squashfuse_ll {image.squashfs} /mnt", image.sif, "true")
    if value == "yes":
        ran(own.run(*words))
    else:
        refused(own.run(*words), "fusemount disabled by configuration 'enable fusemount = no'")
    ran(own.run("exec", image.sif, "true"))


@covers("allow userns-mount fuse")
@pytest.mark.parametrize("value", ["yes", "no"])
def test_fuse_in_user_namespaces(own, image, open_fuse, value):
    """Without it an image is mounted on the host (test_host_image.py), and nothing else is."""
    own.configure(f"allow userns-mount fuse = {value}")
    ran(own.run("exec", "-u", image.sif, "true"))
    served = f"host:squashfuse_ll {image.squashfs} /mnt"
    done = own.run("exec", "-u", "--fusemount", served, image.sif, "true")
    if value == "yes":
        ran(done)
    else:
        refused(done, "FUSE mount in its user namespace, which is not allowed")


# Options whose directives take effect only through them, with what the options need.
OPTIONS = {
    ("--net", "--network", "bridge"): (
        "allow net users", "allow net groups", "allow net networks",
    ),
}  # fmt: skip
VALUES = {
    "allow net users": ("root",),
    "allow net groups": ("root",),
    "allow net networks": ("bridge",),
}


@covers(*VALUES)
@pytest.mark.parametrize("options", list(OPTIONS))
def test_options_that_take_several_directives(own, image, options):
    """Refused with one alone; a launch that does not ask is never refused."""
    for key in OPTIONS[options]:
        for value in VALUES[key]:
            own.configure(f"{key} = {value}")
            done = own.run("exec", *options, image.sif, "true")
            assert done.returncode != 0
            assert "network bridge is for root" in done.stderr, done.stderr
            assert len([x for x in done.stderr.splitlines() if x.startswith("FATAL")]) == 1
            ran(own.run("exec", image.sif, "true"))


@covers("systemd cgroups")
def test_systemd_cgroups(own, image):
    """Without systemd a user has none; root has the kernel's whatever the value."""
    running = Path("/run/systemd/system").is_dir()
    yes = "cgroups v2" if running else "systemd not running as init on this host"
    for value, text in (("yes", yes), ("no", "require 'systemd cgroups' to be enabled")):
        own.configure(f"systemd cgroups = {value}")
        refused(own.run("exec", "--memory", "1G", image.sif, "true"), text)
        ran(own.run("exec", image.sif, "true"))
        ran(own.run("exec", "--memory", "1G", image.sif, "true", root=True))


@covers("allow netns paths")
def test_namespaces_that_may_be_joined(own, image):
    """Where nobody may, a path that is one is refused; tests/e2e/test_networks.py has the rest."""
    for value in ("/run/netns/x", "/proc/self/ns/net"):
        own.configure(f"allow netns paths = {value}")
        refused(own.run("exec", "--netns-path", "/proc/self/ns/net", image.sif, "true"), "not an")
        ran(own.run("exec", image.sif, "true"))


@pytest.fixture
def roots_folder(own) -> Iterator[Path]:
    """A directory that is root's down from /."""
    made = own.place / "folder-of-tests"
    made.mkdir()
    yield made
    shutil.rmtree(made)


@covers("cni configuration path", "cni plugin path")
def test_directories_of_networks(own, image, roots_folder):
    """A directory that is root's; one that somebody else could change is refused."""
    tmp_path = roots_folder
    words = ("exec", "--net", "--network", "own", image.sif, "true")
    for place, mode, text in (("a", 0o755, 'no net configuration with name "own"'),
                              ("b", 0o777, "must belong to root")):  # fmt: skip
        (tmp_path / place).mkdir()
        (tmp_path / place).chmod(mode)
        own.configure(f"cni configuration path = {tmp_path / place}")
        refused(own.run(*words, root=True), text)
    definition = '{"cniVersion": "1.0.0", "name": "own", "type": "thing"}'
    (tmp_path / "a/x.conf").write_text(definition)
    for place, text in (("a", f"{tmp_path}/a/thing: no such file"), ("b", "b/thing: no such")):
        own.configure(
            f"cni configuration path = {tmp_path}/a\ncni plugin path = {tmp_path / place}"
        )
        refused(own.run(*words, root=True), text)


@covers("suidbinary path", "download concurrency", "download part size",
        "download buffer size", "apptheus socket path",
        "apptheus communication socket path")  # fmt: skip
@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("suidbinary path = /usr/bin", ()),
        ("download concurrency = 1", ("pull", "library://y")),
        ("download part size = 1", ("pull", "library://y")),
        ("download buffer size = 1", ("pull", "library://y")),
        ("apptheus socket path = /run/x", ()),
        ("apptheus communication socket path = /run/x", ()),
    ],
)
def test_directives_of_what_is_not_there(own, image, line, command):
    """They never change a launch that does not need them; the command that does is refused."""
    own.configure(line)
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    if command:
        done = own.run(*command)
        assert done.returncode == 255
        assert "remote has no library client" in done.stderr, done.stderr


@covers("mksquashfs procs", "mksquashfs mem")
def test_how_an_image_is_packed(own, tmp_path):
    (tmp_path / "x.def").write_text("Bootstrap: scratch\n")
    words = ("build", str(tmp_path / "x.sif"), str(tmp_path / "x.def"))
    own.configure("mksquashfs procs = 1\nmksquashfs mem = 64M")
    ran(own.run(*words, root=True))
    own.configure("mksquashfs mem = none")
    done = own.run("build", "--force", *words[1:], root=True)
    assert "mksquashfs could not pack" in done.stderr, done.stderr


@covers("audit log")
def test_audit_log(own, image):
    sink = own.place / "audit.log"
    own.configure(f"audit log = {sink}")
    ran(own.run("exec", image.sif, "true"))
    assert len(sink.read_text().splitlines()) == 1
    sink.unlink()
    own.configure("audit log = none")
    ran(own.run("exec", image.sif, "true"))
    assert not sink.exists()


# ---- the file itself ----


def not_trusted(own: Installation, image: SimpleNamespace, *words: str) -> None:
    """The setuid flow is refused in one line; the other flow works."""
    done = own.run("exec", image.sif, "true")
    line = refused(done, *words)
    assert done.stderr.splitlines() == [line]
    ran(own.run("exec", "-u", image.sif, "true"))


def test_file_of_another_owner(own, image):
    own.configure("")
    os.chown(own.config, own.user.pw_uid, 0)
    not_trusted(own, image, str(own.config), "must be owned by root")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_file_that_others_may_write(own, image, mode):
    own.configure("")
    own.config.chmod(mode)
    not_trusted(own, image, str(own.config), "must be writable by root only")


def test_directory_that_others_may_write(own, image):
    own.configure("")
    own.sysconfdir.chmod(0o775)
    not_trusted(own, image, str(own.sysconfdir), "must be writable by root only")
    own.sysconfdir.chmod(0o755)
    own.place.chmod(0o775)
    try:
        not_trusted(own, image, str(own.place), "must be writable by root only")
    finally:
        own.place.chmod(0o755)


def test_directory_of_another_owner(own, image):
    own.configure("")
    os.chown(own.sysconfdir, own.user.pw_uid, -1)
    not_trusted(own, image, str(own.sysconfdir), "must be owned by root")


def test_symbolic_link(own, image):
    own.configure("")
    own.config.rename(own.sysconfdir / "real.conf")
    own.config.symlink_to("real.conf")
    not_trusted(own, image, str(own.config), "is a symbolic link")


def test_link_on_the_way(own, image):
    own.configure("")
    real = own.sysconfdir.with_name("etc-real")
    own.sysconfdir.rename(real)
    own.sysconfdir.symlink_to(real)
    try:
        not_trusted(own, image, str(own.sysconfdir), "symbolic link")
    finally:
        own.sysconfdir.unlink()
        real.rename(own.sysconfdir)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "large"])
def test_no_file_to_read(own, image, kind):
    own.config.unlink()
    if kind == "directory":
        own.config.mkdir()
    elif kind == "fifo":
        os.mkfifo(own.config, 0o644)
    elif kind == "large":
        own.config.write_bytes(b"#\n" * (4 << 20))
    not_trusted(own, image, str(own.config))


def test_unreadable_file(own, image):
    """Only for root to read: nothing that a user could look up, and all that the starter needs."""
    own.configure("allow pid ns = no")
    own.config.chmod(0o600)
    done = own.run("exec", image.sif, "true")
    # The file is opened as the caller: what it says must be readable to be followed.
    refused(done, str(own.config))


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("allow setiud = no", "allow setuid"),
        ("limit container path = /x", "limit container paths"),
        ("mount porc = no", "mount proc"),
    ],
)
def test_unknown_key(own, image, line, nearest):
    own.configure(f"# first line\n\n{line}")
    not_trusted(own, image, f"{own.config}:3: {line.split(' =')[0]}", f"did you mean `{nearest}`?")


@pytest.mark.parametrize(
    "line",
    [
        "allow setuid = maybe", "mount dev = minimum", "max loop devices = abc",
        "sessiondir max size = -1", "allow pid ns = YES", "enable overlay = 1",
        "limit container paths = relative/path", "audit log = relative",
        "allow setuid = yes # with a comment",
    ],
)  # fmt: skip
def test_bad_value(own, image, line):
    own.configure(f"allow ipc ns = no\n{line}")
    not_trusted(own, image, f"{own.config}:2: {line.split(' =')[0]}")


def test_junk(own, image):
    for text in ("no equals sign", "= value", "allow setuid = yes\0", "\x1b[2Jallow = no"):
        own.configure(f"allow pid ns = yes\n{text}")
        done = own.run("exec", image.sif, "true")
        refused(done, f"{own.config}:2")
        assert "\x1b" not in done.stderr
        ran(own.run("exec", "-u", image.sif, "true"))


def test_given_twice(own, image):
    own.configure("allow setuid = yes\nallow setuid = yes")
    not_trusted(own, image, f"{own.config}:2: allow setuid", "given already in line 1")


def test_config_check_says_the_same(own, image):
    own.configure("allow setiud = no")
    done = own.run("config", "check")
    assert done.returncode != 0
    assert "allow setiud" in done.stdout + done.stderr
    assert "allow setuid" in done.stdout + done.stderr


def test_the_real_file_works_as_it_is(own, image):
    """The one that the real Apptainer installs, copied over ours."""
    if not REAL_FILE.exists():
        pytest.skip("did not run: the real Apptainer is not installed")
    shutil.copy(REAL_FILE, own.config)
    own.config.chmod(0o644)
    assert flow_of(own.run("exec", image.sif, *IDENTITY)) == "setuid"
    assert own.run("config", "check").returncode == 0


# ---- an image that only its user can look at ----


@pytest.fixture
def user_mount(own, image, open_fuse) -> Iterator[Path]:
    """Images on a FUSE mount of the user's own, without allow_other: root cannot look into it."""
    tree = Path(tempfile.mkdtemp(dir=image.place))
    shutil.copy(image.sif, tree / "image.sif")
    shutil.copy(image.squashfs, tree / "image.sqfs")
    shutil.copytree(image.sandbox, tree / "sandbox", symlinks=True)
    outer = image.place / "outer.sqfs"
    argv = ["mksquashfs", tree, outer, "-noappend", "-quiet", "-no-progress"]
    subprocess.run(argv, check=True, capture_output=True)
    outer.chmod(0o644)
    point = Path(tempfile.mkdtemp(dir=own.user.pw_dir))
    os.chown(point, own.user.pw_uid, own.user.pw_gid)
    environment = own.environment()
    subprocess.run(["squashfuse", outer, point], check=True, env=environment, **own.identity())
    yield point
    subprocess.run(["fusermount3", "-u", "-z", point], check=True)
    point.rmdir()
    outer.unlink()
    shutil.rmtree(tree)


@pytest.mark.parametrize("name", ["image.sif", "image.sqfs", "sandbox"])
def test_image_on_a_mount_of_the_users_own(own, user_mount, name):
    image = user_mount / name
    own.configure("")
    with pytest.raises(PermissionError):
        as_set_user_id_root(own, image)
    assert flow_of(own.run("exec", image, *IDENTITY)) == "setuid"
    ran(own.run("exec", "-p", "--underlay", image, "true"))
    kind = {"image.sif": "sif", "image.sqfs": "squashfs"}.get(name, "dir")
    own.configure(f"allow container {kind} = no")
    refused(own.run("exec", image, "true"), "disallows")
    # Owner and path are what its server says, so no rule on them can let it pass.
    for rule in (f"owners = root, {own.user.pw_uid}", "groups = root", "paths = /"):
        own.configure(f"limit container {rule}")
        refused(own.run("exec", image, "true"))
        own.configure(f"limit container {rule}\nallow setuid-mount squashfs = no")
        refused(own.run("exec", image, "true"))


def as_set_user_id_root(own: Installation, path: Path) -> None:
    """Look at a file with the ids of the starter, the caller's and root's mixed.

    Raises:
        PermissionError: it cannot be looked at.
    """
    script = (
        "import os, sys; user = int(sys.argv[1]); os.setresuid(user, 0, 0)\n"
        "try: os.stat(sys.argv[2])\n"
        "except PermissionError: sys.exit(13)"
    )
    argv = ["/usr/bin/python3", "-c", script, str(own.user.pw_uid), path]
    if subprocess.run(argv, check=False).returncode == 13:
        raise PermissionError


# ---- the table ----


def test_every_directive_has_a_case():
    keys = {row[1] for row in ROWS}
    assert keys - _covered == set()
    assert _covered - keys == set()
