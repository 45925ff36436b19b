"""Distributions of a few files: repositories of Debian, RPM and Arch packages, made here."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
TOOLS = (
    "sh",
    "cat",
    "echo",
    "ls",
    "test",
    "mkdir",
    "id",
    "true",
    "uname",
    "ln",
    "touch",
    "chmod",
    "mount",
)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 the library's name
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a directory at a loopback address; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tree(folder: Path, *, shell: bool = True) -> Path:
    """Write a root directory with busybox, its names, and what says which system it is."""
    for name in ("bin", "etc", "usr/bin", "var/lib", "var/log", "tmp", "proc", "sys", "dev"):
        (folder / name).mkdir(parents=True)
    if shell:
        shutil.copy(BUSYBOX, folder / "bin/busybox")
        for name in TOOLS:
            (folder / "bin" / name).symlink_to("busybox")
    return folder


def run(*argv: str | Path, **how: object) -> None:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, (argv, done.stdout, done.stderr)


# -- Debian

DEBOOTSTRAP = Path("/usr/share/debootstrap")
# The functions that every suite's script has; what they call is debootstrap's own.
SUITE = """\
mirror_style release
download_style apt
finddebs_style from-indices
variants - minbase
work_out_debs () {
    required="$(get_debs Priority: required)"
    base="apt"
}
first_stage_install () {
    extract $required
    mkdir -p "$TARGET/var/lib/dpkg"
    : >"$TARGET/var/lib/dpkg/status"
    setup_devices
}
second_stage_install () {
    setup_proc
    in_target /bin/sh -c 'echo from /dev/null >/dev/null; ls /proc/self/ >/second-stage'
    extract $base
}
"""


def _deb(folder: Path, name: str, files: Path, priority: str) -> str:
    control = files / "DEBIAN/control"
    control.parent.mkdir()
    facts = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@b>\n"
    facts += f"Priority: {priority}\nDescription: {name}\n"
    control.write_text(facts)
    path = folder / f"pool/{name}_1_all.deb"
    run("dpkg-deb", "--build", "--root-owner-group", "-Zgzip", files, path)
    data = path.read_bytes()
    facts += f"Filename: pool/{path.name}\nSize: {len(data)}\n"
    return f"{facts}MD5sum: {hashlib.md5(data).hexdigest()}\nSHA256: {_sha(data)}\n"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def debian(folder: Path) -> Path:
    """Make a mirror with the suite `tiny` for debootstrap; return its DEBOOTSTRAP_DIR."""
    (folder / "pool").mkdir(parents=True)
    base = _tree(folder / "base")
    (base / "etc/os-release").write_text("ID=tiny\n")
    more = {name: folder / name for name in ("apt", "extra")}
    for name, path in more.items():
        (path / "usr/share").mkdir(parents=True)
        (path / f"usr/share/{name}").write_text(f"{name}\n")
    listed = [_deb(folder, "tiny-base", base, "required")]
    listed += [_deb(folder, name, path, "optional") for name, path in more.items()]
    packages = "".join(f"{facts}\n" for facts in listed).encode()
    place = folder / "dists/tiny/main/binary-amd64"
    place.mkdir(parents=True)
    (place / "Packages").write_bytes(packages)
    release = "Origin: tests\nSuite: tiny\nCodename: tiny\nArchitectures: amd64\n"
    release += "Components: main\nSHA256:\n"
    release += f" {_sha(packages)} {len(packages)} main/binary-amd64/Packages\n"
    (folder / "dists/tiny/Release").write_text(release)
    own = folder / "debootstrap"
    (own / "scripts").mkdir(parents=True)
    (own / "functions").symlink_to(DEBOOTSTRAP / "functions")
    (own / "scripts/debian-common").symlink_to(DEBOOTSTRAP / "scripts/debian-common")
    (own / "scripts/tiny").write_text(SUITE)
    return own


# -- RPM

SPEC = """\
Name: {name}
Version: 1
Release: 1
Summary: {name}
License: none
BuildArch: noarch
AutoReqProv: no
{provides}
%description
{name}
%files
%defattr(-,root,root)
{files}
%post {shell}
{script}
"""


def _rpm(folder: Path, name: str, files: Path, provides: str = "", script: str = "") -> None:
    listed = [
        f"/{path.relative_to(files)}" for path in sorted(files.rglob("*")) if not path.is_dir()
    ]
    text = SPEC.format(
        name=name,
        provides=provides,
        files="\n".join(listed),
        shell="-p /bin/sh" if script else "",
        script=script,
    )
    if not script:
        text = text[: text.index("%post")]
    spec = folder / f"{name}.spec"
    spec.write_text(text)
    top = folder / "rpmbuild"
    argv = ["rpmbuild", "-bb", "--quiet", "--define", f"_topdir {top}", "--buildroot", files]
    argv += ["--define", "_rpmdir " + str(folder / "repo"), "--define", "__os_install_post %{nil}"]
    argv += ["--define", "_build_id_links none", "--define", "_binary_payload w1.gzdio"]
    argv += ["--define", "_binaries_in_noarch_packages_terminate_build 0", "--noclean", spec]
    run(*argv, env={**os.environ, "HOME": str(folder)})


def rpm(folder: Path) -> Path:
    """Make a repository of RPM packages; return its directory, to be served."""
    base = _tree(folder / "base")
    (base / "etc/redhat-release").write_text("Tiny release 1\n")
    extra = folder / "extra"
    (extra / "usr/share").mkdir(parents=True)
    (extra / "usr/share/extra").write_text("extra\n")
    provides = "Provides: coreutils aaa_base /bin/sh"
    _rpm(folder, "tiny-base", base, provides, "echo of the script >/script 2>/dev/null")
    _rpm(folder, "extra", extra)
    run("createrepo_c", "--simple-md-filenames", folder / "repo")
    _sign(folder / "keys", folder / "repo/repodata/repomd.xml")
    return folder / "repo"


def _sign(keys: Path, path: Path) -> None:
    """Sign a file with a key of its own, which lies beside it then."""
    keys.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(keys), "--batch", "--quiet", "--yes", "--armor"]
    run(*gpg, "--passphrase", "", "--quick-gen-key", "tests", "ed25519", "sign", "never")
    run(*gpg, "--output", f"{path}.asc", "--detach-sign", path)
    run(*gpg, "--output", f"{path}.key", "--export", "tests")
    run("gpgconf", "--homedir", keys, "--kill", "gpg-agent")


# -- Arch


def arch(folder: Path) -> Path:
    """Make a repository of Arch packages with its pacman.conf's text but for the server."""
    repo = folder / "repo"
    repo.mkdir(parents=True)
    base = _tree(folder / "base")
    (base / "etc/arch-release").write_text("")
    extra = folder / "extra"
    (extra / "usr/share").mkdir(parents=True)
    (extra / "usr/share/extra").write_text("extra\n")
    packages = [_arch_package(repo, name, folder / name) for name in ("base", "extra")]
    with tarfile.open(repo / "tiny.db", "w:gz") as database:
        for package in packages:
            _list_package(database, package)
    return repo


