"""Builds, pulls and pushes that a signal ends, at points that nobody has chosen.

Of each nothing is left: no process, no mount, no file beside the target or in TMPDIR, no lease of
the cache that would keep the next one waiting; the status is 128 and the signal's number.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from tests import distributions, docker_images, docker_registry, fake_library, images
from tests.e2e.test_image_environment import layout
from tests.own_install import Household, eventually, files

DEADLINE_S = 120
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
ROUNDS = 2


class Case(NamedTuple):
    """A command line of ours, behind a definition file, and the programs that it takes."""

    words: str
    definition: str = ""
    programs: tuple[str, ...] = ()


BUILD = "build --force out.sif it.def"
POST = "%post\n for i in 1 2 3; do sleep 0.1 & wait; echo x > /f$i; done\n"
RPM = ("dnf", "rpm", "rpmbuild", "createrepo_c", "gpg")
CASES = {
    "localimage": Case(BUILD, "Bootstrap: localimage\nFrom: {sif}\n"),
    "%post": Case(BUILD, "Bootstrap: localimage\nFrom: {sif}\n" + POST),
    "--fakeroot %post": Case(f"{BUILD} --fakeroot", "Bootstrap: localimage\nFrom: {sif}\n" + POST),
    "sandbox": Case("build --force --sandbox out it.def", "Bootstrap: localimage\nFrom: {sif}\n"),
    "stages": Case(
        BUILD,
        "Bootstrap: localimage\nFrom: {sif}\nStage: a\n%post\n touch /a\n"
        "Bootstrap: localimage\nFrom: {sif}\n%files from a\n /a\n",
    ),
    "encrypted": Case(f"{BUILD} --encrypt", "Bootstrap: localimage\nFrom: {sif}\n"),
    "scratch": Case(
        BUILD, "Bootstrap: scratch\n%setup\n sleep 0.2; cp /bin/busybox $APPTAINER_ROOTFS\n"
    ),
    "docker": Case("build --force --disable-cache out.sif docker://{host}/lib/base:1"),
    "docker, a tree": Case(BUILD, "Bootstrap: docker\nFrom: {host}/lib/base:1\n" + POST),
    "docker-archive": Case("build --force out.sif docker-archive:{place}/d.tar"),
    "oci": Case("build --force out.sif oci:{place}/layout"),
    "oci-archive": Case("build --force out.sif oci-archive:{place}/o.tar"),
    "oras": Case("build --force --disable-cache out.sif oras://{host}/lib/sif:1"),
    "library": Case("build --force --disable-cache --library {library} out.sif library://own:1"),
    "http": Case("pull --force --disable-cache out.sif {web}/big.sif"),
    "debootstrap": Case(
        f"{BUILD} --fakeroot",
        "Bootstrap: debootstrap\nOSVersion: tiny\nMirrorURL: {web}/debian\nInclude: extra\n",
        ("debootstrap", "dpkg-deb", "wget"),
    ),
    "dnf": Case(
        f"{BUILD} --fakeroot", "Bootstrap: dnf\nMirrorURL: {web}/rpm/repo\nInclude: extra\n", RPM
    ),
    "zypper": Case(
        f"{BUILD} --fakeroot",
        "Bootstrap: zypper\nMirrorURL: {web}/rpm/repo\nInclude: extra\n",
        ("zypper", *RPM[1:]),
    ),
    "arch": Case(
        f"{BUILD} --fakeroot",
        "Bootstrap: arch\nConfURL: {web}/pacman.conf\nInclude: base extra\n",
        ("pacstrap", "pacman"),
    ),
    "busybox": Case(BUILD, "Bootstrap: busybox\nMirrorURL: {web}/busybox\n" + POST),
    "pull": Case("pull --force --disable-cache out.sif docker://{host}/lib/base:1"),
    "pull into the cache": Case("pull --force out.sif docker://{host}/lib/base:1"),
    "push": Case("push {place}/web/big.sif oras://{host}/lib/pushed:1"),
    "exec": Case("exec --disable-cache docker://{host}/lib/base:1 /bin/sh -c true"),
}
# Each agent's own work is in these; the others differ in where the signal finds a common step.
QUICK = ("localimage", "pull into the cache")


def each_case() -> list[object]:
    marks = {name: () if name in QUICK else (pytest.mark.long,) for name in CASES}
    return [pytest.param(name, marks=marks[name], id=name) for name in CASES]


@pytest.fixture(scope="module")
def world(
    product: SimpleNamespace, readable_tmp: Path, demo_sif: Path
) -> Iterator[SimpleNamespace]:
    """What the command lines name: images, a registry, a library, a web server."""
    if not docker_registry.is_here():
        pytest.skip("did not run: docker-registry is not installed")
    place = readable_tmp / "interrupts"
    web = place / "web"
    web.mkdir(parents=True)
    tree = images.small_tree(images.shared_folder())
    layout(place / "layout", tree, {"PATH": "/bin"})
    with tarfile.open(place / "o.tar", "w") as archive:
        archive.add(place / "layout", arcname=".")
    busybox = Path("/bin/busybox").read_bytes()
    docker_images.image(place / "d.tar", docker_images.layer(("bin/sh", busybox)))
    (web / "busybox").write_bytes(busybox)
    # As large as takes a while to be sent.
    (web / "big.sif").write_bytes(demo_sif.read_bytes() + bytes(64 << 20))
    (place / "registry").mkdir()
    with (
        docker_registry.running(place / "registry") as host,
        distributions.served(web) as url,
        fake_library.running() as library,
    ):
        docker_registry.push(place / "layout", host, "lib/base:1")
        (web / "pacman.conf").write_text(distributions.PACMAN.format(url=f"{url}/arch/repo"))
        library.give("own", "1", demo_sif.read_bytes())
        made = SimpleNamespace(
            place=place, web=web, program=product.program,
            names={"sif": demo_sif, "host": host, "place": place, "web": url,
                   "library": library.url},
        )  # fmt: skip
        pushed = subprocess.run(
            [product.program, "push", "--no-https", demo_sif, f"oras://{host}/lib/sif:1"],
            env={"PATH": "/usr/bin:/bin", "HOME": str(place)}, capture_output=True, check=False,
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        yield made


@pytest.fixture
def folder(world: SimpleNamespace, tmp_path: Path) -> Iterator[Path]:
    """An empty directory of the user's, with one for temporary files, and a home."""
    user = images.ordinary_user()
    made = world.place / f"work-{os.getpid()}-{tmp_path.name}"
    for path in (made, made / "work", made / "tmp", made / "home"):
        path.mkdir()
        os.chown(path, user.pw_uid, user.pw_gid)
    return made


