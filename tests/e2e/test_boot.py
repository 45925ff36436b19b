"""`instance start --boot`: the image's own init is the first process of an instance."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.test_instances import STARTED, Instances
from tests.own_install import eventually

NAME = "apy-test-boot"
OPTIONS = ("--boot", "--network", "none")
LACKING = 1 << 17 | 1 << 22  # CAP_SYS_RAWIO, CAP_SYS_BOOT
SCRIPT = """#!/bin/sh
echo up
trap 'echo over >&2; exit 0' {signal}
while :; do sleep 0.05; done
"""
INITTAB = "::sysinit:/bin/echo up\n::shutdown:/bin/echo over\n"


@pytest.fixture(params=["root", "userns"])
def own(request: pytest.FixtureRequest, product, require_root) -> Iterator[Instances]:
    """Root in its two flows; both times by root itself."""
    made = Instances(product.program, "root")
    made.flow = request.param
    made.forget()
    yield made
    made.forget()
    assert made.listed() == {}


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    made = images.shared_folder() / "boots"
    shutil.copytree(images.small_tree(images.shared_folder()), made, symlinks=True)
    yield made
    shutil.rmtree(made)


def init(tree: Path, text: str = "") -> Path:
    """Give the image an init: this script, or busybox's."""
    place = tree / "sbin/init"
    place.unlink(missing_ok=True)
    if text:
        place.write_text(text)
        place.chmod(0o755)
    else:
        place.symlink_to("/bin/busybox")
        (tree / "etc/inittab").write_text(INITTAB)
    return tree


def status_of(pid: object) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_what_it_is(own: Instances, tree: Path) -> None:
    done = own.start(*OPTIONS, init(tree, SCRIPT.format(signal="INT")), NAME, "ignored")
    assert (done.returncode, done.stderr) == (0, STARTED)
    eventually(lambda: own.log(NAME) == "up\n", "init has begun")
    pid = own.listed()[NAME]["pid"]
    found = status_of(pid)
    assert (found["Name"], found["NSpid"].split()[-1], found["NoNewPrivs"]) == ("init", "1", "0")
    held = int(found["CapPrm"], 16)
    assert held & LACKING == 0
    assert held & 1 << 21  # CAP_SYS_ADMIN: an init mounts
    for space in ("pid", "mnt", "net", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{space}") != os.readlink(f"/proc/self/ns/{space}")
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {b"container=apptainer", b"APPTAINER_INSTANCE=" + NAME.encode()} <= {*entries}
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"/bin/sh\0/sbin/init\0"
    assert not Path(f"/proc/{pid}/root{Path(__file__).parent}").exists()
    inside = own.run(
        "exec", f"instance://{NAME}", "sh", "-c", "uname -n; cat /proc/1/comm; ls /tmp"
    )
    assert inside.stdout == f"{NAME}\ninit\n", inside.stderr
    stopped = own.run("instance", "stop", NAME)
    assert (stopped.returncode, stopped.stderr.count("\n")) == (0, 1)
    assert own.log(NAME, "err").endswith("over\n")
    assert not Path(f"/proc/{pid}").exists()


def test_only_what_was_booted_may_be_any_program(own: Instances, tree: Path) -> None:
    """Of other instances the first process is our own program, whatever it calls itself."""
    named = SCRIPT.replace("echo up", "printf appinit >/proc/$$/comm\necho up")
    script = named.format(signal="INT")
    assert own.start(*OPTIONS, init(tree, script), NAME).returncode == 0
    eventually(lambda: own.log(NAME) == "up\n", "init has begun")
    record = own.record(NAME)
    said = json.loads(record.read_text())
    assert own.run("exec", f"instance://{NAME}", "true").returncode == 0
    try:
        record.write_text(json.dumps({**said, "booted": False}))
        listed = own.listed()
        done = own.run("exec", f"instance://{NAME}", "true")
    finally:
        record.write_text(json.dumps(said))
    assert NAME in listed
    assert (done.returncode, "the process is no instance of yours" in done.stderr) == (255, True)


def test_its_own_signal_ends_it(own: Instances, tree: Path) -> None:
    """Busybox's init powers off at SIGUSR2; as it has no right to, the kernel ends it."""
    assert own.start(*OPTIONS, init(tree), NAME).returncode == 0
    eventually(lambda: own.log(NAME) == "up\n", "init has begun")
    stopped = own.run("instance", "stop", "--timeout", "30", NAME)
    assert stopped.returncode == 0, stopped.stderr
    assert own.log(NAME).startswith("up\nover\n")


def test_a_signal_that_is_asked_for(own: Instances, tree: Path) -> None:
    assert own.start(*OPTIONS, init(tree, SCRIPT.format(signal="37")), NAME).returncode == 0
    eventually(lambda: own.log(NAME) == "up\n", "init has begun")
    assert own.run("instance", "stop", "-s", "SIGRTMIN+3", NAME).returncode == 0
    assert own.log(NAME, "err").endswith("over\n")
    bad = own.run("instance", "stop", "-s", "SIGRTMIN+99", NAME)
    assert (bad.returncode, "is not a number" in bad.stderr) == (255, True)


def test_capabilities_that_root_keeps(own: Instances, tree: Path) -> None:
    words = ("--keep-privs", *OPTIONS, init(tree, SCRIPT.format(signal="INT")), NAME)
    assert own.start(*words).returncode == 0
    assert int(status_of(own.listed()[NAME]["pid"])["CapPrm"], 16) & LACKING == LACKING


def test_its_end_frees_the_name(own: Instances, tree: Path) -> None:
    assert own.start(*OPTIONS, init(tree, "#!/bin/sh\nexit 3\n"), NAME).returncode == 0
    eventually(lambda: own.listed() == {}, "the instance has ended")


def test_an_image_without_init(own: Instances, tree: Path) -> None:
    (tree / "sbin/init").unlink(missing_ok=True)
    done = own.start(*OPTIONS, tree, NAME)
    assert done.returncode in (0, 255)
    text = "--boot: /sbin/init does not exist in container, or is no program"
    assert text in done.stderr + own.log(NAME, "err")
    eventually(lambda: own.listed() == {}, "nothing runs")


@pytest.mark.parametrize("option", ["-s", "-u", "-f"])
def test_users_may_not(product, tree: Path, option: str) -> None:
    user = Instances(product.program, "setuid")
    words = ["instance", "start", "--boot", init(tree, SCRIPT.format(signal="INT")), NAME]
    done = user.run(*([option, *words] if option == "-s" else [*words[:2], option, *words[2:]]))
    assert done.returncode == 255
    assert done.stderr == "FATAL:   Could not configure --boot: --boot requires root privileges\n"
    assert user.listed() == {}
