"""What the parity table has found: a launch once did otherwise than the real one."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images


@pytest.fixture
def place(own) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-found-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_root_binds_what_is_closed_to_others(own, sif, place):
    """As the real one: root's mounts are opened with root's rights."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("closed to others\n")
    os.chown(closed, own.user.pw_uid, own.user.pw_gid)
    done = own.run("exec", "-B", f"{closed}:/mnt", sif, "cat", "/mnt/file", root=True)
    assert (done.returncode, done.stdout) == (0, "closed to others\n"), done.stderr


def test_root_writes_over_an_image_of_others(own, place):
    """A file of the image is copied up as its owner's."""
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    os.chown(tree / "opt", 65534, 65534)
    script = "echo w >/opt/w && cat /opt/w; stat -c %u /opt"
    done = own.run("exec", "--writable-tmpfs", tree, "sh", "-c", script, root=True)
    assert (done.returncode, done.stdout) == (0, "w\n65534\n"), done.stderr


@pytest.mark.parametrize("home", ["relative", "./relative"])
def test_home_is_an_absolute_path(own, sif, home):
    done = own.run("exec", "-H", home, sif, "true")
    assert done.returncode == 255
    assert "is not an absolute path" in done.stderr


def test_home_that_is_a_file(own, sif):
    done = own.run("exec", "-H", "/etc/passwd", sif, "true")
    assert done.returncode == 255
    assert "home /etc/passwd is a file, not a directory" in done.stderr


@pytest.mark.parametrize("options", [("-w", "--writable-tmpfs"), ("-w", "--compat")])
def test_writable_wins_over_memory(own, place, options):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    done = own.run("exec", *options, tree, "touch", "/opt/written", root=True)
    assert done.returncode == 0, done.stderr
    assert "Disabling --writable-tmpfs flag, mutually exclusive with --writable" in done.stderr
    assert (tree / "opt/written").exists()


