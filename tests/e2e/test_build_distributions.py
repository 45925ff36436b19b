"""Agents that install a distribution: each one's own program, on a repository made here."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import distributions
from tests.conftest import AsUser

NEEDS = {
    "debootstrap": ("debootstrap", "dpkg-deb", "wget"),
    "yum": ("dnf", "rpm", "rpmbuild", "createrepo_c", "gpg"),
    "dnf": ("dnf", "rpm", "rpmbuild", "createrepo_c", "gpg"),
    "zypper": ("zypper", "rpm", "rpmbuild", "createrepo_c", "gpg"),
    "arch": ("pacstrap", "pacman"),
    "busybox": (),
}
HEADERS = {
    "debootstrap": "OSVersion: tiny\nMirrorURL: {url}/debian\nInclude: extra\n",
    "yum": "OSVersion: repo\nMirrorURL: {url}/rpm/%{{OSVERSION}}\nInclude: extra\n",
    "dnf": "MirrorURL: {url}/none\nUpdateURL: {url}/rpm/repo\nInclude: extra\n"
    "SetOpt: base.skip_if_unavailable=1\n",
    "zypper": "MirrorURL: {url}/rpm/repo\nInclude: extra\n",
    "arch": "ConfURL: {url}/pacman.conf\nInclude: base extra\n",
    "busybox": "MirrorURL: {url}/busybox\n",
}
EXTRA = "%post\n test -c /dev/null && cat /usr/share/extra && touch /from-post\n"
POST = {
    "debootstrap": EXTRA + " cat /etc/os-release; test -s /second-stage\n",
    "yum": EXTRA + " cat /script\n",
    "dnf": EXTRA + " cat /script\n",
    "zypper": EXTRA + " cat /script\n",
    "arch": EXTRA + " test -e /etc/arch-release\n",
    "busybox": "%post\n echo extra | tee /from-post; ls -l /bin/vi\n",
}


@pytest.fixture(scope="module")
def place(readable_tmp: Path, user: pwd.struct_passwd) -> Iterator[SimpleNamespace]:
    """A directory of the user's, and a web server for repositories."""
    web, folder = readable_tmp / "web", readable_tmp / "distributions"
    for path in (web, folder, folder / "tmp"):
        path.mkdir()
        os.chown(path, user.pw_uid, user.pw_gid)
    (web / "busybox").write_bytes(distributions.BUSYBOX.read_bytes())
    (web / "text").write_text("no program\n")
    with distributions.served(web) as url:
        (web / "pacman.conf").write_text(distributions.PACMAN.format(url=f"{url}/arch/repo"))
        yield SimpleNamespace(folder=folder, web=web, url=url, url_of=f"{url}/".format)


@pytest.fixture(scope="module")
def repository_for(place: SimpleNamespace) -> Callable[[str], None]:
    """Makes what an agent's program is to install from; skips where there is no such program."""
    kinds = {"debootstrap": "debian", "yum": "rpm", "dnf": "rpm", "zypper": "rpm", "arch": "arch"}

    def make(agent: str) -> None:
        missing = [name for name in NEEDS[agent] if shutil.which(name) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
        kind = kinds.get(agent)
        if kind and not (place.web / kind).exists():
            (place.web / kind).mkdir()
            getattr(distributions, kind)(place.web / kind)

    return make


@pytest.fixture(scope="module")
def build(product: SimpleNamespace, as_user: AsUser, place: SimpleNamespace) -> Callable[..., Any]:
    def run(*words: str, definition: str, as_root: bool = False) -> Any:
        (place.folder / "it.def").write_text(definition)
        argv = [product.program, "build", "--force", *words, "it.def"]
        more = {"APPTAINER_TMPDIR": f"{place.folder}/tmp"}
        if place.url in definition:
            more["DEBOOTSTRAP_DIR"] = f"{place.web}/debian/debootstrap"
        if as_root:
            environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **more}
            how: dict[str, Any] = {"capture_output": True, "text": True, "env": environ}
            return subprocess.run(argv, cwd=place.folder, check=False, **how)
        # A whole distribution takes its time on a busy machine.
        return as_user(argv, cwd=place.folder, env=more, timeout_s=900)

    return run


def definition(agent: str, place: SimpleNamespace, post: str) -> str:
    return f"Bootstrap: {agent}\n{HEADERS[agent].format(url=place.url)}\n{post}"


