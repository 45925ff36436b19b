"""A caller who controls everything a process can inherit, and the bytes of the request."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.security import forge

EVIL = "import os; open({marker!r}, 'a').write(__name__ + ' ' + str(os.getuid()) + '\\n')\n"
MODULES = (
    "os sys json site sitecustomize usercustomize encodings codecs io abc stat posixpath re typing "
    "struct errno grp pwd apptainer_py _starter zipimport"
).split()
LIMITS = {
    name: getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}


@pytest.fixture(autouse=True, scope="module")
def orphans(require_root):
    forge.adopt_orphans()


@pytest.fixture(params=["setuid", "userns"])
def flow(request) -> str:
    return request.param


@pytest.fixture
def starter(flow, product) -> str:
    return product.starter_suid if flow == "setuid" else product.starter


@pytest.fixture
def words(flow, demo_sif) -> list[str]:
    """A command line of a launch in this flow, up to the payload's own words."""
    return ["exec", *(["-u"] if flow == "userns" else []), str(demo_sif)]


@pytest.fixture
def launch(flow, product, user, words):
    """Runs the launcher as the user: what the payload's words print, in a forged state."""

    def run(payload: list[str], *, stdin: bytes = b"", **how):
        how.setdefault("env", {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir})
        process = forge.start(product.program, [*words, *payload], user=user, **how)
        done = forge.finish(process, stdin)
        assert forge.left_behind() == []
        assert "Traceback" not in done.err
        return done

    return run


def poison(folder: Path, user) -> tuple[dict[str, str], Path]:
    """Fill a directory with modules that leave a mark; return an environment that points there."""
    marker = folder / "marker"
    evil = EVIL.format(marker=str(marker))
    for name in MODULES:
        (folder / f"{name}.py").write_text(evil)
    for package in ("encodings", "apptainer_py", "lib/python3.11/encodings"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(evil)
    (folder / "bin").mkdir()
    for program in ("python3", "python3.11", "apptainer-py", "squashfuse_ll", "fusermount3", "sh"):
        (folder / "bin" / program).write_text(f"#!/bin/sh\necho {program} >> {marker}\n")
        (folder / "bin" / program).chmod(0o755)
    for place in (folder, folder / "bin"):
        (place / "pyvenv.cfg").write_text(f"home = {folder}/bin\n")
        (place / "python3._pth").write_text(f"{folder}\nimport site\n")
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, user.pw_uid, user.pw_gid)
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "HOME": user.pw_dir,
        "LD_PRELOAD": f"{folder}/evil.so",
        "LD_LIBRARY_PATH": str(folder),
        "LD_AUDIT": f"{folder}/evil.so",
        "LD_DEBUG": "all",
        "LD_DEBUG_OUTPUT": str(folder / "ld"),
        "GLIBC_TUNABLES": "glibc.malloc.mxfast=glibc.malloc.mxfast=A" * 50,
        "GCONV_PATH": str(folder),
        "LOCPATH": str(folder),
        "TMPDIR": str(folder),
        "MALLOC_CHECK_": "3",
    }
    for name in ("PATH", "HOME", "STARTUP", "USERBASE", "PLATLIBDIR", "PYCACHEPREFIX"):
        environment[f"PYTHON{name}"] = str(folder)
    for name in ("INSPECT", "DEBUG", "VERBOSE", "DEVMODE", "MALLOCSTATS", "DUMPREFS", "UTF8"):
        environment[f"PYTHON{name}"] = "1"
    environment["PYTHONBREAKPOINT"] = environment["PYTHONWARNINGS"] = "os.system"
    environment["PYTHONCOERCECLOCALE"] = "warn"
    environment["PYTHONEXECUTABLE"] = f"{folder}/bin/python3"
    return environment, marker


