"""CNI networks of root's launches, with Debian's plugins, on a host that is a namespace of its own.

Bridges, addresses and rules are made in that namespace, which goes with the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.own_install import Installation, eventually

PLUGINS = Path("/usr/lib/cni/bridge")
pytestmark = pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check")
HTTP = "10.22.5.6"


class Host:
    """A network, with its own /var/lib/cni, in which launches of root's find themselves."""

    def __init__(self, installed: Installation, sif: Path) -> None:
        self.installed, self.sif = installed, sif
        made = "mkdir -p /var/lib/cni; mount -t tmpfs none /var/lib/cni; mount -t tmpfs none /run;"
        script = f"{made} ip link set lo up; echo ready; exec sleep 600"
        line = ["unshare", "-n", "-m", "sh", "-c", script]
        self.holder = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"ready\n"
        self.inside = ["nsenter", "-t", str(self.holder.pid), "-n", "-m"]

    def end(self) -> None:
        self.holder.kill()
        self.holder.communicate()

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        line = [*self.inside, str(self.installed.program), "exec", *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd="/")

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        started = self.start(*words)
        out, err = started.communicate(timeout=60)
        return started.returncode, out, err

    def sh(self, script: str) -> str:
        done = subprocess.run(
            [*self.inside, "sh", "-c", script], capture_output=True, text=True, check=False
        )
        return done.stdout

    def traces(self) -> list[str]:
        """Return what a container leaves behind if nobody cleans up."""
        found = self.sh("ip -o link | grep -o 'veth[0-9a-f]*'; find /var/lib/cni -name '10.*'")
        rules = self.sh("iptables-save | grep -e '-A CNI-[0-9DF].* -[ds] '")
        return [*found.split(), *rules.splitlines()]


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


def test_a_failing_plugin_undoes_those_before_it(host: Host, tmp_path: Path) -> None:
    host.installed.configure(f"cni configuration path = {tmp_path}")
    tmp_path.chmod(0o755)
    (tmp_path / "x.conflist").write_text(
        '{"cniVersion": "1.0.0", "name": "own", "plugins": [{"type": "bridge", "bridge": "b0",'
        ' "ipam": {"type": "host-local", "subnet": "10.99.0.0/24"}}, {"type": "absent"}]}'
    )
    try:
        status, _, err = host.run("--network", "own", host.sif, "true")
    finally:
        host.installed.restore()
    assert status == 255
    assert 'plugin type="absent" failed (add): /usr/lib/cni/absent: no such file' in err
    eventually(lambda: host.traces() == [], "nothing is left of the network")
