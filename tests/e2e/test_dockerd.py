"""`docker-daemon:` with a real dockerd of the test's own, and the real Apptainer beside us."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import docker_images, images
from tests.e2e.three_flows import good, run_at
from tests.own_install import eventually

DAEMON, CLIENT = "/usr/sbin/dockerd", "/usr/bin/docker"
REAL = "/usr/bin/apptainer"
# It starts a containerd of its own; how long that takes is the machine's matter.
STARTS_S = 60
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (os.path.exists(DAEMON) and os.path.exists(CLIENT)),
        reason="did not run: dockerd or docker is not installed",
    ),
]


@pytest.fixture(scope="module")
def docker(require_root: None) -> Iterator[SimpleNamespace]:
    """A daemon in namespaces of its own, at whose socket everybody may ask."""
    place = Path(tempfile.mkdtemp(prefix="apyd-", dir="/run"))  # paths of sockets are short
    place.chmod(0o755)
    address = f"unix://{place}/s"
    settings = {
        "data-root": str(place / "data"),
        "exec-root": str(place / "exec"),
        "pidfile": str(place / "pid"),
        "hosts": [address],
        "storage-driver": "vfs",
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "ip-masq": False,
    }
    (place / "daemon.json").write_text(json.dumps(settings))
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(place)}
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*argv, DAEMON, "--config-file", place / "daemon.json"],
            env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CLIENT, "--host", address, *words],
            env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip

    try:
        eventually(lambda: call("version").returncode == 0, "dockerd answers", STARTS_S)
        (place / "s").chmod(0o666)
        yield SimpleNamespace(call=call, address=address, place=place)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def loaded(docker: SimpleNamespace) -> SimpleNamespace:
    """The daemon with an image of two layers that it has loaded."""
    busybox = Path("/bin/busybox").read_bytes()
    lower = docker_images.layer(*((f"bin/{name}", busybox) for name in ("busybox", "sh", "echo")))
    archive = docker.place / "d.tar"
    docker_images.image(archive, lower, docker_images.layer(("mine", b"x")))
    done = docker.call("load", "--input", archive)
    assert done.returncode == 0, done.stderr
    return docker


@pytest.fixture
def home(require_root: None) -> Iterator[Path]:
    user = images.ordinary_user()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-home-", dir="/var/tmp"))
    os.chown(made, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_an_image_of_the_daemon(
    loaded: SimpleNamespace, product: SimpleNamespace, home: Path, who: str
) -> None:
    if who == "theirs" and not images.have_real_apptainer():
        pytest.skip("did not run: no real Apptainer on this machine")
    program = product.program if who == "ours" else REAL
    uri, at = f"docker-daemon:{docker_images.NAME}", {"DOCKER_HOST": loaded.address}
    good(run_at(home, program, "build", "built.sif", uri, **at))
    good(run_at(home, program, "pull", "pulled.sif", uri, **at))
    # What either has made, both start.
    for starter in (product.program, program):
        for image in ("built.sif", "pulled.sif"):
            assert good(run_at(home, starter, "run", image)) == "from docker\n"
    assert good(run_at(home, program, "exec", uri, "echo", "x", **at)) == "x\n"


def test_a_change_of_the_daemons_is_seen(
    loaded: SimpleNamespace, product: SimpleNamespace, home: Path
) -> None:
    """The same name for another image: what is in the cache is not taken for it."""
    at = {"DOCKER_HOST": loaded.address}
    name = "localhost/changes:1"
    for number in (1, 2):
        layer = loaded.place / f"{number}.tar"
        layer.write_bytes(
            docker_images.layer(
                ("bin/sh", Path("/bin/busybox").read_bytes()), ("number", f"{number}\n".encode())
            )
        )
        assert loaded.call("import", layer, name).returncode == 0
        words = ("exec", f"docker-daemon:{name}", "sh", "-c", "read x < /number; echo $x")
        assert good(run_at(home, product.program, *words, **at)) == f"{number}\n"


def test_what_the_daemon_does_not_have(
    loaded: SimpleNamespace, product: SimpleNamespace, home: Path
) -> None:
    done = run_at(
        home, product.program, "build", "x.sif", "docker-daemon:none:1", DOCKER_HOST=loaded.address
    )
    assert done.returncode == 255 and "No such image: none:1" in done.stderr
    assert not (home / "x.sif").exists()
