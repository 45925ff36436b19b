"""One test, or more, for every hole that runc and crun have had and each hardening of theirs.

A test's name begins with its row: r05 is T-R05. ROWS is the whole list; the last test compares.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.model import protocol
from tests.e2e.steps import gate
from tests.oci import bed as beds
from tests.own_install import eventually
from tests.security.oci.killing import Ground, number_of
from tests.security.oci.rootless import attacker
from tests.security.oci.weakened import weakened
from tests.starter import test_init_mounts as assembly
from tests.starter.test_init_mounts import block_openat2, exchange, listing, program, root

__all__ = ["program", "root"]

# What befell others: CVE, and what the row is about.
ROWS = {
    "r00": "CVE-2014-9356, 9357, 6407, 6408, 2015-3627, 3629..3631: links under mount targets",
    "r01": "CVE-2016-3697: a number taken for a name of the image's passwd",
    "r02": "CVE-2016-9962: a process that joins is open to the container",
    "r03": "CVE-2019-5736: the runtime's program is overwritten",
    "r04": "CVE-2019-16884: /proc is no procfs when a label is written",
    "r05": "CVE-2019-19921: a race for /proc",
    "r06": "CVE-2021-30465: a mount target is swapped",
    "r07": "CVE-2021-43784: over-long values in the start of the first process",
    "r08": "CVE-2022-29162, 24769, 27649..27651: inheritable capabilities",
    "r09": "CVE-2023-25809: a rootless container writes to the host's cgroups",
    "r10": "CVE-2023-27561, 28642: /proc or /sys is a link, and masks miss",
    "r11": "CVE-2024-21626: the working directory is a leaked descriptor",
    "r12": "CVE-2024-45310: mount points are made on the host",
    "r13": "CVE-2025-31133: what masks is not /dev/null",
    "r14": "CVE-2025-52565: what is /dev/console is not the terminal",
    "r15": "CVE-2025-52881: writes meant for procfs go elsewhere",
    "r16": "CVE-2026-41579, 47766: /dev is a link",
    "r17": "hardening: names of containers",
    "r18": "hardening: numbers of processes that are others' by now",
    "c01": "CVE-2019-18837: links in the root's paths, for each kind of mount",
    "c02": "CVE-2025-24965: files that the runtime makes in the root",
    "c03": "CVE-2026-30892: exec -u 1 was read as 0",
    "c04": "hardening: paths of control groups that climb",
    "c05": "hardening: long id maps",
    "c06": "hardening: kernels without openat2",
}
LINKS = ["/{outside}", "{up}/{outside}", "/proc/self/root/{outside}", "/chain1"]
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bind": ("bind", "/etc", ("rbind", "ro")),
    "file": ("bind", "/etc/hostname", ("bind", "ro")),
    "tmpfs": ("tmpfs", "tmpfs", ("nosuid",)),
    "copy up": ("tmpfs", "tmpfs", ("tmpcopyup",)),
    "proc": ("proc", "proc", ()),
    "sysfs": ("sysfs", "sysfs", ("ro",)),
    "devpts": ("devpts", "devpts", ("newinstance",)),
    "mqueue": ("mqueue", "mqueue", ()),
    "cgroup": ("cgroup", "cgroup", ("ro",)),
}


class Outside:
    """Files of the host beside the bundle, which stay as they are, and so do the host's mounts."""

    def __init__(self, bed: beds.Bed) -> None:
        self.bed = bed
        self.path = bed.place / "outside"
        (self.path / "inner").mkdir(parents=True)
        for name in ("file", "null", "ptmx", "console", "passwd"):
            (self.path / name).write_text("of the host")
        self.path.chmod(0o777)
        self.before = self._state()

    def _state(self) -> tuple[Any, ...]:
        texts = {
            str(path): path.read_text()
            for path in self.path.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        own = [point for point in mounts if point.startswith(str(self.bed.place))]
        return listing(self.path), texts, own

    def assert_untouched(self) -> None:
        assert self._state() == self.before

    def link(self, form: str) -> str:
        """Return the text of a link that would lead here, were it followed outside the root."""
        up = "../" * 12
        return form.format(outside=str(self.path).lstrip("/"), up=up.rstrip("/"))


@pytest.fixture
def outside(bed: beds.Bed) -> Iterator[Outside]:
    made = Outside(bed)
    yield made
    made.assert_untouched()


def put_link(bundle: beds.Bundle, outside: Outside, place: str, form: str) -> None:
    """Make a place of the root a link to the host's directory, in one of four forms."""
    at = bundle.rootfs / place.lstrip("/")
    if at.is_dir() and not at.is_symlink():
        subprocess.run(["rm", "-rf", at], check=True)
    at.parent.mkdir(parents=True, exist_ok=True)
    at.unlink(missing_ok=True)
    at.symlink_to(outside.link(form))
    (bundle.rootfs / "chain1").symlink_to("chain2")
    (bundle.rootfs / "chain2").symlink_to(f"/{str(outside.path).lstrip('/')}")


def run_hostile(bed: beds.Bed, bundle: beds.Bundle, **how: Any) -> int:
    """Run a bundle that may be refused; it must not be refused without a word."""
    done = bed.run(bundle, **how)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or done.stderr.strip(), done
    return done.returncode


# ------------------------------------------------------------------------------------- B1: runc

PLACES = ["/etc/resolv.conf", "/etc/hosts", "/proc", "/sys", "/dev", "/tmp", "/home"]


@pytest.mark.parametrize("form", LINKS)
@pytest.mark.parametrize("place", PLACES)
def test_r00_links_under_mounts(bed, bundle, outside, place: str, form: str) -> None:
    put_link(bundle, outside, place, form)
    if place in ("/etc/resolv.conf", "/etc/hosts"):
        bundle.mount(place, "bind", "/etc/hostname", "bind", "ro")
    elif place in ("/tmp", "/home"):
        bundle.mount(f"{place}/made/deep", "bind", "/etc", "rbind", "ro")
    bundle.args("/bin/true")
    status = run_hostile(bed, bundle)
    if place in ("/proc", "/sys"):
        assert status != 0, "procfs and sysfs lie where their names say"


@pytest.mark.parametrize(("word", "uid"), [("1000", 1000), ("0", 0), ("77", 77)])
def test_r01_a_number_is_a_number(bed, bundle, word: str, uid: int) -> None:
    (bundle.rootfs / "etc/passwd").write_text("1000:x:0:0::/:/bin/sh\n77:x:0:0::/:/bin/sh\n")
    bundle.process["user"] = {"uid": uid, "gid": uid}
    assert bed.facts(bundle)["uid"][0] == uid
    container = bed.sleeping(bed.bundle())
    assert container.exec("id", "-u", flags=("--user", word)).stdout.strip() == word


def test_r02_the_first_process_is_closed_while_it_waits(bed, bundle) -> None:
    """The rest of the row is test_pry.py's; here the process that `create` leaves behind."""
    container = bed.create(bundle.args("/bin/true"))
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        opened = False
        for name in ("mem", "environ", "fd", "exe"):
            with suppress(PermissionError):
                os.stat(f"/proc/{container.pid}/{name}/.") if name == "fd" else os.close(
                    os.open(f"/proc/{container.pid}/{name}", os.O_RDONLY)
                )
                opened = True
        os._exit(opened)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.stat(f"/proc/{container.pid}/fd").st_uid == 0


def hashes(ground_or_bed_program: str) -> dict[str, str]:
    prefix = Path(ground_or_bed_program).resolve().parent.parent
    files = [*(prefix / "bin").iterdir(), *(prefix / "libexec/apptainer-py").iterdir()]
    files += [Path("/usr/bin/python3.11"), Path("/usr/bin/python3").resolve()]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }


def test_r03_the_program_cannot_be_written(bed, bundle) -> None:
    before = hashes(bed.runtime.program)
    (bundle.rootfs / "bin/attacker").hardlink_to(attacker())
    wanted = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]
    for name in ("bounding", "effective", "permitted"):
        bundle.process["capabilities"][name] = wanted
    container = bed.started(bundle.args("/bin/attacker", "write", "1"))
    container.lines("ready")
    for _ in range(30):
        assert container.exec("/bin/true").returncode == 0
    container.kill("TERM")
    assert container.wait() == 0
    assert [line for line in container.said().splitlines() if "wrote" in line] == []
    assert hashes(bed.runtime.program) == before


@pytest.mark.parametrize("interpreter", ["/proc/self/exe", "/proc/1/exe"])
def test_r03_a_script_whose_interpreter_is_the_runtime(bed, bundle, interpreter: str) -> None:
    before = hashes(bed.runtime.program)
    script = bundle.rootfs / "bin/entry"
    script.write_text(f"#!{interpreter}\n")
    script.chmod(0o755)
    done = bed.run(bundle.args("/bin/entry"))
    assert done.returncode != 0
    container = bed.sleeping(bed.bundle())
    assert container.exec("/bin/entry").returncode != 0
    assert hashes(bed.runtime.program) == before