def test_a_poisoned_environment_and_directory_change_nothing(
    starter, product, user, user_tmp, flow
):
    """Through the starter itself, since an LD_PRELOAD is of course the launcher's to load."""
    environment, marker = poison(user_tmp, user)
    engine_words = ["exec", *(["-u"] if flow == "userns" else []), "/image-that-is-absent", "true"]
    texts = [f"{name}={value}" for name, value in environment.items()]
    inherited = {
        key: value
        for key, value in environment.items()
        if flow == "setuid" or not key.startswith(("LD_", "GLIBC", "MALLOC"))
    }
    data = forge.request(
        product.build_id,
        ["apptainer-py", *engine_words],
        environment=texts,
        cwd=str(user_tmp),
        flow=flow,
    )
    done = forge.run_starter(starter, data, user=user, cwd=user_tmp, env=inherited)
    assert done.status == 255
    assert "image-that-is-absent" in done.err
    assert len(forge.without_hints(done.err)) == 1, done.err
    assert not marker.exists(), marker.read_text()
    assert not list(user_tmp.glob("ld*")) or list(user_tmp.glob("ld*")) == [user_tmp / "lib"]


def test_a_poisoned_directory_changes_no_launch(launch, user, user_tmp):
    environment, marker = poison(user_tmp, user)
    kept = {key: value for key, value in environment.items() if not key.startswith(("LD_", "GLI"))}
    done = launch(["echo", "ran"], env=kept, cwd=user_tmp)
    assert (done.status, done.out) == (0, "ran\n"), done.err
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize(
    "arguments",
    [[], [""], ["x"], ["x", ""], ["x", "-1"], ["x", "0"], ["x", "3"], ["x", "99999999999999999999"],
     ["x", "%s%n"], ["x", "3 "], ["x", "policy"], ["x", "A" * 100000], ["x", "9" * 1000],
     ["x" * 100000, "1"], ["x", *["y"] * 10000]],
    ids=lambda words: f"{len(words)}-{(words or ['none'])[-1][:12]}",
)  # fmt: skip
def test_odd_arguments_are_refused_in_one_line(starter, user, arguments):
    script = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "words = [word.encode() for word in eval(sys.argv[2])]\n"
        "vector = (ctypes.c_char_p * (len(words) + 1))(*words, None)\n"
        "libc.execve(sys.argv[1].encode(), vector, (ctypes.c_char_p * 1)(None))\n"
    )
    argv = ["-I", "-c", script, starter, repr(arguments)]
    done = forge.finish(forge.start("/usr/bin/python3", argv, user=user))
    assert (done.status, done.out) == (255, "")
    assert done.err == "FATAL:   the starter is not for direct use; run apptainer-py\n"


@pytest.mark.parametrize("payload", [[""], ["a" * 100000], ["\x1b]0;x\x07\n"], ["\udcff\udcfe"]])
def test_odd_words_of_a_command_are_an_error_in_one_line(launch, payload):
    done = launch(payload)
    assert done.status == 255
    assert len(forge.without_hints(done.err)) == 1 or "\n" in payload[0], done.err


def test_a_thousand_words_arrive(launch):
    texts = [f"word-{number}" for number in range(1000)] + ["x" * 100000, "", " ", "\udcff"]
    process = launch(["sh", "-c", "echo $#; for w; do echo ${#w}; done | tail -n 4", "sh", *texts])
    assert process.out.splitlines()[0] == "1004", process.err
    assert process.out.splitlines()[1:4] == ["100000", "0", "1"]


# ---- descriptors ----


def kinds_of_descriptors(folder: Path) -> list[int]:
    """A descriptor of every kind there is."""
    (folder / "file").write_text("x")
    os.mkfifo(folder / "fifo")
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [
        *os.pipe(),
        os.open(folder / "fifo", os.O_RDWR),
        pair[0].detach(),
        pair[1].detach(),
        socket.socket().detach(),
        *pty.openpty(),
        os.open(folder, os.O_RDONLY),
        os.open(folder / "file", os.O_RDWR),
        os.open(folder / "file", os.O_PATH),
        os.open("/proc/self/mem", os.O_RDONLY),
        os.open("/dev/null", os.O_RDWR),
        os.open("/proc/self/ns/mnt", os.O_RDONLY),
        os.memfd_create("x", 0),
        os.eventfd(0),
        os.pidfd_open(os.getpid()),
    ]
    while len(fds) < 1000:
        fds.append(os.dup(fds[len(fds) % 16]))
    return fds