def _list_package(database: tarfile.TarFile, path: Path) -> None:
    """Describe a package in the repository's database."""
    data = path.read_bytes()
    name = path.name.partition("-")[0]
    facts = {"FILENAME": path.name, "NAME": name, "BASE": name, "VERSION": "1-1", "DESC": name}
    facts |= {"CSIZE": str(len(data)), "ISIZE": "1000", "ARCH": "any", "SHA256SUM": _sha(data)}
    text = "".join(f"%{key}%\n{value}\n\n" for key, value in facts.items()).encode()
    info = tarfile.TarInfo(f"{name}-1-1/desc")
    info.size = len(text)
    database.addfile(info, io.BytesIO(text))


def _arch_package(repo: Path, name: str, files: Path) -> Path:
    path = repo / f"{name}-1-1-any.pkg.tar.gz"
    facts = f"pkgname = {name}\npkgbase = {name}\npkgver = 1-1\npkgdesc = {name}\n"
    facts += "url = none\nbuilddate = 1700000000\npackager = nobody\nsize = 1000\narch = any\n"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(".PKGINFO")
        info.size = len(facts)
        archive.addfile(info, io.BytesIO(facts.encode()))
        for one in sorted(files.iterdir()):
            archive.add(one, one.name, filter=_of_root)
    return path


def _of_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


PACMAN = """\
[options]
Architecture = auto
SigLevel = Never
[tiny]
Server = {url}
"""