def start(world: SimpleNamespace, folder: Path, case: Case) -> subprocess.Popen[bytes]:
    user = images.ordinary_user()
    if case.definition:
        (folder / "work/it.def").write_text(case.definition.format(**world.names))
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "APPTAINER_NOHTTPS": "1",
        "APPTAINER_ENCRYPTION_PASSPHRASE": "words",
        "DEBOOTSTRAP_DIR": f"{world.web}/debian/debootstrap",
    }
    return subprocess.Popen(
        [world.program, *(word.format(**world.names) for word in case.words.split())],
        cwd=folder / "work",
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[user.pw_gid],
        start_new_session=True,
    )


def repository(world: SimpleNamespace, name: str) -> None:
    kind = {"dnf": "rpm", "zypper": "rpm", "debootstrap": "debian", "arch": "arch"}.get(name)
    if kind and not (world.web / kind).exists():
        (world.web / kind).mkdir()
        getattr(distributions, kind)(world.web / kind)


def left_of(world: SimpleNamespace, folder: Path, killed: bool) -> list[str]:
    """Return what there is that was not there before; the cache may keep parts of blobs."""
    found = [path for path in files(folder / "work", folder / "tmp") if not path.endswith("it.def")]
    found = [path for path in found if path not in (f"{folder}/work", f"{folder}/tmp")]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if str(folder) in line]
    leases = [str(path) for path in (folder / "home").rglob("*.lease*")]
    # A killed holder's lease is known to be dead by the next: see below.
    return found + ([] if killed else leases)


@pytest.mark.parametrize("name", each_case())
def test_nothing_is_left(world: SimpleNamespace, folder: Path, home: Household, name: str) -> None:
    case = CASES[name]
    missing = [one for one in case.programs if not any(
        os.access(f"{where}/{one}", os.X_OK) for where in ("/usr/sbin", "/usr/bin", "/bin")
    )]  # fmt: skip
    if missing:
        pytest.skip(f"did not run: not installed: {', '.join(missing)}")
    repository(world, name)
    whole_s = whole(world, folder, case)
    chance = random.Random(seed := int.from_bytes(os.urandom(4), "little"))
    for number in SIGNALS * ROUNDS:
        after_s = chance.uniform(0.05, 0.95) * whole_s
        told = f"seed {seed}: {number.name} after {after_s:.3f} of {whole_s:.3f} s"
        process = home.adopt(start(world, folder, case))
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        status = process.wait(DEADLINE_S)
        said = process.stdout.read().decode(errors="replace")  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        # The image comes by one rename: it may be there, and then it is whole.
        if (folder / "work/out.sif").exists():
            words = [world.program, "inspect", folder / "work/out.sif"]
            assert subprocess.run(words, capture_output=True, check=False).returncode == 0, told
        remove_made(folder)
        if status != 0:
            assert status in (-number, 128 + number), (told, said)
            assert "Traceback" not in said, (told, said)
        eventually(lambda: not home.alive(), f"{told}: no process: {home.alive()}", DEADLINE_S)
        killed = number == signal.SIGKILL
        eventually(
            lambda: not left_of(world, folder, killed),  # noqa: B023 it is called here
            f"{told}: left {left_of(world, folder, killed)}; {said}",
            5,
        )
    # Whatever the last one has left in the cache keeps nobody waiting.
    assert whole(world, folder, case) < DEADLINE_S


def whole(world: SimpleNamespace, folder: Path, case: Case) -> float:
    """Return how long it takes to the end."""
    began = time.monotonic()
    process = start(world, folder, case)
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said.decode(errors="replace")
    took_s = time.monotonic() - began
    remove_made(folder)
    return took_s


def remove_made(folder: Path) -> None:
    subprocess.run(["rm", "-rf", folder / "work/out", folder / "work/out.sif"], check=True)
