"""./install under a prefix of its own: what is there, whose it is, what is refused, what stays."""

from __future__ import annotations

import hashlib
import marshal
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

MODES = {
    "bin/apptainer-py": 0o755,
    "libexec/apptainer-py/starter": 0o755,
    "libexec/apptainer-py/starter-suid": 0o4711,
    "libexec/apptainer-py/stagehost.so": 0o644,
    "libexec/apptainer-py/main.py": 0o755,
    "libexec/apptainer-py/manifest": 0o644,
    "libexec/apptainer-py/session": 0o755,
    "libexec/apptainer-py/bin/fuse-overlayfs": 0o711,
    "libexec/apptainer-py/bin/fuse2fs": 0o711,
    "libexec/apptainer-py/bin/fusefd.so": 0o644,
    "libexec/apptainer-py/bin/gpgv": 0o711,
    "libexec/apptainer-py/bin/squashfuse_ll": 0o711,
    "libexec/apptainer-py/bin/unpack.so": 0o644,
    "lib/apptainer-py/apptainer-py.conf": 0o644,
    "lib/apptainer-py/apptainer_py/__init__.py": 0o644,
}
IMAGE_LAUNCHER = "run-singularity"
PYC_UNCHECKED_HASH = 0b01


def inventory(*folders: Path) -> dict[str, tuple[int, str]]:
    """Return mode and digest of everything below some directories."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (path.lstat().st_mode, hashlib.sha256(content).hexdigest())
    return found


def run_install(repository: Path, *arguments: str | Path, **options):
    return subprocess.run(
        [repository / "install", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )


@pytest.fixture
def place(require_root) -> Iterator[Path]:
    """A directory in which only root can write, all the way up."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-test-", dir="/opt"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def installed(require_root, repository) -> Iterator[SimpleNamespace]:
    """An installation made under a hostile umask and with bytecode switched off."""
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-test-", dir="/opt"))
    place.chmod(0o755)
    prefix, sysconfdir = place / "prefix", place / "etc"
    options = ["--prefix", prefix, "--sysconfdir", sysconfdir]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "/nonexistent"}
    done = run_install(repository, *options, env=environment, umask=0o077)
    assert done.returncode == 0, done.stderr
    yield SimpleNamespace(prefix=prefix, sysconfdir=sysconfdir, options=options, place=place)
    shutil.rmtree(place)


def test_every_program_has_its_mode(installed):
    modes = {name: stat.S_IMODE((installed.prefix / name).stat().st_mode) for name in MODES}
    assert modes == MODES
    links = [path for path in installed.prefix.rglob("*") if path.is_symlink()]
    [link] = links
    assert link.match("lib/python3.*/dist-packages/apptainer_py")
    assert link.resolve() == installed.prefix / "lib/apptainer-py/apptainer_py"


def test_everything_is_roots_alone(installed):
    for path in [installed.prefix, *installed.prefix.rglob("*"), *installed.sysconfdir.rglob("*")]:
        facts = path.lstat()
        assert (facts.st_uid, facts.st_gid) == (0, 0), path
        if path.is_symlink():
            continue
        assert not facts.st_mode & 0o022, path
        assert path.is_file() or stat.S_IMODE(facts.st_mode) == 0o755, path


def test_only_the_starter_is_setuid(installed):
    special = stat.S_ISUID | stat.S_ISGID
    found = [path.name for path in installed.prefix.rglob("*") if path.stat().st_mode & special]
    assert found == ["starter-suid"]


