"""Drivers of accelerators: a made-up driver, found by a made-up loader's cache, in each flow."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation

LIBC = next(Path("/lib").glob("*-linux-gnu/libc.so.6"))
SHOW = ("sh", "-c", "cd /.singularity.d/libs && for f in *; do echo $f $(wc -c <$f); done")
DEVICES = ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1")
Run = Callable[..., subprocess.CompletedProcess[str]]


def named_library(path: Path, soname: str) -> None:
    """Make a library that calls itself by another name than its file has."""
    argv = ["gcc", "-shared", "-nostdlib", "-x", "c", "/dev/null", f"-Wl,-soname,{soname}", "-o"]
    subprocess.run([*argv, path], check=True, timeout=60)


class Driver:
    """A tree with the files of a driver, and the programs that know where they are."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.tools = place / "tools"
        self.libraries = place / "lib"
        for folder in (self.tools, self.libraries):
            folder.mkdir()
        self.listed: list[str] = []
        self.library("libcuda.so.1")
        self.library("libnvidia-ml.so.1")
        self.library("libunrelated.so.1")
        small = bytearray(LIBC.read_bytes()[:4096])
        small[4], small[18] = 1, 3
        self.library("libcuda.so.1", bytes(small), folder="lib32")
        self.program("nvidia-smi", "echo smi of the host")
        self.data = place / "icd.json"
        self.data.write_text("{}")
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)

    def library(self, name: str, content: bytes = b"", *, folder: str = "lib") -> None:
        path = self.place / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content or LIBC.read_bytes())
        self.listed.append(f"\t{name} (libc6) => {path}")
        self.program("ldconfig", "cat <<'END'\n" + "\n".join(self.listed) + "\nEND")

    def program(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @property
    def search(self) -> dict[str, str]:
        return {"PATH": f"{self.tools}:/usr/bin:/bin"}


@pytest.fixture
def driver(installed: Installation) -> Iterator[Driver]:
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-driver-", dir="/var/tmp"))
    made = Driver(place)
    installed.restore()
    before = {
        name: (installed.sysconfdir / name).read_bytes()
        for name in ("nvliblist.conf", "rocmliblist.conf")
    }
    installed.configure(f"binary path = {made.tools}:/usr/bin:/bin\nbind path = /etc/hosts")
    lines = f"libcuda.so\nlibnvidia-ml.so\nnvidia-smi\n{made.data}\n/absent/file\nlibabsent.so\n"
    (installed.sysconfdir / "nvliblist.conf").write_text(lines)
    (installed.sysconfdir / "rocmliblist.conf").write_text("libunrelated.so\n")
    yield made
    for name, content in before.items():
        (installed.sysconfdir / name).write_bytes(content)
    installed.restore()
    shutil.rmtree(place)


@pytest.fixture
def launch(installed: Installation, driver: Driver) -> Run:
    def launch(
        flow: str, *words: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return run(installed.program, flow, words, env={**driver.search, **(env or {})})

    return launch


@pytest.fixture(scope="module")
def devices() -> Iterator[Sequence[str]]:
    """Nodes named as NVIDIA's; they lead to /dev/null."""
    made = []
    Path("/dev/nvidia-caps").mkdir()
    for name in DEVICES:
        path = Path("/dev", name)
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.chmod(0o666)
        made.append(path)
    yield DEVICES
    for path in made:
        path.unlink()
    Path("/dev/nvidia-caps").rmdir()


def ran(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flow", FLOWS)
def test_nv_brings_libraries_programs_and_files(launch: Run, sif: Path, flow: str,
                                                driver: Driver) -> None:  # fmt: skip
    done = launch(flow, "exec", "--nv", sif, *SHOW)
    size = LIBC.stat().st_size
    assert ran(done).splitlines() == [f"libcuda.so.1 {size}", f"libnvidia-ml.so.1 {size}"]
    assert done.stderr.count("WARNING") == 0, done.stderr
    assert ran(launch(flow, "exec", "--nv", sif, "nvidia-smi")) == "smi of the host\n"
    assert ran(launch(flow, "exec", "--nv", sif, "cat", driver.data)) == "{}"
    plain = launch(flow, "exec", sif, "sh", "-c", "ls /.singularity.d/libs; echo $LD_LIBRARY_PATH")
    assert "libcuda" not in plain.stdout


@pytest.mark.parametrize("flow", FLOWS)
def test_libraries_are_read_only_and_without_setuid(launch: Run, sif: Path, flow: str) -> None:
    table = ran(launch(flow, "exec", "--nv", sif, "cat", "/proc/self/mountinfo"))
    lines = [line.split() for line in table.splitlines() if "/.singularity.d/libs" in line]
    assert len(lines) == 3
    for line in lines:
        assert {"ro", "nosuid", "nodev"} <= set(line[5].split(","))


@pytest.mark.parametrize("image", ["sif", "tree"])
def test_the_loader_looks_there(launch: Run, sif: Path, image: str) -> None:
    path = sif if image == "sif" else images.small_tree(images.shared_folder())
    show = ("sh", "-c", "echo $LD_LIBRARY_PATH")
    assert ran(launch("setuid", "exec", "--nv", path, *show)).strip() == "/.singularity.d/libs"
    given = {"APPTAINERENV_LD_LIBRARY_PATH": "/own"}
    found = ran(launch("setuid", "exec", "--nv", path, *show, env=given)).strip()
    assert found == "/own:/.singularity.d/libs"
    both = ran(launch("setuid", "exec", "--nv", "--compat32", path, *show)).strip()
    assert both == "/.singularity.d/libs:/.singularity.d/libs32"
    look = ("wc", "-c", "/.singularity.d/libs32/libcuda.so.1")
    assert ran(launch("setuid", "exec", "--nv", "--compat32", path, *look)).split()[0] == "4096"


@pytest.mark.parametrize("flow", FLOWS)
def test_devices_are_in_a_dev_of_its_own(launch: Run, sif: Path, devices: Sequence[str],
                                         flow: str) -> None:  # fmt: skip
    show = ("sh", "-c", "cd /dev && for f in nvidia*; do echo $f; done; echo x >nvidia0 && echo ok")
    found = ran(launch(flow, "exec", "-c", "--nv", sif, *show)).splitlines()
    assert found == ["nvidia-caps", "nvidia-uvm", "nvidia0", "nvidiactl", "ok"]
    found = ran(launch(flow, "exec", "-c", sif, *show[:2], "cd /dev && echo nvidia*"))
    assert found == "nvidia*\n"
    inside = launch(flow, "exec", "-c", "--nv", sif, "cat", "/dev/nvidia-caps/nvidia-cap1")
    assert ran(inside) == ""
    assert devices


def test_the_writable_sandbox_has_them_too(launch: Run, tmp_path: Path, driver: Driver) -> None:
    tree = Path(tempfile.mkdtemp(prefix="apptainer-py-tree-", dir="/var/tmp"))
    try:
        shutil.copytree(images.described_tree(images.shared_folder()), tree, symlinks=True,
                        dirs_exist_ok=True)  # fmt: skip
        user = images.ordinary_user()
        subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", tree], check=True)
        (tree / ".singularity.d/libs").mkdir(exist_ok=True)
        done = launch("setuid", "exec", "-w", "--nv", tree, *SHOW)
        assert "libcuda.so.1" in ran(done)
        assert "WARNING: nv files may not be bound with --writable" in done.stderr
        assert list((tree / ".singularity.d/libs").iterdir()) == []
        assert not (tree / "usr/bin/nvidia-smi").exists()
    finally:
        shutil.rmtree(tree)


@pytest.mark.parametrize("option", ["nv", "rocm"])
def test_a_host_without_the_driver_is_told(installed: Installation, launch: Run, sif: Path,
                                           option: str) -> None:  # fmt: skip
    (installed.sysconfdir / f"{option}liblist.conf").write_text("libnowhere.so\n")
    done = launch("setuid", "exec", f"--{option}", sif, "echo", "started")
    assert ran(done) == "started\n"
    assert f"WARNING: Could not find any {option} files on this host!" in done.stderr
    (installed.sysconfdir / f"{option}liblist.conf").unlink()
    done = launch("setuid", "exec", f"--{option}", sif, "echo", "started")
    assert ran(done) == "started\n"
    assert f"WARNING: While finding bind points of {option}liblist.conf" in done.stderr
    (installed.sysconfdir / f"{option}liblist.conf").write_text("")


@pytest.mark.parametrize("flow", FLOWS)
def test_rocm_and_nv_together(launch: Run, sif: Path, flow: str) -> None:
    found = ran(launch(flow, "exec", "--nv", "--rocm", sif, *SHOW)).split()[::2]
    assert found == ["libcuda.so.1", "libnvidia-ml.so.1", "libunrelated.so.1"]


@pytest.mark.parametrize("flow", FLOWS)
def test_containlibs(launch: Run, sif: Path, driver: Driver, flow: str) -> None:
    lib = driver.libraries / "libunrelated.so.1"
    found = ran(launch(flow, "exec", "--containlibs", f"{lib},{LIBC}", sif, *SHOW)).split()[::2]
    assert found == ["libc.so.6", "libunrelated.so.1"]
    found = ran(launch(flow, "exec", "--nv", sif, *SHOW, env={"APPTAINER_CONTAINLIBS": str(lib)}))
    assert found.split()[::2] == ["libcuda.so.1", "libnvidia-ml.so.1", "libunrelated.so.1"]


def test_bad_containlibs(launch: Run, sif: Path) -> None:
    for value, reason in (("/absent.so", "doesn't exist"), ("/etc", "a library is a file")):
        done = launch("setuid", "exec", "--containlibs", value, sif, "true")
        assert done.returncode == 255
        assert len(done.stderr.splitlines()) == 1
        assert value in done.stderr
        assert reason in done.stderr


def test_a_bind_of_the_users_lies_beside_the_libraries(
    launch: Run, sif: Path, driver: Driver
) -> None:
    bind = f"{driver.data}:/.singularity.d/libs/own.json"
    found = ran(launch("setuid", "exec", "--nv", "-B", bind, sif, *SHOW)).split()[::2]
    assert found == ["libcuda.so.1", "libnvidia-ml.so.1", "own.json"]


def test_without_user_binds_there_are_none_of_a_list(
    installed: Installation, launch: Run, sif: Path, driver: Driver
) -> None:
    installed.configure(f"binary path = {driver.tools}:/usr/bin\nuser bind control = no")
    done = launch("setuid", "exec", "--nv", sif, "sh", "-c", "ls /.singularity.d/libs; true")
    assert "libcuda" not in ran(done)
    assert "WARNING: Not binding driver files: user bind control disabled" in done.stderr


@pytest.mark.parametrize("flow", FLOWS)
def test_the_pipe_of_the_sharing_service(launch: Run, sif: Path, flow: str) -> None:
    pipe = Path(tempfile.mkdtemp(prefix="apptainer-py-mps-", dir="/tmp"))
    pipe.chmod(0o755)
    (pipe / "control").touch()
    try:
        env = {"CUDA_MPS_PIPE_DIRECTORY": str(pipe)}
        for options in ((), ("-c",)):
            done = launch(flow, "exec", *options, "--nv", sif, "ls", pipe, env=env)
            assert ran(done) == "control\n"
            assert str(pipe) not in done.stderr
    finally:
        shutil.rmtree(pipe)


# ---- nvidia-container-cli ----


def test_nvccli_is_not_for_the_setuid_flow(launch: Run, sif: Path) -> None:
    done = launch("setuid", "exec", "--nvccli", sif, "true")
    assert done.returncode == 255
    assert "FATAL:   nvidia-container-cli not allowed in setuid mode\n" in done.stderr
    done = launch("userns", "exec", "--nvccli", sif, "true")
    assert done.returncode == 255
    assert done.stderr.splitlines() == [
        "INFO:    Setting 'NVIDIA_VISIBLE_DEVICES=all' to emulate legacy GPU binding.",
        "INFO:    Setting --writable-tmpfs (required by nvidia-container-cli)",
        'FATAL:   container creation failed: exec: "nvidia-container-cli": executable file not '
        "found in $PATH",
    ]


@pytest.mark.parametrize("flow", ["userns", "root"])
def test_nvccli_brings_what_it_lists(launch: Run, sif: Path, driver: Driver, flow: str) -> None:
    log = driver.place / "asked"
    log.touch()
    log.chmod(0o666)
    driver.program(
        "nvidia-container-cli",
        f"echo $NVIDIA_DRIVER_CAPABILITIES: $@ >>{log}\n"
        f"echo {driver.libraries}/libcuda.so.1\necho {driver.data}\necho /dev/null",
    )
    (driver.place / "bin").mkdir()
    shutil.copy(driver.tools / "nvidia-smi", driver.place / "bin/nvidia-smi")
    show = ("sh", "-c", "cd /.singularity.d/libs && echo * $NVIDIA_VISIBLE_DEVICES; touch /written")
    asked = {"NVIDIA_VISIBLE_DEVICES": "1,2", "NVIDIA_DRIVER_CAPABILITIES": "compute"}
    found = ran(launch(flow, "exec", "--nvccli", sif, *show, env=asked))
    assert found == "libcuda.so.1 1,2\n"
    assert log.read_text() == "compute: list --libraries --binaries --ipcs --device=1,2\n"
    assert ran(launch(flow, "exec", "--nvccli", sif, *show)) == "libcuda.so.1 all\n"
    done = launch(flow, "exec", "-c", "--nvccli", sif, "true")
    assert "NVIDIA_VISIBLE_DEVICES must be set" in done.stderr
    assert log.read_text().splitlines()[2] == ": list --libraries --binaries --ipcs"


def test_libraries_of_nvccli_are_found_by_their_own_names(
    launch: Run, sif: Path, driver: Driver
) -> None:
    """It lists libcuda.so.VERSION; that programs ask for libcuda.so.1 is said in the file."""
    library = driver.libraries / "libcuda.so.550.54.15"
    named_library(library, "libcuda.so.1")
    driver.program("nvidia-container-cli", f"echo {library}")
    show = ("sh", "-c", "cd /.singularity.d/libs && echo * && wc -c <libcuda.so.1")
    found = ran(launch("userns", "exec", "--nvccli", sif, *show)).split()
    assert found == ["libcuda.so.1", library.name, str(library.stat().st_size)]


def test_an_nvccli_that_fails_says_why(launch: Run, sif: Path, driver: Driver) -> None:
    driver.program("nvidia-container-cli", "echo 'initialization error: no driver' >&2; exit 1")
    done = launch("userns", "exec", "--nvccli", sif, "true")
    assert done.returncode == 255
    assert done.stderr.endswith("nvidia-container-cli: initialization error: no driver\n")


# ---- Gaudi ----


def test_intel_hpu_brings_the_devices_that_are_named(launch: Run, sif: Path) -> None:
    folder = Path("/dev/accel")
    folder.mkdir()
    try:
        for number in (0, 1, 11):
            os.mknod(folder / f"accel{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        show = ("sh", "-c", "cd /dev/accel && echo *")
        for value, expected in (("0,11", "accel0 accel11"), ("all", "accel0 accel1 accel11")):
            env = {"HABANA_VISIBLE_DEVICES": value}
            done = launch("setuid", "exec", "-c", "--intel-hpu", sif, *show, env=env)
            assert ran(done).strip() == expected
    finally:
        shutil.rmtree(folder)
    done = launch("setuid", "exec", "--intel-hpu", sif, "true")
    assert "WARNING: Could not find any intel-hpu devices on this host!" in done.stderr


# ---- --build-config ----


@pytest.mark.parametrize("flow", FLOWS)
def test_a_launch_as_of_a_build_has_none_of_the_hosts_files(
    installed: Installation, sif: Path, flow: str
) -> None:
    words = ["exec", "-c", sif, "cat", "/proc/self/mountinfo"]
    if flow == "userns":
        words.insert(1, "-u")
    as_root = flow == "root"
    found = {}
    for options in ((), ("--build-config",)):
        done = installed.run(*options, *words, root=as_root)
        found[options] = {line.split()[4] for line in ran(done).splitlines()}
    home = "/root" if as_root else installed.user.pw_dir
    gone = found[()] - found["--build-config",]
    assert {"/etc/hosts", "/dev/pts", home} <= gone
    assert {"/proc", "/dev", "/tmp"} <= found["--build-config",]