def check_sealed(ground: Ground) -> None:
    with ground.scene("create") as scene, gate() as stop:
        wait = f"{number_of('OP_GO')}:{protocol.ROLE_INIT}:0:{stop.fd}"
        (words,) = scene.words()
        started = ground.start(*words, wait=wait, out=scene.out, inherited=[stop.fd])
        process = scene.home.adopt(started)
        eventually(lambda: stop.reached() or process.poll() is not None, "init waits")
        assert stop.reached(), scene.said()
        links = {}
        for pid in scene.home.alive():
            with suppress(OSError):
                links[pid] = os.readlink(f"/proc/{pid}/exe")
        inside = [pid for pid, link in links.items() if link.startswith("/memfd:apptainer-py-init")]
        assert inside, links
        fd = os.open(f"/proc/{inside[0]}/exe", os.O_RDONLY)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        os.close(fd)
        stop.open()
        scene.call("state", scene.name)
        eventually(lambda: process.poll() is not None, "create ends")
        scene.recover()
    wanted = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    assert seals & wanted == wanted


def test_r03_what_enters_is_a_sealed_copy(ground: Ground) -> None:
    check_sealed(ground)


@pytest.mark.long
def test_r03_weak_without_seals(ground: Ground) -> None:
    edit = ("caller.c", "return fcntl(copy, F_ADD_SEALS, seals) == 0 ? copy : -1;", "return copy;")
    with weakened(ground, "starter-steps", edit), pytest.raises(AssertionError):
        check_sealed(ground)


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_r04_nothing_but_procfs_lies_on_proc(bed, bundle, kind: str) -> None:
    fake = bed.place / "fake"
    (fake / "self/attr").mkdir(parents=True)
    (fake / "self/attr/exec").write_text("")
    options = ("rbind",) if kind == "bind" else ()
    bundle.replace_mount("/proc", kind, str(fake), *options)
    bed.refused(bundle)
    inner = bed.bundle().mount("/proc/self/attr", kind, str(fake), *options)
    bed.refused(inner)
    assert (fake / "self/attr/exec").read_text() == ""


def test_r04_a_label_that_cannot_be_set_ends_the_start(bed, bundle) -> None:
    if Path("/sys/kernel/security/apparmor").exists():
        bundle.process["apparmorProfile"] = "no-such-profile"
    else:
        bundle.process["apparmorProfile"] = "unconfined-of-none"
    bed.refused(bundle)


def test_r05_proc_that_is_a_link(bed, bundle) -> None:
    (bundle.rootfs / "bad-proc").mkdir()
    (bundle.rootfs / "proc").rmdir()
    (bundle.rootfs / "proc").symlink_to("/bad-proc")
    assert "must be mounted on ordinary directory" in bed.refused(bundle)


def test_r05_a_race_for_proc(program: Path, root: Path) -> None:
    assembly.check_proc_race(program, root, 60)


def race(
    bed: beds.Bed, bundle: beds.Bundle, one: Path, other: Path, rounds: int,
    check: Callable[[beds.Completed], None],
) -> int:  # fmt: skip
    """Start containers while two names of their root change places; returns how many ran."""
    good = 0
    with exchange(one, other):
        for _ in range(rounds):
            done = bed.run(bundle)
            assert "Traceback" not in done.stderr
            assert done.returncode == 0 or done.stderr.strip()
            if done.returncode == 0:
                good += 1
                check(done)
    return good


def all_inside(done: beds.Completed) -> None:
    """Assert that the container shows no file of the host's beside it."""
    assert "of the host" not in done.stdout, done.stdout


ROUNDS = 6
RACED = {
    "target": ("vol", "/vol/inner", "bind"),
    "file target": ("vol", "/vol/file", "file"),
    "made target": ("vol", "/vol/made/deep", "tmpfs"),
    "dev": ("dev", None, None),
    "sys": ("sys", None, None),
    "proc": ("proc", None, None),
    "tmp": ("tmp", "/tmp/x/y", "tmpfs"),
}


