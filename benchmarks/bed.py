"""What the benchmarks stand on: an ordinary user, images of one tree, the programs to compare."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = Path("/var/tmp/apptainer-py-benchmark")
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
LINKS = ("bin", "lib", "lib64", "sbin")
EPOCH = 1_700_000_000


class Unusable(Exception):
    """A program or image that is needed is not there."""


@contextlib.contextmanager
def ordinary_user(name: str | None) -> Iterator[pwd.struct_passwd]:
    """Give an account that is nobody else's: made here and removed at the end, unless named."""
    if os.geteuid() != 0:
        yield pwd.getpwuid(os.getuid())
        return
    if name:
        yield pwd.getpwnam(name)
        return
    made = f"apybench{os.getpid()}"
    argv = ["useradd", "--create-home", "--user-group", "--shell", "/bin/sh", made]
    subprocess.run(argv, check=True)
    try:
        yield pwd.getpwnam(made)
    finally:
        subprocess.run(["userdel", "--remove", made], check=False, stderr=subprocess.DEVNULL)


def become(user: pwd.struct_passwd) -> None:
    """Give up root for ever, in a process of its own."""
    if os.geteuid() == 0:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    os.chdir(user.pw_dir)


def identity_of(user: pwd.struct_passwd) -> dict[str, object]:
    """Return what makes a child process of subprocess the user's."""
    if os.geteuid() != 0:
        return {"cwd": user.pw_dir}
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    ids = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    return {"cwd": user.pw_dir, **ids}


def environment_of(user: pwd.struct_passwd) -> dict[str, str]:
    """Return the plain environment of a user."""
    return {**ENVIRONMENT, "HOME": user.pw_dir, "USER": user.pw_name}


def as_user(user: pwd.struct_passwd, argv: list[str]) -> None:
    """Run a command as the user; what it says on failure is the reason.

    Raises:
        Unusable: it failed.
    """
    done = subprocess.run(
        argv,
        env=environment_of(user),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        **identity_of(user),
    )
    if done.returncode != 0:
        raise Unusable(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-500:]}")


def peers() -> dict[str, str]:
    """Return the programs to compare with, by name: those of PEERS_SETUP, else of the system."""
    setup = Path(os.environ.get("PEERS_SETUP", REPOSITORY / "../shared/peers/setup-peers"))
    found = {name: shutil.which(name) for name in ("apptainer", "bwrap", "crun")}
    if setup.exists():
        argv = ["sh", str(setup), "--where"]
        for line in subprocess.run(argv, capture_output=True, text=True).stdout.splitlines():
            name, _, path = line.partition(" ")
            found[name] = path
    return {name: path for name, path in found.items() if path and os.access(path, os.X_OK)}


def _essential() -> set[str]:
    """Return the packages without which this Debian would not run, and what those need."""
    form = "${Package}\t${Essential}\t${Pre-Depends}, ${Depends}\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True)
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    needs = {name: [word.split() for word in wanted.split(",")] for name, _, wanted in rows}
    found: set[str] = set()
    left = [name for name, essential, _ in rows if essential == "yes"]
    while left:
        name = left.pop()
        if name not in found and name in needs:
            found.add(name)
            left += [words[0].split(":")[0] for words in needs[name] if words]
    return found


def copy_tree(target: Path) -> None:
    """Copy the essential packages of this machine: the root directory that all images hold."""
    listed = subprocess.run(["dpkg", "-L", *sorted(_essential())], capture_output=True, text=True)
    paths = {line for line in listed.stdout.splitlines() if line.startswith("/") and line != "/."}
    names = [path[1:] for path in sorted(paths) if os.path.lexists(path)]
    names += ["etc/passwd", "etc/group", "etc/ld.so.cache"]
    target.mkdir(parents=True)
    for name in LINKS:
        (target / "usr" / name).mkdir(parents=True)
        (target / name).symlink_to(f"usr/{name}")
    pack = ["tar", "-C", "/", "--no-recursion", "-cf", "-", "-T", "-"]
    unpack = ["tar", "-C", str(target), "--keep-directory-symlink", "--no-same-owner", "-xf", "-"]
    packed = subprocess.run(pack, input="\n".join(names).encode(), stdout=subprocess.PIPE)
    subprocess.run(unpack, input=packed.stdout, check=True)
    for name in ("dev", "proc", "sys", "root", "home", "var/tmp"):
        (target / name).mkdir(parents=True, exist_ok=True)
    subprocess.run(["chmod", "-R", "a+rX,u+w", str(target)], check=True)


def _own_sif(tree: Path, target: Path) -> None:
    sys.path.insert(0, str(REPOSITORY))
    from apptainer_py.image import arch, sif_write, squashfs

    packed = target.with_suffix(".squashfs")
    squashfs.pack(str(tree), str(packed), squashfs.Packing(epoch=EPOCH))
    sif_write.write_sif(
        str(target), str(packed), arch=arch.host_arch(), epoch=EPOCH, quick_start=True
    )
    packed.unlink()


class Images:
    """Three images of one tree: gzip SIF and sandbox by the real Apptainer, our own zstd SIF."""

    def __init__(self, folder: Path) -> None:
        self.gzip = folder / "gzip.sif"
        self.zstd = folder / "zstd.sif"
        self.sandbox = folder / "sandbox"


def images(folder: Path, user: pwd.struct_passwd, apptainer: str | None) -> Images:
    """Return the images of a folder, made now where they are missing.

    Raises:
        Unusable: the real Apptainer is needed for that and is not there, or failed.
    """
    made = Images(folder)
    if all(path.exists() for path in (made.gzip, made.zstd, made.sandbox)):
        return made
    if apptainer is None:
        raise Unusable(f"no Apptainer to build {made.gzip}: put one there, or install it")
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tree = scratch / "tree"
    print(f"bed: making the images in {folder}", file=sys.stderr)
    copy_tree(tree)
    if os.geteuid() == 0:
        argv = ["chown", "-R", "--no-dereference", f"{user.pw_uid}:{user.pw_gid}", str(scratch)]
        subprocess.run(argv, check=True)
    as_user(user, [apptainer, "build", "--force", str(scratch / "gzip.sif"), str(tree)])
    from_sif = ["--sandbox", str(scratch / "sandbox"), str(scratch / "gzip.sif")]
    as_user(user, [apptainer, "build", "--force", *from_sif])
    subprocess.run(["chmod", "-R", "a+rX,u+w", str(scratch / "sandbox")], check=True)
    _own_sif(scratch / "sandbox", scratch / "zstd.sif")
    for path in (made.gzip, made.zstd, made.sandbox):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (scratch / path.name).rename(path)
    shutil.rmtree(scratch)
    subprocess.run(["chmod", "a+rx", str(folder)], check=True)
    return made