def test_a_thousand_descriptors_reach_the_payload_as_they_were(launch, user_tmp):
    fds = kinds_of_descriptors(user_tmp)
    wanted = {str(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
    try:
        ls = launch(["ls", "-l", "/proc/self/fd"], inherited=fds)
    finally:
        for fd in fds:
            os.close(fd)
    assert ls.status == 0, ls.err
    rows = [line.split(" -> ") for line in ls.out.splitlines() if " -> " in line]
    held = {left.split()[-1]: right for left, right in rows}
    extra = {fd: name for fd, name in held.items() if fd not in wanted and int(fd) > 2}
    # ls has the directory itself open.
    assert all(name.endswith("/fd") for name in extra.values()), extra
    assert len(extra) <= 1
    missing = set(wanted) - set(held)
    assert not missing
    kinds = {fd for fd in wanted if wanted[fd].split(":")[0] in ("pipe", "socket", "anon_inode")}
    assert all(held[fd].split(":")[0] == wanted[fd].split(":")[0] for fd in kinds)


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=str)
def test_closed_streams_do_not_become_something_else(launch, closed, user_tmp):
    mark = f"/tmp/{user_tmp.name}"
    # The result goes to a file: there may be no stream to print it on.
    script = f"ls -l /proc/$$/fd > {mark}; exit 5"

    def prepare() -> None:
        for fd in closed:
            os.close(fd)

    try:
        done = launch(["sh", "-c", script], prepare=prepare)
        assert done.status == 5, done.err
        listed = Path(mark).read_text().splitlines()
    finally:
        Path(mark).unlink(missing_ok=True)
    pairs = [line.split(" -> ") for line in listed if " -> " in line]
    rows = {left.split()[-1]: right for left, right in pairs}
    for fd in closed:
        assert rows.get(str(fd), "/dev/null") in ("/dev/null", mark), rows
    others = {fd: name for fd, name in rows.items() if int(fd) > 2}
    assert all(name in (mark, "/dev/null") or "pipe" in name for name in others.values()), others
    assert not [name for name in rows.values() if "memfd" in name or "socket" in name]


# ---- limits, signals, timers, umask, directory ----


# With next to nothing of these the kernel does not even load a program.
VITAL = ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CPU")
# A Python program, since some limits leave no room for what Popen does after it has set them.
LIMITED = """
import os, resource, sys
number, soft, hard = (int(word) for word in sys.argv[1:4])
resource.setrlimit(number, (soft, hard))
try:
    os.execve(sys.argv[4], sys.argv[4:], {})
except OSError as error:
    os.write(2, b"not loaded")
"""


@pytest.mark.parametrize("which", ["soft", "both"])
@pytest.mark.parametrize("value", [0, 64, resource.RLIM_INFINITY], ids=["0", "64", "max"])
@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_is_bearable_or_refused(product, user, name, value, which):
    """Whatever a limit is, the starter says why it cannot, or gets as far as the image."""
    _, most = resource.getrlimit(LIMITS[name])
    small = value != resource.RLIM_INFINITY
    if not small or (most != resource.RLIM_INFINITY and value > most):
        value = most
    words = [LIMITS[name], value, value if which == "both" else most]
    fd = forge.memory_file(forge.request(product.build_id, ["x", "exec", "/absent.sif", "true"]))
    argv = ["-I", "-S", "-c", LIMITED, *map(str, words), product.starter_suid, str(fd)]
    process = forge.start("/usr/bin/python3", argv, user=user, inherited=[fd])
    os.close(fd)
    done = forge.finish(process)
    assert forge.left_behind() == []
    if "error while loading shared libraries" in done.err:
        assert small
        assert name in (*VITAL, "RLIMIT_NOFILE"), done
        return
    if done.status < 0 or done.err == "not loaded":
        assert small
        assert name in VITAL, done
        return
    assert done.status == 255
    assert len(forge.without_hints(done.err)) == 1, done.err
    if "absent.sif" not in done.err:
        assert small
        assert which == "both" or name in ("RLIMIT_NPROC",)
        assert re.search(r"the hard limit on .* is below .*; raise it|start a process", done.err)


def test_soft_limits_reach_the_payload_as_they_were(launch):
    wanted = {"-n": 77, "-c": 0, "-f": 3000, "-s": 1024, "-t": 50}

    def prepare() -> None:
        for number, soft in (
            (resource.RLIMIT_NOFILE, 77),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 3000 * 512),
            (resource.RLIMIT_STACK, 1024 * 1024),
            (resource.RLIMIT_CPU, 50),
        ):
            resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))

    script = "; ".join(f"ulimit -S {letter}" for letter in wanted)
    done = launch(["sh", "-c", script], prepare=prepare)
    assert done.out.split() == [str(value) for value in wanted.values()], done.err