@pytest.mark.parametrize("form", ["{up}/{outside}", "/"])
@pytest.mark.parametrize("what", RACED)
def test_r06_a_directory_and_a_link_change_places(
    bed, bundle, outside, what: str, form: str
) -> None:
    """The whole of `run`; the same against starter-init alone, many times faster, follows."""
    name, target, kind = RACED[what]
    (bundle.rootfs / name).mkdir(exist_ok=True)
    (bundle.rootfs / f"{name}.link").symlink_to(outside.link(form))
    if target:
        mount, source, options = KINDS[kind]
        bundle.mount(target, mount, source, *options)
    bundle.linux["maskedPaths"] = ["/proc/kcore", "/sys/firmware", "/vol/file", "/tmp/x"]
    bundle.config["root"]["readonly"] = False
    bundle.shell("cat /vol/file /vol.link/file /tmp/file /dev/file 2>/dev/null; true")
    first, second = bundle.rootfs / name, bundle.rootfs / f"{name}.link"
    race(bed, bundle, first, second, ROUNDS, all_inside)
    outside.assert_untouched()


@pytest.mark.parametrize("link", ["../../outside", "{outside}", "..", "/proc/self/root"])
def test_r06_a_race_for_a_target(program: Path, root: Path, link: str) -> None:
    good, _ = assembly.check_race(program, root, link, 2)
    assert good > 50


@pytest.mark.parametrize("size", [4096, 65536, 70000])
@pytest.mark.parametrize("key", ["hostname", "domainname", "namespace", "profile", "cwd", "path"])
def test_r07_long_values(bed, bundle, key: str, size: int) -> None:
    text = "a" * size
    if key in ("hostname", "domainname"):
        bundle.config[key] = text
    elif key == "namespace":
        bundle.space("network", f"/proc/{text}")
    elif key == "profile":
        bundle.process["apparmorProfile"] = text
    elif key == "cwd":
        bundle.process["cwd"] = f"/{text}"
    else:
        bundle.linux["maskedPaths"] = [f"/{text}"]
    bed.refused(bundle.args("/bin/true"))


@pytest.mark.parametrize("text", ["a\0b", "a\nb", "", "\x7f"])
@pytest.mark.parametrize("key", ["namespace", "cwd", "args", "env", "hostname"])
def test_r07_odd_bytes(bed, bundle, key: str, text: str) -> None:
    if key == "namespace":
        bundle.space("network", f"/proc/self/ns/net{text}x")
    elif key == "cwd":
        bundle.process["cwd"] = f"/tmp/{text}x"
    elif key == "hostname":
        bundle.config["hostname"] = f"h{text}"
    elif key == "args":
        bundle.args("/bin/echo", f"<{text}>")
    else:
        bundle.process["env"] = ["PATH=/bin", f"A={text}"]
    if key in ("hostname", "cwd"):
        bundle.args("/bin/true")
    elif key == "env":
        bundle.args("/bin/env")
    done = bed.run(bundle)
    assert "Traceback" not in done.stderr
    if "\0" in text:
        assert done.returncode == 1, done
        assert done.stderr.strip()


def test_r08_no_inheritable_capabilities(bed, bundle) -> None:
    script = "grep -E 'Cap(Inh|Amb)' /proc/self/status"
    nothing = "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n"
    assert bed.output(bundle.shell(script)) == nothing
    container = bed.sleeping(bed.bundle())
    for flags in ((), ("--cap", "CAP_NET_RAW"), ("--user", "1000")):
        assert container.exec("sh", "-c", script, flags=flags).stdout == nothing, flags


def test_r08_those_of_the_caller_are_not_passed_on(bed, bundle) -> None:
    """As if started by an engine that has inheritable capabilities itself."""
    bundle.shell("grep CapInh /proc/self/status").write()
    argv = ["setpriv", "--inh-caps", "+net_raw,+sys_admin", *bed.argv("run", "--bundle")]
    done = subprocess.run(
        [*argv, bundle.path, bed.name()], capture_output=True, text=True, check=True
    )
    assert done.stdout == "CapInh:\t0000000000000000\n"


@pytest.mark.parametrize("place", ["/proc", "/sys"])
def test_r10_links_miss_no_mask(bed, bundle, outside, place: str) -> None:
    """Of runc's own suite: "/proc is a symlink", "mask paths [prohibit symlink /proc|/sys]"."""
    (bundle.rootfs / place[1:]).rmdir()
    (bundle.rootfs / place[1:]).symlink_to("/elsewhere")
    (bundle.rootfs / "elsewhere").mkdir()
    said = bed.refused(bundle)
    assert "must be mounted on ordinary directory" in said


