"""starter-init from end to end: a master made of Python, a root of busybox, no other part of us."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from apptainer_py.model.hook_frame import hook_frames
from apptainer_py.model.oci_plan import Hook
from apptainer_py.model.process_frame import failure_text, process_frame
from tests.starter import init_master
from tests.starter.init_master import (
    NEWCGROUP,
    NEWIPC,
    NEWNET,
    NEWNS,
    NEWPID,
    NEWTIME,
    NEWUSER,
    NEWUTS,
    Ended,
    Master,
    RowRefused,
    sealed,
    spec,
)

ORDINARY = 65534


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield init_master.build(Path(folder))


@pytest.fixture(scope="module")
def root(require_root: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield init_master.make_root(Path(folder))


@pytest.fixture
def master(program: Path, root: Path):
    with Master(program) as made:
        yield made


def test_a_program_runs_as_pid_1(master: Master, root: Path) -> None:
    master.create(root)
    status, said = master.run(spec("sh", "-c", "echo $$; pwd; ls /; exit 7"))
    assert (status, said.split()) == (7, "1 / bin dev etc proc sys tmp".split())


def test_nothing_of_ours_is_open_in_the_payload(master: Master, root: Path) -> None:
    master.create(root)
    assert master.run(spec("ls", "/proc/self/fd")) == (0, "0\n1\n2\n3\n")  # 3: ls's own


def test_exe_is_no_file_of_the_host(master: Master, root: Path) -> None:
    master.create(root)
    assert master.run(spec("readlink", "/proc/1/exe")) == (0, "/bin/busybox\n")


def status_lines(said: str) -> dict[str, str]:
    """Return /proc/self/status as a mapping."""
    return dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)


def refused(call: Callable[[], object]) -> RowRefused:
    with pytest.raises(RowRefused) as caught:
        call()
    return caught.value


def go_refused(master: Master) -> RowRefused:
    return refused(master.go)


# What the payload is


def test_ids_groups_and_capabilities_are_exact(master: Master, root: Path) -> None:
    master.create(root)
    net_raw, chown = 1 << 13, 1 << 0
    wanted = spec(
        *("cat", "/proc/self/status"),
        uid=1000,
        gid=1001,
        groups=(5, 7),
        umask=0o27,
        capabilities=(net_raw, net_raw | chown, net_raw, net_raw | chown, net_raw),
        no_new_privileges=True,
    )
    code, said = master.run(wanted)
    found = status_lines(said)
    assert code == 0
    assert found["Uid"].split() == ["1000"] * 4
    assert found["Gid"].split() == ["1001"] * 4
    assert found["Groups"].split() == ["5", "7"]
    assert found["Umask"] == "0027"
    assert found["NoNewPrivs"] == "1"
    # execve of a user's program: permitted and effective are what is ambient.
    assert {
        name: int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    } == {
        "CapInh": net_raw,
        "CapPrm": net_raw,
        "CapEff": net_raw,
        "CapBnd": net_raw | chown,
        "CapAmb": net_raw,
    }


def test_inheritable_is_empty_unless_asked(master: Master, root: Path) -> None:
    """CVE-2022-29162: a program with file capabilities would gain what is inheritable."""
    master.create(root)
    caps = 0xA80425FB
    _, said = master.run(spec("cat", "/proc/self/status", capabilities=(caps, caps, 0, caps, 0)))
    found = status_lines(said)
    assert (int(found["CapInh"], 16), int(found["CapAmb"], 16)) == (0, 0)
    assert (int(found["CapEff"], 16), int(found["CapBnd"], 16)) == (caps, caps)


def test_scheduling_priority_and_personality(master: Master, root: Path) -> None:
    master.create(root)
    wanted = spec(
        *("sh", "-c", "cat /proc/self/stat /proc/self/personality"),
        scheduler=(3, 5, 0, 0, 0, 0, 0),  # SCHED_BATCH
        io_priority=2 << 13 | 6,
        personality=0x0008,
        memory_policy=(0, 0),
    )
    code, said = master.run(wanted)
    fields = said.split()
    assert (code, fields[18], fields[40], fields[-1]) == (0, "5", "3", "00000008")


def test_a_bad_scheduler_is_named(master: Master, root: Path) -> None:
    master.create(root)
    failure = refused(lambda: master.process(spec("true", scheduler=(1, 0, 0, 0, 0, 0, 0))))
    assert (failure.value, failure.error) == (protocol.GOSTEP_SCHEDULER, errno.EINVAL)


def test_argv_and_environment_arrive_as_they_are(master: Master, root: Path) -> None:
    master.create(root)
    wanted = spec("sh", "-c", 'printf "%s|" "$@"; env', "", "a b", "é", "x\ny")
    wanted = wanted.replace(environment=(b"PATH=/bin", b"ODD=\xff\xfe", b"EMPTY="))
    master.process(wanted)
    master.go()
    said = b"".join(master._chunks())
    assert said.startswith("a b|é|x\ny|".encode())
    assert set(said.split(b"|")[-1].split(b"\n")) >= {b"ODD=\xff\xfe", b"EMPTY="}
    assert master.wait() == 0


def test_megabytes_of_arguments(master: Master, root: Path) -> None:
    master.create(root)
    words = ["y" * 100_000] * 15
    assert master.run(spec("sh", "-c", "echo $#", "", *words)) == (0, "15\n")


def test_program_lookup_says_what_go_says(program: Path, root: Path) -> None:
    (root / "etc/plain").write_text("x")
    (root / "etc/broken").write_text("x")
    (root / "etc/broken").chmod(0o755)
    cases = {
        "nosuch": (
            protocol.GOSTEP_NOT_FOUND,
            errno.ENOENT,
            'exec: "nosuch": executable file not found in $PATH',
        ),
        "/etc/nosuch": (
            protocol.GOSTEP_STAT,
            errno.ENOENT,
            'exec: "/etc/nosuch": stat /etc/nosuch: no such file or directory',
        ),
        "/etc/plain": (
            protocol.GOSTEP_ACCESS,
            errno.EACCES,
            'exec: "/etc/plain": permission denied',
        ),
        "/bin": (protocol.GOSTEP_ACCESS, errno.EISDIR, 'exec: "/bin": is a directory'),
    }
    for name, (step, error, text) in cases.items():
        with Master(program) as master:
            master.create(root)
            master.process(spec(name))
            failure = go_refused(master)
            assert (failure.value, failure.error) == (step, error)
            assert failure_text(spec(name), step, os.strerror(error).lower()) == text
    with Master(program) as master:
        master.create(root)
        assert master.run(spec("/etc/broken")) == (255, "exec /etc/broken: exec format error\n")


def test_a_relative_path_entry_is_refused(master: Master, root: Path) -> None:
    master.create(root)
    master.process(spec("busybox", environment=(b"PATH=bin",)))
    assert go_refused(master).value == protocol.GOSTEP_RELATIVE


# The working directory


def test_cwd_that_only_the_payload_may_enter(master: Master, root: Path) -> None:
    closed = root / "tmp/closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o700)
    os.chown(closed, 1000, 1000)
    master.create(root)
    assert master.run(spec("pwd", cwd=b"/tmp/closed", uid=1000, gid=1000)) == (0, "/tmp/closed\n")


def test_a_missing_cwd_is_named(master: Master, root: Path) -> None:
    master.create(root)
    master.process(spec("pwd", cwd=b"/nosuch"))
    failure = go_refused(master)
    assert (failure.value, failure.error) == (protocol.GOSTEP_CHDIR, errno.ENOENT)


def test_no_descriptor_leads_out_by_the_working_directory(program: Path, root: Path) -> None:
    """CVE-2024-21626: a WORKDIR of /proc/self/fd/N, for a descriptor that somebody left open."""
    for number in range(16):
        with Master(program) as master:
            master.create(root)
            master.process(spec("pwd", cwd=b"/proc/self/fd/%d" % number))
            assert go_refused(master).value in {protocol.GOSTEP_CHDIR, protocol.GOSTEP_CWD_OUTSIDE}


def test_a_kept_directory_of_the_host_is_found_out(program: Path, root: Path) -> None:
    host = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for cwd in (b"/proc/self/fd/3", b"/proc/self/fd/3/..", b"/proc/self/fd/3/../.."):
            with Master(program, keep=(host,)) as master:
                master.create(root)
                master.process(spec("pwd", cwd=cwd, preserve_fds=1))
                assert go_refused(master).value == protocol.GOSTEP_CWD_OUTSIDE
    finally:
        os.close(host)


# Descriptors


def test_kept_descriptors_and_no_others(program: Path, root: Path) -> None:
    read, write = os.pipe()
    with Master(program, keep=(write, write)) as master:
        os.close(write)
        master.create(root)
        wanted = spec("sh", "-c", "echo kept >&3; ls /proc/self/fd", preserve_fds=1)
        assert master.run(wanted) == (0, "0\n1\n2\n3\n4\n")  # 4: ls's own
        assert os.read(read, 100) == b"kept\n"
        assert os.read(read, 100) == b""
    os.close(read)


def test_ours_are_never_among_those_that_are_kept(master: Master, root: Path) -> None:
    master.create(root)
    master.process(spec("true", preserve_fds=1000))
    assert go_refused(master).value == protocol.GOSTEP_DESCRIPTORS


# Waiting for start


@pytest.fixture
def fifo(tmp_path: Path):
    path = tmp_path / "exec.fifo"
    os.mkfifo(path)
    path.chmod(0o622)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    yield path, fd
    os.close(fd)


def test_the_payload_waits_at_its_fifo(master: Master, root: Path, fifo) -> None:
    path, fd = fifo
    master.create(root)
    master.process(spec("echo", "started", uid=1000, gid=1000))
    master.go(fd)
    # Its program is ours still, a sealed copy in the product; all our descriptors are gone.
    held = {os.readlink(entry) for entry in Path(f"/proc/{master.pid}/fd").iterdir()}
    assert not [name for name in held if name.startswith(("socket:", "/proc", "anon_inode"))]
    assert os.waitpid(master.pid, os.WNOHANG) == (0, 0)
    with path.open("rb") as reader:
        assert reader.read() == b"0"
    assert (master.said(), master.wait()) == ("started\n", 0)


def test_a_fifo_that_the_payload_may_not_open_is_named(master: Master, root: Path, fifo) -> None:
    path, fd = fifo
    path.chmod(0o600)
    master.create(root)
    master.process(spec("true", uid=1000, gid=1000, capabilities=(0, 0, 0, 0, 0)))
    master.send(protocol.OP_GO, fd=fd)
    failure = refused(master.receive)
    assert (failure.value, failure.error) == (protocol.GOSTEP_FIFO, errno.EACCES)


def test_a_start_that_dies_half_way_is_followed_by_another(
    master: Master, root: Path, fifo
) -> None:
    path, fd = fifo
    master.create(root)
    master.process(spec("echo", "started"))
    master.go(fd)
    for _ in range(50):
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # opens, and is gone
    stays = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert (master.said(), master.wait()) == ("started\n", 0)
    os.close(stays)


def test_the_waiting_init_cannot_be_read_by_others(master: Master, root: Path, fifo) -> None:
    """CVE-2016-9962: who is in the container already must not reach what a newcomer holds."""
    _, fd = fifo
    master.create(root)
    master.process(spec("true", uid=1000, gid=1000))
    master.go(fd)
    assert os.stat(f"/proc/{master.pid}/fd").st_uid == 0
    assert os.stat(f"/proc/{master.pid}/mem").st_uid == 0


def test_exec_failure_after_the_start_is_on_stderr(master: Master, root: Path, fifo) -> None:
    path, fd = fifo
    (root / "etc/broken").write_text("x")
    (root / "etc/broken").chmod(0o755)
    master.create(root)
    master.process(spec("/etc/broken"))
    master.go(fd)
    path.read_bytes()
    assert (master.said(), master.wait()) == ("exec /etc/broken: exec format error\n", 255)


# Filters


def filter_of(*errno_of: tuple[int, int]) -> bytes:
    """Return a program that fails these system calls (x86-64 numbers) with these errors."""
    steps = [struct.pack("=HBBI", 0x20, 0, 0, 0)]  # load the number
    for number, error in errno_of:
        steps.append(struct.pack("=HBBI", 0x15, 0, 1, number))
        steps.append(struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | error))
    return b"".join([*steps, struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)])


MKDIR, UNAME = 83, 63


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_holds_for_the_payload(
    master: Master, root: Path, no_new_privileges: bool
) -> None:
    master.create(root)
    wanted = spec(
        *("sh", "-c", "grep Seccomp: /proc/self/status; touch /tmp/a && mkdir /tmp/d"),
        uid=1000,
        gid=1000,
        capabilities=(0, 0, 0, 0, 0),
        no_new_privileges=no_new_privileges,
    )
    (root / "tmp").chmod(0o1777)
    code, said = master.run(wanted, program=filter_of((MKDIR, errno.EDOM)))
    assert (code, said.split("\n")[0].split()) == (1, ["Seccomp:", "2"])
    assert "Numerical argument out of domain" in said


def test_a_program_that_the_kernel_refuses_is_named(master: Master, root: Path) -> None:
    master.create(root)
    master.process(spec("true"), program=struct.pack("=HBBI", 0x20, 0, 0, 4096))
    failure = go_refused(master)
    assert (failure.value, failure.error) == (protocol.GOSTEP_FILTER, errno.EINVAL)


def test_the_listener_is_handed_over_before_the_payload_starts(master: Master, root: Path) -> None:
    master.create(root)
    notify = b"".join(
        [
            struct.pack("=HBBI", 0x20, 0, 0, 0),
            struct.pack("=HBBI", 0x15, 0, 1, UNAME),
            struct.pack("=HBBI", 0x06, 0, 0, 0x7FC00000),
            struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000),
        ]
    )
    master.process(spec("ls", "/proc/self/fd"), program=notify, program_flags=8)
    master.send(protocol.OP_GO)
    op, number, _ = master.receive()
    pidfd = os.pidfd_open(master.pid)
    libc = ctypes.CDLL(None, use_errno=True)
    listener = libc.syscall(438, pidfd, number, 0)  # pidfd_getfd
    assert op == protocol.OP_GO
    assert listener >= 0
    assert os.readlink(f"/proc/self/fd/{listener}") == "anon_inode:seccomp notify"
    master.socket.send(b"k")
    with pytest.raises(Ended):
        master.receive()
    assert (master.said(), master.wait()) == ("0\n1\n2\n3\n", 0)
    os.close(listener)
    os.close(pidfd)


# The terminal


def test_the_terminal_is_the_payloads(master: Master, root: Path) -> None:
    master.create(root)
    _, terminal = master.row(protocol.OP_CONSOLE, numbers=(33, 77), flags=1)
    script = "tty; stty size; stat -c %t /dev/console; readlink /proc/1/fd/0; cat /proc/1/stat"
    master.process(spec("sh", "-c", script, uid=1000, gid=5))
    master.go()
    said = b""
    try:
        while chunk := os.read(terminal, 4096):
            said += chunk
    except OSError as error:
        assert error.errno == errno.EIO
    lines = said.decode().split("\r\n")
    assert lines[:4] == ["/dev/pts/0", "33 77", "88", "/dev/pts/0"]
    assert int(lines[4].split()[6]) != 0  # tty_nr
    assert master.wait() == 0
    os.close(terminal)


@pytest.mark.parametrize("trap", ["link", "regular"])
def test_what_the_container_calls_ptmx_is_judged(master: Master, root: Path, trap: str) -> None:
    """CVE-2025-52565: not what it is called counts, but that it is devpts' own."""
    master.spaces()
    master.mapped()
    master.row(protocol.OP_PROPAGATION)
    os.close(master.row(protocol.OP_ROOT_BUNDLE, str(root), flags=1)[1])
    master.mount("tmpfs", "/dev")
    if trap == "link":
        master.row(protocol.OP_LINK, "/proc/self/mem", "/dev/ptmx")
    else:
        master.row(protocol.OP_MKNOD, "/dev/ptmx", numbers=(0o020666, 1 << 32 | 5, 0, 0))
    master.row(protocol.OP_ENTER, numbers=(0, 0))
    failure = refused(lambda: master.row(protocol.OP_CONSOLE, numbers=(0, 0), flags=1))
    assert failure.error in {errno.ENODEV, errno.ENOENT, errno.ENOTDIR}


