"""CNI networks with Debian's plugins, on a host that is a namespace of its own: root's, users'.

Bridges, addresses and rules are made in that namespace, which goes with the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cni_host import PLUGINS, Host
from tests.e2e import steps
from tests.own_install import Household, Installation, eventually, household

pytestmark = pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check")
HTTP = "10.22.5.6"


@pytest.fixture
def host(installed: Installation, sif: Path) -> Iterator[Host]:
    made = Host(installed, sif)
    try:
        yield made
    finally:
        made.end()


def hello(host: Host, address: str) -> str:
    """Return what answers at an address, seen from the host, once something does."""
    script = (
        "import socket, sys\n"
        f"s = socket.create_connection({tuple(address.split(':'))!r}, 3)\n"
        "print(s.recv(100).decode(), end='')"
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        line = [*host.inside, "/usr/bin/python3", "-c", script]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.stdout:
            return done.stdout
        time.sleep(0.1)
    return ""


def test_a_bridge_connects_and_goes(host: Host) -> None:
    script = "tail -n +3 /proc/net/dev | cut -d: -f1; cut -f1-3 /proc/net/route"
    status, out, err = host.run("--net", host.sif, "sh", "-c", script)
    assert (status, err) == (0, "")
    assert {"lo", "eth0"} <= set(out.split())
    assert "0100160A" in out  # the bridge's own address is the gateway
    assert "10.22.0.1" in host.sh("ip -br addr show sbr0")
    assert host.traces() == []


def test_who_listens_inside_is_reached(host: Host) -> None:
    arguments = f"portmap=8080:80/tcp;IP={HTTP}"
    listen = "while :; do echo hello | nc -l -p 80; done"
    words = ("--network", "bridge,ptp", "--network-args", arguments)
    started = host.start("-p", *words, host.sif, "sh", "-c", listen)
    try:
        assert hello(host, f"{HTTP}:80") == "hello\n"
        assert hello(host, "127.0.0.1:8080") == "hello\n"
        assert len(host.traces()) >= 4
    finally:
        started.terminate()
        started.communicate(timeout=60)
    eventually(lambda: host.traces() == [], "nothing is left of the network")


def test_whoever_is_killed_nothing_is_left(host: Host) -> None:
    started = host.start("-p", "--network-args", "portmap=8081:80/tcp", host.sif, "sleep", "60")
    eventually(lambda: len(host.traces()) >= 3, "the network is made")
    family = [started.pid]
    for pid in family:
        try:
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except FileNotFoundError:
            continue
    session = os.getsid(started.pid)
    for pid in family:
        try:
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.communicate(timeout=60)
    eventually(lambda: host.traces() == [], "nothing is left of the network")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network", "nope"), 'no net configuration with name "nope"'),
        (("--network", "bridge,none"), 'no net configuration with name "none"'),
        (("--network", "../x"), 'no net configuration with name "../x"'),
        (("--network-args", "foo"), "error while setting network arguments: invalid argument: foo"),
        (("--network-args", "IP=1.2.3.4;CNI_PATH=/tmp x"), "invalid argument: CNI_PATH=/tmp x"),
        (("--network-args", "portmap=8080:80"), "badly formatted portmap argument '8080:80'"),
        (("--network-args", "IP=1.2.3.4"), 'plugin type="bridge" failed (add)'),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    host: Host, words: tuple[str, ...], said: str
) -> None:
    status, out, err = host.run("--net", *words, host.sif, "echo", "ran")
    assert (status, out) == (255, "")
    assert said in err
    assert [line[:9] for line in err.splitlines()] == ["FATAL:   "]
    eventually(lambda: host.traces() == [], "nothing is left of the network")


def test_a_port_that_is_taken(host: Host) -> None:
    script = "import socket, time; s = socket.create_server(('', 8082)); print(1, flush=True); "
    line = [*host.inside, "/usr/bin/python3", "-c", script + "time.sleep(60)"]
    taker = subprocess.Popen(line, stdout=subprocess.PIPE)
    try:
        assert taker.stdout is not None
        taker.stdout.readline()
        words = ("--net", "--network-args", "portmap=8082:80/tcp")
        status, _, err = host.run(*words, host.sif, "true")
    finally:
        taker.kill()
        taker.communicate()
    assert status == 255
    assert "host port 8082/tcp cannot be used: address already in use" in err


def configure(host: Host, file: dict[str, object], more: str = "") -> None:
    """Have one network more: its directory is root's down from /."""
    folder = host.installed.sysconfdir / "networks-of-tests"
    folder.mkdir(exist_ok=True)
    (folder / "x.conflist").write_text(json.dumps({"cniVersion": "1.0.0", **file}))
    host.installed.configure(f"cni configuration path = {folder}\n{more}")


