"""podman, buildah, containerd and docker with storage of their own, and a runtime given by path."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import images
from tests.oci import bed as beds
from tests.oci.runtimes import (
    expect_differences,
    pytest_generate_tests,
    runtime,
    runtime_of,
)

__all__ = ["pytest_generate_tests", "runtime"]

# A hard limit cannot be raised without CAP_SYS_RESOURCE, which the default of podman asks for.
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "rut"
runtime_supports_json = ["rut"]
runtime_supports_nocgroup = ["rut"]
tmp_dir = "{place}/tmp"
[engine.runtimes]
rut = ["{program}"]
[network]
network_backend = "netavark"
"""
STORAGE = '[storage]\ndriver = "{driver}"\ngraphroot = "{place}/root"\nrunroot = "{place}/run"\n'
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expect_differences(items)
    for item in items:
        # The clients with runc show that a test is right; ours shows that we are.
        if runtime_of(item) == "runc":
            item.add_marker(pytest.mark.long)


def program(name: str) -> str:
    """Return a client's path; where it is not installed the test says that it did not run."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        pytest.skip(f"did not run: {name} is not installed")
    return found


# The first process of a pid namespace: clients wait for what they have orphaned to be reaped at
# once, and not every process 1 does so. All that a client leaves ends with it.
REAPER = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
os.write(1, b"ready")
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


class Household:
    """Namespaces of mounts and processes in which a client runs."""

    def __init__(self) -> None:
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*argv, sys.executable, "-c", REAPER], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.read(5) == b"ready"
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        self.first = int(Path(children).read_text())

    def enter(self) -> list[str]:
        """Return the words before a command that runs in it."""
        return ["nsenter", "--target", str(self.first), "--mount", "--pid"]

    def end(self) -> None:
        """End all of it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def household(require_root: None) -> Iterator[Household]:
    made = Household()
    yield made
    made.end()


