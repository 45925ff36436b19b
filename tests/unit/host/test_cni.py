"""CNI networks: files that are root's, arguments of a strict alphabet, what plugins read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.host import cni

CHAIN: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "lan",
    "plugins": [
        {"type": "bridge", "ipam": {"type": "host-local"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of whoever runs the tests count as root's."""
    if os.geteuid() != 0:
        pytest.skip("needs files of root")


def write(place: Path, name: str, value: object) -> Path:
    path = place / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    path.chmod(0o644)
    place.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("said", "address"),
    [
        (b'{"ips": [{"address": "10.22.0.5/16", "interface": 2}]}', "10.22.0.5"),
        (b'{"ips": [{"address": "fd00::5/64"}, {"address": "10.22.0.5/16"}]}', "10.22.0.5"),
        (b'{"ips": [{"address": "fd00::5/64"}]}', "fd00::5"),
        (b'{"cniVersion": "0.2.0", "ip4": {"ip": "10.22.0.5/16"}}', "10.22.0.5"),
        (b'{"cniVersion": "1.0.0"}', ""),
        (b'{"ips": [{"addr": 1}]}', ""),
        (b'{"ips": 1}', ""),
        (b"[]", ""),
        (b"", ""),
    ],
)
def test_where_a_container_is_to_be_found(said: bytes, address: str) -> None:
    assert cni.address_of(said) == address


def test_a_wrong_file_behind_those_that_are_wanted_is_nobodys_concern(
    own: None, tmp_path: Path
) -> None:
    write(tmp_path, "10.conflist", CHAIN)
    write(tmp_path, "20.conflist", "{")
    assert cni.find_networks(str(tmp_path), ("lan",))
    with pytest.raises(cni.NetworkWrong, match=r"20\.conflist"):
        cni.find_networks(str(tmp_path), ("lan", "other"))


def test_the_first_file_of_a_name_counts(own: None, tmp_path: Path) -> None:
    write(tmp_path, "10.conflist", CHAIN)
    write(tmp_path, "20.conflist", {**CHAIN, "plugins": [{"type": "other"}]})
    write(tmp_path, "30.conf", {"name": "one", "type": "ptp"})
    write(tmp_path, "README", "no network")
    lan, one = cni.find_networks(str(tmp_path), ("lan", "one"))
    assert [plugin["type"] for plugin in lan.plugins] == ["bridge", "portmap"]
    assert (one.version, one.plugins[0]["type"]) == ("0.2.0", "ptp")


def test_an_unknown_name(own: None, tmp_path: Path) -> None:
    write(tmp_path, "10.conflist", CHAIN)
    with pytest.raises(cni.NetworkWrong, match='no net configuration with name "x"'):
        cni.find_networks(str(tmp_path), ("x",))
    with pytest.raises(cni.NetworkWrong, match="no such file or directory"):
        cni.find_networks(str(tmp_path / "no"), ("x",))


@pytest.mark.parametrize(
    "value",
    [
        "[]", "{", '{"name": "x"}', '{"name": "../x", "type": "a"}', '{"name": "x", "type": "/a"}',
        '{"name": "x", "plugins": []}', '{"name": "x", "plugins": [1]}', '{"name": 1, "type": "a"}',
        '{"name": "x", "plugins": {"type": "a"}}', "[" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_network(own: None, tmp_path: Path, value: str) -> None:
    path = write(tmp_path, "10.conflist", value)
    with pytest.raises(cni.NetworkWrong) as caught:
        cni.find_networks(str(tmp_path), ("x",))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_somebody_else_could_change(own: None, tmp_path: Path) -> None:
    path = write(tmp_path, "10.conflist", CHAIN)
    spoilt = ((path, "chmod", 0o666), (path, "chown", 1), (tmp_path, "chmod", 0o777),
              (tmp_path, "chown", 1))  # fmt: skip
    for target, how, value in spoilt:
        if how == "chmod":
            target.chmod(value)
        else:
            os.chown(target, value, value)
        with pytest.raises(cni.NetworkWrong, match="must belong to root"):
            cni.find_networks(str(tmp_path), ("lan",))
        os.chown(target, 0, 0)
        target.chmod(0o755)
    assert cni.find_networks(str(tmp_path), ("lan",))


def test_arguments_belong_to_a_network() -> None:
    words = ("IP=10.0.0.2;MAC=02:00:00:00:00:01", "b:portmap=8080:80/tcp;X=y", "portmap=53/udp")
    first, second = cni.parse_arguments(words, ("a", "b"))
    assert first.text() == "IP=10.0.0.2;MAC=02:00:00:00:00:01"
    assert first.ports == [{"hostPort": 53, "containerPort": 53, "protocol": "udp"}]
    assert second.text() == "X=y"
    assert second.ports == [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]


@pytest.mark.parametrize(
    "word",
    [
        "foo", "", "=x", "K=", "K=a b", "K=a\nb", "K=a;;", "K=a;CNI_PATH", "K=$(x)", "K='x'", "K=é",
        "K=" + "a" * 200, "a b=c", "../x=1", "c:IP=1", "portmap=80:80", "portmap=0:80/tcp",
        "portmap=99999:80/tcp", "portmap=80:x/tcp", "portmap=80:80/icmp", "portmap=-1:80/tcp",
        "portmap=٣:80/tcp",
    ],
)  # fmt: skip
def test_arguments_that_could_be_more(word: str) -> None:
    with pytest.raises(cni.NetworkWrong, match="error while setting network arguments") as caught:
        cni.parse_arguments((word,), ("a",))
    assert str(caught.value).startswith("container creation failed: ")


def test_ports_need_a_plugin_that_passes_them_on() -> None:
    arguments = cni.parse_arguments(("portmap=80/tcp",), ("lan",))[0]
    able = cni.Network(name="lan", version="1.0.0", plugins=tuple(CHAIN["plugins"]))
    cni.check_use(able, arguments)
    unable = cni.Network(name="lan", version="1.0.0", plugins=tuple(CHAIN["plugins"][:1]))
    cni.check_use(unable, cni.Arguments())
    with pytest.raises(cni.NetworkWrong, match="the network lan passes no port on"):
        cni.check_use(unable, arguments)


@pytest.mark.parametrize(
    ("error", "said", "reason"),
    [
        (0, b'{"code": 7, "msg": "no\\nroom"}', "no room"),
        (0, b"", "it gave no reason"),
        (0, b"nonsense", "it gave no reason"),
        (0, b"[" * 5000, "it gave no reason"),
        (2, b"", "/x/bridge: no such file or directory"),
        (62, b"", "it did not end within a minute, and was killed"),
    ],
)
def test_why_a_plugin_failed(error: int, said: bytes, reason: str) -> None:
    assert cni.plugin_reason("/x/bridge", error, said) == reason