def test_r10_a_masked_path_through_a_link(bed, bundle) -> None:
    (bundle.rootfs / "real").write_text("secret")
    (bundle.rootfs / "alias").symlink_to("real")
    bundle.linux["maskedPaths"].append("/alias")
    assert bed.output(bundle.shell("cat /alias /real")) == ""


DESCRIPTORS = [*range(3, 20), *range(1000, 1006)]
WAYS = ["/proc/self/fd/{n}", "/proc/self/fd/{n}/../../..", "/w{n}", "/proc/thread-self/fd/{n}"]


def inside_only(done: beds.Completed) -> bool:
    if done.returncode != 0:
        return True
    return done.stdout.startswith("/") and "unreachable" not in done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_r11_the_working_directory_is_inside(bed, bundle, outside, way: str) -> None:
    for number in DESCRIPTORS:
        (bundle.rootfs / f"w{number}").symlink_to(f"/proc/self/fd/{number}")
    inner = bed.bundle()
    for number in DESCRIPTORS:
        (inner.rootfs / f"w{number}").symlink_to(f"/proc/self/fd/{number}")
    container = bed.sleeping(inner)
    script = "readlink /proc/self/cwd; ls ../../../../../../../.. | sort | head -3; pwd -P"
    names = sorted(path.name for path in bundle.rootfs.iterdir())[:3]
    handle = os.open(bed.place, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(handle, True)
    for number in DESCRIPTORS:
        cwd = way.format(n=number)
        bundle.process["cwd"] = cwd
        flags = ("--cwd", cwd)
        runs = [container.exec("sh", "-c", script, flags=flags, pass_fds=[handle])]
        if number in (7, 8, 1000):
            runs.append(bed.run(bundle.shell(script), pass_fds=[handle]))
        for done in runs:
            assert inside_only(done), done
            if done.returncode == 0:
                shown = done.stdout.splitlines()
                assert shown[1 : 1 + len(names)] == names, done
    os.close(handle)


def test_r11_no_descriptor_is_passed_on(bed, bundle) -> None:
    handle = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(handle, True)
    script = "ls -l /proc/self/fd | sed -n 's/.* \\([0-9]*\\) -> .*/\\1/p'"
    shown = bed.output(bundle.shell(script), pass_fds=[handle]).split()
    assert shown == ["0", "1", "2"]
    container = bed.sleeping(bed.bundle())
    again = container.exec("sh", "-c", script, pass_fds=[handle]).stdout.split()
    assert again == ["0", "1", "2"]
    os.close(handle)


@pytest.mark.parametrize("kind", ["bind", "file", "tmpfs"])
def test_r12_mount_points_are_made_inside(bed, bundle, outside, kind: str) -> None:
    mount, source, options = KINDS[kind]
    for number in range(6):
        bundle.mount(f"/vol/dir/made{number}/deep", mount, source, *options)
    (bundle.rootfs / "vol/dir").mkdir(parents=True)
    (bundle.rootfs / "vol/link").symlink_to(outside.link("{up}/{outside}"))
    bundle.args("/bin/true")
    race(bed, bundle, bundle.rootfs / "vol/dir", bundle.rootfs / "vol/link", ROUNDS, all_inside)
    outside.assert_untouched()


NULLS: dict[str, Callable[[Path, Outside], None]] = {
    "core_pattern": lambda at, _: at.symlink_to("/proc/sys/kernel/core_pattern"),
    "sysrq": lambda at, _: at.symlink_to("/proc/sysrq-trigger"),
    "outside": lambda at, out: at.symlink_to(out.link("/{outside}") + "/null"),
    "regular": lambda at, _: at.write_text("not null"),
    "fifo": lambda at, _: os.mkfifo(at),
    "directory": lambda at, _: at.mkdir(),
    "zero": lambda at, _: os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
}


@pytest.mark.parametrize("what", NULLS)
def test_r13_what_masks_is_the_null_device(bed, bundle, outside, what: str) -> None:
    """The image's own /dev, without a mount of the configuration's on it."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    for target in ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        bundle.without_mount(target)
    NULLS[what](bundle.rootfs / "dev/null", outside)
    (bundle.rootfs / "secret").write_text("secret")
    bundle.linux["maskedPaths"] = ["/secret"]
    bundle.shell("stat -c '%t %T' /secret; cat /secret; echo overwritten >/secret")
    done = bed.run(bundle)
    assert done.returncode != 0 or done.stdout == "1 3\n", done
    assert "secret" not in done.stdout
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern


def test_r13_a_race_for_the_null_device(program: Path, root: Path) -> None:
    assembly.test_a_race_for_what_masks(program, root)


CONSOLES: dict[str, Callable[[Path, Outside], None]] = {
    "console link": lambda dev, out: (dev / "console").symlink_to(out.link("/{outside}/console")),
    "console up": lambda dev, out: (dev / "console").symlink_to(out.link("{up}/{outside}/console")),
    "console directory": lambda dev, _: (dev / "console").mkdir(),
    "console fifo": lambda dev, _: os.mkfifo(dev / "console"),
    "ptmx link": lambda dev, out: (dev / "ptmx").symlink_to(out.link("/{outside}/ptmx")),
    "ptmx file": lambda dev, _: (dev / "ptmx").write_text(""),
    "ptmx device": lambda dev, _: os.mknod(dev / "ptmx", stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "pts link": lambda dev, out: (dev / "pts").symlink_to(out.link("/{outside}")),
}


@pytest.mark.parametrize("what", CONSOLES)
def test_r14_the_console_is_the_terminal(bed, bundle, outside, what: str) -> None:
    for target in ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        bundle.without_mount(target)
    if what != "pts link":
        bundle.mount("/dev/pts", "devpts", "devpts", "newinstance", "ptmxmode=0666")
    CONSOLES[what](bundle.rootfs / "dev", outside)
    bundle.process["terminal"] = True
    bundle.shell("stat -c %t /dev/console").write()
    listener, receive = beds.pseudo_terminal_from(bed.place / "c")
    name = bed.name()
    words = ("run", "--detach", "--console-socket", bed.place / "c", "--bundle", bundle.path, name)
    with listener:
        done = bed.call(*words)
        if done.returncode != 0:
            assert done.stderr.strip()
            return
        terminal = receive()
    said = b""
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            said += piece
    os.close(terminal)
    assert said.strip() == b"88", said  # 136 in hexadecimal: the other end of a pty


def test_r15_a_sysctl_is_the_kernels(program: Path, root: Path) -> None:
    assembly.check_sysctl(program, root)


@pytest.mark.parametrize("form", ["/{outside}", "/proc", "/sys"])
def test_r15_sysctls_do_not_follow_the_image(bed, bundle, outside, form: str) -> None:
    """/proc is the image's: nothing is mounted there."""
    bundle.without_mount("/proc")
    (bundle.rootfs / "proc/sys/net/ipv4").mkdir(parents=True)
    (bundle.rootfs / "proc/sys/net/ipv4/ip_forward").symlink_to(outside.link(form) + "/file")
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    bundle.linux["maskedPaths"] = bundle.linux["readonlyPaths"] = []
    assert run_hostile(bed, bundle.args("/bin/true")) == 0


@pytest.mark.parametrize("key", ["net.ipv4.../../kernel/core_pattern", "net/../kernel/hostname"])
def test_r15_a_sysctl_that_climbs(bed, bundle, key: str) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    bundle.linux["sysctl"] = {key: "x"}
    bed.refused(bundle)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern


@pytest.mark.parametrize("form", LINKS)
def test_r16_a_device_directory_that_is_a_link(bed, bundle, outside, form: str) -> None:
    for target in ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        bundle.without_mount(target)
    put_link(bundle, outside, "/dev", form)
    run_hostile(bed, bundle.args("/bin/true"))


NAMES = ["..", ".", "a/b", "/a", "a\n", "a b", "", "ünï", "a" * 300, "%s", "a\\b", "a;b"]


@pytest.mark.parametrize("name", NAMES)
def test_r17_names_that_are_none(bed, bundle, name: str) -> None:
    bundle.write()
    before = sorted(os.listdir(bed.place))
    for words in (
        ("create", "--bundle", bundle.path, name),
        ("run", "--bundle", bundle.path, name),
        ("state", name),
        ("delete", name),
        ("kill", name, "KILL"),
        ("start", name),
        ("pause", name),
        ("exec", name, "true"),
    ):
        done = bed.call(*words)
        assert done.returncode in (1, 255), (words, done)
        assert done.stderr.strip()
        assert "Traceback" not in done.stderr
    assert [n for n in os.listdir(bed.place) if n not in (*before, "state")] == []
    assert not bed.root.exists() or os.listdir(bed.root) == []


@pytest.mark.parametrize("name", ["-x", "--", "--force"])
def test_r17_names_that_look_like_flags(bed, bundle, name: str) -> None:
    """They are names as good as others, and behind "--" nothing takes them for flags."""
    bundle.args("sleep", "600").write()
    with open(bundle.path / "out", "w+") as out:
        words = bed.argv("create", "--bundle", bundle.path, "--", name)
        made = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=60)
        out.seek(0)
        assert made.returncode == 0, out.read()
    bed.good("start", "--", name)
    assert json.loads(bed.good("state", "--", name).stdout)["id"] == name
    bed.good("delete", "--force", "--", name)
    assert os.listdir(bed.root) == []


