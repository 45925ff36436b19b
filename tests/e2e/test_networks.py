"""Networks of a launch: what each kind shows inside, and what nobody finds on the host after."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation, eventually

NEEDS_ROOT = "is for root, and in the setuid flow for those"


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
    assert NEEDS_ROOT in done.stderr.splitlines()[-2], done.stderr


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


@pytest.fixture
def tun() -> Iterator[None]:
    """Let users open /dev/net/tun, as they may on most machines."""
    device = Path("/dev/net/tun")
    if not device.exists() or not Path("/usr/bin/pasta").exists():
        pytest.skip("no /dev/net/tun or no pasta: run ./check")
    before = device.stat().st_mode & 0o7777
    device.chmod(0o666)
    yield
    device.chmod(before)


def pastas() -> set[int]:
    """Return the numbers of all processes of pasta's program."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if place.joinpath("comm").read_text().startswith(("pasta", "passt")):
                found.add(int(place.name))
        except OSError:
            continue
    return found


USER = ("exec", "--net", "--network", "user")


@pytest.mark.parametrize("flow", FLOWS)
def test_a_network_without_privilege(
    installed: Installation, sif: Path, tun: None, flow: str
) -> None:
    before = pastas()
    script = (
        "tail -n +3 /proc/net/dev | cut -d: -f1; ls /sys/class/net; wc -l </proc/net/route; id -u"
    )
    done = run(installed.program, flow, [*USER, sif, "sh", "-c", script])
    words = done.stdout.split()
    assert done.stderr == ""
    assert words.count("lo") == 2
    assert len(words) == 6
    assert words[4] == "3"  # a default route and one for the network itself
    assert words[5] == ("0" if flow == "root" else str(installed.user.pw_uid))
    eventually(lambda: pastas() <= before, "pasta has ended")


@pytest.mark.parametrize("flow", FLOWS)
def test_a_port_of_the_user(installed: Installation, sif: Path, tun: None, flow: str) -> None:
    before = pastas()
    more = ["-u"] if flow == "userns" else []
    ids = {} if flow == "root" else installed.identity()
    words = [*USER, *more, "--network-args", "portmap=18124:8080/tcp", sif]
    started = subprocess.Popen(
        [installed.program, *words, "sh", "-c", "echo hello | nc -l -p 8080"],
        env=installed.environment(), cwd="/", **ids,
    )  # fmt: skip

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", 18124), 3) as one:
                return one.recv(16) == b"hello\n"
        except OSError:
            return False

    try:
        eventually(answers, "the payload answers")
        assert started.wait(20) == 0
    finally:
        started.kill()
        started.wait(20)
    eventually(lambda: pastas() <= before, "pasta has ended")


@pytest.mark.parametrize("flow", ["setuid", "userns"])
def test_pasta_ends_with_a_launch_that_is_killed(
    installed: Installation, sif: Path, tun: None, flow: str
) -> None:
    before = pastas()
    more = ["-u"] if flow == "userns" else []
    started = subprocess.Popen(
        [installed.program, *USER, *more, sif, "sh", "-c", "echo ran; exec sleep 60"],
        env=installed.environment(), cwd="/", stdout=subprocess.PIPE, **installed.identity(),
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == b"ran\n"
    assert pastas() - before
    family = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.kill()
    for pid in family:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.communicate(timeout=20)
    eventually(lambda: pastas() <= before, "pasta has ended")


@pytest.mark.parametrize("flow", ["setuid", "userns"])
def test_without_its_device_there_is_no_such_network(
    installed: Installation, sif: Path, tun: None, flow: str
) -> None:
    before = pastas()
    Path("/dev/net/tun").chmod(0o600)
    done = run(installed.program, flow, [*USER, sif, "echo", "ran"])
    assert (done.returncode, done.stdout) == (255, "")
    why = "permission denied: ask your administrator for mode 0666"
    assert f"the network user cannot be set up: /dev/net/tun: {why}\n" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    eventually(lambda: pastas() <= before, "pasta has ended")


@pytest.mark.parametrize("flow", ["setuid", "userns"])
@pytest.mark.parametrize(
    ("argument", "said"),
    [("portmap=80:80/tcp", "host port 80/tcp cannot be used: permission denied"),
     ("portmap=8080:80/sctp", "the network user passes on tcp and udp, and no sctp"),
     ("portmap=8096:80/tcp;portmap=8096:81/tcp", "8096/tcp cannot be used: address already in use"),
     ("IP=10.0.0.1", "takes no argument but portmap"), ("x", "invalid argument: x")],
)  # fmt: skip
def test_arguments_of_that_network(
    installed: Installation, sif: Path, flow: str, argument: str, said: str
) -> None:
    done = run(installed.program, flow, [*USER, "--network-args", argument, sif, "true"])
    assert done.returncode == 255
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def space() -> Iterator[str]:
    """The path of a network namespace that root has made."""
    name = f"apytest-{os.getpid()}"
    had = Path("/run/netns").exists()
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    if not had:
        subprocess.run(["umount", "/run/netns"], check=False, capture_output=True)
        Path("/run/netns").rmdir()


def inode(path: str) -> str:
    return f"net:[{Path(path).stat().st_ino}]"


def test_a_namespace_that_is_there(own: Installation, sif: Path, space: str) -> None:
    words = ("exec", "--netns-path", space, sif, "readlink", "/proc/self/ns/net")
    refusal = f'FATAL:   "{space}" is not an allowed netns path in apptainer-py.conf\n'
    assert own.run(*words, root=True).stdout.strip() == inode(space)
    user = own.user.pw_name
    for text in ("", f"allow netns paths = {space}", f"allow net users = {user}",
                 f"allow netns paths = {space}x\nallow net users = {user}",
                 f"allow netns paths = {space}\nallow net users = root"):  # fmt: skip
        own.configure(text)
        done = own.run(*words)
        assert (done.returncode, done.stderr) == (255, refusal)
    own.configure(f"allow netns paths = {space}\nallow net users = {user}")
    assert own.run(*words).stdout.strip() == inode(space)
    assert own.run("exec", "-u", *words[1:]).stderr == refusal
    own.configure(f"allow netns paths = {space}\nallow net groups = {user}")
    assert own.run(*words).stdout.strip() == inode(space)


@pytest.mark.parametrize("path", ["/etc/passwd", "/nope", "/proc/self/ns/uts", "/proc/self/ns/net"])
def test_what_is_no_such_namespace(own: Installation, sif: Path, path: str) -> None:
    done = own.run("exec", "--netns-path", path, sif, "true")
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:   ")
    assert len(done.stderr.splitlines()) == 1
