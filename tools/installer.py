"""Puts a fresh build under a prefix, or takes it away; run as root by ./install."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifest import BadManifest, Manifest, digest_of
from trust import Untrusted, check_interpreter, check_path, complaint

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON = "/usr/bin/python3"
SQUASHFUSE = "/usr/bin/squashfuse_ll"
# Without these, images that need one are refused with the package's name.
MORE_SERVERS = ("/usr/bin/fuse2fs", "/usr/bin/fuse-overlayfs", "/usr/bin/gpgv")
LIBEXEC = "libexec/apptainer-py"
IMAGE_LAUNCHER = "run-singularity"


class Refused(Exception):
    """Something that the administrator has to change first."""


class Installation:
    """Files on their way to their places, and the list of those that are there."""

    def __init__(self, prefix: str, sysconfdir: str) -> None:
        self.prefix = prefix
        self.libexec = f"{prefix}/{LIBEXEC}"
        self.library = f"{prefix}/lib/apptainer-py"
        self.sysconfdir = sysconfdir
        self.list_path = f"{self.libexec}/manifest"
        # Ours even if an installation that was cut short has made them.
        self.own = (self.libexec, self.library, self.sysconfdir)
        self.before = Manifest.load(self.list_path)
        self.now = Manifest()
        self._ready = {"/"}

    def directory(self, path: str) -> None:
        """Make a directory and its parents, root's and 0755, and remember those that are new.

        Raises:
            Untrusted: it is there, and not root's alone.
        """
        if path in self._ready:
            return
        self._ready.add(path)
        self.directory(os.path.dirname(path))
        ours = path in self.before.directories or path.startswith(self.own)
        if not os.path.lexists(path):
            os.mkdir(path, 0o755)
            ours = True
        elif said := complaint(path, os.lstat(path)):
            raise Untrusted(said)
        if ours:
            self.now.directories.add(path)

    def place(self, source: str | Path, target: str, mode: int) -> None:
        """Copy a file to a new name and rename it: no launch ever sees half of it."""
        self.directory(os.path.dirname(target))
        fresh = self._copy_beside(source, target, mode)
        self.now.files[target] = digest_of(fresh)
        os.rename(fresh, target)

    def _copy_beside(self, source: str | Path, target: str, mode: int) -> str:
        folder, name = os.path.split(target)
        descriptor, fresh = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream, open(source, "rb") as content:
                shutil.copyfileobj(content, stream)
                os.fchown(stream.fileno(), 0, 0)
                os.fchmod(stream.fileno(), mode)
        except BaseException:
            os.unlink(fresh)
            raise
        return fresh

    def place_config(self, source: Path, target: str) -> None:
        """Copy a configuration file where there is none; else put a differing one beside it."""
        self.directory(os.path.dirname(target))
        shipped = digest_of(str(source))
        if not os.path.lexists(target):
            self.place(source, target, 0o644)
            del self.now.files[target]
            self.now.configs[target] = shipped
            return
        if said := complaint(target, os.lstat(target)):
            print(f"install: warning: the setuid flow will refuse this file: {said}")
        # Remember what we once put there: only an unchanged file is ours to remove.
        self.now.configs[target] = self.before.configs.get(target, shipped)
        if not os.path.isfile(target) or digest_of(target) != shipped:
            self.place(source, f"{target}.new", 0o644)
            print(f"install: {target} is kept; the new default is {target}.new")

    def place_link(self, target: str, link: str) -> None:
        """Let a name lead to what is installed, unless somebody else's file or link has it."""
        if os.path.lexists(link) and not leads_to(link, target):
            print(f"install: warning: {link} is not ours; it stays as it is")
            self.before.files.pop(link, None)
            return
        above = os.path.dirname(link)
        missing = []
        while not os.path.isdir(above):
            missing.append(above)
            above = os.path.dirname(above)
        for path in reversed(missing):
            os.mkdir(path)
            os.chmod(path, 0o755)
        self.now.directories.update(missing)
        # A directory that an earlier installation has made is still ours.
        parents = {os.path.dirname(link), os.path.dirname(os.path.dirname(link))}
        self.now.directories |= self.before.directories & parents
        fresh = f"{link}.{os.urandom(6).hex()}"
        os.symlink(os.path.relpath(target, os.path.dirname(link)), fresh)
        os.rename(fresh, link)
        self.now.files[link] = "-"

    def finish(self) -> None:
        """Write the list, then remove what an earlier installation had and this one has not."""
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as stream:
            stream.write(self.now.text())
            stream.flush()
            self.place(stream.name, self.list_path, 0o644)
        stale = Manifest()
        kept = {*self.now.files, *self.now.configs}
        stale.files = {path: d for path, d in self.before.files.items() if path not in kept}
        stale.configs = {path: d for path, d in self.before.configs.items() if path not in kept}
        stale.directories = self.before.directories - self.now.directories
        remove(stale)