def test_hard_limits_reach_the_payload_as_they_were(launch):
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 512))

    done = launch(["sh", "-c", "ulimit -S -n; ulimit -H -n; ulimit -H -c"], prepare=prepare)
    assert done.out.split() == ["100", "200", "1"], done.err


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("RLIMIT_FSIZE", 10, "the hard limit on file size (ulimit -Hf) is below 1 MiB; raise it"),
        ("RLIMIT_NOFILE", 40, "the hard limit on open files (ulimit -Hn) is below 64; raise it"),
        ("RLIMIT_CPU", 2, "the hard limit on processor time (ulimit -Ht) is below 5 seconds"),
    ],
)
def test_a_hard_limit_that_is_too_small_is_refused_in_one_line(product, user, name, value, text):
    data = forge.request(product.build_id, ["apptainer-py", "exec", "/absent", "true"])

    def prepare() -> None:
        resource.setrlimit(LIMITS[name], (value, value))

    done = forge.run_starter(product.starter_suid, data, user=user, prepare=prepare)
    assert (done.status, len(done.err.splitlines())) == (255, 1)
    assert text in done.err


def signal_set(text: str) -> set[int]:
    mask = int(text, 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}


def test_signals_reach_the_payload_as_they_were(launch):
    blocked = {signal.SIGUSR1, signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM, 40}
    ignored = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD, 35}

    def prepare() -> None:
        for number in range(1, 65):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    done = launch(["cat", "/proc/self/status"], prepare=prepare)
    assert done.status == 0, done.err
    facts = dict(line.split(":\t") for line in done.out.splitlines() if line.startswith("Sig"))
    assert signal_set(facts["SigBlk"]) == blocked
    # The image's shell, which runs first, may catch or reset SIGCHLD.
    assert signal_set(facts["SigIgn"]) | {signal.SIGCHLD} == ignored


def test_every_signal_blocked_and_ignored_does_not_disturb_the_launch(launch):
    every = set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}

    def prepare() -> None:
        for number in every:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, every)

    done = launch(["sh", "-c", "exit 9"], prepare=prepare)
    assert done.status == 9, done.err


def test_timers_of_the_caller_do_not_end_the_launch(launch):
    def prepare() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, after_s, 0.004)

    # Python itself may be hit before it has become the launcher: then nothing was tested.
    for tries in range(20):
        after_s = 0.004 + tries / 2000
        done = launch(["echo", "ran"], prepare=prepare)
        if done.status == 0:
            break
        assert done.status == -signal.SIGALRM, done
    else:
        pytest.fail("the launcher never got as far as the starter")
    assert done.out == "ran\n"


@pytest.mark.parametrize("mask", [0o000, 0o777, 0o027], ids=oct)
def test_the_umask_reaches_the_payload(launch, mask):
    done = launch(["sh", "-c", "umask"], umask=mask)
    assert (done.status, done.out) == (0, f"{mask:04o}\n"), done.err


def test_priority_and_processors_reach_the_payload(launch):
    """As with the real one: a batch system's choice holds for what it has started."""
    one = max(os.sched_getaffinity(0))

    def prepare() -> None:
        os.nice(7)
        os.sched_setaffinity(0, {one})

    script = "cut -d ' ' -f 19 /proc/self/stat; grep ^Cpus_allowed_list /proc/self/status"
    done = launch(["sh", "-c", script], prepare=prepare)
    assert done.out.split() == ["7", "Cpus_allowed_list:", str(one)], done.err


