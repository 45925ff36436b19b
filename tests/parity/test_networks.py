"""Networks and limits in force: what the container and the host have of them, with both."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.cni_host import PLUGINS, Host
from tests.own_install import eventually
from tests.parity import sample

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
    ),
    pytest.mark.skipif(not PLUGINS.exists(), reason="no CNI plugins: run ./check"),
]
# Some machines lack a capability, and the real one refuses to start without all of them.
ENVIRONMENT = {"HOME": "/root", "USER": "root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
ENVIRONMENT["APPTAINER_DROP_CAPS"] = "sys_resource"
INSIDE = (
    "grep -o '^ *[a-z0-9]*:' /proc/net/dev | sort; cut -f1-4,8 /proc/net/route | sort; "
    "cat /etc/resolv.conf /etc/hosts; uname -n; id"
)
RULES = "iptables-save | grep -e ^-A -e ^:CNI | sort"


class Both:
    """The two programs, each on a host of its own, with one configuration of root's limits."""

    def __init__(self, ours: str, image: Path, folder: Path) -> None:
        self.image = image
        # Without systemd the real one limits nothing, unless it is told that there is none.
        real = Path("/etc/apptainer/apptainer.conf").read_text()
        file = folder / "apptainer.conf"
        file.write_text(re.sub(r"(?m)^systemd cgroups.*", "systemd cgroups = no", real))
        self.lines = [[str(images.REAL_APPTAINER), "-c", str(file)], [ours]]

    def start(self, which: int, host: Host, words: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*host.inside, *self.lines[which], *words], env=ENVIRONMENT, cwd="/",
            stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        )  # fmt: skip

    def run(self, which: int, host: Host, options: str) -> dict[str, object]:
        """Return what is seen inside, and on the host meanwhile and afterwards."""
        script = f"{INSIDE}; echo $$ ==; read line"
        words = ["exec", *options.split(), str(self.image), "sh", "-c", script]
        started = self.start(which, host, words)
        assert started.stdout is not None
        out = ""
        while line := started.stdout.readline():
            out += line
            if line.endswith("==\n"):
                break
        rules, limits = rules_of(host), limits_of(out)
        _, err = started.communicate("\n", timeout=60)
        eventually(lambda: not host.traces(), "nothing is left of the network")
        found = {"status": started.returncode, "said": said(err), "rules": rules}
        found |= {"inside": re.sub(r"\d+ ==\n", "", out), "limits": limits}
        return found | {"afterwards": rules_of(host)}


def said(err: str) -> list[str]:
    """Return warnings and errors; the real one undoes what it has not made, with no PATH."""
    lines = [line for line in sample.said(err) if "could not delete networks: " not in line]
    return [re.sub(r" in /etc/[^/]*/network$", " in ETC", line) for line in lines]


def rules_of(host: Host) -> str:
    """Return the rules, without what is another in each launch."""
    text = re.sub(r"CNI-(DN-)?[0-9a-f]{16,}", r"CNI-\1N", host.sh(RULES))
    text = re.sub(r'id: \\"[^"]*"', "id", text)
    return "\n".join(sorted(text.splitlines()))


FILES = (
    "memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.memsw.limit_in_bytes",
    "memory.oom_control", "cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpuset.cpus",
    "cpuset.mems", "pids.max", "blkio.weight", "devices.list",
)  # fmt: skip