def leads_to(link: str, target: str) -> bool:
    """Return whether a name is a symbolic link to that target, which need not be there."""
    if not os.path.islink(link):
        return False
    return os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link))) == target


def remove(listed: Manifest) -> list[str]:
    """Remove what is listed, privilege first; return the configuration that was changed."""
    first = [path for path in listed.files if path.endswith("/starter-suid")]
    for path in [*first, *sorted(listed.files)]:
        if os.path.lexists(path):
            os.unlink(path)
    changed = []
    for path, digest in sorted(listed.configs.items()):
        if not os.path.lexists(path):
            continue
        if os.path.isfile(path) and digest_of(path) == digest:
            os.unlink(path)
        else:
            changed.append(path)
    for path in sorted(listed.directories, key=len, reverse=True):
        # Somebody else's files may lie in it by now.
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    return changed


def plain_path(value: str, name: str) -> str:
    """Return an absolute path without surprises, to be compiled in.

    Raises:
        Refused: it is relative, has dots, or characters that C or a shell would need quoted.
    """
    value = value.rstrip("/")
    plain = all(c.isascii() and (c.isalnum() or c in "/._+-") for c in value)
    if not value.startswith("/") or os.path.normpath(value) != value or not plain:
        raise Refused(
            f"--{name} {value!r} is not a plain absolute path: "
            "letters, digits and . _ + - between slashes"
        )
    return value


def check_prefix(path: str, name: str) -> None:
    """Look at all that leads to a directory that will hold what runs as root.

    Raises:
        Refused: with the directory and what is wrong with it.
    """
    try:
        resolved = check_path(path)
    except Untrusted as error:
        raise Refused(f"--{name} {path}: an ordinary user could change it: {error}") from error
    if resolved != path:
        # The starter compares its own path with the one that was compiled in.
        raise Refused(f"--{name} {path} leads to {resolved}: give me that one")


def check_python(library: str) -> None:
    """Look at the interpreter that every launch will load.

    Raises:
        Refused: with the file and what is wrong with it.
    """
    try:
        check_interpreter(PYTHON, library)
    except Untrusted as error:
        raise Refused(f"{PYTHON}: an ordinary user could change it: {error}") from error


def nearest_directory(path: str) -> str:
    """Return the path, or the nearest parent that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def warn_of_mount_flags(prefix: str, *, setuid: bool) -> None:
    """Say what will not work on the file system of the prefix."""
    path = nearest_directory(prefix)
    flags = os.statvfs(path).f_flag
    if flags & os.ST_NOEXEC:
        print(f"install: warning: {path} is mounted noexec: nothing installed here will start")
    if setuid and flags & os.ST_NOSUID:
        print(
            f"install: warning: {path} is mounted nosuid: the setuid bit is ignored there, "
            "every launch will use a user namespace"
        )


def build_place() -> str:
    """Return a directory of root's where what was compiled can be tried."""
    for path in ("/var/tmp", "/root"):
        if not os.statvfs(path).f_flag & os.ST_NOEXEC:
            return path
    return str(CHECKOUT)


