"""Images for tests: each function makes one in a folder, once, and returns its path.

The folder must be one that every user can reach. The real Apptainer refuses to build as root in
some virtual machines, so it is always run as an ordinary user.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from apptainer_py.image import arch, sif_write, squashfs
from apptainer_py.verbs.inspect import Wanted, inspect

REAL_APPTAINER = Path("/usr/bin/apptainer")
ORDINARY_USER = "apytest"
EPOCH = 1_700_000_000
APPLETS = (
    "sh ash cat echo env false head id kill ls mkdir mount ps pwd readlink rm sleep stat sort "
    "tail test touch tr true uname wc"
)
FOLDERS = "bin dev etc home opt proc root run sbin srv sys tmp usr/bin var/tmp"

DEFINITION = """\
Bootstrap: localimage
From: {tree}

%environment
    export FOO=bar
    export BAZ="a b <&>"

%runscript
    echo "run $@"

%startscript
    echo "start"

%test
    echo "tested"

%labels
    Maintainer Zoë & co
    Version 1.0

%help
    This is help
    in two lines

%apprun foo
    echo "app foo $@"

%apphelp foo
    help for foo

%applabels foo
    AppLabel yes

%appenv foo
    export APPV=1

%appinstall foo
    touch installed

%apptest foo
    echo test of foo
"""

_META = {
    ".singularity.d/env/01-base.sh": "#!/bin/sh\n",
    ".singularity.d/env/90-environment.sh": "#!/bin/sh\nexport FOO=bar\n",
    ".singularity.d/runscript": '#!/bin/sh\n\n    echo "run $@"\n',
    ".singularity.d/startscript": '#!/bin/sh\n\n    echo "start"\n',
    ".singularity.d/test": '#!/bin/sh\n\n    echo "tested"\n',
    ".singularity.d/runscript.help": "    This is help\n    in two lines\n",
    ".singularity.d/labels.json": '{\n\t"Maintainer": "Zoë & co",\n\t"Version": "1.0"\n}\n',
    ".singularity.d/Singularity": "Bootstrap: localimage\nFrom: tree\n",
    "scif/apps/foo/scif/runscript": '#!/bin/sh\n\n    echo "app foo $@"\n',
    "scif/apps/foo/scif/labels.json": '{\n\t"SCIF_APP_NAME": "foo"\n}\n',
    "scif/apps/foo/scif/env/90-environment.sh": "export APPV=1\n",
}


def have_real_apptainer() -> bool:
    """Return whether the program that we are compatible with can be asked."""
    return os.access(REAL_APPTAINER, os.X_OK)


def real_apptainer(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real Apptainer as an ordinary user."""
    return as_ordinary_user([REAL_APPTAINER, *words], cwd=cwd)