RANGE = {"type": "host-local", "subnet": "10.99.0.0/24"}
BRIDGE: dict[str, object] = {"type": "bridge", "bridge": "b0", "ipam": RANGE}


@pytest.fixture
def restored(host: Host) -> Iterator[None]:
    yield
    shutil.rmtree(host.installed.sysconfdir / "networks-of-tests", ignore_errors=True)
    host.installed.restore()


def test_a_failing_plugin_undoes_those_before_it(host: Host, restored: None) -> None:
    configure(host, {"name": "own", "plugins": [BRIDGE, {"type": "absent"}]})
    status, _, err = host.run("--network", "own", host.sif, "true")
    assert status == 255
    assert 'plugin type="absent" failed (add): /usr/lib/cni/absent: no such file' in err
    eventually(lambda: host.traces() == [], "nothing is left of the network")


def allow(host: Host, networks: str = "bridge", more: str = "") -> str:
    name = host.installed.user.pw_name
    text = f"allow net users = {name}\nallow net networks = {networks}\n{more}"
    host.installed.configure(text)
    return text


@pytest.fixture
def users(host: Host, restored: None) -> Host:
    """Let the ordinary user join the network bridge."""
    allow(host)
    return host


def test_a_user_who_may_is_connected(users: Host) -> None:
    script = "id -u; tail -n +3 /proc/net/dev | cut -d: -f1; grep Cap /proc/self/status"
    status, out, err = users.run("--net", users.sif, "sh", "-c", script, user=True)
    assert (status, err) == (0, "")
    lines = out.split()
    assert lines[0] == str(users.installed.user.pw_uid)
    assert {"lo", "eth0"} <= set(lines)
    assert "CapPrm: 0000000000000000" in " ".join(lines)
    assert users.traces() == []


def test_the_list_of_instances_has_a_networks_address(users: Host) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [*users.inside, *users.as_user, str(users.installed.program), "instance", *words]
        return subprocess.run(line, capture_output=True, text=True, check=False, cwd="/")

    words = ("--net", "--network", "ptp,bridge", "--network-args", f"bridge:IP={HTTP}")
    allow(users, "bridge, ptp")
    try:
        assert command("start", *words, str(users.sif), "addressed").returncode == 0
        (line,) = [one for one in command("list").stdout.splitlines() if "addressed" in one]
        assert re.fullmatch(r"10\.23\.\d+\.\d+", line.split()[2])
    finally:
        command("stop", "addressed")
    eventually(lambda: users.traces() == [], "nothing is left of the network")


def bound(host: Host, port: int, kind: str) -> str:
    """Return what a user is told who binds that port of the host."""
    script = (
        "import socket\n"
        f"s = socket.socket(socket.AF_INET, socket.{kind})\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        f"s.bind(('', {port}))\n"
        "s.type == socket.SOCK_STREAM and s.listen()"
    )
    line = [*host.inside, *host.as_user, "/usr/bin/python3", "-c", script]
    return subprocess.run(line, capture_output=True, text=True, check=False).stderr


def test_a_users_port_is_passed_on_and_nobody_elses(users: Host) -> None:
    """While what comes there goes to the container, nobody can believe to have that port."""
    words = ("--network-args", f"portmap=8080:8000/tcp;portmap=8081:81/udp;IP={HTTP}")
    listen = "while :; do echo hello | nc -l -p 8000; done"
    started = users.start("-p", "--net", *words, users.sif, "sh", "-c", listen, user=True)
    try:
        assert hello(users, "127.0.0.1:8080") == "hello\n"
        assert "Address already in use" in bound(users, 8080, "SOCK_STREAM")
        assert "Address already in use" in bound(users, 8081, "SOCK_DGRAM")
    finally:
        started.terminate()
        started.communicate(timeout=60)
    eventually(lambda: users.traces() == [], "nothing is left of the network")
    eventually(lambda: bound(users, 8080, "SOCK_STREAM") == "", "the port is free")


