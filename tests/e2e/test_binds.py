"""Binds and the container's own files: nothing that an image says is followed out of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run

Run = Callable[..., subprocess.CompletedProcess[str]]
# T-R00: what we mount or write on, which the image may have made a link.
OURS = (
    "etc/passwd",
    "etc/group",
    "etc/hosts",
    "etc/resolv.conf",
    "etc/localtime",
    "etc/hostname",
    "tmp",
    "var/tmp",
    "home",
    "proc",
    "sys",
    "dev",
    ".singularity.d",
    "environment",
)


@pytest.fixture(params=FLOWS)
def launch(request: pytest.FixtureRequest, product: SimpleNamespace, user: object) -> Run:
    def launch(*words: str | Path, **how: object) -> subprocess.CompletedProcess[str]:
        return run(product.program, request.param, words, **how)  # type: ignore[arg-type]

    return launch


@pytest.fixture
def tree(readable_tmp: Path, tmp_path: Path) -> Iterator[Path]:
    """A tree of the ordinary user's, to change."""
    small = images.small_tree(readable_tmp / "binds")
    target = readable_tmp / f"binds-{tmp_path.name}"
    shutil.copytree(small, target, symlinks=True)
    user = images.ordinary_user()
    subprocess.run(["chown", "-hR", f"{user.pw_uid}:{user.pw_gid}", target], check=True)
    yield target
    shutil.rmtree(target)