def test_a_variable_without_a_name_is_named(own, sif):
    done = own.run("exec", "--env", "=x", sif, "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "WARNING: Ignore environment variable =x: variable name missing\n"


def mounted(own, *words, cwd="/"):
    """Return where what is mounted, as source path and target, in order."""
    done = own.run("exec", *words, "cat", "/proc/self/mountinfo", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [tuple(line.split()[3:5]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("cwd", ["/tmp", "/srv"])
def test_a_bind_over_the_current_directory_is_what_is_seen_there(own, sif, place, cwd):
    shown = mounted(own, "-B", f"{place}:{cwd}", sif, cwd=cwd)
    assert [source for source, target in shown if target == cwd][-1] == str(place)


@pytest.mark.parametrize("link", [("var/tmp", "../tmp"), ("tmp", "var/tmp")])
def test_an_image_with_one_tmp_has_the_hosts_tmp_there(own, place, link):
    tree = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / link[0]).rmdir()
    (tree / link[0]).symlink_to(link[1])
    shown = [source for source, target in mounted(own, tree) if target in ("/tmp", "/var/tmp")]
    assert shown == ["/tmp"]


def test_a_list_of_binds_may_have_blanks(own, sif, place):
    shown = mounted(own, "-B", f"{place}: /mnt: ro, {place}:/opt", sif)
    assert {(str(place), "/mnt"), (str(place), "/opt")} <= {*shown}


def test_a_closed_directory_is_bound_and_stays_closed(own, sif, place):
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    done = own.run("exec", "-B", f"{closed}:/mnt", sif, "sh", "-c", "stat -c %a /mnt; ls /mnt")
    assert done.stdout == "700\n", done.stderr
    assert "ermission denied" in done.stderr
    assert "FATAL" not in done.stderr


def test_a_home_that_is_not_there_is_an_empty_directory(own, sif):
    script = "cd && pwd && touch new && ls -A"
    done = own.run("exec", "-H", "/nonexistent/home", sif, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "/nonexistent/home\nnew\n"), done.stderr
    assert "Not mounting home directory /nonexistent/home: it does not exist" in done.stderr


def test_a_home_wins_over_an_empty_tmp(own, sif, place):
    (place / "file").write_text("of the home\n")
    done = own.run("exec", "-c", "-H", f"{place}:/tmp", sif, "cat", "/tmp/file")
    assert (done.returncode, done.stdout) == (0, "of the home\n"), done.stderr


SPACES = ["", "-u"]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kib", [-1, 100_000])
def test_the_stack_limit_is_the_callers(own, sif, space, kib):
    """The kernel lowers it to 8 MiB when the setuid starter begins."""
    size = resource.RLIM_INFINITY if kib < 0 else kib << 10
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard not in (resource.RLIM_INFINITY, -1):
        pytest.skip("did not run: this machine's hard limit of the stack is a number")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (size, hard))

    words = ["exec", *space.split(), sif, "sh", "-c", "ulimit -s"]
    done = own.run(*words, preexec_fn=limit)
    assert done.stdout == ("unlimited\n" if kib < 0 else f"{kib}\n"), done.stderr


def test_more_words_than_sixteen_bits_count(own, sif):
    done = own.run("exec", sif, "sh", "-c", "echo $#", *map(str, range(100_000)))
    assert (done.returncode, done.stdout) == (0, "99999\n"), done.stderr


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_root_makes_nothing_among_the_hosts_devices(own, sif, place, kind):
    source = place / "source"
    source.touch() if kind == "file" else source.mkdir()
    target = Path("/dev", f"{place.name}-{kind}")
    done = own.run("exec", "-B", f"{source}:{target}", sif, "true", root=True)
    assert done.returncode == 255
    assert f"destination {target} doesn't exist in container" in done.stderr
    assert "nothing can be made in /dev" in done.stderr
    assert not target.exists()


@pytest.mark.parametrize("cwd", ["/bin", "/usr/bin", "/lib"])
def test_the_hosts_programs_do_not_cover_the_images(own, sif, cwd):
    """Where /bin is a link, the current directory is /usr/bin."""
    done = own.run("exec", sif, "cat", "/proc/self/mountinfo", cwd=cwd)
    assert done.returncode == 0, done.stderr
    points = [line.split()[4] for line in done.stdout.splitlines()]
    assert not {"/bin", "/usr/bin", "/lib", "/usr/lib"} & {*points}


REMOVED = 'mkdir d && cd d && rmdir ../d && exec "$@"'


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("exec", "{sif}", "pwd"), 0, "WARNING: the current directory has no path"),
        (("exec", "-B", ".:/mnt", "{sif}", "true"), 255, "bind path: .: the current directory"),
        (("exec", "-c", "-W", "w", "{sif}", "true"), 255, "FATAL:   the current directory has no"),
    ],
)
def test_a_current_directory_that_is_gone(own, sif, user_tmp, words, status, told):
    argv = ["sh", "-c", REMOVED, "sh", own.program, *(word.format(sif=sif) for word in words)]
    done = subprocess.run(
        argv, cwd=user_tmp, env=own.environment(), capture_output=True, text=True, check=False,
        **own.identity(),
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert [line for line in done.stderr.splitlines() if told in line], done.stderr
    assert len(done.stderr.splitlines()) == 1


WRONG_LIMITS = [
    ("--memory 10x", "invalid memory value: invalid size: '10x'"),
    ("--cpus x", "invalid cpus value: can't convert x to decimal"),
    ("--cpus 1e9", "cpus value must be in range 0.01 - "),
    ("--blkio-weight 5", "blkio-weight must be in range 10-1000"),
    ("--apply-cgroups /nonexistent", "open /nonexistent: no such file or directory"),
    ("--memory 1G --apply-cgroups /etc/passwd", "cannot apply a cgroups TOML file while"),
]


def test_who_joins_is_told_what_is_wrong_and_what_has_no_effect(own, sif):
    started = own.run("instance", "start", sif, "parity")
    assert started.returncode == 0, started.stderr
    try:
        for words, told in WRONG_LIMITS:
            done = own.run("exec", *words.split(), "instance://parity", "true")
            assert done.returncode == 255
            assert done.stderr.startswith(f"FATAL:   {told}"), words
            assert len(done.stderr.splitlines()) == 1
        done = own.run("exec", "-H", "relative", "instance://parity", "true")
        assert done.returncode == 0, done.stderr
        assert "--home: without effect" in done.stderr
    finally:
        own.run("instance", "stop", "-F", "parity")