def test_what_a_user_can_kill_undoes_no_cleaning(users: Host) -> None:
    """They are root's, in a session of their own, with rights for networks alone."""
    script = "echo ran; exec sleep 60"
    started = users.start("-p", "--net", users.sif, "sh", "-c", script, user=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ran\n"
    twin, janitor = roots_of(started.pid)
    for pid in (twin, janitor):
        facts = status_of(pid)
        assert re.search(r"Groups:\s*\n", facts)
        assert "NoNewPrivs:\t1" in facts
        assert "CapPrm:\t000000000028340b\n" in facts
        assert "CapBnd:\t000000000028340b\n" in facts
        assert os.getsid(pid) == twin
    script = f"kill -0 {janitor} 2>/dev/null || kill -0 {twin} 2>/dev/null && echo can be killed; :"
    line = [*users.inside, *users.as_user, "sh", "-c", script]
    assert subprocess.run(line, capture_output=True, text=True, check=False).stdout == ""
    for pid in members(started.pid):
        if pid != twin:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    started.communicate(timeout=60)
    eventually(lambda: users.traces() == [], "nothing is left of the network")
    eventually(lambda: not Path(f"/proc/{twin}").exists(), "its twin has ended")


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def members(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for one in found:
        with contextlib.suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def roots_of(pid: int) -> list[int]:
    """Return those of them that are root's."""
    found = []
    for one in members(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [one] if "\nUid:\t0\t0\t0\t0\n" in status_of(one) else []
    return found


_CLONE3, _NEWNET = 435, 0x40000000


@contextlib.contextmanager
def process_of_number(pid: int) -> Iterator[None]:
    """Have a process of this number, with a network of its own, as any user can have one."""
    libc = ctypes.CDLL(None)
    number = (ctypes.c_int * 1)(pid)
    arguments = struct.pack("11Q", *(0,) * 4, signal.SIGCHLD, *(0,) * 3, ctypes.addressof(number),
                            1, 0)  # fmt: skip
    made = libc.syscall(_CLONE3, arguments, len(arguments))
    if made == 0:
        libc.unshare(_NEWNET)
        while True:
            signal.pause()
    assert made == pid
    ours = os.readlink("/proc/self/ns/net")
    eventually(lambda: os.readlink(f"/proc/{pid}/ns/net") != ours, "it has a network")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_another_process_by_the_containers_number_is_not_connected(
    world, users: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user can stop the janitor before it is root's, kill the container, and take its number."""
    text = allow(users)
    monkeypatch.setitem(steps.FLOWS, "network", (steps.words("--net"), text, "sif", []))
    place = f"{steps.number_of('DROP_JANITOR')}:-1:0"
    with household() as home, steps.gate() as stop:
        before = [*users.inside, *users.as_user[:-4]]
        process = home.adopt(steps.launch(
            world, "network", wait=f"{place}:{stop.fd}", inherited=[stop.fd], before=before,
        ))  # fmt: skip
        eventually(lambda: stop.reached() or process.poll() is not None, "the janitor waits")
        assert stop.reached(), steps.finish(process)
        host = os.readlink(f"/proc/{process.pid}/ns/net")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        container = next(n for n in children if os.readlink(f"/proc/{n}/ns/net") != host)
        os.kill(int(container), signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{container}").exists(), "keeper has reaped it")
        with process_of_number(int(container)):
            stop.open()
            assert steps.finish(process)[0] != 0
            line = ["nsenter", "-t", container, "-n", "cat", "/proc/net/dev"]
            seen = subprocess.run(line, capture_output=True, text=True, check=True).stdout
            assert "eth0" not in seen
    eventually(lambda: users.traces() == [], "nothing is left of the network")


STATIC = {"type": "static", "addresses": [{"address": "10.98.0.2/24"}]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network", "ptp"), "network ptp is for root, and in the setuid flow for those"),
        (("-u", "--network", "bridge"), "network bridge is for root, and in the setuid flow"),
        (("--network", "bridge,ptp"), "network ptp is for root, and in the setuid flow for those"),
        (("-u", "-f"), "network fakeroot is for root and for --fakeroot in the setuid flow"),
        (("--network-args", "portmap=80:80/tcp"), "host port 80/tcp cannot be used: permission"),
        (("--network-args", "portmap=8080:80/sctp"), "8080/sctp cannot be used: this protocol"),
        (("--network-args", "MAC=02:00:00:00:00:01"), "network bridge: a user may ask for"),
        (("--network-args", "IP=10.22.0.7;GATEWAY=10.22.0.8"), "network bridge: a user may ask"),
        (("--network-args", "IP=10.22.0.7/8"), "network bridge: a user may ask for"),
        (("--network-args", "IP=10.23.0.7"), 'plugin type="bridge" failed (add)'),
        (("--network-args", "CNI_COMMAND=x"), "network bridge: a user may ask for"),
    ],
)
def test_what_a_user_may_not(users: Host, words: tuple[str, ...], said: str) -> None:
    status, out, err = users.run("--net", *words, users.sif, "echo", "ran", user=True)
    assert (status, out) == (255, "")
    assert said in err
    eventually(lambda: users.traces() == [], "nothing is left of the network")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "allow net networks = bridge",
        "allow net users = {name}",
        "allow net users = root\nallow net networks = bridge",
        "allow net groups = root\nallow net networks = bridge",
    ],
)
def test_a_user_whom_nobody_allows(host: Host, restored: None, text: str) -> None:
    host.installed.configure(text.format(name=host.installed.user.pw_name))
    status, out, err = host.run("--net", host.sif, "echo", "ran", user=True)
    assert (status, out) == (255, "")
    assert "network bridge is for root, and in the setuid flow for those" in err


def test_an_address_that_is_nobodys_range(host: Host, restored: None) -> None:
    """Of a network whose plugin believes what it is told, a user tells nothing."""
    plugin = {"type": "bridge", "bridge": "b0", "ipam": STATIC}
    more = f"allow net users = {host.installed.user.pw_name}\nallow net networks = own"
    configure(host, {"name": "own", "plugins": [plugin]}, more)
    words = ("--network", "own", "--network-args", "IP=10.98.0.1")
    status, _, err = host.run(*words, host.sif, "true", user=True)
    assert status == 255
    assert "network own: a user may ask for" in err
    assert host.run("--network", "own", host.sif, "true", user=True)[0] == 0


def test_a_port_of_another_container_is_taken(users: Host) -> None:
    words = ("--net", "--network-args", "portmap=8083:80/tcp")
    first = users.start("-p", *words, users.sif, "sleep", "60", user=True)
    try:
        eventually(lambda: len(users.traces()) >= 3, "the network is made")
        status, _, err = users.run(*words, users.sif, "true", user=True)
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert status == 255
    assert "host port 8083/tcp cannot be used: address already in use" in err
    eventually(lambda: users.traces() == [], "nothing is left of the network")


def test_a_users_place_among_others_is_not_the_janitors(users: Host) -> None:
    """A user who keeps one processor busy could make plugins wait there until they are killed."""
    slow = ["chrt", "-i", "0", "nice", "-n", "19", "ionice", "-c", "3", "taskset", "-c", "0"]
    line = [*users.inside, *users.as_user, *slow, str(users.installed.program), "exec", "-p"]
    line += ["--net", str(users.sif), "sh", "-c", "echo ran; exec sleep 60"]
    started = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd="/")
    assert started.stdout is not None
    try:
        assert started.stdout.readline() == "ran\n"
        for pid in roots_of(started.pid):
            assert os.sched_getscheduler(pid) == os.SCHED_OTHER
            assert os.getpriority(os.PRIO_PROCESS, pid) == 0
            assert os.sched_getaffinity(pid) >= os.sched_getaffinity(0)
            told = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True)
            assert told.stdout.startswith("none:")
    finally:
        started.terminate()
        started.communicate(timeout=60)
    eventually(lambda: users.traces() == [], "nothing is left of the network")