@pytest.fixture
def outside(user: object) -> Iterator[Path]:
    """What a link of an image leads to: anybody may write it, and no default mount shows it."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-outside-", dir="/var/lib"))
    fill(made)
    yield made
    shutil.rmtree(made)


def fill(user_tmp: Path) -> None:
    user_tmp.chmod(0o777)
    for name in ("passwd", "group", "hosts", "resolv.conf", "localtime", "hostname"):
        (user_tmp / name).write_text("outside\n")
        (user_tmp / name).chmod(0o666)
    (user_tmp / "directory").mkdir()
    (user_tmp / "directory").chmod(0o777)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.lstat().st_mode, path.read_text() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def replaced(tree: Path, name: str, to: str) -> None:
    path = tree / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(to)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["absolute", "dots"])
@pytest.mark.parametrize("options", [(), ("-c", "--hostname", "box"), ("-w",)],
                         ids=["plain", "contain", "writable"])  # fmt: skip
def test_links_of_the_image_lead_nowhere_outside(
    launch: Run, tree: Path, outside: Path, name: str, form: str, options: tuple[str, ...]
) -> None:
    target = outside / (os.path.basename(name) if name.startswith("etc/") else "directory")
    replaced(tree, name, str(target) if form == "absolute" else "../" * 20 + str(target)[1:])
    before = state(outside)
    done = launch(
        "exec",
        *options,
        tree,
        "/bin/busybox",
        "sh",
        "-c",
        "echo ran; echo x >/etc/passwd; echo x >/tmp/leak; echo x >/home/leak",
    )
    assert state(outside) == before
    assert "Traceback" not in done.stderr
    # The link is either resolved inside, or the launch is refused with a reason.
    assert done.stdout == "ran\n" or done.stderr.startswith(("FATAL", "WARNING", "INFO")), done
    Path("/tmp/leak").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "hardlink", "huge"])
@pytest.mark.parametrize("name", ["passwd", "group", "resolv.conf"])
def test_files_that_we_write_may_be_anything_in_the_image(
    launch: Run, tree: Path, outside: Path, kind: str, name: str
) -> None:
    """T-C02."""
    path = tree / "etc" / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path, 0o666)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        os.mknod(path, 0o20666, os.makedev(1, 5))
    elif kind == "hardlink":
        os.link(outside / name, path)
    else:
        with open(path, "wb") as huge:
            huge.truncate(1 << 32)
    before = state(outside)
    done = launch("exec", tree, "/bin/busybox", "echo", "ran")
    assert done.stdout == "ran\n", done.stderr
    assert state(outside) == before


def test_targets_are_made_where_the_image_lacks_them(
    launch: Run, tree: Path, outside: Path
) -> None:
    (outside / "directory/file").write_text("bound\n")
    (tree / "var/run").symlink_to("/run")
    (tree / "alias").symlink_to("opt")
    for target, shown in (
        ("/new/deep", "/new/deep"), ("/var/run/x", "/run/x"), ("/alias/y", "/opt/y"),
        ("/usr/../z", "/z"),
    ):  # fmt: skip
        for layer in ((), ("--underlay",), ("--writable-tmpfs",)):
            done = launch("exec", *layer, "-B", f"{outside}/directory:{target}", tree, "cat",
                          f"{shown}/file")  # fmt: skip
            assert done.stdout == "bound\n", (target, layer, done.stderr)
    assert not (tree / "new").exists()


def test_the_underlay_is_the_image(launch: Run, tree: Path, outside: Path) -> None:
    (tree / "opt/deep").mkdir()
    (tree / "opt/deep/file").write_text("of the image\n")
    (tree / "opt/link").symlink_to("deep/file")
    done = launch("exec", "--underlay", "-B", f"{outside}:/opt/new", tree, "sh", "-c",
                  "cat /opt/deep/file /opt/link; echo x >/opt/w || echo read-only")  # fmt: skip
    assert done.stdout == "of the image\nof the image\nread-only\n", done.stderr


def test_a_read_only_bind_is_read_only_below_too(launch: Run, tree: Path, outside: Path) -> None:
    done = launch("exec", "-B", f"{outside}:/mnt:ro", tree, "sh", "-c",
                  "echo x >/mnt/passwd || echo x >/mnt/directory/x || echo kept")  # fmt: skip
    assert done.stdout == "kept\n"
    assert (outside / "passwd").read_text() == "outside\n"


def test_contain_has_a_dev_of_its_own(launch: Run, tree: Path) -> None:
    done = launch("exec", "-C", tree, "sh", "-c",
                  "ls /dev; [ -w /dev/null ] && echo x >/dev/shm/x && ls /dev/shm")  # fmt: skip
    names = set(done.stdout.split())
    assert {"null", "zero", "tty", "random", "urandom", "shm", "pts", "ptmx", "fd", "x"} <= names
    assert not {"kmsg", "mem", "loop0", "vda", "sda"} & names
    done = launch("exec", "-c", "--no-mount", "devpts", tree, "ls", "/dev")
    assert "pts" not in done.stdout.split()


def test_scratch_and_workdir(launch: Run, tree: Path, outside: Path) -> None:
    work = outside / "directory"
    done = launch("exec", "-c", "-W", work, "-S", "/scratch/a", tree, "sh", "-c",
                  "for d in /tmp /var/tmp /scratch/a $HOME; do echo x >$d/kept; done")  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = {str(path.relative_to(work)) for path in work.rglob("kept")}
    assert kept == {"tmp/kept", "var_tmp/kept", "scratch/scratch/a/kept", "home/kept"}
    done = launch("exec", "-S", "/scratch", tree, "sh", "-c", "echo x >/scratch/x; cat /scratch/x")
    assert done.stdout == "x\n"


def test_bad_binds_are_one_fatal_line(launch: Run, tree: Path) -> None:
    for spec, text in (
        ("/tmp:relative", "destination must be an absolute path"),
        ("/tmp:/mnt:odd", "odd is not a valid bind option"),
        ("/a:/b:c:d", 'bad bind syntax "/a:/b:c:": should be /a:/b:c'),
        ("/nonexistent:/mnt", "mount source /nonexistent doesn't exist"),
        ("/etc/passwd:/opt", "could not mount /etc/passwd: not a directory"),
    ):
        done = launch("exec", "-B", spec, tree, "true")
        fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
        assert (len(fatal), done.returncode, text in fatal[0]) == (1, 255, True), done.stderr


def test_a_user_cannot_bind_what_the_user_cannot_read(
    product: SimpleNamespace, user: object, tree: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    (secret / "file").write_text("secret")
    for flow in ("setuid", "userns"):
        done = run(product.program, flow, ["exec", "-B", f"{secret}/file:/mnt/f", tree, "cat",
                                           "/mnt/f"])  # fmt: skip
        assert (done.returncode, done.stdout) == (255, "")