def test_every_module_is_compiled_and_trusted_without_its_source(installed):
    library = installed.prefix / "lib/apptainer-py"
    sources = list(library.rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        content = compiled.read_bytes()
        assert int.from_bytes(content[4:8], "little") == PYC_UNCHECKED_HASH, compiled
        if sys.version_info[:2] == (3, 11):
            assert marshal.loads(content[16:]).co_filename == str(source)  # noqa: S302 our own


def test_the_administrators_file_is_changed_by_command(installed):
    """Both commands write the file anew from the one that was installed beside the modules."""
    program, conf = (
        installed.prefix / "bin/apptainer-py",
        installed.sysconfdir / "apptainer-py.conf",
    )
    before = conf.read_bytes()
    argv = [program, "config", "global", "--set", "mount proc", "no"]
    subprocess.run(argv, check=True)
    assert "\nmount proc = no\n" in conf.read_text()
    subprocess.run([program, "config", "global", "--reset", "mount proc"], check=True)
    subprocess.run([program, "confgen", conf, installed.place / "new"], check=True)
    assert (installed.place / "new").read_bytes() == conf.read_bytes()
    conf.write_bytes(before)


def test_prefix_is_compiled_in(installed):
    text = (installed.prefix / "lib/apptainer-py/apptainer_py/base/build.py").read_text()
    assert f'PREFIX = "{installed.prefix}"' in text
    assert f'SYSCONFDIR = "{installed.sysconfdir}"' in text
    assert re.search(r'^BUILD_ID = "[0-9a-f]{32}"$', text, re.MULTILINE)


def test_nothing_names_the_checkout(installed, repository):
    here = str(repository).encode()
    assert not [p for p in installed.prefix.rglob("*") if p.is_file() and here in p.read_bytes()]


def test_configuration_is_the_shipped_one(installed, repository):
    shipped = sorted(p.relative_to(repository / "etc") for p in (repository / "etc").rglob("*"))
    there = sorted(p.relative_to(installed.sysconfdir) for p in installed.sysconfdir.rglob("*"))
    # Beside them a file that the commands of capability.json lock.
    assert there == sorted([*shipped, Path(".capability.lock")])
    assert {Path(f"{name}.conf") for name in ("apptainer-py", "nvliblist", "rocmliblist")} <= {
        *there
    }


def test_installing_again_changes_nothing(installed, repository):
    before = inventory(installed.prefix, installed.sysconfdir)
    done = run_install(repository, *installed.options)
    assert done.returncode == 0, done.stderr
    assert inventory(installed.prefix, installed.sysconfdir) == before


def test_manifest_lists_every_file(installed):
    lines = (installed.prefix / "libexec/apptainer-py/manifest").read_text().splitlines()
    listed = {line.split(" ", 2)[2] for line in lines}
    there = {str(path) for path in inventory(installed.prefix, installed.sysconfdir)}
    assert there - listed == {f"{installed.prefix}/libexec/apptainer-py/manifest"}
    assert listed - there == set()


def test_life_of_an_installation(place, repository):
    """Install, edit the configuration, install without the bit, remove."""
    prefix, sysconfdir = place / "prefix", place / "etc"
    options = ["--prefix", prefix, "--sysconfdir", sysconfdir]
    assert run_install(repository, *options).returncode == 0
    config = sysconfdir / "apptainer-py.conf"
    shipped = config.read_bytes()
    config.write_bytes(shipped + b"# edited\n")

    done = run_install(repository, *options, "--no-setuid")
    assert done.returncode == 0, done.stderr
    assert config.read_bytes() == shipped + b"# edited\n"
    assert (sysconfdir / "apptainer-py.conf.new").read_bytes() == shipped
    assert not (prefix / "libexec/apptainer-py/starter-suid").exists()
    assert "SETUID = False" in (prefix / "lib/apptainer-py/apptainer_py/base/build.py").read_text()

    # What others put among our files stays theirs.
    foreign = prefix / "bin/other-program"
    foreign.write_text("not ours")
    done = run_install(repository, "--uninstall", "--prefix", prefix)
    assert done.returncode == 0, done.stderr
    assert str(config) in done.stdout
    left = [str(path.relative_to(place)) for path in place.rglob("*")]
    assert sorted(left) == sorted(
        ["etc", "etc/apptainer-py.conf", "prefix", "prefix/bin", "prefix/bin/other-program"]
    )


def test_uninstall_refuses_a_list_that_others_could_write(place, repository, user):
    listing = place / "prefix/libexec/apptainer-py/manifest"
    listing.parent.mkdir(parents=True)
    victim = place / "victim"
    victim.write_text("precious")
    listing.write_text(f"file - {victim}\n")
    os.chown(listing, user.pw_uid, user.pw_gid)
    done = run_install(repository, "--uninstall", "--prefix", place / "prefix")
    assert done.returncode == 1
    assert f"belongs to uid {user.pw_uid}" in done.stderr
    assert victim.exists()


def refusal(repository: Path, *arguments: str | Path) -> str:
    """Return the one line with which an installation was refused."""
    done = run_install(repository, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_refuses_a_prefix_below_a_users_directory(place, repository, user):
    (place / "theirs").mkdir()
    os.chown(place / "theirs", user.pw_uid, user.pw_gid)
    said = refusal(repository, "--prefix", place / "theirs/prefix")
    assert f"{place}/theirs belongs to uid {user.pw_uid}" in said
    assert not (place / "theirs/prefix").exists()


@pytest.mark.parametrize(("mode", "who"), [(0o775, "group 0"), (0o757, "everybody")])
@pytest.mark.parametrize("option", ["--prefix", "--sysconfdir"])
def test_refuses_a_directory_that_others_may_write(place, repository, mode, who, option):
    (place / "shared").mkdir()
    (place / "shared").chmod(mode)
    said = refusal(repository, "--prefix", place / "prefix", option, place / "shared/below/it")
    assert f"{place}/shared is writable by {who}" in said
    assert list((place / "shared").iterdir()) == []


def test_refuses_a_link_that_a_user_made(place, repository, user):
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    os.chown(place / "link", user.pw_uid, user.pw_gid, follow_symlinks=False)
    assert "belongs to uid" in refusal(repository, "--prefix", place / "link/prefix")


def test_refuses_a_prefix_that_is_another_name(place, repository):
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    assert f"leads to {place}/real" in refusal(repository, "--prefix", place / "link")


def test_refuses_tmp_without_advising_to_close_it(repository, require_root):
    said = refusal(repository, "--prefix", "/tmp/apptainer-py")
    assert "/tmp is writable by everybody" in said
    assert "chmod" not in said


@pytest.mark.parametrize("prefix", ["relative", "/opt/../opt/x", "/opt/a b", '/opt/"x"', "/", ""])
def test_refuses_a_prefix_that_cannot_be_compiled_in(require_root, repository, prefix):
    assert "is not a plain absolute path" in refusal(repository, "--prefix", prefix)


def test_refuses_an_ordinary_user(place, repository, user):
    # The checkout may lie where only root can look: a copy of the script is enough.
    shutil.copy(repository / "install", place / "install")
    done = run_install(place, "--prefix", place / "prefix", user=user.pw_uid, cwd="/")
    assert done.returncode == 1
    assert "run me as root" in done.stderr


def in_private_mounts(script: str, *arguments: str | Path):
    """Run a shell script in a mount namespace of its own."""
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"]
    return subprocess.run(
        [*argv, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("interpreter", "/usr/bin/python3.11"),
        ("library", "/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0"),
        ("standard library", "/usr/lib/python3.11/os.py"),
    ],
)
def test_refuses_an_interpreter_that_others_may_write(place, repository, kind, path):
    script = 'cp "$1" "$2"; chmod 775 "$2"; mount --bind "$2" "$1"; exec "$3" --prefix "$4"'
    arguments = [path, place / "copy", repository / "install", place / "prefix"]
    done = in_private_mounts(script, *arguments)
    assert done.returncode == 1, kind
    assert f"{path} is writable by group 0" in done.stderr
    assert not (place / "prefix").exists()


def test_warns_of_a_file_system_without_setuid(place, repository):
    (place / "mnt").mkdir()
    script = 'mount -t tmpfs -o mode=755,nosuid tmpfs "$1"; shift; exec "$@"'
    arguments = ["--prefix", place / "mnt/prefix", "--sysconfdir", place / "mnt/etc"]
    done = in_private_mounts(script, place / "mnt", repository / "install", *arguments)
    assert done.returncode == 0, done.stderr
    assert "mounted nosuid" in done.stdout


def test_refuses_unknown_words_and_shows_the_usage(repository, require_root):
    done = run_install(repository, "--demmo")
    assert done.returncode == 1
    assert "unknown option --demmo" in done.stderr
    assert "usage:" in done.stderr


def test_demo_runs_as_an_ordinary_user_and_uninstall_leaves_nothing(place, repository):
    prefix = place / "prefix"
    options = ["--prefix", prefix, "--sysconfdir", place / "etc", "--demo"]
    done = run_install(repository, *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(uid [1-9]\d*\) in the apptainer-py demo image", done.stdout)
    assert "in the setuid flow" in done.stdout
    assert "apydemo" not in Path("/etc/passwd").read_text()

    assert run_install(repository, "--uninstall", "--prefix", prefix).returncode == 0
    assert list(place.iterdir()) == []
    again = run_install(repository, "--uninstall", "--prefix", prefix)
    assert again.returncode == 1
    assert "nothing of ours" in again.stderr


def test_an_image_is_a_program_where_no_other_apptainer_has_that_name(installed, demo_sif) -> None:
    script = installed.prefix / "bin" / IMAGE_LAUNCHER
    others = [Path(folder, IMAGE_LAUNCHER) for folder in ("/usr/local/bin", "/usr/bin", "/bin")]
    found = [path for path in (*others, script) if path.exists()]
    assert script.exists() != any(path.exists() for path in others)
    if "apptainer-py --quiet run" not in found[0].read_text():
        pytest.skip("did not run: another Apptainer's run-singularity is on this machine")
    image = installed.place / "image.sif"
    shutil.copyfile(demo_sif, image)
    image.chmod(0o755)
    environment = {"PATH": f"{found[0].parent}:/usr/bin:/bin", "HOME": "/"}
    done = subprocess.run(
        [image, "echo", "word"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:], done.stderr) == (0, ["word"], "")


@pytest.mark.long
def test_the_name_of_another_one_is_left_alone(repository, place) -> None:
    other = place / "prefix/bin" / IMAGE_LAUNCHER
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    options = ("--prefix", place / "prefix", "--sysconfdir", place / "etc", "--no-setuid")
    assert run_install(repository, *options).returncode == 0
    assert run_install(repository, *options, "--uninstall").returncode == 0
    assert other.read_text() == "#!/bin/sh\n"