def limits_of(out: str) -> dict[str, str]:
    """Return what the payload's control groups of version 1 hold."""
    number = re.search(r"(\d+) ==\n", out)
    found: dict[str, str] = {}
    if number is None:
        return found
    for line in Path(f"/proc/{number[1]}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in FILES:
            file = Path(f"/sys/fs/cgroup/{controllers}{path}/{name}")
            if file.exists():
                found[name] = file.read_text()
    return found


@pytest.fixture(scope="module")
def both(product: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if os.getuid() != 0:
        pytest.skip("did not run: needs root")
    image = images.own_sif(images.shared_folder())
    yield Both(product.program, image, tmp_path_factory.mktemp("limits"))


@pytest.fixture
def hosts(product: SimpleNamespace, user: pwd.struct_passwd, both: Both) -> Iterator[list[Host]]:
    installed = SimpleNamespace(user=user, program=product.program)
    made = [Host(installed, both.image) for _ in both.lines]  # type: ignore[arg-type]
    yield made
    for one in made:
        one.end()


NETWORKS = [
    "--net",
    "--net --network bridge",
    "--network ptp",
    "--network none",
    "--net --network none --hostname box",
    "--net --network bridge,ptp",
    "--network ptp,bridge --hostname box",
    "--net --network-args portmap=8080:80/tcp",
    "--net --network-args portmap=8080:80/udp",
    "--network-args portmap=8080:80/tcp --network-args portmap=8081:81/udp",
    "--network-args portmap=8080:80/tcp;portmap=8081:81/tcp",
    "--network ptp --network-args ptp:portmap=8080:80/tcp",
    "--network bridge,ptp --network-args ptp:portmap=8080:80/tcp",
    "--network-args IP=10.22.0.77",
    "--network ptp --network-args IP=10.23.0.77",
    "--net --dns 192.0.2.1",
    "--net --dns 192.0.2.1,2001:db8::1 --hostname box",
    "--hostname box",
    "--net --hostname box.example.org",
    "--hostname " + "a" * 64,
    "--net -C",
    "--net --uts",
    "--network nope",
    "--network bridge,nope",
    "--network none,bridge",
    "--network-args nonsense",
    "--network-args portmap=8080:80",
    "--network-args portmap=x:80/tcp",
    "--network-args nope:IP=10.22.0.77",
    "--network-args IP=10.99.0.1",
    "--net --dns nonsense",
]
LIMITS = [
    "--memory 100M",
    "--memory 100m --memory-swap 200m",
    "--memory 64M --memory-reservation 32M",
    "--memory 1g --memory-swap -1",
    "--memory 64M --oom-kill-disable",
    "--cpus 0.5",
    "--cpus 2",
    "--cpu-shares 512",
    "--cpuset-cpus 0",
    "--cpuset-cpus 0 --cpuset-mems 0",
    "--pids-limit 50",
    "--pids-limit -1",
    "--memory 100M --cpus 0.5 --pids-limit 50",
    "--apply-cgroups {file}",
    "--apply-cgroups {devices}",
    "--net --pids-limit 50",
]


def some(lines: list[str], every: int) -> list[object]:
    """Return the lines, of which a run that is not long takes one in so many."""
    return [
        pytest.param(line, marks=[pytest.mark.long] if at % every else [])
        for at, line in enumerate(lines)
    ]


# Of these the message is our own, and why.
DIFFERS = {
    "--network-args portmap=x:80/tcp": "no names of the functions that found out",
}


@pytest.mark.parametrize("options", some(NETWORKS, 7))
def test_networks(both: Both, hosts: list[Host], options: str) -> None:
    real, ours = (both.run(which, host, options) for which, host in enumerate(hosts))
    if options in DIFFERS:
        assert ours.pop("said") != real.pop("said")
    assert ours == real


@pytest.mark.parametrize("options", some(LIMITS, 4))
def test_limits(both: Both, hosts: list[Host], options: str, tmp_path: Path) -> None:
    names = {"file": tmp_path / "limits.toml", "devices": tmp_path / "devices.toml"}
    names["file"].write_text(
        "[memory]\nlimit = 67108864\n[cpu]\nshares = 300\nquota = 20000\nperiod = 50000\n"
        "[pids]\nlimit = 40\n"
    )
    names["devices"].write_text(
        '[[devices]]\nallow = false\ntype = "c"\nmajor = 10\nminor = 229\naccess = "rwm"\n'
    )
    line = options.format(**names)
    real, ours = (both.run(which, host, line) for which, host in enumerate(hosts))
    assert real["limits"]
    if "devices" in options:
        # The real one denies all the others, too, and the payload has no /dev/null.
        for one in (real, ours):
            one["limits"].pop("devices.list")  # type: ignore[attr-defined]
    assert ours == real