@pytest.mark.parametrize("as_root", [False, True], ids=["user", "root"])
@pytest.mark.parametrize("agent", sorted(HEADERS))
def test_a_distribution_is_installed(
    build, place: SimpleNamespace, repository_for, agent: str, as_root: bool
) -> None:
    repository_for(agent)
    words = ("--sandbox", "box") if as_root else ("--sandbox", "--fakeroot", "box")
    done = build(*words, definition=definition(agent, place, POST[agent]), as_root=as_root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "extra\n" in done.stdout
    box = place.folder / "box"
    assert (box / "from-post").exists()
    # What was shown to the programs, and what they keep for another time, is gone.
    assert (
        not list(box.glob("var/cache/*/pkg/*")) and not (box / "var/cache/yum-bootstrap").exists()
    )
    if not as_root:
        assert not [
            one for one in (box / "dev").iterdir() if one.is_file() and not one.is_symlink()
        ]
        assert not list((box / "proc").iterdir())
    assert not os.listdir(place.folder / "tmp")
    subprocess.run(["rm", "-rf", box], check=True)


FAILURES = [
    ("debootstrap", "", "", "debootstrap needs the header key OSVersion and MirrorURL"),
    ("debootstrap", "OSVersion: none\nMirrorURL: {url}\n", "", "debootstrap ended with status 1"),
    ("debootstrap", "OSVersion: --foreign\nMirrorURL: x\n", "", "begins with a hyphen"),
    ("yum", "", "", "yum needs the header key MirrorURL"),
    ("dnf", "MirrorURL: {url}/%{{OSVERSION}}\n", "", "the header no key OSVersion"),
    ("yum", "MirrorURL: {url}/none\n", "", "dnf ended with status 1"),
    ("yum", "MirrorURL: {url}/rpm\nInclude: --nogpgcheck\n", "", "the name of no package"),
    ("zypper", "", "", "zypper needs the header key MirrorURL"),
    ("zypper", "MirrorURL: {url}/none\n", "", "zypper ended with status"),
    ("zypper", "Product: SLES\nUser: u\n", "", "needs the header key RegCode and OSVersion"),
    ("arch", "ConfURL: {url}/none\n", "", "there is no /none"),
    ("arch", "ConfURL: {url}/text\n", "", "pacstrap ended with status 1"),
    ("busybox", "", "", "busybox needs the header key MirrorURL"),
    ("busybox", "MirrorURL: {url}/none\n", "", "there is no /none"),
    ("busybox", "MirrorURL: {url}/text\n", "", "text is no busybox"),
    ("busybox", "MirrorURL: {url}/busybox\n", "%post\n false\n", "%post section: exit status 1"),
]


@pytest.mark.parametrize(
    ("agent", "header", "post", "says"), FAILURES, ids=[f"{one[0]} {one[3]}" for one in FAILURES]
)
def test_a_failure_names_its_line_and_leaves_nothing(
    build, place: SimpleNamespace, agent: str, header: str, post: str, says: str
) -> None:
    missing = [name for name in NEEDS[agent] if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    text = f"# a comment\nBootstrap: {agent}\n{header.format(url=place.url)}{post}"
    done = build("failed.sif", definition=text)
    assert done.returncode == 255
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL:")]
    assert len(fatal) == 1 and says in fatal[0], done.stderr
    last = done.stderr.splitlines()[-1]
    assert (f"line 2: Bootstrap: {agent}" if not post else "line 5 of section") in last
    assert sorted(os.listdir(place.folder)) == ["it.def", "tmp"]
    assert not os.listdir(place.folder / "tmp")


@pytest.mark.long
def test_debian_itself(build, place: SimpleNamespace) -> None:
    """A whole Debian, from the mirror that this machine has its own packages from."""
    listed = ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"]
    found = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split("\n")
    plain = [
        line.split() for line in found if len(line.split()) == 2 and "-" not in line.split()[1]
    ]
    if not plain or shutil.which("debootstrap") is None:
        pytest.skip("no mirror, or no debootstrap")
    mirror, suite = plain[0]
    header = f"Bootstrap: debootstrap\nOSVersion: {suite}\nMirrorURL: {mirror}\nInclude: hello\n"
    post = "%post\n hello; dpkg --audit; apt-get --version\n%test\n hello\n"
    done = build("--fakeroot", "debian.sif", definition=header + post)
    if "Failed getting release file" in done.stdout + done.stderr:
        pytest.skip("the mirror cannot be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.count("Hello, world!") == 2
    (place.folder / "debian.sif").unlink()
