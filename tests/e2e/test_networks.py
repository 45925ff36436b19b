"""Networks of a launch: what each kind shows inside, and what nobody finds on the host after."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation

NEEDS_ROOT = "not supported yet for users other than root"


@pytest.mark.parametrize("flow", FLOWS)
def test_no_network_is_a_loopback_that_works(installed: Installation, sif: Path, flow: str) -> None:
    script = (
        "tail -n +3 /proc/net/dev | cut -d: -f1; ls /sys/class/net; readlink /proc/self/ns/net;"
        "(echo hello | nc -l -p 5000 127.0.0.1 &) ; sleep 0.2; nc 127.0.0.1 5000 </dev/null"
    )
    done = run(installed.program, flow, ["exec", "--network", "none", sif, "sh", "-c", script])
    inside = done.stdout.split()
    assert inside[:2] == ["lo", "lo"], done.stderr
    assert inside[2] != str(Path("/proc/self/ns/net").readlink())
    assert inside[3] == "hello"
    assert done.stderr == "INFO:    Setting --net (required by --network)\n"


@pytest.mark.parametrize("flow", FLOWS)
def test_with_net_nothing_is_said(installed: Installation, sif: Path, flow: str) -> None:
    done = run(installed.program, flow, ["exec", "--net", "--network", "none", sif, "true"])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flow", ["setuid", "userns"])
@pytest.mark.parametrize("words", [("--net",), ("--network", "bridge"), ("--network", "none,x")])
def test_other_networks_need_root(
    installed: Installation, sif: Path, flow: str, words: tuple[str, ...]
) -> None:
    done = run(installed.program, flow, ["exec", *words, sif, "true"])
    assert done.returncode == 255
    assert NEEDS_ROOT in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("flow", FLOWS)
def test_name_servers(installed: Installation, sif: Path, flow: str) -> None:
    def exec_with(servers: str):
        return run(
            installed.program, flow, ["exec", "--dns", servers, sif, "cat", "/etc/resolv.conf"]
        )

    assert exec_with("8.8.8.8,::1").stdout == "nameserver 8.8.8.8\nnameserver ::1\n"
    for wrong, word in (("bad", "bad"), ("8.8.8.8,", "")):
        done = exec_with(wrong)
        assert done.returncode == 255
        text = f"dns ip {word} is not a valid IP address\n"
        assert done.stderr == f"FATAL:   container creation failed: {text}"


@pytest.mark.parametrize("flow", FLOWS)
def test_a_host_name_of_its_own(installed: Installation, sif: Path, flow: str) -> None:
    words = ["exec", "--net", "--network", "none", "--hostname", "inside", sif, "uname", "-n"]
    assert run(installed.program, flow, words).stdout == "inside\n"