@pytest.mark.parametrize("kind", ["deleted", "unreadable"])
def test_a_directory_that_is_not_there(launch, user, user_tmp, kind):
    inner = user_tmp / "inner"
    inner.mkdir()
    os.chown(inner, user.pw_uid, user.pw_gid)

    def prepare() -> None:
        os.chdir(inner)
        if kind == "deleted":
            inner.rmdir()
        else:
            inner.chmod(0)

    done = launch(["pwd"], prepare=prepare)
    if kind == "unreadable":
        inner.chmod(0o700)
    assert done.status == 0, done.err
    assert done.out in ("/\n", f"{user.pw_dir}\n", f"{inner}\n")


# ---- the request ----


def refuse(starter, user, data: bytes | int) -> str:
    done = forge.run_starter(starter, data, user=user)
    assert forge.left_behind() == []
    assert (done.status, done.out) == (255, "")
    assert len(forge.without_hints(done.err)) == 1, done.err
    return done.err


def descriptors_that_are_no_request(folder: Path, good: bytes) -> dict[str, Callable[[], int]]:
    (folder / "file").write_bytes(good)
    (folder / "fifo").unlink(missing_ok=True)
    os.mkfifo(folder / "fifo")
    return {
        "pipe": lambda: os.pipe()[0],
        "fifo": lambda: os.open(folder / "fifo", os.O_RDWR),
        "socket": lambda: socket.socket().detach(),
        "tty": lambda: pty.openpty()[1],
        "directory": lambda: os.open(folder, os.O_RDONLY),
        "file": lambda: os.open(folder / "file", os.O_RDONLY),
        "path": lambda: os.open(folder / "file", os.O_PATH),
        "device": lambda: os.open("/dev/zero", os.O_RDONLY),
        "memory of a process": lambda: os.open("/proc/self/mem", os.O_RDONLY),
        "eventfd": lambda: os.eventfd(1),
        "unsealed": lambda: forge.memory_file(good, seals=0),
        "not sealed against writing": lambda: forge.memory_file(
            good, seals=forge.SEALS & ~fcntl.F_SEAL_WRITE
        ),
        "not sealed against growing": lambda: forge.memory_file(
            good, seals=forge.SEALS & ~fcntl.F_SEAL_GROW
        ),
        "seals that are not sealed": lambda: forge.memory_file(
            good, seals=forge.SEALS & ~fcntl.F_SEAL_SEAL
        ),
    }


KINDS = [
    "pipe", "fifo", "socket", "tty", "directory", "file", "path", "device", "memory of a process",
    "eventfd", "unsealed", "not sealed against writing", "not sealed against growing",
    "seals that are not sealed",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_sealed_memory_file_is_a_request(starter, flow, product, user, user_tmp, kind):
    good = forge.request(product.build_id, ["apptainer-py", "exec", "/x", "true"], flow=flow)
    made = descriptors_that_are_no_request(user_tmp, good)
    assert set(made) == set(KINDS)
    fd = made[kind]()
    try:
        assert refuse(starter, user, fd) == (
            "FATAL:   the starter is not for direct use; run apptainer-py\n"
        )
    finally:
        os.close(fd)


BIG = 2**32 - 1
FORGERIES: dict[str, dict[str, object]] = {
    "magic": {"magic": b"APYREQ2\0"},
    "version": {"version": 77},
    "header size": {"header_size": 127},
    "flags": {"flags": 0x8000},
    "no argument": {"argc": 0},
    "many arguments": {"argc": BIG},
    "many variables": {"envc": BIG},
    "arguments inside the header": {"argv_off": 0},
    "arguments beyond": {"argv_off": BIG},
    "variables before": {"env_off": 0},
    "variables beyond": {"env_off": BIG},
    "directory before": {"cwd_off": 1},
    "directory beyond": {"cwd_off": BIG},
    "engine before": {"engine_off": 1},
    "engine beyond": {"engine_off": BIG},
    "engine file before": {"engine_file_off": 1},
    "total too small": {"total": 100},
    "total too large": {"total": BIG},
    "total beyond the file": {"total": 1 << 20},
    "unknown forecast": {"forecast": BIG},
    "image beyond the arguments": {"image_arg": BIG},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_refused(starter, flow, product, user, name):
    words = ["apptainer-py", "exec", "/x", "true"]
    data = forge.request(product.build_id, words, flow=flow, **FORGERIES[name])
    assert refuse(starter, user, data).startswith("FATAL:   the launch request is malformed")


@pytest.mark.parametrize("build", ["", "0" * 32, "x" * 64, "0" * 31])
def test_another_build_is_refused(starter, flow, user, build):
    data = forge.request(build, ["apptainer-py", "exec", "/x", "true"], flow=flow)
    assert "launcher and starter are of different builds" in refuse(starter, user, data)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("counts that lie", {"argc": 3}),
        ("more variables than there are", {"envc": 5}),
        ("directory too long", {"cwd": "/" + "x" * 5000}),
        ("engine too long", {"engine": "x" * 80}),
        ("unknown engine", {"engine": "../../etc/passwd"}),
        ("engine of format marks", {"engine": "%n%n%s"}),
    ],
)
def test_parts_that_lie_are_refused(starter, flow, product, user, name, how):
    data = forge.request(product.build_id, ["apptainer-py", "exec", "/x", "true"], flow=flow, **how)
    assert "Traceback" not in refuse(starter, user, data)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 200])