def as_ordinary_user(
    argv: Sequence[str | Path], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with the ids and home of an ordinary user, who is created if needed."""
    plain = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    words = [str(word) for word in argv]
    if os.geteuid() != 0:
        home = os.path.expanduser("~")
        return _run(words, cwd=cwd, env={**plain, "HOME": home})
    user = ordinary_user()
    env = {**plain, "HOME": user.pw_dir, "USER": user.pw_name}
    ids = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [user.pw_gid]}
    return _run(words, cwd=cwd or Path(user.pw_dir), env=env, **ids)


def _run(words: list[str], **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        timeout=300,
        **how,
    )


@functools.cache
def ordinary_user() -> pwd.struct_passwd:
    """Return the user that tests act as when they run as root."""
    try:
        return pwd.getpwnam(ORDINARY_USER)
    except KeyError:
        argv = ["useradd", "--create-home", "--user-group", "--shell", "/bin/bash", ORDINARY_USER]
        subprocess.run(argv, check=True)
        return pwd.getpwnam(ORDINARY_USER)


def _made_once(name: str) -> Callable[[Callable[[Path, Path], None]], Callable[[Path], Path]]:
    def wrap(make: Callable[[Path, Path], None]) -> Callable[[Path], Path]:
        @functools.wraps(make)
        def once(folder: Path) -> Path:
            target = folder / name
            if not target.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    Path(scratch).chmod(0o755)
                    partial = Path(scratch) / name
                    make(folder, partial)
                    partial.rename(target)
            return target

        return once  # type: ignore[return-value]

    return wrap


@_made_once("tree")
def small_tree(folder: Path, target: Path) -> None:
    """A root directory with a static busybox and the usual folders, without any metadata."""
    for name in FOLDERS.split():
        (target / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (target / name).chmod(0o1777)
    _write(target / "etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    _write(target / "etc/group", "root:x:0:\n")
    _write(target / "etc/hosts", "127.0.0.1 localhost\n")
    _write(target / "etc/resolv.conf", "")
    _write(target / "etc/test-release", "a small tree\n")
    shutil.copy("/bin/busybox", target / "bin/busybox")
    for applet in APPLETS.split():
        (target / "bin" / applet).symlink_to("busybox")


@_made_once("described")
def described_tree(folder: Path, target: Path) -> None:
    """The small tree with scripts, environment, labels and an app below /.singularity.d."""
    shutil.copytree(small_tree(folder), target, symlinks=True)
    for name, content in _META.items():
        _write(target / name, content, 0o644 if name.endswith(".json") else 0o755)


@_made_once("real.sif")
def real_sif(folder: Path, target: Path) -> None:
    """A gzip SIF file, built by the real Apptainer from a definition file with every section."""
    tree = small_tree(folder)
    _build_with_real(target, lambda scratch: _definition(scratch, tree))


@_made_once("sandbox")
def real_sandbox(folder: Path, target: Path) -> None:
    """A sandbox directory, built by the real Apptainer from the same definition file."""
    tree = small_tree(folder)
    _build_with_real(target, lambda scratch: _definition(scratch, tree), "--sandbox")


@_made_once("own.sif")
def own_sif(folder: Path, target: Path) -> None:
    """A zstd SIF file of the described tree, written by us."""
    tree = described_tree(folder)
    packed = target.parent / "root.squashfs"
    squashfs.pack(str(tree), str(packed), squashfs.Packing(epoch=EPOCH))
    facts = json.loads(inspect(str(tree), Wanted(all=True)).text)
    sif_write.write_sif(
        str(target),
        str(packed),
        arch=arch.host_arch(),
        deffile=_META[".singularity.d/Singularity"].encode(),
        metadata=json.dumps(facts).encode(),
        epoch=EPOCH,
    )
    target.chmod(0o755)


@_made_once("bare.squashfs")
def bare_squashfs(folder: Path, target: Path) -> None:
    """A gzip squashfs file of the described tree, packed as others do, with nothing around it."""
    how = squashfs.Packing(compression="gzip", level=None, quick_start=False, epoch=EPOCH)
    squashfs.pack(str(described_tree(folder)), str(target), how)


def _definition(scratch: Path, tree: Path) -> Path:
    path = scratch / "image.def"
    path.write_text(DEFINITION.format(tree=tree))
    path.chmod(0o644)
    return path


def _build_with_real(target: Path, source: Callable[[Path], Path], *options: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        spec = source(Path(scratch))
        if os.geteuid() == 0:
            user = ordinary_user()
            os.chown(scratch, user.pw_uid, user.pw_gid)
        built = Path(scratch) / target.name
        done = real_apptainer("build", *options, built, spec)
        if done.returncode != 0:
            raise RuntimeError(f"the real Apptainer could not build: {done.stderr[-2000:]}")
        built.rename(target)


def _write(path: Path, content: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)


@functools.cache
def shared_folder() -> Path:
    """Return a folder that everybody can read and that goes when this process ends."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-images-", dir="/var/tmp"))
    made.chmod(0o755)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
