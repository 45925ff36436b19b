"""The engine fakeroot: a program of the host as root of a user namespace, and who starts one."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from apptainer_py.model import protocol
from tests import images
from tests.e2e.identities import HOOKS, expected, table, traced
from tests.own_install import HostState, assert_nothing_left, household, request_bytes, sealed

FLOWS = {"setuid": protocol.FLOW_SETUID, "userns": protocol.FLOW_USERNS}


def run(own, flow, *words, degree="ranges", trace=None, cwd="/"):
    """Start a program by the engine; returns what subprocess does."""
    fd = -1
    if trace is not None:
        fd = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.set_inheritable(fd, True)
    content = request_bytes(
        own.facts()["BUILD_ID"],
        ["fakeroot", degree, *words],
        {"PATH": "/usr/bin:/bin", "KEPT": "a value"},
        flow=FLOWS[flow],
        cwd=str(cwd),
        engine="fakeroot",
        trace_fd=fd,
    )
    request = sealed(content)
    passed = (request,) if fd < 0 else (request, fd)
    program = own.suid if flow == "setuid" else own.libexec / "starter"
    try:
        return subprocess.run(
            ["fakeroot", str(request)], executable=program, pass_fds=passed, env={},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
            cwd="/", **own.identity(),
        )  # fmt: skip
    finally:
        for one in passed:
            os.close(one)


@pytest.fixture(params=list(FLOWS))
def flow(request) -> str:
    return request.param


def test_it_is_root_of_all_its_users_ids(own, flow, user_tmp):
    user_tmp.chmod(0o777)
    script = (
        "id -u; cat /proc/self/uid_map; touch mine other && chown 7:7 other; echo >/dev/null && "
        "echo device; pwd; echo $KEPT; grep NoNewPrivs /proc/self/status"
    )
    with household() as home:
        host = HostState(own.session)
        done = run(own, flow, "/bin/sh", "-c", script, cwd=user_tmp)
        assert_nothing_left(home, host)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    uid = str(own.user.pw_uid)
    assert lines[0] == "0"
    assert lines[1].split() == ["0", uid, "1"]
    assert lines[2].split()[0::2] == ["1", "65536"]
    assert lines[3:] == ["device", str(user_tmp), "a value", "NoNewPrivs:\t1"]
    assert (user_tmp / "mine").stat().st_uid == own.user.pw_uid
    assert (user_tmp / "other").stat().st_uid == int(lines[2].split()[1]) + 6


def test_devices_seem_to_be_made_and_marks_of_overlays_are_the_kernels(own, flow, user_tmp):
    user_tmp.chmod(0o777)
    script = (
        "import os, stat\n"
        "for kind, number in ((stat.S_IFBLK, 1792), (stat.S_IFCHR, 259), (stat.S_IFIFO, 0)):\n"
        "    os.mknod('a%o' % kind, kind | 0o600, number)\n"
        "    os.mknod('b%o' % kind, kind | 0o600, number, dir_fd=os.open('.', os.O_RDONLY))\n"
        "print(sorted(os.listdir('.')))\n"
        "os.mknod('mark', stat.S_IFCHR | 0o600, 0); print('mark')\n"
    )
    done = run(own, flow, sys.executable, "-I", "-c", script, cwd=user_tmp)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['a10000', 'b10000']", "mark"]


def test_one_id(own):
    done = run(own, "userns", "/bin/sh", "-c", "cat /proc/self/uid_map", degree="one")
    assert (done.returncode, done.stdout.split()) == (0, ["0", str(own.user.pw_uid), "1"])


def test_the_setuid_flow_has_ranges_alone(own):
    done = run(own, "setuid", "/bin/true", degree="one")
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:   ")
    assert done.stdout == ""


# The rows of identities.py; with one id there is nobody whom a program could become.
KINDS = {
    "setuid": ("setuid", "ranges", "fakeroot", "yes"),
    "userns": ("userns", "ranges", "fakeroot-u", "yes"),
    "userns, one id": ("userns", "one", "fakeroot-u", "no"),
}
INSIDE = ("STAGE2", "payload")
MINE = {"mnt"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_and_hook_has_the_identity_of_the_table(own, user_tmp, kind):
    user_tmp.chmod(0o777)
    trace, (flow, degree, name, limited) = user_tmp / "trace", KINDS[kind]
    assert run(own, flow, "/bin/true", degree=degree, trace=trace).returncode == 0
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    who, rows = pwd.getpwuid(own.user.pw_uid), table(name)
    wanted = {
        process: expected(row | ({"no_new_privs": limited} if process in INSIDE else {}), who, MINE)
        for process, row in rows.items()
    }
    processes = [event for event in events if event["event"] == "process"]
    keeper = [traced(event) for event in processes if event["process"] == "KEEPER"]
    assert keeper == [wanted["KEEPER"], wanted["dropped"]]
    others = [event for event in processes if event["process"] != "KEEPER"]
    assert sorted(event["process"] for event in others) == ["MASTER", "RPC", "STAGE2"]
    hooks = [event for event in events if event["event"] == "hook"]
    for event in others + hooks:
        assert traced(event) == wanted[event["process"]], (event["process"], event.get("name"))
    for process, names in HOOKS.items():
        assert [event["name"] for event in hooks if event["process"] == process] == names
    assert {event["process"] for event in hooks} == set(HOOKS)
    births = [event for event in events if event.get("name") == "EXEC_PAYLOAD"]
    assert [traced(event) for event in births] == [wanted["STAGE2"]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("allow user ns = no", "User namespace required but not allowed by configuration."),
        ("user bind control = no", "the administrator's configuration forbids it"),
        ("limit container paths = /opt", "the administrator's configuration forbids it"),
    ],
)
def test_the_administrator_forbids_it(own, line, says):
    own.configure(line)
    with household() as home:
        host = HostState(own.session)
        done = run(own, "setuid", "/bin/true")
        assert_nothing_left(home, host)
    assert done.returncode == 255
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["none", "/bin/true"], ["ranges"], ["ranges", "true"]])
def test_wrong_words(own, words):
    done = run(own, "userns", *words[1:], degree=words[0])
    assert done.returncode == 255
    assert "is told a degree" in done.stderr


def test_a_program_that_is_not_there(own, flow):
    done = run(own, flow, "/no/such/program")
    assert done.returncode == 255
    assert done.stderr == "FATAL:   /no/such/program: no such file or directory\n"


ENTER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from apptainer_py.runtime import fakeroot
spaces = fakeroot.Namespaces(ranges=True, setuid=sys.argv[2] == "setuid")
child = os.fork()
if child == 0:
    spaces.enter()
    os.chown("file", 9, 9)
    os.mknod("device", 0o60600, 1792)
    print(os.getuid(), os.path.exists("device"), flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
spaces.close()
sys.exit(status)
"""


