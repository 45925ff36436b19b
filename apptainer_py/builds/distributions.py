"""Bootstrap agents that install a distribution with its own package manager, or busybox alone.

The programs are the host's, and think that they are root. Where the build is root of a user
namespace, that cannot make devices nor mount kernel file systems: it shows the host's harmless
devices and /proc in the new root, and a few programs before the host's leave it at that.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import report
from apptainer_py.builds.agents import TOOLS, Base, ConveyorFailed, Order
from apptainer_py.image import arch
from apptainer_py.kernel import _container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What Debian calls the package with a program.
_PACKAGES = {
    "SUSEConnect": "suseconnect, of SUSE's own distributions",
    "chroot": "coreutils",
    "curl": "curl",
    "debootstrap": "debootstrap",
    "dnf": "dnf",
    "pacman": "pacman-package-manager",
    "pacstrap": "arch-install-scripts",
    "rpm": "rpm",
    "rpmkeys": "rpm",
    "zypper": "zypper",
}
_DEVICES = ("null", "random", "urandom", "zero")
_MS_BIND = 4096
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_PACMAN_CONF = (
    "https://gitlab.archlinux.org/archlinux/packaging/packages/pacman/-/raw/main/pacman.conf"
)
_BUSYBOX_BYTES = 64 << 20
_RPM_SCRIPTS_FAILED = 107
# Go's names of architectures to Debian's, where they are not the same.
_DEBIAN = {"386": "i386", "arm": "armhf", "ppc64le": "ppc64el", "mips64le": "mips64el"}
_NO_IDS = "without a range of subordinate ids (/etc/subuid) files can belong to root only"


# -- programs of the host


def find(program: str, *others: str) -> str:
    """Return the path of a program of the host's, the first that is there.

    Raises:
        ConveyorFailed: none is.
    """
    for name in (program, *others):
        for folder in TOOLS.split(":"):
            if os.access(f"{folder}/{name}", os.X_OK):
                return f"{folder}/{name}"
    raise ConveyorFailed(
        reason=f"{program} is not installed",
        advice=f"the package with it is {_PACKAGES.get(program, program)} (apt-get install)",
    )


def _run(argv: Sequence[str], order: Order, *, good: Sequence[int] = (0,), **more: str) -> int:
    """Run a program until its end; return its status, which is a good one."""
    import subprocess

    log.debug(f"running {' '.join(argv)}")
    path = f"{more.pop('PATH', '')}:{TOOLS}".lstrip(":")
    if order.environ.get("TMPDIR"):
        # What a killed program leaves there goes with the build's directory.
        more["TMPDIR"] = order.folder
    done = subprocess.run(
        argv,
        env={**order.environ, **more, "PATH": path},
        cwd=order.folder,
        stdin=subprocess.DEVNULL,
        stdout=None if log.level >= log.INFO else subprocess.DEVNULL,
        check=False,
    )
    if done.returncode not in good:
        name = os.path.basename(argv[0])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        advice = "" if order.owns_all else _NO_IDS
        raise ConveyorFailed(reason=f"{name} ended with {how}", advice=advice)
    return done.returncode


_MKNOD = """#!/bin/sh
# The device of the host's is shown in place of one that cannot be made here.
for word; do case $word in /*) path=$word ;; esac; done
[ -e "$path" ] || : >"$path"
"""
# Asked to mount or unmount /proc of the new root, it shows the host's there.
_MOUNT = """#!/bin/sh
for word; do
    case $word in
    /*/proc) [ ! -d "$word" ] || [ -n "$(ls -A "$word")" ] || /bin/mount --rbind /proc "$word" ;;
    esac
