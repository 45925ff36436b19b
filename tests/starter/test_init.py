"""starter-init from end to end: a master made of Python, a root of busybox, no other part of us."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from apptainer_py.model.process_frame import failure_text
from tests.starter import init_master
from tests.starter.init_master import Master, RowRefused, spec


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_master.build(tmp_path_factory.mktemp("init"))


@pytest.fixture(scope="module")
def root(require_root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_master.make_root(tmp_path_factory.mktemp("bundle"))


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
    assert {name: int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
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
        "nosuch": (protocol.GOSTEP_NOT_FOUND, errno.ENOENT, 'exec: "nosuch": executable file not found in $PATH'),
        "/etc/nosuch": (protocol.GOSTEP_STAT, errno.ENOENT, 'exec: "/etc/nosuch": stat /etc/nosuch: no such file or directory'),
        "/etc/plain": (protocol.GOSTEP_ACCESS, errno.EACCES, 'exec: "/etc/plain": permission denied'),
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


def test_a_start_that_dies_half_way_is_followed_by_another(master: Master, root: Path, fifo) -> None:
    path, fd = fifo
    master.create(root)
    master.process(spec("echo", "started"))
    master.go(fd)
    for _ in range(50):
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # opens, and is gone
    if not select.select([master.output], [], [], 0.1)[0]:
        with path.open("rb") as reader:
            assert reader.read() in {b"0", b""}
    assert (master.said(), master.wait()) == ("started\n", 0)


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
    path.open("rb").close()
    assert (master.said(), master.wait()) == ("exec /etc/broken: exec format error\n", 255)
