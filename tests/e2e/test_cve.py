"""What broke others, tried here: each test stands for rows of docs/cve.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images

FLOWS = {"setuid": [], "userns": ["-u"]}
LINKED = (
    "etc/resolv.conf etc/passwd etc/group etc/hosts etc/localtime proc sys dev tmp var/tmp home"
    " .singularity.d"
).split()
ONLY_OWN_DEVICES = ("/dev", "/dev/")


@pytest.fixture(params=FLOWS)
def launch(request, product, as_user):
    """Runs `exec` in one flow after the other."""

    def run(*words, **how):
        return as_user([product.program, "exec", *FLOWS[request.param], *words], **how)

    return run


@pytest.fixture
def sandbox(readable_tmp, user) -> Iterator[Path]:
    """A sandbox directory that belongs to the user."""
    made = readable_tmp / "sandbox"
    shutil.copytree(images.small_tree(images.shared_folder()), made, symlinks=True)
    subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", made], check=True)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def canary(readable_tmp, user) -> Iterator[Path]:
    """A directory of the host where nothing may change."""
    made = readable_tmp / "canary"
    (made / "folder").mkdir(parents=True)
    (made / "file").write_text("untouched")
    subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", made], check=True)
    yield made
    shutil.rmtree(made)


def content(folder: Path) -> list[tuple[str, bytes]]:
    return [
        (str(path), b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    ]


@pytest.mark.parametrize("climb", ["", "/../../../../.."])
def test_links_in_the_image_lead_nowhere_on_the_host(launch, sandbox, canary, climb):
    before = content(canary)
    for name in LINKED:
        place = sandbox / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        what = "file" if "." in name and name != ".singularity.d" else "folder"
        place.symlink_to(f"{climb}{canary}/{what}")
    done = launch(sandbox, "/bin/true")
    assert done.returncode in (0, 255)
    assert content(canary) == before


def test_directory_through_a_descriptor(launch, demo_sif):
    seen = [
        launch("--cwd", f"/proc/self/fd/{fd}", demo_sif, "sh", "-c", "readlink /proc/self/cwd; ls")
        for fd in range(3, 24)
    ]
    assert len(seen) == 21
    for done in seen:
        assert done.returncode != 0 or not done.stdout.startswith("(unreachable)")
        assert "vmlinuz" not in done.stdout


def test_payload_holds_no_descriptor_of_ours(launch, demo_sif):
    done = launch(demo_sif, "sh", "-c", "echo /proc/self/fd/*")
    assert done.returncode == 0
    held = {int(Path(path).name) for path in done.stdout.split()}
    assert {0, 1, 2} <= held <= {0, 1, 2, 3}  # 3 is the directory that the shell reads


def test_payload_has_no_capability_in_any_set(launch, demo_sif):
    done = launch(demo_sif, "grep", "^Cap", "/proc/self/status")
    sets = dict(line.split() for line in done.stdout.splitlines())
    assert sets.keys() == {"CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"}
    assert {int(mask, 16) for mask in sets.values()} == {0}


def test_every_mount_is_without_setuid_and_devices(launch, sandbox):
    done = launch(sandbox, "cat", "/proc/self/mountinfo")
    mounts = [line.split() for line in done.stdout.splitlines()]
    assert len(mounts) > 5
    for fields in mounts:
        point, options = fields[4], fields[5].split(",")
        assert "nosuid" in options, fields
        assert "nodev" in options or point.startswith(ONLY_OWN_DEVICES), fields


def test_host_root_is_no_image(launch, user_tmp):
    (user_tmp / "link").symlink_to("/")
    for name in ("/", "//", "/../", "/usr/..", str(user_tmp / "link")):
        done = launch(name, "true")
        assert done.returncode == 255, name
        assert len(done.stderr.strip().splitlines()) == 1


def test_what_the_user_cannot_read_cannot_be_bound(launch, demo_sif, readable_tmp, user_tmp):
    secret = readable_tmp / "secret"
    secret.mkdir(mode=0o700, exist_ok=True)
    (secret / "key").write_text("secret of root")
    (user_tmp / "link").symlink_to(secret / "key")
    for source in (secret / "key", user_tmp / "link"):
        done = launch("-B", f"{source}:/mnt", demo_sif, "cat", "/mnt")
        assert done.returncode == 255
        assert "secret of root" not in done.stdout + done.stderr
    done = launch("-B", f"{secret}:/mnt", demo_sif, "cat", "/mnt/key")
    assert done.returncode != 0
    assert "secret of root" not in done.stdout


@pytest.mark.parametrize("length", [4097, 65536, 70000])
def test_long_words_end_in_one_line(launch, demo_sif, length):
    word = "/" + "x" * length
    for words in (["-B", f"/tmp:{word}"], ["-B", word], ["--hostname", word], ["--cwd", word]):
        done = launch(*words, demo_sif, "true")
        assert done.returncode in (1, 255), words[0]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["fifo", "huge", "link"])
def test_account_files_of_the_image_are_read_within_bounds(launch, sandbox, what):
    for name in ("passwd", "group"):
        place = sandbox / "etc" / name
        place.unlink()
        if what == "fifo":
            os.mkfifo(place)
        elif what == "link":
            place.symlink_to("/dev/zero")
        else:
            with place.open("wb") as target:
                target.truncate(1 << 30)
    done = launch(sandbox, "/bin/true", timeout_s=30)
    assert done.returncode in (0, 255)
    assert "Traceback" not in done.stderr


def test_home_adds_no_line_to_passwd(launch, demo_sif, user_tmp):
    done = launch("--home", f"{user_tmp}:/x\nroot2::0:0::/:/bin/sh", demo_sif, "cat", "/etc/passwd")
    assert done.returncode != 0
    assert "root2" not in done.stdout


def test_words_that_look_like_options_stay_words(launch, demo_sif):
    done = launch(demo_sif, "echo", "--bind", "/:/host", "-u", "@x")
    assert (done.returncode, done.stdout) == (0, "--bind /:/host -u @x\n")


def test_loader_settings_of_the_caller_change_nothing(launch, demo_sif, user_tmp):
    hostile = {
        "LD_PRELOAD": f"{user_tmp}/x.so",
        "LD_LIBRARY_PATH": str(user_tmp),
        "LD_AUDIT": f"{user_tmp}/x.so",
        "GLIBC_TUNABLES": "glibc.malloc.mxfast=glibc.malloc.mxfast=A",
        "PYTHONPATH": str(user_tmp),
        "PYTHONHOME": str(user_tmp),
        "GCONV_PATH": str(user_tmp),
    }
    (user_tmp / "os.py").write_text("raise SystemExit(99)\n")
    done = launch(demo_sif, "echo", "good", env=hostile, cwd=user_tmp)
    assert done.returncode == 0
    assert done.stdout == "good\n"


def test_groups_stay_in_a_users_namespace(product, as_user, demo_sif):
    done = as_user([product.program, "exec", "-u", demo_sif, "cat", "/proc/self/setgroups"])
    assert done.stdout == "deny\n", done.stderr


def test_cgroups_are_not_the_payloads(launch, demo_sif):
    script = "mkdir /sys/fs/cgroup/x 2>/dev/null; echo 1 2>/dev/null >/sys/fs/cgroup/cgroup.procs"
    done = launch(demo_sif, "sh", "-c", f"{script}; echo $?")
    assert done.stdout in ("1\n", "2\n"), done.stderr
    assert not Path("/sys/fs/cgroup/x").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_devices_are_not_the_images(launch, sandbox, canary, kind):
    names = ("null", "zero", "console", "tty", "ptmx")
    for name in names:
        place = sandbox / "dev" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("") if kind == "file" else place.symlink_to(canary / "file")
    before = content(canary)
    done = launch(
        "-c", sandbox, "sh", "-c", "echo x > /dev/null; stat -c %t:%T /dev/null /dev/zero"
    )
    assert done.stdout.split() == ["1:3", "1:5"], done.stderr
    assert content(canary) == before


ABSENT = [
    ["exec", "--security", "selinux:x", "{sif}", "true"],
    ["exec", "-n", "--network", "bridge", "{sif}", "true"],
    ["exec", "instance://x", "true"],
    ["exec", "library://alpine", "true"],
    ["plugin", "inspect", "absent"],
    ["pull", "library://x/y/z"],
    ["cache", "clean", "--type", "none"],
]


@pytest.mark.parametrize("words", ABSENT, ids=" ".join)
def test_what_does_not_exist_is_refused_in_one_line(product, as_user, demo_sif, words, user_tmp):
    line = [product.program, *(word.format(sif=demo_sif) for word in words)]
    done = as_user(line, cwd=user_tmp)
    assert done.returncode in (1, 255)
    first, *way_out = done.stderr.splitlines()
    assert first.startswith("FATAL:"), done.stderr
    assert all(line.startswith("INFO:") for line in way_out[:1]) and len(way_out) <= 1, done.stderr
    assert not list(user_tmp.iterdir())


def test_root_in_a_users_directory_runs_nothing_of_it(product, demo_sif, user_tmp):
    mark = user_tmp / "mark"
    names = (
        "os re json site encodings sitecustomize usercustomize struct apptainer_py codecs".split()
    )
    for name in names:
        (user_tmp / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    env = {"PATH": f"{user_tmp}:/usr/bin:/bin", "HOME": str(user_tmp), "PYTHONPATH": str(user_tmp)}
    for words in (
        ["version"],
        ["inspect", demo_sif],
        ["config", "check"],
        ["exec", demo_sif, "true"],
    ):
        line = [product.program, *words]
        done = subprocess.run(
            line, cwd=user_tmp, env=env, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
    assert not mark.exists()