def test_a_console_that_is_a_link_is_refused(master: Master, root: Path) -> None:
    master.spaces()
    master.mapped()
    master.row(protocol.OP_PROPAGATION)
    os.close(master.row(protocol.OP_ROOT_BUNDLE, str(root), flags=1)[1])
    master.mount("tmpfs", "/dev")
    master.mount("devpts", "/dev/pts", [("newinstance", None), ("ptmxmode", "0666")])
    master.row(protocol.OP_LINK, "../etc/console", "/dev/console")
    master.row(protocol.OP_ENTER, numbers=(0, 0))
    failure = refused(lambda: master.row(protocol.OP_CONSOLE, numbers=(0, 0), flags=1))
    assert failure.error == errno.ELOOP
    assert not (root / "etc/console").exists()


# Namespaces


def test_every_namespace_is_new(master: Master, root: Path) -> None:
    flags = NEWNS | NEWPID | NEWUTS | NEWIPC | NEWNET | NEWCGROUP | NEWTIME
    master.spaces(flags, (86400, 0, 0, 5))
    master.mapped(8 | 16)
    master.assemble(root)
    kinds = "mnt pid uts ipc net cgroup time".split()
    script = "; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds)
    code, said = master.run(
        spec("sh", "-c", f"{script}; cat /proc/net/dev /proc/self/timens_offsets")
    )
    lines = said.splitlines()
    for kind, line in zip(kinds, lines, strict=False):
        assert line != os.readlink(f"/proc/self/ns/{kind}")
    assert code == 0
    assert [line.split() for line in lines[-2:]] == [
        ["monotonic", "86400", "0"],
        ["boottime", "0", "5"],
    ]