def build(output: Path, prefix: str, sysconfdir: str, *, setuid: bool) -> None:
    """Run setup.py for this prefix.

    Raises:
        Refused: it failed; it has said why.
    """
    argv = [PYTHON, "-I", "-B", str(CHECKOUT / "setup.py"), "-q", "build_product"]
    argv += ["--prefix", prefix, "--sysconfdir", sysconfdir, "--output", str(output)]
    argv += [] if setuid else ["--no-setuid"]
    done = subprocess.run(argv, cwd=CHECKOUT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Refused("the build failed")


def check_module(package: Path) -> None:
    """Load the Cython module as a launch will, before anything is replaced.

    Raises:
        Refused: this interpreter cannot load it.
    """
    load = f"import sys; sys.path.insert(0, {str(package)!r}); import apptainer_py.kernel._starter"
    done = subprocess.run([PYTHON, "-I", "-S", "-B", "-c", load], check=False)
    if done.returncode != 0:
        soabi = sysconfig.get_config_var("SOABI")
        raise Refused(
            f"{PYTHON} ({soabi}) cannot load the module that was just built: "
            "apt-get install --reinstall python3 python3-dev cython3"
        )


@contextmanager
def alone(prefix: str) -> Iterator[None]:
    """Keep a second installer of the same prefix waiting."""
    descriptor = os.open(nearest_directory(prefix), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def place_all(installation: Installation, built: Path, *, setuid: bool) -> None:
    """Put every file in its place, what older launches may still be reading first by rename."""
    package = built / "package"
    for source in sorted((package / "apptainer_py").rglob("*")):
        if source.suffix in (".py", ".pyc", ".pyi", ".so") or source.name == "py.typed":
            name = source.relative_to(package)
            installation.place(source, f"{installation.library}/{name}", 0o644)
    # `config global` and `confgen` write the administrator's file anew from this one.
    shipped = CHECKOUT / "etc/apptainer-py.conf"
    installation.place(shipped, f"{installation.library}/apptainer-py.conf", 0o644)
    for source in sorted((CHECKOUT / "etc").rglob("*")):
        if source.is_file():
            name = source.relative_to(CHECKOUT / "etc")
            installation.place_config(source, f"{installation.sysconfdir}/{name}")
    # Who changes capability.json locks this; a lock that users could open would let them wait.
    installation.place(os.devnull, f"{installation.sysconfdir}/.capability.lock", 0o600)
    libexec = installation.libexec
    installation.directory(f"{libexec}/session")
    installation.place(os.devnull, f"{libexec}/plugins/.lock", 0o600)
    # Not readable: so the image server stays non-dumpable although it runs as the user.
    installation.place(SQUASHFUSE, f"{libexec}/bin/squashfuse_ll", 0o711)
    for program in MORE_SERVERS:
        if os.path.exists(program):
            installation.place(program, f"{libexec}/bin/{os.path.basename(program)}", 0o711)
    installation.place(built / "unpack.so", f"{libexec}/bin/unpack.so", 0o644)
    installation.place(built / "fusefd.so", f"{libexec}/bin/fusefd.so", 0o644)
    installation.place(built / "stagehost.so", f"{libexec}/stagehost.so", 0o644)
    installation.place(built / "main.py", f"{libexec}/main.py", 0o755)
    installation.place(built / "starter", f"{libexec}/starter", 0o755)
    # Readable by all: what enters a container is a copy that its caller makes.
    installation.place(built / "starter-init", f"{libexec}/starter-init", 0o755)
    installation.place(built / "launcher", f"{libexec}/launcher", 0o755)
    installation.place(built / "starter-monitor", f"{libexec}/starter-monitor", 0o755)
    for name in ("apptainer-py", "apptainer-py-oci"):
        installation.place(built / name, f"{installation.prefix}/bin/{name}", 0o755)
    place_image_launcher(installation, built)
    if setuid:
        installation.place(built / "starter", f"{libexec}/starter-suid", 0o711)
    # Where Debian's Python looks, if the prefix is /usr/local: programs of users import it.
    packages = f"{installation.prefix}/lib/python{sysconfig.get_python_version()}/dist-packages"
    installation.place_link(f"{installation.library}/apptainer_py", f"{packages}/apptainer_py")
    installation.finish()
    if setuid:
        # Last of all: until here nothing new holds privilege, nor does a file of another name.
        os.chmod(f"{libexec}/starter-suid", 0o4711)


def place_image_launcher(installation: Installation, built: Path) -> None:
    """Place what the first line of a SIF file asks for, where no other program is that.

    It is what `./image.sif` starts; another Apptainer's goes on to be that one's.
    """
    place = f"{installation.prefix}/bin/{IMAGE_LAUNCHER}"
    for folder in ("/usr/local/bin", "/usr/bin", "/bin", os.path.dirname(place)):
        found = f"{folder}/{IMAGE_LAUNCHER}"
        if os.path.lexists(found) and not (found == place and place in installation.before.files):
            return
    script = built / IMAGE_LAUNCHER
    program = f"{installation.prefix}/bin/apptainer-py"
    script.write_text(f'#!/bin/sh\nexec {program} --quiet run "$@"\n')
    installation.place(script, place, 0o755)


def install(prefix: str, sysconfdir: str, *, setuid: bool) -> None:
    """Check, build, place.

    Raises:
        Refused: with what has to be changed first.
    """
    check_prefix(prefix, "prefix")
    check_prefix(sysconfdir, "sysconfdir")
    library = sysconfig.get_config_var("LIBDIR") + "/" + sysconfig.get_config_var("INSTSONAME")
    check_python(library)
    warn_of_mount_flags(prefix, setuid=setuid)
    with tempfile.TemporaryDirectory(prefix="apptainer-py-build-", dir=build_place()) as scratch:
        built = Path(scratch)
        build(built, prefix, sysconfdir, setuid=setuid)
        check_module(built / "package")
        with alone(prefix):
            place_all(Installation(prefix, sysconfdir), built, setuid=setuid)
    said = f"install: apptainer-py is {prefix}/bin/apptainer-py; configuration in {sysconfdir}"
    print(said, flush=True)


def uninstall(prefix: str) -> None:
    """Remove what the list of an installation names.

    Raises:
        Refused: there is none, or somebody else could have written it.
    """
    list_path = f"{prefix}/{LIBEXEC}/manifest"
    if not os.path.exists(list_path):
        raise Refused(f"nothing of ours is under {prefix}: {list_path} is not there")
    check_prefix(list_path, "prefix")
    with alone(prefix):
        listed = Manifest.load(list_path)
        listed.files[list_path] = "-"
        changed = remove(listed)
    for path in changed:
        print(f"uninstall: {path} was changed since it was installed; it is left there")
    if os.path.isdir(f"{prefix}/{LIBEXEC}/plugins"):
        print(f"uninstall: plug-ins are left in {prefix}/{LIBEXEC}/plugins")
    print(f"uninstall: apptainer-py is gone from {prefix}")


def demo(prefix: str) -> int:
    """Run the demonstration against what was just installed; return its exit status."""
    script = str(CHECKOUT / "tools/demo.py")
    return subprocess.run([PYTHON, "-I", "-B", script, "--prefix", prefix], check=False).returncode


def main() -> int:
    """Read the arguments that ./install hands over."""
    parser = argparse.ArgumentParser(prog="install")
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--sysconfdir", default="/etc/apptainer-py")
    parser.add_argument("--setuid", action="store_true")
    parser.add_argument("--demo", action="store_true")
    asked = parser.parse_args()
    os.umask(0o022)
    try:
        prefix = plain_path(asked.prefix, "prefix")
        if asked.action == "uninstall":
            uninstall(prefix)
            return 0
        install(prefix, plain_path(asked.sysconfdir, "sysconfdir"), setuid=asked.setuid)
    except (Refused, Untrusted, BadManifest) as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"install: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    return demo(prefix) if asked.demo else 0


if __name__ == "__main__":
    sys.exit(main())