class Client:
    """A client of the runtime's, with everything that it writes below one directory."""

    def __init__(
        self, household: Household, place: Path, name: str, environment: dict[str, str]
    ) -> None:
        self.household = household
        self.place = place
        self.argv = [*household.enter(), name]
        self.environment = environment

    def read(self, path: str) -> str:
        """Return the content of a file as the client sees it."""
        argv = [*self.household.enter(), "cat", path]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def call(self, *words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the client's."""
        if "input" not in how:
            how.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [*self.argv, *(str(word) for word in words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            **how,
        )

    def good(self, *words: str | Path, **how: Any) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.call(*words, **how)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout


def storage_driver(place: Path) -> str:
    """Return overlay where a file system allows it as an upper directory, else vfs."""
    for name in ("lower", "upper", "work", "merged"):
        (place / "trial" / name).mkdir(parents=True)
    trial = place / "trial"
    options = f"lowerdir={trial}/lower,upperdir={trial}/upper,workdir={trial}/work"
    argv = ["mount", "-t", "overlay", "overlay", "-o", options, str(trial / "merged")]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        return "vfs"
    subprocess.run(["umount", str(trial / "merged")], check=True)
    return "overlay"


def containers_environment(place: Path, runtime_program: str) -> dict[str, str]:
    """Write the configuration of podman and buildah; return their environment."""
    driver = storage_driver(place)
    texts = {"containers.conf": CONFIGURATION, "storage.conf": STORAGE}
    for name, text in texts.items():
        (place / name).write_text(text.format(place=place, program=runtime_program, driver=driver))
    (place / "home/.config/containers").mkdir(parents=True)
    (place / "home/.config/containers/policy.json").write_text(POLICY)
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(place / "home"),
        "CONTAINERS_CONF": str(place / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(place / "storage.conf"),
        "XDG_RUNTIME_DIR": "",
        "TMPDIR": str(place),
    }


@pytest.fixture(scope="module")
def client_place(runtime: beds.Runtime) -> Iterator[Path]:
    """A directory for the clients of one runtime.

    Its name is short: with a longer one podman 4.3 waits twenty seconds for each container's end,
    because the socket that conmon tells it on has a path that does not fit.
    """
    made = Path(tempfile.mkdtemp(prefix="apy", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


CLIENTS_GROUPS = ("libpod_parent", "default", "docker")


@pytest.fixture(scope="module")
def client_groups() -> Iterator[None]:
    """The clients make cgroups for all their containers, and leave them when they end.

    Those that were there before, and those in use, stay.
    """
    places = set(beds.hierarchies().values())
    paths = [Path(place, name) for place in places for name in CLIENTS_GROUPS]
    before = {path for path in paths if path.is_dir()}
    yield
    for path in paths:
        if path not in before and path.is_dir():
            for folder, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


@pytest.fixture(scope="module")
def podman(
    runtime: beds.Runtime, client_place: Path, household: Household, client_groups: None
) -> Iterator[Client]:
    """podman with an image named busybox."""
    place = client_place / "p"
    (place / "tmp").mkdir(parents=True)
    environment = containers_environment(place, runtime.program)
    made = Client(household, place, program("podman"), environment)
    made.good("pull", "--quiet", f"oci-archive:{images.archive()}")
    identifier = made.good("images", "--quiet", "--no-trunc").split()[0]
    made.good("tag", identifier, images.NAME)
    yield made
    made.call("rm", "--all", "--force", "--time", "0")
    made.call("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def buildah(runtime: beds.Runtime, client_place: Path, household: Household) -> Iterator[Client]:
    """buildah with an image named busybox."""
    place = client_place / "b"
    (place / "tmp").mkdir(parents=True)
    environment = containers_environment(place, runtime.program)
    made = Client(household, place, program("buildah"), environment)
    made.good("pull", "--quiet", f"oci-archive:{images.archive()}")
    identifier = made.good("images", "--quiet", "--no-trunc").split()[0]
    made.good("tag", identifier, images.NAME)
    yield made
    made.call("rm", "--all")
    made.call("rmi", "--all", "--force")


CONTAINERD = """\
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{place}/s"
[ttrpc]
  address = "{place}/t"
"""


@pytest.fixture(scope="module")
def containerd(runtime: beds.Runtime, client_groups: None) -> Iterator[Client]:
    """ctr with a daemon of its own, an image, and the options that choose the runtime."""
    daemon, ctr = program("containerd"), program("ctr")
    household = Household()
    # Paths of sockets are short.
    place = Path(tempfile.mkdtemp(prefix="apyc-", dir="/run"))
    (place / "config.toml").write_text(CONTAINERD.format(place=place))
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(place)}
    with open(place / "log", "w") as log:
        argv = [*household.enter(), daemon, "--config", str(place / "config.toml")]
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    made = Client(household, place, ctr, environment)
    made.argv += ["--address", str(place / "s")]
    try:
        beds.eventually(
            lambda: made.call("version").returncode == 0, (place / "log").read_text()[-500:]
        )
        made.good("images", "import", "--snapshotter", "overlayfs", images.archive())
        yield made
        for name in made.good("containers", "list", "--quiet").split():
            made.call("tasks", "delete", "--force", name)
            made.call("containers", "delete", name)
    finally:
        household.end()
        process.wait(timeout=30)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def docker(runtime: beds.Runtime, client_groups: None) -> Iterator[Client]:
    """docker with a daemon of its own, an image named busybox, and no network but the host's."""
    daemon, client = program("dockerd"), program("docker")
    household = Household()
    # Paths of sockets are short.
    place = Path(tempfile.mkdtemp(prefix="apyd-", dir="/run"))
    settings = {
        "data-root": str(place / "data"),
        "exec-root": str(place / "exec"),
        "pidfile": str(place / "pid"),
        "hosts": [f"unix://{place}/s"],
        "runtimes": {"rut": {"path": runtime.program}},
        "default-runtime": "rut",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "storage-driver": "overlay2",
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "ip-masq": False,
        # A hard limit cannot be raised without CAP_SYS_RESOURCE.
        "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 1024, "Soft": 1024}},
    }
    (place / "daemon.json").write_text(json.dumps(settings))
    # The tree of images lies on a file system that overlay takes as an upper directory.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(place)}
    with open(place / "log", "w") as log:
        argv = [*household.enter(), daemon, "--config-file", str(place / "daemon.json")]
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    made = Client(household, place, client, environment)
    made.argv += ["--host", f"unix://{place}/s"]
    try:
        beds.eventually(
            lambda: made.call("version").returncode == 0, (place / "log").read_text()[-500:]
        )
        made.good("import", "--change", 'CMD ["sh"]', images.layer_file(), images.NAME)
        yield made
        for name in made.good("ps", "--all", "--quiet").split():
            made.call("rm", "--force", name)
    finally:
        household.end()
        process.wait(timeout=30)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names of containers that are nobody else's."""
    yield [f"apytest{os.getpid()}x{number}" for number in range(4)]