def maps(pid: int, uid: str, gid: str) -> None:
    for name, text in (("uid_map", uid), ("gid_map", gid)):
        Path(f"/proc/{pid}/{name}").write_text(text)


def test_a_user_namespace_with_clocks_of_its_own(master: Master, root: Path) -> None:
    flags = NEWUSER | NEWNS | NEWPID | NEWTIME | NEWCGROUP | NEWNET
    master.spaces(flags, (0, 0, 500, 0))
    maps(master.pid, "0 100000 65536", "0 100000 65536")
    master.mapped(1 | 2 | 8 | 16)
    master.assemble(root)
    script = "id; cat /proc/self/timens_offsets /proc/self/uid_map"
    code, said = master.run(
        spec("sh", "-c", script, uid=5, gid=6, groups=(7,), in_user_namespace=True)
    )
    assert (code, said.split()) == (
        0,
        "uid=5 gid=6 groups=7 monotonic 0 0 boottime 500 0 0 100000 65536".split(),
    )


def in_child(work: Callable[[], str]) -> str:
    """Run this as an ordinary user; what it returns, or its traceback."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(ORDINARY, ORDINARY, ORDINARY)
            os.setresuid(ORDINARY, ORDINARY, ORDINARY)
            said = work()
        except Exception:  # noqa: BLE001
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as result:
        said = result.read()
    os.waitpid(child, 0)
    return said


def test_an_ordinary_user_maps_itself(program: Path, root: Path) -> None:
    def work() -> str:
        with Master(program) as master:
            master.spaces(NEWUSER | NEWNS | NEWPID | NEWNET | NEWTIME, (0, 0, 9, 0))
            Path(f"/proc/{master.pid}/setgroups").write_text("deny")
            maps(master.pid, f"0 {ORDINARY} 1", f"0 {ORDINARY} 1")
            master.mapped(1 | 8 | 16)
            assert os.stat(f"/proc/{master.pid}/mem").st_uid == 0  # not dumpable from here on
            master.assemble(root, node=False)
            wanted = spec("sh", "-c", "id -u; tty; ls /proc/self/fd", groups=None)
            _, terminal = master.row(protocol.OP_CONSOLE, numbers=(0, 0), flags=1)
            master.process(wanted)
            master.go()
            said = b""
            while len(said.split()) < 6:
                said += os.read(terminal, 4096)
            return said.decode().replace("\r", "") + str(master.wait())

    os.chown(root, ORDINARY, ORDINARY)
    try:
        assert in_child(work) == "0\n/dev/pts/0\n0  1  2  3\n0"
    finally:
        os.chown(root, 0, 0)


def test_an_unmapped_user_is_named(master: Master, root: Path) -> None:
    master.spaces(NEWUSER | NEWNS | NEWPID)
    maps(master.pid, "0 100000 1000", "0 100000 1000")
    master.mapped(1 | 2 | 8)
    master.assemble(root)
    master.process(spec("true", uid=5000))
    failure = go_refused(master)
    assert (failure.value, failure.error) == (protocol.GOSTEP_UID, errno.EINVAL)


def test_one_more_process_joins_by_pidfd(program: Path, master: Master, root: Path, fifo) -> None:
    _, fd = fifo
    master.create(root, NEWNS | NEWPID | NEWUTS | NEWIPC)
    master.row(protocol.OP_NAME, "inside")
    master.process(spec("true"))
    master.go(fd)
    pidfd = os.pidfd_open(master.pid)
    with Master(program) as tenant:
        tenant.row(protocol.OP_JOIN, numbers=(NEWNS | NEWPID | NEWUTS | NEWIPC,), fd=pidfd)
        tenant.spaces(0)
        tenant.mapped(8)
        tenant.row(protocol.OP_TENANT)
        wanted = spec(
            "sh", "-c", "echo $$; cat /proc/sys/kernel/hostname; ls /proc/self/fd", tenant=True
        )
        assert tenant.run(wanted) == (0, "2\ninside\n0\n1\n2\n3\n")
    os.close(pidfd)


def test_joins_wait_for_the_user_namespace(program: Path, master: Master, root: Path, fifo) -> None:
    _, fd = fifo
    master.spaces(NEWUSER | NEWNS | NEWPID | NEWUTS)
    maps(master.pid, "0 100000 65536", "0 100000 65536")
    master.mapped(1 | 2 | 8)
    master.assemble(root)
    master.process(spec("true", in_user_namespace=True))
    master.go(fd)
    kinds = [("user", NEWUSER), ("mnt", NEWNS), ("uts", NEWUTS), ("pid", NEWPID)]
    with Master(program) as tenant:
        for name, kind in kinds:
            space = os.open(f"/proc/{master.pid}/ns/{name}", os.O_RDONLY)
            tenant.row(protocol.OP_JOIN, numbers=(kind,), fd=space)
            os.close(space)
        tenant.spaces(0)
        tenant.mapped(1 | 2 | 8)
        tenant.row(protocol.OP_TENANT)
        assert tenant.run(
            spec("sh", "-c", "echo $$; id -u; cat /proc/self/uid_map | wc -l", tenant=True)
        ) == (0, "2\n0\n1\n")


def test_a_wrong_namespace_is_named(master: Master) -> None:
    space = os.open("/proc/self/ns/uts", os.O_RDONLY)
    failure = refused(lambda: master.row(protocol.OP_JOIN, numbers=(NEWNET,), fd=space))
    os.close(space)
    assert (failure.value, failure.error) == (NEWNET, errno.EINVAL)


# What comes before the clone


def test_affinity_and_oom_score(master: Master, root: Path) -> None:
    master.row(protocol.OP_PREP, "0,0-0", numbers=(300,), flags=1 | 2 | 4)
    master.create(root)
    script = "cat /proc/self/oom_score_adj; grep Cpus_allowed_list /proc/self/status"
    code, said = master.run(spec("sh", "-c", script))
    assert (code, said.split()) == (0, ["300", "Cpus_allowed_list:", "0"])


@pytest.mark.parametrize("bad", ["", "a", "1-", "-1", "2-1", "1,", "65536", "1--2", "9" * 40])
def test_a_bad_list_of_processors(master: Master, bad: str) -> None:
    failure = refused(lambda: master.row(protocol.OP_PREP, bad, flags=4))
    assert failure.error == errno.EINVAL


def test_a_cgroup_that_is_not_there(master: Master) -> None:
    failure = refused(lambda: master.row(protocol.OP_CGROUP, "/sys/fs/cgroup/pids/nosuch/tasks"))
    assert failure.error == errno.ENOENT


def test_the_session_keyring_has_its_name(master: Master, root: Path) -> None:
    master.spaces()
    master.mapped()
    master.row(protocol.OP_KEYRING, "_ses.test", numbers=(0x80000,))
    master.assemble(root)
    code, said = master.run(spec("cat", "/proc/keys"))
    assert code == 0
    assert "_ses.test" in said


# Hooks


def test_hooks_of_the_container(master: Master, root: Path) -> None:
    master.spaces()
    master.mapped()
    master.row(protocol.OP_PROPAGATION)
    os.close(master.row(protocol.OP_ROOT_BUNDLE, str(root), flags=1)[1])
    state = (b'{"pid":', b"}")
    ok = Hook(
        kind="createContainer", path="/bin/sh", arguments=("sh", "-c", "cat; test $(pwd) != /")
    )
    bad = Hook(kind="createContainer", path="/bin/sh", arguments=("sh", "-c", "cat; exit 3"))
    frame = sealed(hook_frames((ok, bad), state))
    failure = refused(lambda: master.row(protocol.OP_RUN_HOOKS, fd=frame))
    os.close(frame)
    assert failure.value == 2
    assert os.read(failure.fd, 4096) == b'exit status 3, stdout: {"pid":1}, stderr: '
    os.close(failure.fd)


def test_the_last_hook_has_the_payloads_environment(master: Master, root: Path) -> None:
    master.create(root)
    hook = Hook(
        kind="startContainer", path="/bin/sh", arguments=("sh", "-c", "echo $MINE > /tmp/hook")
    )
    wanted = spec("cat", "/tmp/hook", environment=(b"PATH=/bin", b"MINE=yes"))
    assert master.run(wanted, hooks=hook_frames((hook,), (b"{}", b""))) == (0, "yes\n")


def test_the_last_hook_can_stop_it(master: Master, root: Path) -> None:
    master.create(root)
    hook = Hook(kind="startContainer", path="/bin/sh", arguments=("sh", "-c", "exit 4"))
    code, said = master.run(spec("echo", "never"), hooks=hook_frames((hook,), (b"{}", b"")))
    assert (code, said) == (
        255,
        "error running startContainer hook #0: exit status 4, stdout: , stderr: \n",
    )


# A master that is not one of ours


def test_rows_out_of_phase_end_the_launch(master: Master) -> None:
    master.send(protocol.OP_ENTER)
    with pytest.raises(Ended):
        master.receive()
    assert master.forerunner.wait(timeout=20) == 254


def test_rows_once_too_often_end_the_launch(master: Master) -> None:
    master.row(protocol.OP_PREP)
    master.send(protocol.OP_PREP)
    with pytest.raises(Ended):
        master.receive()


def test_after_a_failure_nothing_more_is_done(master: Master) -> None:
    refused(lambda: master.row(protocol.OP_CGROUP, "/nosuch"))
    assert refused(lambda: master.row(protocol.OP_SPACES)).code == protocol.ERR_CANCELLED


def test_a_frame_that_could_change_is_refused(master: Master, root: Path) -> None:
    master.create(root)
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.write(fd, process_frame(spec("true"), b"", b""))
    failure = refused(lambda: master.row(protocol.OP_PROCESS, fd=fd))
    os.close(fd)
    assert (failure.value, failure.error) == (protocol.GOSTEP_FRAME, errno.EINVAL)


@pytest.mark.parametrize("until", ["spaces", "mapped", "assemble", "process"])
def test_init_dies_with_its_master(program: Path, root: Path, until: str) -> None:
    ready, tell = os.pipe()
    master = os.fork()
    if master == 0:
        made = Master(program)
        made.spaces()
        if until != "spaces":
            made.mapped()
        if until in {"assemble", "process"}:
            made.assemble(root)
        if until == "process":
            made.process(spec("sleep", "1000"))
        os.write(tell, b"%d" % made.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(tell)
    os.waitpid(master, 0)
    pid = int(os.read(ready, 20))
    os.close(ready)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)


def test_a_script_that_names_our_program_gets_nowhere(master: Master, root: Path) -> None:
    """CVE-2019-5736: `#!/proc/self/exe` runs what started the container."""
    (root / "etc/script").write_text("#!/proc/self/exe\n")
    (root / "etc/script").chmod(0o755)
    master.create(root)
    assert master.run(spec("/etc/script")) == (
        255,
        "FATAL:   starter-init is not for direct use; run apptainer-py-oci\n",
    )