@pytest.mark.parametrize("limit", ["--data=4000000000:4000000000", "--rttime=9000000:9000000"])
def test_limits_of_the_callers_stop_no_plugin(users: Host, limit: str) -> None:
    """A plugin that could write no file would leave an address reserved for ever."""
    limited = ["prlimit", limit, "--"]
    program = str(users.installed.program)
    line = [*users.inside, *users.as_user, *limited, program, "exec", "--net"]
    line += [str(users.sif), "true"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd="/")
    if int(re.findall(r"CapBnd:\s(\w+)", status_of(os.getpid()))[0], 16) >> 24 & 1:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 255
        assert "a hard limit could end a network's plugin" in done.stderr
    assert users.traces() == []


def test_fakeroot_has_the_network_that_is_made_for_it(host: Host, restored: None) -> None:
    """Root of a container of its own may change addresses: it is a link of its own to the host."""
    if not has_ranges(host):
        pytest.skip("did not run: this user has no range of ids")
    words = ("--fakeroot", "--net", host.sif, "sh", "-c", "id -u; ls /sys/class/net")
    status, out, err = host.run(*words, user=True)
    assert status == 0, err
    assert "WARNING: network bridge is replaced by `fakeroot`, the one of --fakeroot" in err
    assert out.split()[0] == "0"
    assert "eth0" in out.split()
    assert host.traces() == []


TAKES_AWAY = (
    "ip addr flush dev eth0",
    "ip link set eth0 down; ip link set eth0 name other",
    "ip link del eth0",
)