done
exit 0
"""


class _Prepared:
    """A root directory in which a package manager and its scripts can work.

    `path` is where programs are searched for first; `kernel` tells that the program would mount
    /proc and make devices for itself, if it could.
    """

    def __init__(self, order: Order, *, kernel: bool = False) -> None:
        self._order = order
        self._kernel = kernel
        self._shown: list[str] = []
        self.path = ""

    def __enter__(self) -> _Prepared:
        if self._order.is_root and self._kernel:
            return self
        os.makedirs(f"{self._order.root}/dev", mode=0o755, exist_ok=True)
        try:
            for name in _DEVICES:
                self._device(name)
            if self._kernel:
                self._stand_in()
        except OSError as error:
            self._leave()
            reason = f"{error.filename or self._order.root}: {(error.strerror or '').lower()}"
            raise ConveyorFailed(reason=reason) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _device(self, name: str) -> None:
        path = f"{self._order.root}/dev/{name}"
        if self._order.is_root:
            os.mknod(path, stat.S_IFCHR | 0o666, os.stat(f"/dev/{name}").st_rdev)
            os.chmod(path, 0o666)
            return
        with open(path, "xb"):
            pass
        # In the build's own mount namespace, which nobody else sees.
        _container.mount(f"/dev/{name}".encode(), os.fsencode(path), b"", _MS_BIND)
        self._shown.append(path)

    def _stand_in(self) -> None:
        self.path = f"{self._order.folder}/bin"
        os.makedirs(self.path, mode=0o755, exist_ok=True)
        for name, text in (("mknod", _MKNOD), ("mount", _MOUNT), ("umount", _MOUNT)):
            with open(os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CREAT, 0o755), "w") as file:
                file.write(text)

    def _leave(self) -> None:
        """Take away what was shown, and the files that it was shown at."""
        proc = [f"{self._order.root}/proc"] if self.path else []
        for path in (*self._shown, *proc):
            try:
                _container.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)
            except OSError as error:
                log.debug(f"{path}: {error}")
        folder = -1 if self._order.is_root else _open_inside(self._order.root, "dev")
        if folder < 0:
            return
        try:
            for name in os.listdir(folder):
                facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode) and not facts.st_size:
                    os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)


# -- headers


def _needed(order: Order, *keys: str) -> list[str]:
    """Return values of the header that there have to be."""
    missing = [_SPELT[key] for key in keys if not order.header.get(key)]
    if missing:
        agent = order.header["bootstrap"]
        raise ConveyorFailed(reason=f"{agent} needs the header key {' and '.join(missing)}")
    for key in keys:
        if order.header[key].startswith("-"):
            raise ConveyorFailed(reason=f"{_SPELT[key]} begins with a hyphen")
    return [order.header[key] for key in keys]


_SPELT = {
    "mirrorurl": "MirrorURL", "osversion": "OSVersion", "product": "Product", "user": "User",
    "regcode": "RegCode",
}  # fmt: skip


def _included(order: Order) -> list[str]:
    """Return the packages that the header and the environment ask for."""
    words = f"{order.header.get('include', '')} {order.environ.get('INCLUDE', '')}"
    found = words.replace(",", " ").split()
    for word in found:
        if word.startswith("-"):
            raise ConveyorFailed(reason=f"Include: {word} is the name of no package")
    return found


def _url(order: Order, key: str) -> str:
    """Return an address of the header with `%{OSVERSION}` filled in."""
    import re

    text, version = order.header.get(key, ""), order.header.get("osversion", "")
    pattern = re.compile(r"%\{OSVERSION\}", re.IGNORECASE)
    if pattern.search(text) and not version:
        reason = f"{key} has %{{OSVERSION}}, and the header no key OSVersion"
        raise ConveyorFailed(reason=reason)
    return pattern.sub(lambda _: version, text)


def _download(url: str, path: str, order: Order, most_bytes: int = 1 << 20) -> None:
    from apptainer_py.registry import downloads

    try:
        with downloads.Source(url, environ=order.environ) as source:
            if source.size_bytes > most_bytes:
                raise ConveyorFailed(reason=f"{url} has more than {most_bytes} bytes")
            with report.counting("Downloading", source.size_bytes) as told:
                source.write(path, _bounded(told, url, most_bytes))
    except ConveyorFailed:
        raise
    except ApptainerError as error:
        raise ConveyorFailed(reason=f"{url}: {error}") from None


def _bounded(told: Callable[[int], None], url: str, most_bytes: int) -> Callable[[int], None]:
    total = 0

    def more(size: int) -> None:
        nonlocal total
        total += size
        if total > most_bytes:
            raise ConveyorFailed(reason=f"{url} has more than {most_bytes} bytes")
        told(size)

    return more


# -- Debian and its like


def debootstrap(order: Order) -> Base:
    """Install a suite of Debian or Ubuntu."""
    suite, mirror = _needed(order, "osversion", "mirrorurl")
    program = find("debootstrap")
    machine = order.arch or arch.host_arch()
    argv = [program, "--variant=minbase", "--exclude=openssl,udev,debconf-i18n,e2fsprogs"]
    argv += [f"--include={','.join(('apt', *_included(order)))}"]
    argv += [f"--arch={_DEBIAN.get(machine, machine)}", suite, order.root, mirror]
    with _Prepared(order, kernel=True) as prepared:
        try:
            _run(argv, order, PATH=prepared.path)
        except ConveyorFailed as error:
            said = _last_line(f"{order.root}/debootstrap/debootstrap.log")
            error.facts["reason"] = f"{error.facts['reason']}{said}"
            raise
    os.chmod(order.root, 0o755)
    return Base()


def _last_line(path: str) -> str:
    """Return what a log ends with, after a colon; "" where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        data = os.pread(fd, 4096, max(0, os.fstat(fd).st_size - 4096))
    finally:
        os.close(fd)
    lines = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {''.join(filter(str.isprintable, lines[-1]))[:200]}" if lines else ""


