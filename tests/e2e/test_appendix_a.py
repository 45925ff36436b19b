"""Defects of the real Apptainer 1.4: it fails here, and we do not (facts, appendix A).

Not here: the metrics gateway itself, which there is none of here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import extfs_images, images
from tests.e2e import test_oci_images
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Completed

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
    ),
]
USERS = ("setuid", "userns")
REAL = images.REAL_APPTAINER
VALUES = {
    "JSON": '{"a": "b c"}',
    "TICK": "a `id` b",
    "QUOTE": 'it\'s "so"',
    "DOLLAR": "$HOME and \\$x \\",
    "LINES": "one\ntwo\n",
    "ONE": '"',
    "PLAIN": "x y",
    "WIDE": "Zoë\t\u2028",
}


def both(installed, flow: str, *words: str | Path, **how: object) -> tuple[Completed, Completed]:
    """Return what the real one did, and what we did."""
    return (
        run(REAL, flow, words, **how),  # type: ignore[arg-type]
        run(installed.program, flow, words, **how),  # type: ignore[arg-type]
    )


def test_1_root_without_one_capability(installed, sif):
    """Here CAP_SYS_RESOURCE may be missing; elsewhere it is taken away first."""
    wrapped = ["capsh", "--drop=cap_sys_resource", "--", "-c", '"$0" exec "$1" true']
    done = [
        subprocess.run([*wrapped, program, sif], capture_output=True, text=True, check=False)
        for program in (REAL, installed.program)
    ]
    assert done[0].returncode == 1
    assert "Requesting capability set" in done[0].stderr
    assert (done[1].returncode, done[1].stderr) == (0, "")


def test_2_a_writable_ext3_overlay_in_the_setuid_flow(installed):
    """There fuse2fs and its launch wait for each other until somebody ends them."""
    tree = images.small_tree(images.shared_folder())
    with tempfile.TemporaryDirectory(prefix="apptainer-py-extfs-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        image = extfs_images.extfs(Path(folder, "overlay.img"), owner=installed.user.pw_uid)
        os.chown(image, installed.user.pw_uid, installed.user.pw_gid)
        words = ("exec", "--overlay", image, tree, "sh", "-c", "echo x >/x; echo ran")
        real, ours = (
            run("/usr/bin/timeout", "setuid", [seconds, program, *words])
            for seconds, program in (("5", REAL), ("50", installed.program))
        )
    assert (real.returncode, real.stdout) == (124, "")
    assert (ours.returncode, ours.stdout) == (0, "ran\n"), ours.stderr


@pytest.fixture(scope="module")
def from_registry(installed) -> Iterator[Path]:
    """A SIF file that the real one builds of an OCI image whose variables have odd values."""
    with tempfile.TemporaryDirectory(prefix="apptainer-py-odd-", dir="/var/tmp") as folder:
        place = Path(folder)
        config = {"Env": ["PATH=/bin:/extra", *(f"{k}={v}" for k, v in VALUES.items())]}
        tree = images.small_tree(images.shared_folder())
        before = test_oci_images.CONFIG
        test_oci_images.CONFIG = config  # type: ignore[assignment]
        try:
            packed = subprocess.run(
                ["tar", "-C", tree, "-cf", "-", "."], capture_output=True, check=True
            ).stdout
            test_oci_images.make_layout(place / "layout", packed)
        finally:
            test_oci_images.CONFIG = before
        subprocess.run(["chmod", "-R", "a+rX", place], check=True)
        os.chown(place, installed.user.pw_uid, installed.user.pw_gid)
        built = images.real_apptainer("build", place / "odd.sif", f"oci:{place}/layout")
        assert built.returncode == 0, built.stderr
        yield place / "odd.sif"


@pytest.mark.parametrize("flow", USERS)
def test_3_odd_values_of_an_image_from_a_registry(installed, from_registry, flow):
    """Not one variable survives there, PATH least of all."""
    real, ours = (
        dict(entry.partition("=")[::2] for entry in done.stdout.split("\0"))
        for done in both(installed, flow, "exec", from_registry, "cat", "/proc/self/environ")
    )
    assert {name: ours.get(name) for name in VALUES} == VALUES
    assert ours["PATH"].startswith("/bin:/extra")
    assert not real["PATH"].startswith("/bin:/extra")
    assert not [name for name, value in VALUES.items() if real.get(name) == value]


def test_3_such_a_variable_of_the_callers_wins(installed, from_registry):
    done = run(installed.program, "setuid", ["exec", "--env", "JSON=mine", from_registry, "env"])
    assert "JSON=mine" in done.stdout.splitlines()


@pytest.mark.parametrize("flow", USERS)
@pytest.mark.parametrize("bind", ["/nonexistent", "/tmp:relative"])
def test_4_a_failed_mount_ends_without_noise(installed, sif, flow, bind):
    """There an image server is waited for, and the clean-up fails."""
    real, ours = both(installed, flow, "exec", "-B", bind, sif, "true")
    assert (real.returncode, ours.returncode) == (255, 255)
    noise = [line for line in real.stderr.splitlines() if "INFO" in line]
    assert any("Terminating squashfuse" in line or "Cleanup error" in line for line in noise)
    assert "INFO" not in ours.stderr
    assert len([line for line in ours.stderr.splitlines() if "FATAL" in line]) == 1


def test_5_cpu_shares_are_not_taken_for_cpus(installed, sif):
    real, ours = both(installed, "setuid", "exec", sif, "true", env={"APPTAINER_CPU_SHARES": "512"})
    assert "cpus value must be in range" in real.stderr
    assert "cpus" not in ours.stderr
    named = run(installed.program, "setuid", ["exec", sif, "true"], env={"APPTAINER_CPUS": "x"})
    assert "invalid cpus value" in named.stderr


def test_6_the_key_of_the_metrics_gateway(installed):
    """There the key that the file itself has is not one that can be asked for."""
    words = ["config", "global", "--get", "apptheus socket path"]
    assert "\napptheus socket path = " in Path("/etc/apptainer/apptainer.conf").read_text()
    real, ours = (run(program, "root", words) for program in (REAL, installed.program))
    assert real.returncode == 255
    assert "not a valid configuration directive" in real.stderr
    assert (ours.returncode, ours.stdout) == (0, "/run/apptheus/gateway.sock\n"), ours.stderr


def test_7_an_instance_of_a_bare_sandbox(installed):
    tree, name = images.small_tree(images.shared_folder()), "apy-bare"
    real, ours = both(installed, "setuid", "instance", "start", tree, name)
    try:
        inside = run(installed.program, "setuid", ["exec", f"instance://{name}", "echo", "in"])
    finally:
        run(installed.program, "setuid", ["instance", "stop", name])
    assert real.returncode == 255
    assert "actions/start" in real.stderr
    assert (ours.returncode, inside.stdout) == (0, "in\n"), ours.stderr


@pytest.fixture(scope="module")
def closed_sandbox(installed) -> Iterator[Path]:
    """A sandbox of the user's, with a file that is root's alone."""
    with tempfile.TemporaryDirectory(prefix="apptainer-py-closed-", dir="/var/tmp") as folder:
        tree = Path(folder, "tree")
        subprocess.run(["cp", "-a", images.small_tree(images.shared_folder()), tree], check=True)
        ids = f"{installed.user.pw_uid}:{installed.user.pw_gid}"
        subprocess.run(["chown", "-R", "-h", ids, folder], check=True)
        (tree / "etc/secret").write_text("root's own\n")
        (tree / "etc/secret").chmod(0o600)
        os.chmod(folder, 0o755)
        yield tree


def test_8_what_a_user_cannot_read(installed, closed_sandbox):
    """There the copy goes on without its stream, and complains of each file that follows."""
    target = closed_sandbox.parent / "target"
    words = ["build", "--sandbox", target, closed_sandbox]
    real, ours = both(installed, "setuid", *words)
    assert (real.returncode, ours.returncode) == (255, 255)
    assert len(real.stderr.splitlines()) > 5
    fatal = [line for line in ours.stderr.splitlines() if not line.startswith("INFO:")]
    assert len(fatal) == 1
    assert f"{closed_sandbox}/etc/secret" in fatal[0]
    assert "permission denied" in fatal[0].lower()
    assert not target.exists()


def test_9_encryption_without_a_key(installed, closed_sandbox):
    """There nothing is built, but it is said that it was, and the status is 0."""
    tree, place = images.small_tree(images.shared_folder()), closed_sandbox.parent
    real, ours = (
        run(program, "setuid", ["build", "--encrypt", place / f"{number}.sif", tree])
        for number, program in enumerate((REAL, installed.program))
    )
    assert (real.returncode, ours.returncode) == (0, 255)
    assert "Build complete" in real.stderr
    assert "Build complete" not in ours.stderr
    assert list(place.glob("*.sif")) == []
    assert "Missing encryption info" in ours.stderr


@pytest.mark.parametrize("words", [("import", "/nonexistent"), ("export", "nowhere")])
def test_12_one_status_for_what_failed(installed, closed_sandbox, words):
    """There each command of `key` has another one."""
    env = {"APPTAINER_KEYSDIR": str(closed_sandbox.parent / "keys")}
    real, ours = both(installed, "setuid", "key", *words, env=env)
    assert real.returncode == {"import": 2, "export": 10}[words[0]]
    assert ours.returncode == 255
    assert real.stderr.partition(":")[2] == ours.stderr.partition(":")[2]


@pytest.mark.parametrize("flow", USERS)
def test_10_no_test_is_no_contradiction(installed, flow):
    tree = images.small_tree(images.shared_folder())
    real, ours = both(installed, flow, "test", tree)
    assert (real.returncode, ours.returncode) == (255, 0)
    assert len(real.stderr.splitlines()) == 2
    assert ours.stderr == "INFO:    No test script found in container, exiting\n"


@pytest.mark.parametrize("flow", FLOWS)
def test_11_nothing_of_ours_needs_proc(installed, sif, flow):
    more = {"env": {"APPTAINER_DROP_CAPS": "sys_resource"}} if flow == "root" else {}
    real, ours = both(installed, flow, "exec", "--no-mount", "proc", sif, "true", **more)
    assert "readlink /proc/self/exe" in real.stderr
    assert (ours.returncode, ours.stderr) == (0, "")