@pytest.mark.parametrize("network", ["bridge", "ptp", "bridge,ptp"])
@pytest.mark.parametrize("script", TAKES_AWAY)
def test_root_inside_takes_its_interface_away(host: Host, network: str, script: str) -> None:
    """Plugins look there for what to undo; a rule would be left for each such launch."""
    words = (
        "--network",
        network,
        "--network-args",
        "portmap=8085:80/tcp",
        "-B",
        "/usr,/lib,/lib64",
    )
    ran = f"PATH=/usr/sbin:$PATH; {script}"
    status, _, err = host.run("-C", "--net", *words, host.sif, "/usr/bin/sh", "-c", ran)
    assert (status, err) == (0, "")
    assert "apptainer-py-" not in host.sh("iptables-save")
    eventually(lambda: host.traces() == [], "nothing is left of the network")


def test_root_of_fakeroot_takes_its_interface_away(host: Host, restored: None) -> None:
    if not has_ranges(host):
        pytest.skip("did not run: this user has no range of ids")
    words = ("--fakeroot", "--net", "--network", "fakeroot", "-B", "/usr,/lib,/lib64", host.sif)
    status, _, err = host.run(*words, "/usr/bin/ip", "link", "del", "eth0", user=True)
    assert (status, err) == (0, "")
    eventually(lambda: host.traces() == [], "nothing is left of the network")


def has_ranges(host: Host) -> bool:
    """Return whether the user has ranges of ids, and the setuid flow serves --fakeroot."""
    name = host.installed.user.pw_name
    return all(
        any(line.split(":")[0] == name for line in Path(file).read_text().splitlines())
        for file in ("/etc/subuid", "/etc/subgid")
    )


HANGS = """\
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    if (strcmp(getenv("CNI_COMMAND"), HANGS_IN) != 0)
        return write(1, "{}", 2) != 2;
    (void)!fork();
    for (;;)
        pause();
}
"""


def have_it_hang(host: Host, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    folder = host.installed.sysconfdir / "networks-of-tests"
    configure(host, {"name": "own", "plugins": [BRIDGE, {"type": "hangs"}]})
    for program in ("bridge", "host-local"):
        shutil.copy(PLUGINS.parent / program, folder)
    line = ["gcc", "-x", "c", f'-DHANGS_IN="{command}"', "-o", str(folder / "hangs"), "-"]
    subprocess.run(line, input=HANGS, text=True, check=True)
    text = f"cni configuration path = {folder}\ncni plugin path = {folder}\n"
    words = steps.words("--network", "own")
    monkeypatch.setitem(steps.FLOWS, "network", (words, text, "sif", []))
    monkeypatch.setattr(steps, "ROOT_FLOWS", ("network",))


def plugins_of(home: Household) -> list[int]:
    """Return the plugin that runs, and its child."""
    found = []
    for pid in sorted(home.alive()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [pid] if Path(f"/proc/{pid}/cmdline").read_bytes() == b"plugin\0" else []
    return found


@pytest.mark.parametrize("victim", ["plugin", "janitor"])
def test_children_of_a_plugin_that_is_killed_end_with_it(
    world, host: Host, restored: None, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """What one of them did later would not be undone."""
    have_it_hang(host, monkeypatch, "ADD")
    with household() as home:
        process = home.adopt(steps.launch(world, "network", before=host.inside))
        eventually(lambda: len(plugins_of(home)) == 2, "plugin and child hang")
        plugin = plugins_of(home)[0]
        named = [pid for pid, facts in home.alive().items() if facts[2] == "HOST_HELPER"]
        os.kill(plugin if victim == "plugin" else max(named), signal.SIGKILL)
        eventually(lambda: not home.alive(), "all have ended")
        assert steps.finish(process)[0] == 255
    assert host.traces() == []


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("ADD", 255, 'failed: plugin type="hangs" failed (add): it did not end within a minute'),
        ("DEL", 0, "WARNING: the CNI plugin hangs could not undo its part of the container's"),
    ],
)
def test_a_plugin_that_hangs_is_killed(
    world, host: Host, restored: None, monkeypatch: pytest.MonkeyPatch,
    command: str, status: int, said: str,
) -> None:  # fmt: skip
    have_it_hang(host, monkeypatch, command)
    with household() as home:
        started = steps.launch(world, "network", before=host.inside, limit_ms=3000)
        ended, out, err = steps.finish(home.adopt(started))
        assert (ended, out) == (status, b"" if status else b"ran\n"), err
        assert err.decode().count(said) == 1, err
        eventually(lambda: not home.alive(), "what the plugin has started is killed, too")
    assert host.traces() == []