# -- distributions of RPM packages


def _rpm_home(order: Order) -> str:
    """Return a home directory in which rpm finds where those distributions have their database.

    Debian's rpm has it in each user's home, so that nobody takes it for the system's own.
    """
    own = os.path.join(order.environ.get("HOME", ""), ".rpmmacros")
    try:
        with open(own, encoding="utf-8", errors="surrogateescape") as file:
            more = file.read(1 << 20)
    except OSError:
        more = ""
    home = f"{order.folder}/home"
    os.makedirs(home, mode=0o700, exist_ok=True)
    with open(f"{home}/.rpmmacros", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"%_var /var\n%_dbpath %{{_var}}/lib/rpm\n{more}")
    return home


def yum(order: Order) -> Base:
    """Install a distribution with dnf, or yum where that is all there is."""
    from apptainer_py.image.oci_layers import remove_tree

    _needed(order, "mirrorurl")
    # Both are dnf's: the last of these names is an older program's.
    program, rpm = find("dnf", "yum"), find("rpm")
    key = order.environ.get("GPG", "")
    home = _rpm_home(order)
    conf = f"{order.folder}/dnf.conf"
    with open(conf, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(yum_conf(_url(order, "mirrorurl"), _url(order, "updateurl"), signed=bool(key)))
    if key:
        _import_key(order, rpm, key, home)
    else:
        log.info("Skipping GPG Key Import")
    argv = [program, "--noplugins", "-c", conf, "--installroot", order.root, "-y"]
    version, option = order.header.get("osversion", ""), order.header.get("setopt", "")
    argv += [f"--releasever={version}"]
    argv += [f"--setopt={option}"] if option else []
    argv += ["install", "/etc/redhat-release", "coreutils", *_included(order)]
    with _Prepared(order):
        _run(argv, order, HOME=home)
    parent = _open_inside(order.root, "var/cache")
    if parent >= 0:
        try:
            remove_tree(parent, b"yum-bootstrap")
        except FileNotFoundError:
            pass
        finally:
            os.close(parent)
    return Base()


def yum_conf(mirror: str, updates: str, *, signed: bool) -> str:
    """Return a configuration with one or two repositories, and none of the host's."""
    check = f"gpgcheck={int(signed)}\n"
    text = "[main]\ncachedir=/var/cache/yum-bootstrap\nkeepcache=0\ndebuglevel=2\n"
    text += f"logfile=/var/log/yum.log\nexactarch=1\nobsoletes=1\nreposdir=/dev/null\n{check}\n"
    for name, url in (("base", mirror), ("updates", updates)):
        if url:
            text += f"[{name}]\nname=Linux $releasever - $basearch {name}\n"
            text += f"baseurl={url}\nenabled=1\n{check}\n"
    return text


def _import_key(order: Order, rpm: str, key: str, home: str) -> None:
    if not key.startswith("https://"):
        raise ConveyorFailed(reason=f"GPG={key}: the key must be fetched with https")
    find("curl")
    log.info("We have a GPG key!  Preparing RPM database.")
    for words in (["--initdb"], ["--import", key]):
        _run([rpm, "--root", order.root, *words], order, HOME=home)
    log.info("GPG key import complete!")


def _open_inside(root: str, name: str) -> int:
    """Return a directory below a root, -1 where there is none; links lead nowhere."""
    from apptainer_py.kernel import _starter

    above = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return _starter.openat2(above, name.encode(), flags, 0x08 | 0x04)
    except OSError:
        return -1
    finally:
        os.close(above)


def zypper(order: Order) -> Base:
    """Install openSUSE, or SUSE's enterprise distribution for whoever is registered."""
    program = find("zypper")
    find("rpm")
    home = _rpm_home(order)
    commands = zypper_commands(order, program)
    os.makedirs(f"{order.root}/etc/zypp", mode=0o755, exist_ok=True)
    with open(f"{order.root}/etc/zypp/zypp.conf", "w", encoding="utf-8") as file:
        file.write("[main]\ncachedir=/var/cache/zypp-bootstrap\n\n")
    with _Prepared(order):
        for argv in commands[:-1]:
            _run(argv, order, HOME=home)
        status = _run(commands[-1], order, good=(0, _RPM_SCRIPTS_FAILED), HOME=home)
    if status:
        log.warning("Bootstrap succeeded, some RPM scripts failed")
    return Base()


def zypper_commands(order: Order, program: str) -> list[list[str]]:
    """Return what is run, one after the other.

    Raises:
        ConveyorFailed: the header does not say enough.
    """
    header = order.header
    base = [program, "--non-interactive", "--root", order.root]
    enterprise = any(header.get(key) for key in ("product", "user", "regcode"))
    if enterprise:
        _needed(order, "product", "user", "regcode", "osversion")
    else:
        _needed(order, "mirrorurl")
    commands = []
    for number, (key, name) in enumerate((("mirrorurl", "repo"), ("updateurl", "update"))):
        if url := _url(order, key):
            commands += _repository(base, url, name, fresh=bool(number))
    commands += _registration(order) if enterprise else []
    others = sorted((key for key in header if key.startswith("otherurl")), key=_number)
    for number, key in enumerate(others):
        commands += _repository(base, _url(order, key), f"repo-{number}", fresh=True)
    version = header.get("osversion", "")
    argv = [*base[:2], "--root", order.root, *([f"--releasever={version}"] if version else [])]
    argv += ["install", "--auto-agree-with-licenses", "--download-in-advance", "--", "aaa_base"]
    argv += [*_included(order), *(["SUSEConnect"] if enterprise else [])]
    return [*commands, argv]


def _number(key: str) -> int:
    return int(key.removeprefix("otherurl"))


def _repository(base: list[str], url: str, name: str, *, fresh: bool) -> list[list[str]]:
    adding = ["ar", *(["-f"] if fresh else []), "--", url, name]
    return [[*base, *adding], [*base, "--gpg-auto-import-keys", "refresh", "-r", name]]


def _registration(order: Order) -> list[list[str]]:
    """Return the commands that register an enterprise distribution and its modules."""
    header = order.header
    major, _, minor = header["osversion"].partition(".")
    if not major.isdecimal() or (minor and not minor.isdecimal()):
        raise ConveyorFailed(reason=f"OSVersion: {header['osversion']} is not of the form 15.1")
    if header.get("productpgp"):
        raise ConveyorFailed(reason="the header key ProductPGP is not supported yet")
    if not header.get("mirrorurl"):
        raise ConveyorFailed(reason="an enterprise distribution needs the header key MirrorURL")
    version = header["osversion"]
    product, *more = _url(order, "product").split("/")
    machine = more[1] if len(more) > 1 else os.uname().machine
    program = [find("SUSEConnect"), "--root", order.root]
    full = f"{product}/{more[0] if more else version}/{machine}"
    first = ["--product", full, "--email", header["user"], "--regcode", header["regcode"]]
    first += ["--url", header["registerurl"]] if header.get("registerurl") else []
    modules = [word.strip() for word in header.get("modules", "").split(",") if word.strip()]
    found = [[*program, *first]]
    return found + [[*program, "--product", f"{one}/{version}/{machine}"] for one in modules]


# -- Arch Linux


def arch_linux(order: Order) -> Base:
    """Install Arch Linux."""
    program = find("pacstrap")
    find("pacman")
    if arch.host_arch() != "amd64":
        raise ConveyorFailed(reason=f"there is no Arch Linux for {arch.host_arch()}")
    conf = f"{order.folder}/pacman.conf"
    _download(order.header.get("confurl", "") or _PACMAN_CONF, conf, order)
    packages = _included(order) or ["base"]
    argv = [program, "-C", conf, "-G", "-M", order.root, *packages]
    with _Prepared(order, kernel=True) as prepared:
        _run(argv, order, PATH=prepared.path)
        if os.path.exists(f"{order.root}/usr/bin/pacman-key"):
            script = "pacman-key --init && pacman-key --populate archlinux"
            _run([find("chroot"), order.root, "/bin/sh", "-c", script], order)
    _empty_cache(order.root)
    return Base()


def _empty_cache(root: str) -> None:
    """Take away the packages' files, which pacman keeps."""
    folder = _open_inside(root, "var/cache/pacman/pkg")
    if folder < 0:
        return
    try:
        for name in os.listdir(folder):
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)


