"""A network device moves into a network namespace that the test makes."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator

import pytest

from apptainer_py.host import netlink

pytestmark = pytest.mark.usefixtures("require_root")


def ip(*words: str, pid: int | None = None) -> str:
    enter = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
    done = subprocess.run([*enter, "ip", *words], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def inside() -> Iterator[int]:
    argv = ["unshare", "-n", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def device() -> Iterator[str]:
    name = f"ap{uuid.uuid4().hex[:8]}"
    ip("link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    yield name
    subprocess.run(["ip", "link", "del", f"{name}p"], check=True)


def test_a_device_keeps_its_permanent_addresses(inside, device):
    ip("address", "add", "192.0.2.7/24", "dev", device)
    ip("address", "add", "2001:db8::7/64", "dev", device, "nodad")
    ip("link", "set", device, "up")
    netlink.move_devices({device: "eth7"}, inside)
    shown = ip("-o", "address", "show", "dev", "eth7", pid=inside)
    assert "192.0.2.7/24" in shown
    assert "2001:db8::7/64" in shown
    assert "UP" in ip("-o", "link", "show", "dev", "eth7", pid=inside).split(">")[0]
    assert device not in [word.split("@")[0] for word in ip("-o", "link").replace(":", " ").split()]


def test_a_missing_device_is_named(inside):
    with pytest.raises(netlink.NetlinkError, match=r'"nosuch0".*no such device'):
        netlink.move_devices({"nosuch0": "eth0"}, inside)