def test_r18_a_number_that_is_anothers(bed, bundle) -> None:
    """More of the row is test_state.py's; here a container that has really ended."""
    container = bed.sleeping(bundle)
    container.kill()
    container.wait()
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        record = bed.root / container.id / "record"
        old, new = (number.to_bytes(4, "little") for number in (container.pid, bystander.pid))
        assert record.read_bytes().count(old) >= 1
        record.write_bytes(record.read_bytes().replace(old, new, 1))
        assert json.loads(bed.good("state", container.id).stdout)["status"] == "stopped"
        assert "not running" in bed.bad("kill", container.id, "KILL")
        assert container.exec("true").returncode == 255
        bed.good("delete", "--force", container.id)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


# ------------------------------------------------------------------------------------- B2: crun


@pytest.mark.parametrize("form", LINKS[1:3])
@pytest.mark.parametrize("kind", KINDS)
def test_c01_every_kind_of_mount(bed, bundle, outside, kind: str, form: str) -> None:
    put_link(bundle, outside, "/trap", form)
    mount, source, options = KINDS[kind]
    bundle.mount("/trap", mount, source, *options)
    inner = "file" if kind == "file" else "inner"
    bundle.mount(f"/trap/{inner}", mount, source, *options)
    run_hostile(bed, bundle.args("/bin/true"))


