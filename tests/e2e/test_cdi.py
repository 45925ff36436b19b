"""`--device` with CDI specifications, in each flow."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.test_drivers import named_library
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation

Run = Callable[..., subprocess.CompletedProcess[str]]
LIBS = "/.singularity.d/libs"
NODE = Path("/dev/apytest-card")


@pytest.fixture
def place() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-cdi-", dir="/var/tmp"))
    made.chmod(0o755)
    (made / "data").write_text("data of the driver\n")
    os.mknod(NODE, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    NODE.chmod(0o666)
    yield made
    NODE.unlink()
    shutil.rmtree(made)


def write(place: Path, *, name: str = "vendor.json", **edits: object) -> None:
    value = {
        "cdiVersion": "0.6.0",
        "kind": "v.com/card",
        "devices": [{"name": "0", "containerEdits": edits}],
    }
    (place / name).write_text(json.dumps(value))


@pytest.fixture
def launch(installed: Installation, sif: Path, place: Path) -> Run:
    def launch(flow: str, *words: str, script: str) -> subprocess.CompletedProcess[str]:
        line = ["exec", "--cdi-dirs", place, "--device", "v.com/card=0", *words, sif, "sh", "-c"]
        return run(installed.program, flow, [*line, script])

    return launch


def ran(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 255, done.stdout
    assert done.stderr.count("FATAL") == 1
    assert reason in done.stderr


@pytest.mark.parametrize("flow", FLOWS)
def test_variables_mounts_and_nodes(launch: Run, place: Path, flow: str) -> None:
    write(
        place,
        env=["CARD=a $(id) `x` \"q\" 'p' \\", "TWO=line\nbreak"],
        mounts=[{"hostPath": str(place), "containerPath": "/opt/driver", "options": ["ro"]}],
        deviceNodes=[{"path": str(NODE)}],
    )
    script = f'printf "%s\\n" "$CARD" "$TWO"; cat /opt/driver/data; head -c 3 {NODE} | wc -c'
    expected = "a $(id) `x` \"q\" 'p' \\\nline\nbreak\ndata of the driver\n3\n"
    assert ran(launch(flow, script=script)) == expected
    assert ran(launch(flow, "-c", script=script)) == expected
    done = launch(flow, script="touch /opt/driver/new")
    assert "Read-only file system" in done.stderr


@pytest.mark.parametrize("flow", FLOWS)
def test_a_node_under_another_name(launch: Run, place: Path, flow: str) -> None:
    write(place, deviceNodes=[{"path": "/dev/card/first", "hostPath": str(NODE)}])
    assert ran(launch(flow, "-c", script="head -c 3 /dev/card/first | wc -c")) == "3\n"
    refused(launch(flow, script="true"), "add --contain")


@pytest.mark.parametrize("flow", FLOWS)
def test_the_hooks_of_nvidia_become_links_and_folders(launch: Run, place: Path, flow: str) -> None:
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}
    links = ["--link", "libx.so.1::/opt/lib/libx.so", "--link=hosts::/etc/alias"]
    write(
        place,
        hooks=[
            {**hook, "args": ["nvidia-cdi-hook", "create-symlinks", *links]},
            {**hook, "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "/opt/lib"]},
            {**hook, "path": "/usr/bin/nvidia-ctk",
             "args": ["nvidia-ctk", "hook", "update-ldcache", "--folder", "/opt/lib64"]},
        ],
    )  # fmt: skip
    script = "readlink /opt/lib/libx.so; readlink /etc/alias; echo $LD_LIBRARY_PATH"
    found = ran(launch(flow, script=script)).split()
    assert found == ["libx.so.1", "hosts", "/opt/lib:/opt/lib64"]
    underlay = launch(flow, "--underlay", script="readlink /opt/lib/libx.so")
    assert ran(underlay) == "libx.so.1\n"


@pytest.mark.parametrize("flow", FLOWS)
def test_libraries_are_found_by_the_names_that_ldconfig_would_give_them(
    launch: Run, place: Path, flow: str
) -> None:
    """nvidia-ctk mounts libcuda.so.VERSION alone, and has ldconfig make libcuda.so.1."""
    library = place / "libcuda.so.550.54.15"
    named_library(library, "libcuda.so.1")
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}
    inside = f"/usr/lib/x86_64-linux-gnu/{library.name}"
    write(
        place,
        mounts=[{"hostPath": str(library), "containerPath": inside, "options": ["ro"]}],
        hooks=[
            {**hook, "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "/usr/lib/x"]},
            {**hook, "args": ["nvidia-cdi-hook", "create-soname-symlinks", "--folder", "/x"]},
        ],
    )
    script = "echo $LD_LIBRARY_PATH; cd /.singularity.d/libs; echo *; wc -c <libcuda.so.1"
    found = ran(launch(flow, script=script)).split()
    assert found == ["/.singularity.d/libs:/usr/lib/x", "libcuda.so.1", str(library.stat().st_size)]


def test_the_images_own_cuda_is_taken_where_it_is_later(launch: Run, place: Path) -> None:
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}
    words = ["nvidia-cdi-hook", "enable-cuda-compat", "--host-driver-version=550.54.15"]
    later, earlier = place / "later", place / "earlier"
    for folder, version in ((later, "560.35.03"), (earlier, "535.1")):
        folder.mkdir()
        (folder / f"libcuda.so.{version}").touch()
        (folder / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")
    compat = "/usr/local/cuda/compat"
    write(place, hooks=[{**hook, "args": words}])
    script = 'echo "$LD_LIBRARY_PATH $# ${__found-unset} ${__file-unset}"'
    for folder, expected in ((later, f"/own:{compat}:{LIBS}"), (earlier, f"/own:{LIBS}"),
                             (place, f"/own:{LIBS}")):  # fmt: skip
        done = launch("setuid", "-B", f"{folder}:{compat}", "--env", "LD_LIBRARY_PATH=/own",
                      script=script)  # fmt: skip
        assert ran(done).strip() == f"{expected} 0 unset unset"
    (later / "libcuda.so.570.1").touch()
    assert "compat" not in ran(launch("setuid", "-B", f"{later}:{compat}", script=script))


@pytest.mark.parametrize("flow", FLOWS)
def test_links_below_dev_and_the_profile_of_the_cards(launch: Run, place: Path, flow: str) -> None:
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk"}
    link = "--link=../../nvidia9::/dev/dri/by-path/pci-0000:01:00.0-card"
    write(
        place,
        deviceNodes=[{"path": "/dev/nvidia9", "hostPath": str(NODE)}],
        hooks=[
            {**hook, "args": ["nvidia-ctk", "hook", "create-symlinks", link]},
            {**hook, "args": ["nvidia-ctk", "hook", "update-application-profile"]},
            {**hook, "args": ["nvidia-ctk", "hook", "update-nvidia-params"]},
        ],
    )
    profile = "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf"
    script = f"readlink /dev/dri/by-path/*; head -c 3 /dev/dri/by-path/* | wc -c; cat {profile}"
    found = ran(launch(flow, "-c", script=script)).splitlines()
    assert found[:2] == ["../../nvidia9", "3"]
    # The card's minor number, here that of /dev/zero, is a bit of the mask.
    assert '"EGLVisibleDGPUDevices",0x20' in found[2]


def test_other_hooks_refuse(launch: Run, place: Path) -> None:
    hook = {"hookName": "prestart", "path": "/bin/touch", "args": ["touch", str(place / "ran")]}
    write(place, hooks=[hook])
    refused(launch("setuid", script="true"), "the prestart hook `/bin/touch")
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"deviceNodes": [{"path": "/dev/absent"}]}, "/dev/absent does not exist on this host"),
        ({"deviceNodes": [{"path": "/etc/hosts"}]}, "does not lie below /dev"),
        ({"mounts": [{"hostPath": "/absent", "containerPath": "/x"}]}, "/absent does not exist"),
        ({"mounts": [{"hostPath": "/etc", "containerPath": "x"}]}, "no absolute path"),
        ({"netDevices": [{"hostInterfaceName": "eth0", "name": "x"}]}, "not supported"),
    ],
)
def test_what_cannot_be_given(
    launch: Run, place: Path, edits: dict[str, object], reason: str
) -> None:
    write(place, **edits)
    refused(launch("setuid", script="true"), reason)


def test_yaml_and_names(installed: Installation, sif: Path, launch: Run, place: Path) -> None:
    (place / "vendor.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: v.com/card\ndevices:\n- name: '0'\n  containerEdits:\n"
        "    env:\n    - FROM=yaml\n"
    )
    assert ran(launch("setuid", script="echo $FROM")) == "yaml\n"
    for name, reason in (("v.com/card=7", "unresolvable CDI device"), ("card", "invalid CDI")):
        done = run(installed.program, "setuid", ["exec", "--device", name, sif, "true"])
        refused(done, reason)
    (place / "vendor.yaml").write_text("[: {")
    refused(launch("setuid", script="true"), "vendor.yaml")


def test_a_user_gets_no_device_that_is_closed_to_them(launch: Run, place: Path) -> None:
    NODE.chmod(0o600)
    write(place, deviceNodes=[{"path": str(NODE)}])
    assert ran(launch("setuid", "-c", script=f"head -c 1 {NODE} 2>&1 | wc -l")) != "0\n"
    assert "denied" in launch("setuid", "-c", script=f"cat {NODE}").stderr