# -- busybox

_BUSYBOX_FILES = (
    ("etc/passwd", "root:!:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\n"),
    ("etc/hosts", "127.0.0.1   localhost localhost.localdomain localhost4\n"),
)


def busybox(order: Order) -> Base:
    """Fetch busybox, a program for everything, and give it all its names."""
    import subprocess

    (url,) = _needed(order, "mirrorurl")
    for name in ("bin", "etc"):
        os.makedirs(f"{order.root}/{name}", mode=0o755, exist_ok=True)
    for name, text in _BUSYBOX_FILES:
        with open(f"{order.root}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    path = f"{order.root}/bin/busybox"
    _download(url, path, order, _BUSYBOX_BYTES)
    os.chmod(path, 0o755)
    # Inside of the new root: nothing that was fetched runs on the host.
    argv = [find("chroot"), order.root, "/bin/busybox", "--list"]
    done = subprocess.run(argv, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    names = done.stdout.decode("utf-8", "replace").split()
    if done.returncode or not names:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ConveyorFailed(reason=f"{url} is no busybox: {said[-1] if said else 'no answer'}")
    for name in names:
        if "/" not in name and name not in (".", "..") and not _there(f"{order.root}/bin/{name}"):
            os.link(path, f"{order.root}/bin/{name}")
    return Base()


def _there(path: str) -> bool:
    return os.path.lexists(path)