MADE = ["/dev/null", "/dev/ptmx", "/dev/fd", "/dev/stdin", "/dev/core", "/dev/console", "/made"]
FORMS: dict[str, Callable[[Path, Outside], None]] = {
    "link": lambda at, out: at.symlink_to(out.link("/{outside}/file")),
    "link up": lambda at, out: at.symlink_to(out.link("{up}/{outside}/file")),
    "link to nothing": lambda at, out: at.symlink_to(out.link("/{outside}/new")),
    "hard link": lambda at, out: os.link(out.path / "file", at),
    "directory": lambda at, _: at.mkdir(),
    "fifo": lambda at, _: os.mkfifo(at),
    "device": lambda at, _: os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", MADE)
def test_c02_what_is_made_in_the_root(bed, bundle, outside, place: str, form: str) -> None:
    """The image has something else at each place where the runtime makes a file or directory."""
    for target in ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        bundle.without_mount(target)
    FORMS[form](bundle.rootfs / place[1:], outside)
    bundle.process["cwd"] = "/made/deep"
    (outside.path / "file").chmod(0o666)
    outside.before = outside._state()
    run_hostile(bed, bundle.args("/bin/true"))


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "/etc/group", "/etc/resolv.conf", "/etc/mtab", "/.env"]
)
@pytest.mark.parametrize("form", ["link", "link up", "hard link", "fifo"])
def test_c02_nothing_else_is_written(bed, bundle, outside, target: str, form: str) -> None:
    at = bundle.rootfs / target[1:]
    at.unlink(missing_ok=True)
    FORMS[form](at, outside)
    outside.before = outside._state()
    assert run_hostile(bed, bundle.args("/bin/true")) == 0


USERS = {
    "1": (1, 0), "1:2": (1, 2), "01": (1, 0), "0:7": (0, 7), "1000": (1000, 0),
    "1:": None, ":1": None, "name": None, "worker": None, "worker:extra": None, "+1": None,
    "1x": None, "-1": None, "0x0": None, " 1": None, "1 ": None, "1:2:3": None,
    "4294967295": None, "4294967296": None, "18446744073709551616": None, "1.0": None, "١": None,
}  # fmt: skip