def test_its_namespaces_are_entered_by_who_needs_them(own, flow, user_tmp):
    """What a build does; in the setuid flow also where the kernel keeps namespaces from users."""
    user_tmp.chmod(0o777)
    (user_tmp / "file").touch()
    os.chown(user_tmp / "file", own.user.pw_uid, own.user.pw_gid)
    library = str(own.prefix / "lib/apptainer-py")
    with household() as home:
        host = HostState(own.session)
        done = subprocess.run(
            ["/usr/bin/python3", "-I", "-S", "-B", "-c", ENTER, library, flow],
            cwd=user_tmp, capture_output=True, text=True, check=False, timeout=60,
            **own.identity(),
        )  # fmt: skip
        assert_nothing_left(home, host)
    assert (done.returncode, done.stdout) == (0, "0 False\n"), done.stderr
    assert (user_tmp / "file").stat().st_uid > own.user.pw_uid


def test_a_build_believes_that_it_made_devices(own, user_tmp):
    user_tmp.chmod(0o777)
    tree = images.small_tree(images.shared_folder())
    definition = Path(user_tmp / "x.def")
    definition.write_text(
        f"Bootstrap: localimage\nFrom: {tree}\n"
        "%setup\n  mknod $APPTAINER_ROOTFS/disk b 7 0\n"
        "%post\n  mknod /null c 1 3 && test ! -e /null && touch /made && chown 3:3 /made\n"
    )
    with household() as home:
        host = HostState(own.session)
        done = own.run(
            "build", "--fakeroot", "--sandbox", user_tmp / "out", definition,
            env={"TMPDIR": str(user_tmp)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_nothing_left(home, host)
    assert (user_tmp / "out/made").stat().st_uid not in (0, own.user.pw_uid)
    assert not (user_tmp / "out/disk").exists()
    assert sorted(path.name for path in user_tmp.iterdir()) == ["out", "x.def"]
