"""Apptainer's own example definition files, as they are installed with it.

Where one names a place of the internet, a registry, library or server of this machine has its name;
programs that would install packages are stand-ins in the base images. Nothing else is changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from apptainer_py.builds import definition
from tests import distributions, docker_registry, fake_library, images
from tests.e2e.test_image_environment import layout
from tests.e2e.three_flows import good, run_at

FOLDERS = (
    Path(os.environ.get("PEERS_ROOT", "/opt/peers"), "root/usr/share/doc/apptainer/examples"),
    Path("/usr/share/doc/apptainer/examples"),
    Path("/usr/share/doc/apptainer-suid/examples"),
)
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), None)
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="did not run: Apptainer's examples are not here"),
    pytest.mark.skipif(
        not docker_registry.is_here(), reason="did not run: docker-registry is not installed"
    ),
]
# What the examples install with, and what they then start.
STAND_INS = ("apt-get", "dnf", "pip3", "locale-gen", "asciinema", "cowsay", "fortune", "lolcat")
STAND_IN = '#!/bin/sh\necho "${0##*/} $*"\n'
# It "compiles" to a script: go build -o NAME SOURCE.
GO = '#!/bin/sh\nprintf \'#!/bin/sh\\necho Hello World!\\n\' > "$3" && chmod 0755 "$3"\n'
Do = Callable[..., "subprocess.CompletedProcess[str]"]


class Example(NamedTuple):
    """Words behind `apptainer`, with IMAGE for the built image, and what they print."""

    words: tuple[str, ...]
    says: str


BUILT = {
    "apps/Apptainer": Example(("run", "--app", "foo", "IMAGE"), "RUNNING FOO\n"),
    "apps/Apptainer.cowsay": Example(("run", "--app", "cowsay", "IMAGE", "a"), "cowsay a\n"),
    "asciinema/Apptainer": Example(("run", "IMAGE", "rec"), "asciinema rec\n"),
    "build-apptainer/build-apptainer.def": Example(("run-help", "IMAGE"), "\n    SUMMARY"),
    "busybox/Apptainer": Example(("run", "--app", "testapp", "IMAGE"), "testapp\n"),
    "docker/Apptainer": Example(("run", "IMAGE"), "This is what happens when you run"),
    "instances/Apptainer": Example(("inspect", "--startscript", "IMAGE"), "#!/bin/sh\n"),
    "library/Apptainer": Example(("run", "IMAGE", "a b"), "a b\n"),
    "multistage/Apptainer": Example(("run", "IMAGE"), "Hello World!\n"),
    "scratch/Apptainer.alpine": Example(("exec", "IMAGE", "cat", "/etc/made"), "alpine\n"),
    "scratch/Apptainer.busybox": Example(("exec", "IMAGE", "echo", "x"), "x\n"),
}
# Whole distributions from the internet: test_build_distributions has their agents, with
# repositories made here.
DISTRIBUTIONS = re.compile(r"(almalinux|arch|fedora|opensuse|raspbian|rocky|sle|ubuntu)\b")
REFUSED = {
    "self/Apptainer": "invalid header keyword found: exclude",
    "shub/Apptainer": "ended in 2021",
}


def examples() -> dict[str, str]:
    assert FOLDER is not None
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file() and re.fullmatch(r"Apptainer(\.\w+)?|\w+Def|.*\.def", path.name):
            found[str(path.relative_to(FOLDER))] = path.read_text()
    return found


@pytest.fixture(scope="module")
def place(readable_tmp: Path) -> Path:
    made = readable_tmp / "examples"
    made.mkdir()
    user = images.ordinary_user()
    os.chown(made, user.pw_uid, user.pw_gid)
    return made


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """A root directory with busybox, and the stand-ins."""
    made = place / "tree"
    shutil.copytree(images.small_tree(images.shared_folder()), made, symlinks=True)
    names = subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True)
    for name in names.stdout.split():
        if not (made / "bin" / name).exists():
            (made / "bin" / name).symlink_to("busybox")
    for name in STAND_INS:
        (made / "bin" / name).unlink(missing_ok=True)
        (made / "bin" / name).write_text(STAND_IN)
        (made / "bin" / name).chmod(0o755)
    (made / "root").mkdir(exist_ok=True)
    (made / "bin/go").write_text(GO)
    (made / "bin/go").chmod(0o755)
    return made


@pytest.fixture(scope="module")
def stood_in(place: Path, tree: Path, demo_sif: Path) -> Iterator[Callable[[str], str]]:
    """Returns an example's text with this machine's names in place of the internet's."""
    layout(place / "layout", tree, {"PATH": "/bin"})
    web = place / "web"
    web.mkdir()
    shutil.copy("/bin/busybox", web / "busybox")
    (tree / "etc/made").write_text("alpine\n")
    with tarfile.open(web / "root.tar.gz", "w:gz") as archive:
        archive.add(tree, arcname=".")
    (place / "registry").mkdir()
    with (
        docker_registry.running(place / "registry") as host,
        distributions.served(web) as url,
        fake_library.running() as library,
    ):
        docker_registry.push(place / "layout", host, "lib/base:1")
        library.give("alpine", "3.11.5", demo_sif.read_bytes())

        def change(text: str) -> str:
            text = re.sub(r"(?m)^From: ghcr\.io/\S+", f"From: {host}/lib/sif:1", text)
            if re.search(r"(?mi)^bootstrap: docker", text):
                text = re.sub(r"(?m)^From: [a-z]+:\S+", f"From: {host}/lib/base:1", text, count=1)
            text = re.sub(r"https?://\S+/busybox(?=[\s'])", f"{url}/busybox", text)
            text = re.sub(r"https?://\S+\.tar\.gz(?=')", f"{url}/root.tar.gz", text)
            return text.replace("https://library.production.sycloud.io", library.url)

        change.host = host  # type: ignore[attr-defined]
        yield change


@pytest.fixture
def do(product: SimpleNamespace, place: Path) -> Do:
    def run(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return run_at(place, product.program, *words, APPTAINER_NOHTTPS="1", **more)

    return run


def test_each_example_is_known() -> None:
    """A new version's examples are looked at."""
    unknown = [
        name
        for name in examples()
        if name not in BUILT and name not in REFUSED and not DISTRIBUTIONS.match(name)
    ]
    assert unknown == []
    assert len(examples()) > len(BUILT)


def test_each_example_is_read() -> None:
    for name, text in examples().items():
        if name == "self/Apptainer":
            continue  # it has a key that Apptainer, too, does not know any more
        stages = definition.parse(text, file=name)
        assert stages and all(stage.header["bootstrap"] for stage in stages), name


@pytest.mark.parametrize("name", BUILT)
def test_an_example_is_built(
    do: Do, place: Path, stood_in: Callable[[str], str], demo_sif: Path, name: str
) -> None:
    text = examples().get(name)
    if text is None:
        pytest.skip(f"did not run: this Apptainer has no example {name}")
    if "oras" in text:
        good(do("push", demo_sif, f"oras://{stood_in.host}/lib/sif:1"))  # type: ignore[attr-defined]
    (place / "example.def").write_text(stood_in(text))
    good(do("build", "--force", "example.sif", "example.def"))
    words, says = BUILT[name]
    told = do(*(str(place / "example.sif") if word == "IMAGE" else word for word in words))
    assert told.stdout.startswith(says), (told.stdout, told.stderr)


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_of_what_has_ended(do: Do, place: Path, name: str) -> None:
    (place / "ended.def").write_text(examples()[name])
    done = do("build", "ended.sif", "ended.def")
    assert done.returncode == 255 and REFUSED[name] in done.stderr