def test_c03_users_of_exec(bed, bundle) -> None:
    container = bed.sleeping(bundle)
    for word, wanted in USERS.items():
        done = container.exec("sh", "-c", "id -u; id -g", flags=("--user", word))
        if wanted is None:
            assert done.returncode != 0, (word, done)
            assert done.stderr.strip()
        else:
            assert done.returncode == 0, (word, done)
            assert tuple(map(int, done.stdout.split())) == wanted, word
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("uid", [-1, 4294967295, 4294967296, 1 << 64, 1.5, "1", None, True, [0]])
@pytest.mark.parametrize("key", ["uid", "gid"])
def test_c03_users_of_a_configuration(bed, bundle, key: str, uid: object) -> None:
    bundle.process["user"] = {"uid": 5, "gid": 5, key: uid}
    if uid is None:  # as runc: the same as nothing
        facts = bed.facts(bundle)
        assert facts["uid" if key == "gid" else "gid"][0] == 5
    else:
        bed.refused(bundle.args("/bin/true"))


@pytest.mark.parametrize("path", ["../../{name}", "/../../{name}", "{name}/../../../x{name}"])
def test_c04_paths_of_groups_do_not_climb(bed, bundle, path: str) -> None:
    name = f"apytest-{os.getpid()}-climber"
    bundle.linux["cgroupsPath"] = path.format(name=name)
    before = set(os.listdir("/sys/fs")) | set(os.listdir("/sys"))
    container = bed.sleeping(bundle)
    for line in Path(f"/proc/{container.pid}/cgroup").read_text().splitlines():
        group = line.split(":", 2)[2]
        assert ".." not in group
    assert set(os.listdir("/sys/fs")) | set(os.listdir("/sys")) == before
    container.finish()
    assert beds.cgroups_named(name) == []


@pytest.mark.parametrize("path", ["/", "/.", "//", "/.."])
def test_c04_the_root_group_is_nobodys(bed, bundle, path: str) -> None:
    bundle.linux["cgroupsPath"] = path
    bed.refused(bundle)


@pytest.mark.parametrize("path", ["../x", "/../../x", "a/../../../x", "/"])
def test_c04_groups_below_do_not_climb(bed, bundle, path: str) -> None:
    container = bed.sleeping(bundle)
    groups = Path(f"/proc/{container.pid}/cgroup").read_text()
    own = {line.split(":", 2)[2] for line in groups.splitlines()}
    done = container.exec("cat", "/proc/self/cgroup", flags=("--cgroup", path))
    if done.returncode == 0:
        found = {line.split(":", 2)[2] for line in done.stdout.splitlines()}
        assert all(any(f"{one}/".startswith(base) for base in own) for one in found)
    else:
        assert "sub cgroup path" in done.stderr


def test_c05_the_longest_id_map(bed, bundle) -> None:
    # The kernel takes 340 lines, and less than a page of text.
    lines = [{"containerID": n, "hostID": 1000 + n, "size": 1} for n in range(340)]
    bundle.user_space(1000)
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = lines
    shown = bed.output(bundle.shell("wc -l </proc/self/uid_map; tail -n 1 /proc/self/gid_map"))
    assert shown.split() == ["340", "339", "1339", "1"]


@pytest.mark.parametrize("count", [341, 1000, 5000])
def test_c05_an_id_map_that_is_too_long(bed, bundle, count: int) -> None:
    lines = [{"containerID": n, "hostID": 100000 + n, "size": 1} for n in range(count)]
    bundle.user_space()
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = lines
    bed.refused(bundle)


@pytest.mark.parametrize("form", LINKS)
@pytest.mark.parametrize("place", ["/trap", "/dev", "/tmp"])
def test_c06_without_openat2(bed, bundle, outside, place: str, form: str) -> None:
    put_link(bundle, outside, place, form)
    bundle.mount(f"{place}/made/deep", "tmpfs", "tmpfs")
    bundle.mount("/trap", "bind", "/etc", "rbind", "ro")
    if place == "/dev":
        for target in ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
            bundle.without_mount(target)
    run_hostile(bed, bundle.args("/bin/true"), preexec_fn=block_openat2)


def test_c06_an_ordinary_container_without_openat2(bed, bundle) -> None:
    assert bed.output(bundle.args("/bin/echo", "ran"), preexec_fn=block_openat2) == "ran\n"


@pytest.mark.parametrize("link", ["../outside", "/proc/self/root"])
def test_c06_links_without_openat2(program: Path, root: Path, link: str) -> None:
    assembly.test_hostile_links_without_openat2(program, root, link)


# ---------------------------------------------------------------------- the tests are the whole


def test_every_row_has_its_test() -> None:
    here = Path(__file__).parent
    found = set()
    for path in here.glob("test_*.py"):
        found |= set(re.findall(r"^def test_([rc]\d\d)_", path.read_text(), re.MULTILINE))
    assert found == set(ROWS)
