"""The root of a container, assembled by starter-init itself, and images that try to break out."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import refused_calls
from tests.starter import init_driver as d
from tests.starter.init_driver import Init, RowFailedError

pytestmark = pytest.mark.usefixtures("require_root")
NULL, ZERO = os.makedev(1, 3), os.makedev(1, 5)
libc = ctypes.CDLL(None, use_errno=True)
EXCHANGER = """
import ctypes, os, sys
renameat2 = ctypes.CDLL(None).renameat2
os.write(1, b"r")
while True:
    renameat2(-100, sys.argv[1].encode(), -100, sys.argv[2].encode(), 2)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return d.compile_init(tmp_path_factory.mktemp("init"))


@pytest.fixture
def root(readable_tmp: Path) -> Iterator[Path]:
    """Return a root with a few directories; beside it lies `outside`, which stays as it is."""
    place = readable_tmp / f"{os.getpid()}-{os.urandom(4).hex()}"
    for name in ("proc", "sys", "dev", "etc", "vol"):
        (place / "rootfs" / name).mkdir(parents=True)
    (place / "outside/inner").mkdir(parents=True)
    (place / "outside/file").write_text("of the host")
    before = listing(place / "outside")
    yield place / "rootfs"
    assert listing(place / "outside") == before
    subprocess.run(["rm", "-rf", "--one-file-system", place], check=True)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return what lies below a directory: names, modes and inodes."""
    found = []
    for base, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            st = os.lstat(f"{base}/{name}")
            found.append((f"{base}/{name}", st.st_mode, st.st_ino))
    return sorted(found)


def libc_mount(*words: object) -> None:
    if libc.mount(*[w.encode() if isinstance(w, str) else w for w in words]) < 0:
        raise OSError(ctypes.get_errno(), "mount")


def points(container: Init) -> list[str]:
    return [point for point, *_ in container.mounts()]


def assert_inside(container: Init, before: list[str], root: Path) -> None:
    """Assert that what was mounted since `before` lies in the root."""
    new = points(container)
    for point in before:
        new.remove(point)
    assert [point for point in new if not point.startswith(f"{root}/")] == []


def basic(container: Init) -> None:
    container.mount("proc", "/proc")
    container.mount("tmpfs", "/dev", ["mode=755", "size=65536k"], d.NOSUID)
    container.row("MKNOD", "/dev/null", None, stat.S_IFCHR | 0o666, 1 << 32 | 3)


# ---------------------------------------------------------------- what a configuration asks for


def test_a_usual_root(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        basic(c)
        options = ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        c.mount("devpts", "/dev/pts", options, d.NOSUID | d.NOEXEC)
        c.mount("tmpfs", "/dev/shm", ["mode=1777"], d.NOSUID | d.NODEV | d.NOEXEC)
        c.mount("mqueue", "/dev/mqueue", (), d.NOSUID | d.NODEV | d.NOEXEC)
        c.mount("sysfs", "/sys", ["ro"], d.RDONLY | d.NOSUID)
        c.bind("/etc/hosts", "/etc/hosts", d.RDONLY)
        c.row("MKNOD", "/dev/deep/zero", None, stat.S_IFCHR | 0o640, 1 << 32 | 5, 7, 8)
        c.row("LINK", "/proc/self/fd", "/dev/fd")
        c.row("LINK", "pts/ptmx", "/dev/ptmx")
        c.enter(0, "/home/dir")
        c.row("REMOUNT", "/dev", None, d.RDONLY)
        c.row("ROOT_READONLY")
        c.row("NAME", "box")
        found = {point: (kind, options) for point, _, kind, options, _ in c.mounts()}
        assert found["/"][1].startswith("ro")
        assert found["/proc"] == ("proc", "rw,relatime")
        assert found["/dev"] == ("tmpfs", "ro,nosuid,relatime")
        assert found["/dev/pts"] == ("devpts", "rw,nosuid,noexec,relatime")
        assert found["/dev/mqueue"][0] == "mqueue"
        assert found["/sys"] == ("sysfs", "ro,nosuid,relatime")
        assert found["/etc/hosts"][1].startswith("ro")
        assert (root / "home/dir").stat().st_mode & 0o7777 == 0o755
        zero = os.lstat(c.at("/dev/deep/zero"))
        assert (zero.st_rdev, zero.st_mode & 0o777) == (ZERO, 0o640)
        assert (zero.st_uid, zero.st_gid) == (7, 8)
        assert os.readlink(c.at("/dev/ptmx")) == "pts/ptmx"
        assert os.readlink(c.at("/dev/fd")) == "/proc/self/fd"


def test_what_is_there_is_kept(program: Path, root: Path) -> None:
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o600, NULL)
    (root / "dev/fd").write_text("mine")
    with Init(program) as c:
        c.root(root)
        c.row("MKNOD", "/dev/null", None, stat.S_IFCHR | 0o666, 1 << 32 | 3)
        c.row("LINK", "/proc/self/fd", "/dev/fd")
        c.row("LINK", "pts/ptmx", "/dev/fd", flags=1)
    assert (root / "dev/null").stat().st_mode & 0o777 == 0o600
    assert os.readlink(root / "dev/fd") == "pts/ptmx"


def test_the_node_of_the_host(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        c.row("MKNOD", "/dev/null", None, stat.S_IFCHR | 0o666, 1 << 32 | 3, flags=1)
        c.row("MKNOD", "/dev/other", "/dev/zero", stat.S_IFCHR | 0o666, 1 << 32 | 5, flags=1)
        c.enter()
        assert os.stat(c.at("/dev/null")).st_rdev == NULL
        assert os.stat(c.at("/dev/other")).st_rdev == ZERO


def test_kinds_of_sources(program: Path, root: Path) -> None:
    (root.parent / "link").symlink_to("outside/file")
    with Init(program) as c:
        c.root(root)
        c.bind(root.parent / "link", "/etc/followed")
        c.bind(root.parent / "outside", "/vol/new/deep")
        c.bind(f"/proc/{os.getpid()}/ns/uts", "/etc/uts")
        c.enter()
        assert c.at("/etc/followed").read_text() == "of the host"
        assert sorted(os.listdir(c.at("/vol/new/deep"))) == ["file", "inner"]
        assert os.stat(c.at("/etc/uts")).st_ino == os.stat("/proc/self/ns/uts").st_ino


@pytest.mark.parametrize("path", ["/no/such/thing", "/etc/passwd/x"])
def test_a_source_that_lacks(program: Path, root: Path, path: str) -> None:
    with Init(program) as c:
        c.root(root)
        with pytest.raises(RowFailedError) as failed:
            c.bind(path, "/vol/x")
        assert failed.value.error in (errno.ENOENT, errno.ENOTDIR)
        # The rows after a failed one are answered and not done.
        with pytest.raises(RowFailedError) as later:
            c.row("LINK", "a", "/vol/link")
        assert later.value.code == d.ERR_CANCELLED
    assert os.listdir(root / "vol") == []


def test_a_mount_that_may_fail(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        assert c.mount("ext4", "/vol", flags=d.PLACE_MAY_FAIL) != 0
        c.mount("tmpfs", "/vol")


def test_kinds_that_do_not_match(program: Path, root: Path) -> None:
    (root / "etc/file").write_text("x")
    for source, target in ((root.parent / "outside", "/etc/file"), ("/etc/hosts", "/vol")):
        with Init(program) as c:
            c.root(root)
            with pytest.raises(RowFailedError) as failed:
                c.bind(source, target)
            assert failed.value.error == errno.ENOTDIR


def test_flags_of_a_bind_and_its_propagation(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        c.row("TREE", str(root.parent / "outside"))
        c.row("ATTR", None, None, d.RDONLY | d.NOSUID | 0x10, 0, d.MS_SHARED)
        c.row("PLACE", "/vol")
        options = {point: options for point, _, _, options, _ in c.mounts()}[f"{root}/vol"]
        assert options == "ro,nosuid,noatime"
        lines = Path(f"/proc/{c.pid}/mountinfo").read_text().splitlines()
        assert any(f"{root}/vol " in line and " shared:" in line for line in lines)


def test_the_mode_of_a_directory_is_copied(program: Path, root: Path) -> None:
    (root / "vol").chmod(0o1751)
    with Init(program) as c:
        c.root(root)
        c.mount("tmpfs", "/vol", flags=d.PLACE_COPY_MODE)
        c.mount("tmpfs", "/new", flags=d.PLACE_COPY_MODE)
        assert c.at(f"{root}/vol").stat().st_mode & 0o7777 == 0o1751
        assert c.at(f"{root}/new").stat().st_mode & 0o7777 == 0o1777


def test_copy_up(program: Path, root: Path) -> None:
    vol = root / "vol"
    (vol / "sub").mkdir(mode=0o750)
    (vol / "sub/file").write_bytes(b"x" * 100_000)
    os.setxattr(vol / "sub/file", "user.note", b"kept")
    os.chown(vol / "sub/file", 11, 12)
    (vol / "sub/file").chmod(0o4710)
    (vol / "link").symlink_to("/etc/passwd")
    os.mkfifo(vol / "pipe", 0o604)
    vol.chmod(0o711)
    with Init(program) as c:
        c.root(root)
        c.row("FS", "tmpfs", "tmpfs")
        c.row("FSOPT", "ro")
        c.row("COPYUP", "/vol")
        c.row("PLACE", "/vol", flags=d.PLACE_COPY_MODE)
        c.enter()
        found = os.stat(c.at("/vol/sub/file"))
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (11, 12, 0o4710)
        assert (found.st_size, os.getxattr(c.at("/vol/sub/file"), "user.note")) == (
            100_000,
            b"kept",
        )
        assert os.readlink(c.at("/vol/link")) == "/etc/passwd"
        assert stat.S_ISFIFO(os.lstat(c.at("/vol/pipe")).st_mode)
        assert os.stat(c.at("/vol/sub")).st_mode & 0o777 == 0o750
        assert os.stat(c.at("/vol")).st_mode & 0o777 == 0o711
        assert c.mounts()[-1][3].startswith("ro")


def test_options_too_long_for_fsconfig(program: Path, root: Path) -> None:
    layers = []
    for number in range(4):
        layer = root.parent / ("layer" + "x" * 90 + str(number))
        layer.mkdir()
        (layer / f"from{number}").write_text("")
        layers.append(str(layer))
    for key, value in (("lowerdir", ":".join(layers)), ("", "lowerdir=" + ":".join(layers))):
        with Init(program) as c:
            c.root(root)
            c.row("FS", "overlay", "overlay")
            c.row("FSOPT", key, value)
            c.row("ATTR", None, None, d.NODEV)
            c.row("PLACE", "/vol")
            c.enter()
            assert sorted(os.listdir(c.at("/vol"))) == ["from0", "from1", "from2", "from3"]
            assert c.mounts()[-1][0] == "/vol"
            assert [m[3] for m in c.mounts()[1:]] == ["rw,nodev,relatime"]


@contextmanager
def user_space(inside: int, outside: int) -> Iterator[int]:
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        libc.unshare(d.NEWUSER)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    for kind in ("uid", "gid"):
        Path(f"/proc/{child}/{kind}_map").write_text(f"{inside} {outside} 1000\n")
    fd = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    yield fd
    for number in (fd, ready, done):
        os.close(number)
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_an_id_mapped_bind(program: Path, root: Path) -> None:
    source = root.parent / "mapped"
    source.mkdir()
    (source / "file").write_text("x")
    with Init(program) as c, user_space(0, 5000) as space:
        c.root(root)
        c.row("TREE", str(source))
        c.row("ATTR", None, None, d.RDONLY | d.IDMAP, fd=space)
        c.row("PLACE", "/vol")
        c.enter()
        assert os.stat(c.at("/vol/file")).st_uid == 5000
        assert "idmapped" in c.mounts()[-1][3]


def test_a_tree_of_somebody_else(program: Path, root: Path) -> None:
    fd = libc.syscall(428, -100, str(root.parent / "outside").encode(), 0x80001)
    with Init(program) as c:
        c.root(root)
        c.row("TREE", fd=fd)
        os.close(fd)
        c.row("PLACE", "/vol")
        c.enter()
        assert sorted(os.listdir(c.at("/vol"))) == ["file", "inner"]


def locked_volume(root: Path) -> Callable[[], None]:
    """A volume with flags that a user namespace finds locked."""
    volume = str(root.parent / "volume")
    Path(volume).mkdir()

    def prepare() -> None:
        libc.unshare(d.NEWNS)
        libc_mount(None, "/", None, d.MS_REC | d.MS_PRIVATE, None)
        libc_mount("tmpfs", volume, "tmpfs", 2 | 4 | 1024, "mode=777")  # nosuid, nodev, noatime

    return prepare


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ((d.RDONLY, d.NODEV | d.NOSUID, 0, 0), None),
        ((d.RDONLY, d.NODEV, 0, d.NODEV), d.WHY_CLEARED_LOCKED),
        ((0x20, d.ATIME | d.NODEV, 0, 0), d.WHY_LOCKED_ATIME),
        ((d.NOEXEC, 0, 0, 0), None),
    ],
)
def test_locked_flags(
    program: Path, root: Path, fields: tuple[int, ...], value: int | None
) -> None:
    os.chown(root, 100000, 100000)
    os.chown(root / "vol", 100000, 100000)
    with Init(program, preexec=locked_volume(root)) as c:
        c.root(root, d.NEWUSER | d.NEWNS | d.NEWPID)
        c.row("TREE", str(root.parent / "volume"), flags=d.TREE_RECURSIVE)
        if value is not None:
            with pytest.raises(RowFailedError) as failed:
                c.row("ATTR", None, None, *fields)
            assert (failed.value.error, failed.value.value) == (errno.EPERM, value)
            return
        c.row("ATTR", None, None, *fields)
        c.row("PLACE", "/vol")
        options = c.mounts()[-1][3].split(",")
        assert {"nosuid", "nodev", "noatime"} <= set(options)
        assert ("ro" in options) == bool(fields[0] & d.RDONLY)


def test_a_user_namespace(program: Path, root: Path) -> None:
    subprocess.run(["chown", "-R", "100000:100000", root], check=True)
    with Init(program) as c:
        c.root(root, d.NEWUSER | d.NEWNS | d.NEWPID | d.NEWUTS | d.NEWIPC | d.NEWNET)
        c.mount("proc", "/proc")
        c.mount("tmpfs", "/dev", ["mode=755"], d.NOSUID)
        c.mount("devpts", "/dev/pts", ["newinstance", "ptmxmode=0666"], d.NOSUID)
        c.mount("sysfs", "/sys", ["ro"], d.RDONLY | d.NOSUID | d.NODEV | d.NOEXEC)
        # No right to make nodes: the host's is shown.
        c.row("MKNOD", "/dev/null", None, stat.S_IFCHR | 0o666, 1 << 32 | 3)
        c.enter(0, "/home/somebody")
        c.row("READONLY_PATH", "/proc/sys")
        c.row("MASK_PATH", "/proc/keys")
        c.row("MASK_PATH", "/proc/acpi")
        c.row("MASK_PATH", "/sys/firmware")
        c.row("ROOT_READONLY")
        c.row("NAME", "box")
        c.row("SYSCTL", "net/ipv4/ip_forward", "1")
        assert os.stat(c.at("/dev/null")).st_rdev == NULL
        assert os.stat(c.at("/proc/keys")).st_rdev == NULL
        assert (root / "home/somebody").stat().st_uid == 100000


def test_mounts_of_the_root_stay_in_the_namespace(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.born()
        c.row("PROPAGATION")
        c.row("ROOT_BUNDLE", str(root), flags=1)
        basic(c)
        assert f"{root}/" not in Path("/proc/self/mountinfo").read_text()
        shared = [
            line
            for line in Path(f"/proc/{c.pid}/mountinfo").read_text().splitlines()
            if str(root) in line and " shared:" in line
        ]
        assert shared == []
        c.enter()


@pytest.mark.parametrize("how", [0, 1])
def test_the_old_root_is_gone(program: Path, root: Path, how: int) -> None:
    with Init(program) as c:
        c.root(root)
        if how == 1:
            c.mount("proc", "/proc")
        c.enter(how)
        if how == 0:
            assert len(c.mounts()) == 1
        else:
            # Not one whole procfs or sysfs lies below the container's root.
            assert [m for m in c.mounts() if m[2] == "sysfs" and m[1] == "/"] == []
        assert sorted(os.listdir(c.at("/"))) == sorted(os.listdir(root))


def test_without_a_mount_namespace(program: Path, root: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    with Init(program) as c:
        c.born(d.NEWPID | d.NEWUTS)
        c.row("ROOT_BUNDLE", str(root), flags=2)
        c.enter(2, "/work")
        assert sorted(os.listdir(c.at("/"))) == sorted(os.listdir(root))
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_link_comes_up(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        c.row("NETDEV", "lo")
        # Device, index, length of prefix, scope and flags (IFF_UP is 1 of the address's 0x80).
        shown = Path(f"/proc/{c.pid}/net/if_inet6").read_text().split()
        assert shown[-1] == "lo"
        with pytest.raises(RowFailedError) as failed:
            c.row("NETDEV", "nosuch0")
        assert failed.value.error == errno.ENODEV


# ------------------------------------------------------------------------ hostile roots (B1, B2)

LINKS = (
    "..",
    "../..",
    "../../../../../../../..",
    "/",
    "/..",
    "/proc/self/root",
    "/proc/self/cwd",
    "/proc/1/root",
    "/proc/self/fd/0",
    "/proc/self/fd/3",
    "/proc/self/fd/4",
    "/proc/thread-self/root",
    "/proc/self/fd/../root/{outside}",
    "{outside}",
    "../outside",
    "../../outside",
    "a/../../../../outside",
    "loop",
    "/dangling/far/away",
    "chain1",
    "pipe",
    "etc/../../outside/inner",
    "etc/../../outside",
    "",
)


def check_hostile_links(program: Path, root: Path, link: str) -> None:
    """Bind, make nodes and links below a link: all happens in the root, or fails."""
    outside = root.parent / "outside"
    before_outside = listing(outside)
    with suppress(FileNotFoundError):
        os.symlink(link.format(outside=outside), root / "t")
    (root / "loop").symlink_to("loop")
    (root / "chain1").symlink_to("chain2/..")
    (root / "chain2").symlink_to(f"{outside}/inner")
    os.mkfifo(root / "pipe")
    for number in range(6):
        with Init(program) as c:
            c.root(root)
            c.mount("proc", "/proc")
            before = points(c)
            # More than one row, each on its own: a failed one ends the launch.
            with suppress(RowFailedError):
                if number == 0:
                    c.bind("/etc", "/t/inner")
                elif number == 1:
                    c.bind("/etc", "/t/made/../made2")
                elif number == 2:
                    c.bind("/etc/hosts", "/t/file")
                elif number == 3:
                    c.row("MKNOD", "/t/node", None, stat.S_IFCHR | 0o666, 1 << 32 | 3)
                elif number == 4:
                    c.row("LINK", "pts/ptmx", "/t/file", flags=1)
                else:
                    c.bind("/etc", "/t")
            assert_inside(c, before, root)
            assert listing(outside) == before_outside


@pytest.mark.parametrize("link", LINKS)
def test_hostile_links(program: Path, root: Path, link: str) -> None:
    check_hostile_links(program, root, link)


def block_openat2() -> None:
    """As a filter of seccomp does that knows nothing of openat2(2), and as an old kernel."""
    refused_calls.refuse(refused_calls.OPENAT2, errno.ENOSYS)


@pytest.mark.parametrize("link", LINKS)
def test_hostile_links_without_openat2(program: Path, root: Path, link: str) -> None:
    outside = root.parent / "outside"
    os.symlink(link.format(outside=outside) or "..", root / "t")
    (root / "chain1").symlink_to(f"{outside}/inner")
    with Init(program, preexec=block_openat2) as c:
        c.root(root)
        c.mount("proc", "/proc")
        before = points(c)
        with suppress(RowFailedError):
            c.bind("/etc", "/t/inner/made")
        assert_inside(c, before, root)


def test_a_root_without_openat2(program: Path, root: Path) -> None:
    (root / "run").symlink_to("var/run")
    with Init(program, preexec=block_openat2) as c:
        c.root(root)
        basic(c)
        c.bind("/etc", "/run/x/../y")
        c.enter()
        c.row("MASK_PATH", "/proc/keys")
        assert os.stat(c.at("/proc/keys")).st_rdev == NULL
        assert os.listdir(c.at("/var/run/y"))


def test_a_link_that_dangles_is_followed_in_the_root(program: Path, root: Path) -> None:
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub.conf")
    (root / "run").symlink_to("/var/../var/run")
    with Init(program) as c:
        c.root(root)
        c.bind("/etc/hosts", "/etc/resolv.conf")
        c.enter()
        assert c.at("/var/run/systemd/resolve/stub.conf").read_text() == (
            Path("/etc/hosts").read_text()
        )


@pytest.mark.parametrize("kind", ["proc", "sysfs"])
@pytest.mark.parametrize("what", ["link", "absolute", "file", "dangling"])
def test_procfs_lies_on_an_ordinary_directory(
    program: Path, root: Path, kind: str, what: str
) -> None:
    where = {"proc": "proc", "sysfs": "sys"}[kind]
    (root / where).rmdir()
    if what == "file":
        (root / where).write_text("")
    else:
        target = {"link": "vol", "absolute": "/vol", "dangling": "none"}[what]
        (root / where).symlink_to(target)
    why = {"proc": d.WHY_PROC_NOT_ORDINARY, "sysfs": d.WHY_SYSFS_NOT_ORDINARY}[kind]
    with Init(program) as c:
        c.root(root)
        with pytest.raises(RowFailedError) as failed:
            c.mount(kind, f"/{where}")
        assert (failed.value.error, failed.value.value) == (errno.ENOTDIR, why)


@pytest.mark.parametrize(
    ("target", "flags", "good"),
    [
        ("/proc/sys", 0, False),
        ("/proc/self/attr", 0, False),
        ("/proc", 0, False),
        ("/to-proc/sys", 0, False),
        ("/to-proc", 0, False),
        ("/proc/../proc/./sys", 0, False),
        ("/proc/uptime", d.PLACE_BELOW_PROC, True),
        ("/procfile", 0, True),
    ],
)
@pytest.mark.parametrize("mounted", [True, False])
def test_nothing_covers_procfs(
    program: Path, root: Path, target: str, flags: int, good: bool, mounted: bool
) -> None:
    (root / "to-proc").symlink_to("proc")
    (root / "proc/sys").mkdir()
    source = "/etc/hosts" if good else "/etc"
    with Init(program) as c:
        c.root(root)
        if mounted:
            c.mount("proc", "/proc")
        if good:
            c.bind(source, target, flags=flags)
            return
        with pytest.raises(RowFailedError) as failed:
            c.bind(source, target, flags=flags)
        expected = {errno.EPERM} if target != "/proc/self/attr" else {errno.EPERM, errno.ENOENT}
        assert failed.value.error in expected
        assert failed.value.value in (d.WHY_INSIDE_PROC, d.WHY_NOT_PROC, 0)


def test_procfs_may_be_bound_or_mounted_again(program: Path, root: Path) -> None:
    with Init(program) as c:
        c.root(root)
        c.bind("/proc", "/proc")
        c.mount("proc", "/proc")
        c.enter()


@pytest.mark.parametrize("target", ["/", "/.", "/..", "/vol/..", "/up"])
def test_the_root_itself_is_no_target(program: Path, root: Path, target: str) -> None:
    (root / "up").symlink_to("..")
    with Init(program) as c:
        c.root(root)
        with pytest.raises(RowFailedError) as failed:
            c.bind("/etc", target)
        assert (failed.value.error, failed.value.value) == (errno.EBUSY, d.WHY_IS_ROOT)


FALSE_NULLS: dict[str, Callable[[Path], None]] = {
    "link": lambda path: path.symlink_to("/proc/sys/kernel/core_pattern"),
    "sysrq": lambda path: path.symlink_to("/proc/sysrq-trigger"),
    "file": Path.touch,
    "pipe": os.mkfifo,
    "zero": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, ZERO),
    "folder": lambda path: path.mkdir(),
    "none": lambda path: None,
}


def check_masks(program: Path, root: Path, what: str) -> None:
    """Files are covered by a node 1:3, whatever the image calls /dev/null."""
    FALSE_NULLS[what](root / "dev/null")
    (root / "secret").write_text("secret")
    (root / "secrets").mkdir()
    (root / "secrets/one").write_text("secret")
    with Init(program) as c:
        c.root(root)
        c.mount("proc", "/proc")
        c.enter()
        for path in ("/secret", "/proc/keys", "/proc/timer_list", "/secrets", "/proc/bus", "/gone"):
            c.row("MASK_PATH", path)
        for path in ("/secret", "/proc/keys", "/proc/timer_list"):
            if c.at(path).exists():
                assert os.stat(c.at(path)).st_rdev == NULL, path
        assert os.listdir(c.at("/secrets")) == os.listdir(c.at("/proc/bus")) == []
        with pytest.raises(OSError, match="Read-only"):
            (c.at("/secrets") / "new").write_text("")


@pytest.mark.parametrize("what", FALSE_NULLS)
def test_masks(program: Path, root: Path, what: str) -> None:
    check_masks(program, root, what)


def test_a_read_only_path(program: Path, root: Path) -> None:
    (root / "vol/file").write_text("x")
    with Init(program) as c:
        c.root(root)
        basic(c)
        c.enter()
        for path in ("/vol", "/proc/sys", "/gone", "/vol/file/gone"):
            c.row("READONLY_PATH", path)
        for path in ("/vol/new", "/proc/sys/kernel/hostname"):
            with pytest.raises(OSError, match="Read-only"):
                c.at(path).write_text("x")


@pytest.mark.parametrize("path", ["/", "/up"])
@pytest.mark.parametrize("row", ["READONLY_PATH", "MASK_PATH"])
def test_the_root_is_not_masked(program: Path, root: Path, row: str, path: str) -> None:
    (root / "up").symlink_to("..")
    with Init(program) as c:
        c.root(root)
        c.enter()
        with pytest.raises(RowFailedError):
            c.row(row, path)


def check_sysctl(program: Path, root: Path) -> None:
    """What the container calls /proc is not written to."""
    fake = root.parent / "fake"
    (fake / "net/ipv4").mkdir(parents=True)
    (fake / "net/ipv4/ip_forward").write_text("untouched")
    with Init(program) as c:
        c.root(root)
        c.mount("proc", "/proc")
        c.bind(fake, "/proc/sys", flags=d.PLACE_BELOW_PROC)
        c.enter()
        c.row("SYSCTL", "net/ipv4/ip_forward", "1")
        argv = ["nsenter", "-t", str(c.pid), "-n", "cat", "/proc/sys/net/ipv4/ip_forward"]
        assert subprocess.run(argv, capture_output=True, check=True).stdout == b"1\n"
    assert (fake / "net/ipv4/ip_forward").read_text() == "untouched"


def test_sysctl_is_the_kernels(program: Path, root: Path) -> None:
    check_sysctl(program, root)


@pytest.mark.parametrize(
    "key", ["../sysrq-trigger", "net/../../self/attr/exec", "/net", "net//x", "net/", "."]
)
def test_sysctl_stays_below(program: Path, root: Path, key: str) -> None:
    with Init(program) as c:
        c.root(root)
        c.enter()
        with pytest.raises(EOFError):
            c.row("SYSCTL", key, "x")
        assert c.forerunner.wait() == 0


@pytest.mark.parametrize(("key", "value"), [("no/such/key", 1), ("net/ipv4/ip_forward", 2)])
def test_sysctl_says_what_failed(program: Path, root: Path, key: str, value: int) -> None:
    with Init(program) as c:
        c.root(root)
        c.enter()
        with pytest.raises(RowFailedError) as failed:
            c.row("SYSCTL", key, "not a number")
        assert failed.value.value == value


@pytest.mark.parametrize(
    "cwd",
    [
        "/proc/self/fd/{n}",
        "/proc/self/fd/{n}/../../..",
        "/w{n}",
        "/w{n}/made",
        "../../x",
        "/proc/self/cwd/made",
        "/proc/1/root/made",
    ],
)
@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 6, 7, 8])
def test_the_working_directory_is_made_inside(
    program: Path, root: Path, cwd: str, number: int
) -> None:
    for n in range(10):
        (root / f"w{n}").symlink_to(f"/proc/self/fd/{n}")
    here = sorted(os.listdir("."))
    with Init(program) as c:
        c.root(root)
        c.mount("proc", "/proc")
        with suppress(RowFailedError):
            c.enter(0, cwd.format(n=number))
    assert sorted(os.listdir(".")) == here


def test_a_device_directory_that_is_a_link(program: Path, root: Path) -> None:
    """CVE-2026-41579: what is removed and made in /dev stays in the root."""
    outside = root.parent / "outside"
    (outside / "ptmx").write_text("of the host")
    before = listing(outside)
    (root / "dev").rmdir()
    (root / "dev").symlink_to(outside)
    with Init(program) as c:
        c.root(root)
        c.row("LINK", "pts/ptmx", "/dev/ptmx", flags=1)
        c.row("LINK", "/proc/self/fd", "/dev/fd")
        c.row("MKNOD", "/dev/null", None, stat.S_IFCHR | 0o666, 1 << 32 | 3)
    assert listing(outside) == before
    assert sorted(os.listdir(f"{root}{outside}")) == ["fd", "null", "ptmx"]
    (outside / "ptmx").unlink()


# ---------------------------------------------------------------------------------------- races


@contextmanager
def exchange(one: Path, other: Path) -> Iterator[None]:
    """Swaps two names for as long as it lasts."""
    argv = [sys.executable, "-ISc", EXCHANGER, str(one), str(other)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as swapper:
        assert swapper.stdout is not None
        swapper.stdout.read(1)
        try:
            yield
        finally:
            swapper.kill()


def check_race(program: Path, root: Path, link: str, rounds: int) -> tuple[int, int]:
    """Bind below a directory that a link takes turns with; return how many went well or not."""
    outside = root.parent / "outside"
    before_outside = listing(outside)
    (root / "vol/dir/inner").mkdir(parents=True)
    (root / "vol/link").symlink_to(link.format(outside=outside))
    good = bad = 0
    with exchange(root / "vol/dir", root / "vol/link"):
        for _ in range(rounds):
            with Init(program) as c:
                c.root(root)
                before = points(c)
                for number in range(250):
                    kind = number % 5
                    if kind < 2:
                        error = c.bind("/etc", "/vol/dir/inner", flags=d.PLACE_MAY_FAIL)
                    elif kind < 4:
                        target = f"/vol/dir/made{number}/deep"
                        error = c.bind("/etc", target, flags=d.PLACE_MAY_FAIL)
                    else:
                        target = f"/vol/dir/file{number}"
                        error = c.bind("/etc/hosts", target, flags=d.PLACE_MAY_FAIL)
                    good, bad = good + (error == 0), bad + (error != 0)
                assert_inside(c, before, root)
            assert listing(outside) == before_outside
    return good, bad


@pytest.mark.parametrize("link", ["../../outside", "{outside}", "..", "/proc/self/root"])
def test_a_race_for_the_target(program: Path, root: Path, link: str) -> None:
    good, _ = check_race(program, root, link, 4)
    assert good > 100


def test_a_race_for_what_masks(program: Path, root: Path) -> None:
    """CVE-2025-31133: /dev/null is the device and a link in turns."""
    (root / "dev/link").symlink_to("/proc/sys/kernel/core_pattern")
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, NULL)
    pattern = Path("/proc/sys/kernel/core_pattern").stat()
    with exchange(root / "dev/null", root / "dev/link"), Init(program) as c:
        for number in range(500):
            (root / f"vol/{number}").write_text("secret")
        c.root(root)
        c.mount("proc", "/proc")
        c.enter()
        for number in range(500):
            c.row("MASK_PATH", f"/vol/{number}")
        for number in range(500):
            found = os.stat(c.at(f"/vol/{number}"))
            assert (found.st_rdev, found.st_ino) != (0, pattern.st_ino)
            assert found.st_rdev == NULL


def check_proc_race(program: Path, root: Path, rounds: int) -> None:
    """CVE-2019-19921: /proc and a link take turns; what is masked is masked in procfs itself."""
    for name in ("keys", "timer_list"):
        (root / "vol" / name).write_text("not procfs")
    (root / "link").symlink_to("vol")
    placed = 0
    with exchange(root / "proc", root / "link"):
        for _ in range(rounds):
            with Init(program) as c:
                c.root(root)
                with suppress(RowFailedError):
                    c.mount("proc", "/proc")
                    placed += 1
                    c.enter()
                    c.row("MASK_PATH", "/proc/keys")
                    c.row("READONLY_PATH", "/proc/sys")
                    points = {(kind, point) for point, _, kind, _, _ in c.mounts()}
                    proc = {point for kind, point in points if kind == "proc"}
                    assert proc <= {"/proc", "/proc/sys", "/link", "/link/sys"}
                    assert {"/proc/keys", "/link/keys"} & {point for _, point in points}
                    assert {"/proc/sys", "/link/sys"} & proc
    assert placed > 0


def test_a_race_for_proc(program: Path, root: Path) -> None:
    check_proc_race(program, root, 150)


# ------------------------------------------------ the tests themselves, against weakened builds

OPEN = "open2(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)"
FOLLOW = "openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)"


@pytest.fixture(scope="session")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def build(*edits: tuple[str, str, str]) -> Path:
        return d.compile_init(tmp_path_factory.mktemp("weak"), edits)

    return build


@pytest.mark.long
def test_weak_look_up(weak: Callable[..., Path], root: Path) -> None:
    program = weak(("init_target.c", OPEN, "open2(root, path + 1, flags, 0)"))
    with pytest.raises(AssertionError):
        check_hostile_links(program, root, "../outside")


@pytest.mark.long
def test_weak_creation(weak: Callable[..., Path], root: Path) -> None:
    program = weak(("init_target.c", FOLLOW, "openat(dir, name, O_PATH | O_CLOEXEC)"))
    with pytest.raises(AssertionError):
        check_hostile_links(program, root, "../outside")


@pytest.mark.long
def test_weak_place_of_proc(weak: Callable[..., Path], root: Path) -> None:
    program = weak(
        ("init_mounts.c", 'strcmp(path, "/sys") == 0;\n}', 'strcmp(path, "/sys") == 0 && 0;\n}'),
        ("init_mounts.c", 'return hand_is(s, "proc") ||', 'return 0 && hand_is(s, "proc") ||'),
        ("init_mounts.c", "return kept[i].fd;", "return s->root_fd;"),
    )
    with pytest.raises(AssertionError):
        check_proc_race(program, root, 300)


@pytest.mark.long
def test_weak_null(weak: Callable[..., Path], root: Path) -> None:
    program = weak(("init_dev.c", "st.st_rdev == makedev(1, 3)", "1"))
    with pytest.raises(AssertionError):
        check_masks(program, root, "zero")


@pytest.mark.long
def test_weak_proc(weak: Callable[..., Path], root: Path) -> None:
    edit = "int fd = init_proc(s) < 0 ? -1 : open_sysctl(s, key);"
    instead = 's->proc_fd = open("/proc", O_PATH); int fd = open_sysctl(s, key);'
    flags = "RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV"
    program = weak(("init_proc.c", edit, instead), ("init_proc.c", flags, "RESOLVE_BENEATH"))
    with pytest.raises(AssertionError):
        check_sysctl(program, root)