def test_a_request_that_is_cut_short_is_refused(starter, flow, product, user, size):
    data = forge.request(product.build_id, ["x", "exec", "/x", "true"], flow=flow)[:size]
    refuse(starter, user, data)


def test_a_huge_request_is_refused(starter, flow, product, user):
    words = ["x", "exec", "/x", *["y" * 100000] * 90]
    data = forge.request(product.build_id, words, flow=flow)
    assert len(data) > 8 << 20
    assert refuse(starter, user, data).startswith("FATAL:   the launch request is malformed")


def test_trailing_bytes_are_refused(starter, flow, product, user):
    data = forge.request(product.build_id, ["x", "exec", "/x", "true"], flow=flow) + b"more"
    assert refuse(starter, user, data).startswith("FATAL:   the launch request is malformed")


def test_random_requests_are_refused(starter, flow, product, user):
    dice = random.Random(1)
    good = forge.request(product.build_id, ["x", "exec", "/x", "true"], flow=flow)
    for _ in range(10):
        data = bytearray(good)
        for _ in range(6):
            data[dice.randrange(len(data))] = dice.randrange(256)
        done = forge.run_starter(starter, bytes(data), user=user)
        assert done.status in (1, 255), done
        assert "Traceback" not in done.err
    assert forge.left_behind() == []


def test_a_trace_descriptor_that_is_not_the_callers_is_left_alone(product, user, demo_sif):
    for fd in (0, 1, 2, 900, -5):
        data = forge.request(
            product.build_id, ["x", "exec", str(demo_sif), "true"], flags=1, trace_fd=fd
        )
        done = forge.run_starter(product.starter_suid, data, user=user)
        assert done.status == 0, done
        assert done.out == ""


def test_a_request_that_claims_another_flow_gains_nothing(product, user, demo_sif):
    """The starter goes by its own identity, whatever the request says."""
    words = ["x", "exec", str(demo_sif), "cat", "/proc/self/status"]
    for starter in (product.starter, product.starter_suid):
        for flow in ("setuid", "userns", "root"):
            data = forge.request(product.build_id, words, flow=flow)
            done = forge.run_starter(starter, data, user=user)
            facts = dict(line.split(":\t", 1) for line in done.out.splitlines() if ":\t" in line)
            assert done.status == 0, done.err
            assert facts["Uid"].split() == [str(user.pw_uid)] * 4
            assert {facts[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
                "0" * 16
            }


def test_the_environment_of_a_request_is_the_payloads_alone(product, user, demo_sif):
    odd = ["", "=", "=x", "novalue", "A=1", "A=2", "B=\udcff", "C=" + "x" * 130000, "D=a\nb"]
    data = forge.request(
        product.build_id, ["x", "exec", str(demo_sif), "env"], environment=[*odd, "HOME=/"]
    )
    done = forge.run_starter(product.starter_suid, data, user=user)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert "A=1" in lines
    assert "C=" + "x" * 130000 in lines
