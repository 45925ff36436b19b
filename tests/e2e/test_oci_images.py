"""`run --oci` and its like, and `oci mount`: asserted from inside, as root and as a user."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import select
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apptainer_py.image import arch, sif_write, squashfs
from tests import images
from tests.conftest import AsUser
from tests.oci import bed as beds

CONFIG = {
    "Entrypoint": ["/bin/echo", "first"],
    "Cmd": ["second"],
    "Env": ["FOO=bar", "PATH=/bin"],
    "User": "app",
    "WorkingDir": "/srv/work",
}
PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n"
GROUP = "root:x:0:\napp:x:1000:\nmore:x:50:app\n"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def tar_of(tree: Path) -> bytes:
    file = io.BytesIO()

    def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 1000 if "home/app" in info.name else 0
        return info

    implied = tarfile.TarInfo("opt/parts/file")
    with tarfile.open(fileobj=file, mode="w") as archive:
        # As builders write it: nothing for the root, nor for every directory above a file.
        for child in sorted(tree.iterdir()):
            archive.add(child, child.name, filter=owned, recursive=child.name != "home")
        archive.addfile(implied)
        archive.add(tree / "home/app", "home/app", filter=owned)
    return file.getvalue()


def make_layout(target: Path, *layers: bytes) -> None:
    (target / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digits = hashlib.sha256(data).hexdigest()
        (target / "blobs/sha256" / digits).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digits}", "size": len(data)}

    config = {"architecture": arch.host_arch(), "os": "linux", "rootfs": {}, "config": CONFIG}
    oci = "application/vnd.oci.image."
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(config).encode(), f"{oci}config.v1+json"),
        "layers": [blob(data, f"{oci}layer.v1.tar") for data in layers],
    }
    row = blob(json.dumps(manifest).encode(), f"{oci}manifest.v1+json")
    row["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


@pytest.fixture(scope="module")
def place(readable_tmp: Path) -> Path:
    """Images of one tree: a layout, a SIF file with OCI configuration, one without."""
    made = readable_tmp / "oci-images"
    tree = made / "tree"
    made.mkdir()
    subprocess.run(["cp", "-a", images.small_tree(images.shared_folder()), tree], check=True)
    (tree / "etc/passwd").write_text(PASSWD)
    (tree / "etc/group").write_text(GROUP)
    (tree / "home/app").mkdir()
    os.chown(tree / "home/app", 1000, 1000)
    whiteout = tarfile.TarInfo("etc/.wh.test-release")
    upper = whiteout.tobuf() + bytes(1024)
    make_layout(made / "layout", tar_of(tree), upper)
    packed = made / "root.squashfs"
    squashfs.pack(str(tree), str(packed), squashfs.Packing(all_root=False))
    for name, metadata in (("oci.sif", json.dumps(CONFIG).encode()), ("plain.sif", None)):
        target = made / name
        sif_write.write_sif(str(target), str(packed), arch=arch.host_arch(), metadata=metadata)
        data = target.read_bytes()
        old, new = b"inspect-metadata.json", b"oci-config.json"
        target.write_bytes(data.replace(old, new.ljust(len(old), b"\0"), 1))
        target.chmod(0o644)
    return made


@pytest.fixture(params=["root", "user"])
def run(request: pytest.FixtureRequest, product: SimpleNamespace, as_user: AsUser) -> Run:
    """Runs the program as root or as an ordinary user."""

    def start(*words: str | Path, **how: object) -> subprocess.CompletedProcess[str]:
        argv = [product.program, *map(str, words)]
        if request.param == "user":
            return as_user(argv, **how)
        env = {"PATH": os.defpath, "HOME": "/root", **how.pop("env", {})}
        return subprocess.run(
            argv, env=env, capture_output=True, text=True, check=False,
            input=how.pop("stdin", ""), **how,
        )  # fmt: skip

    return start


@pytest.fixture(autouse=True)
def nothing_left(open_fuse: None) -> Iterator[None]:
    """No mount, container, unpacked layer or image server outlives a test."""

    def found() -> list[str]:
        left = [
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if "oci-images" in line or "squashfuse" in line
        ]
        folders = ("/run/apptainer-py-oci", *map(str, Path("/tmp").glob("apptainer-py-*")))
        for folder in folders:
            if Path(folder).is_dir():
                left += [name for name in os.listdir(folder) if name.startswith("apy-")]
        return left

    before = found()
    yield
    assert found() == before


@pytest.fixture(params=["layout", "oci.sif"])
def image(request: pytest.FixtureRequest, place: Path) -> str:
    path = place / request.param
    return f"oci:{path}:v1" if request.param == "layout" else str(path)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_entry_point_and_command(run: Run, image: str) -> None:
    assert lines(run("run", "--oci", image)) == ["first second"]
    assert lines(run("run", "--oci", image, "third")) == ["first third"]


def test_user_directory_and_environment(run: Run, image: str) -> None:
    script = "id; pwd; echo $FOO $HOME $PATH; touch ~/own && ls -n ~ | tail -1"
    identity, directory, values, listed = lines(run("exec", "--oci", image, "sh", "-c", script))
    assert identity.startswith("uid=1000(app) gid=1000(app)")
    assert "50(more)" in identity
    assert directory == "/srv/work"
    assert values == "bar /home/app /bin"
    assert listed.split()[2:4] == ["1000", "1000"]


def test_nothing_of_the_host_but_what_is_asked_for(run: Run, image: str, place: Path) -> None:
    script = "env; ls -d /root/.. /var/tmp/* 2>/dev/null; ls /proc | grep -c '^[0-9]'"
    said = run("exec", "--oci", image, "sh", "-c", script, env={"SECRET": "x"}, cwd="/var/tmp")
    shown = lines(said)
    assert not any("SECRET" in line or "/var/tmp" in line for line in shown)
    assert int(shown[-1]) < 6
    assert lines(run("exec", "--oci", "-B", f"{place}:/mnt:ro", image, "ls", "/mnt/layout"))
    assert run("exec", "--oci", "-B", f"{place}:/mnt:ro", image, "touch", "/mnt/x").returncode


def test_what_is_written_is_lost(run: Run, place: Path) -> None:
    script = "touch /written /etc/written && rm /bin/busybox && echo done"
    assert lines(run("exec", "--oci", place / "plain.sif", "sh", "-c", script)) == ["done"]
    script = "ls /written /etc/written; exit 0"
    assert not lines(run("exec", "--oci", place / "plain.sif", "sh", "-c", script))


def test_a_whiteout_hides_a_file(run: Run, place: Path) -> None:
    test = ("test", "-e", "/etc/test-release")
    assert run("exec", "--oci", f"oci:{place}/layout", *test).returncode == 1
    assert run("exec", "--oci", place / "oci.sif", *test).returncode == 0


def test_directories_that_no_layer_names_are_open(run: Run, place: Path) -> None:
    script = ("stat", "-c", "%a", "/", "/opt", "/opt/parts")
    done = run("exec", "--oci", f"oci:{place}/layout", *script)
    assert done.stdout.split() == ["755"] * 3, done.stderr


def test_an_archive(run: Run, place: Path, readable_tmp: Path) -> None:
    file = readable_tmp / "archive.tar"
    with tarfile.open(file, "w") as archive:
        archive.add(place / "layout", ".")
    assert lines(run("run", "--oci", f"oci-archive:{file}:v1")) == ["first second"]


@pytest.mark.parametrize("status", [0, 7, 255])
def test_the_status_is_the_payloads(run: Run, image: str, status: int) -> None:
    assert run("exec", "--oci", image, "sh", "-c", f"exit {status}").returncode == status


def test_a_signal_is_128_and_its_number(run: Run, image: str) -> None:
    script = "sh -c 'kill -9 $$'; exit $?"
    assert run("exec", "--oci", image, "sh", "-c", script).returncode == 137


def test_streams_are_the_callers(run: Run, image: str) -> None:
    done = run("exec", "--oci", image, "sh", "-c", "cat; echo wrong >&2", stdin="given\n")
    assert (done.stdout, done.stderr) == ("given\n", "wrong\n")


def test_options(run: Run, image: str) -> None:
    script = "hostname; pwd; echo $A; cat /etc/resolv.conf; ls /sys/class/net"
    options = ("--hostname", "box", "--cwd", "/opt", "--env", "A=b", "--dns", "192.0.2.1")
    words = ("--net", "--network", "none", "-S", "/scratch")
    shown = lines(run("exec", "--oci", *options, *words, image, "sh", "-c", script))
    assert shown == ["box", "/opt", "b", "nameserver 192.0.2.1", "lo"]


def test_limits_are_roots(run: Run, image: str, request: pytest.FixtureRequest) -> None:
    groups = Path("/proc/self/cgroup").read_text()
    v1 = ":memory:" in groups
    names = ("memory/memory.limit_in_bytes", "pids/pids.max") if v1 else ("memory.max", "pids.max")
    script = "; ".join(f"cat /sys/fs/cgroup/{name}" for name in names)
    words = ("--memory", "64m", "--pids-limit", "50", image, "sh", "-c", script)
    if request.node.callspec.params["run"] == "root":
        assert lines(run("exec", "--oci", *words)) == [str(64 << 20), "50"]
        wrong = run("exec", "--oci", "--memory", "much", image, "true")
        assert "invalid memory value" in wrong.stderr
        return
    done = run("exec", "--oci", *words)
    assert done.returncode == 255
    assert "limits of resources with --oci are root's to set" in done.stderr


def test_capabilities_are_dockers(run: Run, place: Path) -> None:
    words = ("sh", "-c", "grep CapEff /proc/self/status")
    plain = place / "plain.sif"
    assert lines(run("exec", "--oci", plain, *words)) == ["CapEff:\t00000000a80425fb"]
    assert lines(run("exec", "--oci", "--no-privs", plain, *words)) == ["CapEff:\t0000000000000000"]
    more = run("exec", "--oci", "--drop-caps", "all", "--add-caps", "chown", plain, *words)
    assert more.stdout.strip() == "CapEff:\t0000000000000000"


def test_the_variable_asks_for_it_too(run: Run, image: str) -> None:
    assert lines(run("run", image, env={"APPTAINER_OCI": "1"})) == ["first second"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--oci", "library://busybox"), "remote has no library client"),
        (("run", "oci:/nowhere"), "no such file or directory"),
        (("run", "--oci", "--writable", "IMAGE"), "`--writable` is not supported with --oci"),
        (("run", "--oci", "--net", "IMAGE"), "--net needs --network none"),
        (("run", "--oci", "/nowhere"), "could not open image /nowhere"),
        (("run", "--oci", "oci:/nowhere:v1"), "no such file or directory"),
        (("exec", "--oci", "--add-caps", "cake", "IMAGE", "true"), "CAKE is no capability"),
        (("exec", "--oci", "IMAGE", "/nowhere"), "/nowhere"),
    ],
)
def test_refusals_are_one_line(run: Run, place: Path, words: tuple[str, ...], said: str) -> None:
    named = [str(place / "oci.sif") if word == "IMAGE" else word for word in words]
    done = run(*named)
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert done.returncode == 255
    assert len(fatal) == 1
    assert said in fatal[0]
    assert not done.stdout


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("kind", ["layout", "oci.sif"])
def test_the_payload_ends_with_a_killed_launcher(
    product: SimpleNamespace, place: Path, kind: str
) -> None:
    image = f"oci:{place / kind}:v1" if kind == "layout" else str(place / kind)
    launcher = subprocess.Popen(
        [product.program, "exec", "--oci", image, "sleep", "600"], stdin=subprocess.DEVNULL
    )

    def payloads() -> list[int]:
        found = children_of(launcher.pid)
        return [pid for pid in found if "sleep" in Path(f"/proc/{pid}/comm").read_text()]

    beds.eventually(payloads, "the payload runs")
    pidfd = os.pidfd_open(payloads()[0])
    launcher.kill()
    launcher.wait()
    assert select.select([pidfd], [], [], beds.DEADLINE_S)[0], "the payload goes on"
    os.close(pidfd)
    runtime = f"{product.bindir}/apptainer-py-oci"
    listed = subprocess.run([runtime, "list", "-q"], capture_output=True, text=True, check=True)
    mine = [one for one in listed.stdout.split() if one.startswith(f"apy-{launcher.pid}-")]
    for one in mine:
        assert subprocess.run([runtime, "delete", "--force", one]).returncode == 0
    assert mine
    # What was unpacked goes with the next image.
    layout = f"oci:{place / 'layout'}:v1"
    subprocess.run([product.program, "exec", "--oci", layout, "true"], check=True)


def test_a_hostile_layer_leaves_nothing(run: Run, place: Path, readable_tmp: Path) -> None:
    info = tarfile.TarInfo("../../../escaped")
    target = readable_tmp / "hostile"
    if not target.exists():
        make_layout(target, info.tobuf() + bytes(1024))
    done = run("exec", "--oci", f"oci:{target}", "true")
    assert done.returncode == 255
    assert "leads out of the image" in done.stderr


def test_a_terminal(product: SimpleNamespace, place: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        words = ["shell", "--oci", str(place / "oci.sif")]
        os.execve(product.program, ["apptainer-py", *words], {"TERM": "dumb", "PATH": "/bin"})
    os.write(terminal, b"test -t 0 && test -c /dev/console && exit 9\n")
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


# -- oci mount


@pytest.fixture
def bundle(product: SimpleNamespace, place: Path, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "bundle"
    subprocess.run([product.program, "oci", "mount", place / "oci.sif", target], check=True)
    yield target
    if target.exists():
        subprocess.run([product.program, "oci", "umount", target], check=True)


def test_a_mounted_image_is_a_bundle(product: SimpleNamespace, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    process = config["process"]
    assert process["args"] == ["/bin/echo", "first", "second"]
    assert process["cwd"] == "/srv/work"
    assert process["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [50]}
    assert {"FOO=bar", "PATH=/bin"} <= set(process["env"])
    assert (config["hostname"], process["terminal"]) == ("apptainer", True)
    process["terminal"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    argv = [f"{product.program}-oci", "run", "-b", bundle, f"apy-mounted-{os.getpid()}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("first second\n", 0), done.stderr


def test_umount_undoes_it(product: SimpleNamespace, bundle: Path) -> None:
    (bundle / "rootfs/written").write_text("x")
    assert (bundle / "overlay/upper/written").exists()
    subprocess.run([product.program, "oci", "umount", bundle], check=True)
    assert not bundle.exists()


def test_what_is_no_bundle_of_ours_is_left_alone(product: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("rootfs", "overlay", "volumes"):
        (tmp_path / name).mkdir()
    argv = [product.program, "oci", "umount", tmp_path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert "is no bundle" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["overlay", "rootfs", "volumes"]


def test_a_failed_mount_leaves_nothing(product: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "no.sif").write_text("no image")
    argv = [product.program, "oci", "mount", tmp_path / "no.sif", tmp_path / "bundle"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert os.listdir(tmp_path) == ["no.sif"]


def test_mounting_is_for_root(product: SimpleNamespace, as_user: AsUser, place: Path) -> None:
    done = as_user([product.program, "oci", "mount", place / "oci.sif", "bundle"])
    assert done.returncode == 255
    assert "requires root privileges" in done.stderr
