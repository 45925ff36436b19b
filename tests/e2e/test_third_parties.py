"""Images between us and programs of third parties, both ways: skopeo, umoci and a registry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import docker_registry, images
from tests.e2e.three_flows import good, run_at

MISSING = [name for name in ("skopeo", "umoci", "docker-registry") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"did not run: without {MISSING}")
INDEX = "application/vnd.oci.image.index.v1+json"
REAL = "/usr/bin/apptainer"
PLAIN = {"APPTAINER_NOHTTPS": "1"}
TOLD = {
    "org.apptainer-py.oci.user": "5:6",
    "org.apptainer-py.oci.working-dir": "/srv",
    "org.opencontainers.image.stopSignal": "SIGUSR1",
}
Do = Callable[..., "subprocess.CompletedProcess[str]"]


def tool(*words: str | Path) -> str:
    """Run a program of somebody else's as root; return what it printed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def copy(*words: str | Path) -> None:
    tool("skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false", *words)


@pytest.fixture(scope="module")
def place(readable_tmp: Path) -> Path:
    """A folder with an image that umoci has made: three layers, two of which take away."""
    made = readable_tmp / "third"
    tree, layout = made / "tree", made / "layout"
    made.mkdir()
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    # Who starts as an ordinary user cannot give files away.
    (tree / "etc/gone").write_text("gone\n")
    (tree / "opt/old").mkdir(parents=True)
    (tree / "opt/hard").hardlink_to(tree / "etc/gone")
    (made / "new").write_text("new\n")
    (made / "folder").mkdir()
    (made / "folder/instead").write_text("instead\n")
    image = f"{layout}:tag"
    tool("umoci", "init", "--layout", layout)
    tool("umoci", "new", "--image", image)
    tool("umoci", "insert", "--image", image, tree, "/")
    tool("umoci", "insert", "--image", image, "--whiteout", "/etc/gone")
    tool("umoci", "insert", "--image", image, "--opaque", made / "folder", "/opt")
    config = {"env": "FOO=b c", "workingdir": "/srv", "user": "5:6", "stopsignal": "SIGUSR1"}
    words = [word for name, value in config.items() for word in (f"--config.{name}", value)]
    tool("umoci", "config", "--image", image, *words, "--config.cmd", "echo", "--config.cmd", "x y")
    for path in (layout, *layout.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return made


@pytest.fixture(scope="module")
def host(place: Path) -> Iterator[str]:
    (place / "registry").mkdir()
    with docker_registry.running(place / "registry") as found:
        yield found


@pytest.fixture(scope="module")
def home(place: Path) -> Path:
    made = place / "home"
    made.mkdir()
    user = images.ordinary_user()
    os.chown(made, user.pw_uid, user.pw_gid)
    return made


@pytest.fixture
def do(product: SimpleNamespace, home: Path) -> Do:
    """Run a command line of ours, or of another program, as the ordinary user at home."""

    def run(*words: str | Path, program: str | Path = product.program, **more: str):
        return run_at(home, program, *words, **PLAIN, **more)

    return run


def check(do: Do, image: str | Path) -> None:
    """Assert that an image is the one of `place`."""
    assert good(do("run", image)) == "x y\n"
    script = 'echo "$FOO"; test ! -e /etc/gone && ls /opt; test "$(stat -c %a /srv)" = 755'
    assert good(do("exec", image, "sh", "-c", script)) == "b c\ninstead\n"
    labels = json.loads(good(do("inspect", "--json", "--labels", image)))
    found = labels["data"]["attributes"]["labels"]
    assert {name: found.get(name) for name in TOLD} == TOLD


FORMS = {
    "oci": ("oci:{0}/form-oci:tag", ()),
    "oci-archive": ("oci-archive:{0}/o.tar:tag", ()),
    "docker-archive": ("docker-archive:{0}/d.tar:localhost/third:tag", ()),
    "registry oci": ("docker://{1}/third:oci", ("--format", "oci")),
    "registry docker": ("docker://{1}/third:docker", ("--format", "v2s2")),
    "registry zstd": ("docker://{1}/third:zstd", ("--dest-compress-format", "zstd")),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_skopeo_writes(do: Do, place: Path, home: Path, host: str, form: str) -> None:
    text, words = FORMS[form]
    uri = text.format(place, host)
    copy(*words, f"oci:{place}/layout:tag", uri)
    for path in place.glob("*.tar"):
        path.chmod(0o644)
    good(do("build", "--force", "copied.sif", uri))
    check(do, "copied.sif")
    # Whatever the format, the same layers are the same tree.
    good(do("build", "--force", "--sandbox", "copied", uri))
    ours = tree(home / "copied")
    first = place / "first.json"
    if not first.exists():
        first.write_text(json.dumps(ours))
    assert ours == json.loads(first.read_text())


# What a build adds to a tree.
OURS = (
    ".singularity.d", ".exec", ".run", ".shell", ".test", "singularity", "environment", "dev",
    "proc", "sys", "tmp", "root", "home", "var", "etc",
)  # fmt: skip


def tree(root: Path) -> dict[str, list[str]]:
    """Return kind, mode and content by path."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if name.split("/")[0] in OURS:
            continue
        facts = path.lstat()
        content = os.readlink(path) if stat.S_ISLNK(facts.st_mode) else ""
        if stat.S_ISREG(facts.st_mode):
            content = str(facts.st_size)
        found[name] = [f"{facts.st_mode:o}", content]
    return found


def test_umoci_unpacks_the_same_tree(do: Do, place: Path, home: Path) -> None:
    bundle = place / "bundle"
    tool("umoci", "unpack", "--rootless", "--image", f"{place}/layout:tag", bundle)
    good(do("build", "--force", "--sandbox", "by-us", f"oci:{place}/layout:tag"))
    assert tree(home / "by-us") == tree(bundle / "rootfs")
    assert not (home / "by-us/etc/gone").exists()


def test_what_umoci_repacks(do: Do, place: Path) -> None:
    """A layer that umoci makes of changes in a tree."""
    copied, bundle = place / "repacked", place / "repacked.bundle"
    shutil.copytree(place / "layout", copied)
    tool("umoci", "unpack", "--rootless", "--image", f"{copied}:tag", bundle)
    root = bundle / "rootfs"
    (root / "added").write_text("added\n")
    (root / "opt/instead").unlink()
    (root / "srv").rmdir()
    (root / "srv").symlink_to("opt")
    tool("umoci", "repack", "--image", f"{copied}:more", bundle)
    for path in (copied, *copied.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    script = "cat /added; readlink /srv; ls /opt"
    good(do("build", "--force", "repacked.sif", f"oci:{copied}:more"))
    assert good(do("exec", "repacked.sif", "sh", "-c", script)) == "added\nopt\n"


def test_an_index_of_architectures(do: Do, place: Path, home: Path, host: str) -> None:
    """Pushed whole by skopeo: each architecture gives its own image."""
    uri = f"docker://{host}/third:many"
    copy("--all", f"oci:{index_of(place, 'many', 'arm64', ('v8',))}", uri)
    good(do("pull", "--force", "host.sif", uri))
    check(do, "host.sif")
    done = do("pull", "--force", "--arch", "arm64", "other.sif", uri)
    assert done.returncode == 0, done.stderr
    labels = json.loads(good(do("inspect", "--json", "other.sif")))
    assert labels["data"]["attributes"]["labels"]["org.label-schema.build-arch"] == "arm64"


def test_a_variant_of_an_architecture(do: Do, place: Path, home: Path, host: str) -> None:
    """`build` and `pull` take the one that is asked for."""
    many = index_of(place, "variants", "arm", ("v6", "v7"))
    copy("--all", f"oci:{many}", f"docker://{host}/third:variants")
    uri = f"docker://{host}/third:variants"
    for words in (("build",), ("pull",)):
        for variant in ("v6", "v7"):
            wanted = ("--force", "--arch", "arm", "--arch-variant", variant, "variant.sif", uri)
            good(do(*words, *wanted))
            labels = json.loads(good(do("inspect", "--json", "--labels", "variant.sif")))
            assert labels["data"]["attributes"]["labels"]["of"] == variant
        done = do(*words, "--force", "--arch", "arm", "--arch-variant", "v5", "none.sif", uri)
        assert done.returncode == 255 and "no image for arm" in done.stderr


def index_of(place: Path, name: str, machine: str, variants: tuple[str, ...]) -> Path:
    """Return a layout whose only entry is an index of the image, and of some for another machine.

    Each variant of that machine has a label with its name.
    """
    many = place / name
    shutil.copytree(place / "layout", many)
    for variant in variants:
        image = f"{many}:{variant}"
        tool("umoci", "new", "--image", image)
        tool("umoci", "insert", "--image", image, place / "new", f"/of-{variant}")
        words = ("--architecture", machine, "--config.label", f"of={variant}")
        tool("umoci", "config", "--image", image, *words)
    index = json.loads((many / "index.json").read_text())
    inner: dict[str, object] = {"schemaVersion": 2, "mediaType": INDEX}
    rows = []
    for row in index["manifests"]:
        tag = row.pop("annotations")["org.opencontainers.image.ref.name"]
        platform = {"architecture": "amd64", "os": "linux"}
        if tag in variants:
            platform |= {"architecture": machine, "variant": tag}
        rows.append({**row, "platform": platform})
    data = json.dumps({**inner, "manifests": rows}).encode()
    digits = hashlib.sha256(data).hexdigest()
    (many / "blobs/sha256" / digits).write_bytes(data)
    entry = {"mediaType": INDEX, "digest": f"sha256:{digits}", "size": len(data)}
    (many / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return many


def test_skopeo_sees_and_copies_what_we_push(
    do: Do, place: Path, home: Path, host: str, demo_sif: Path
) -> None:
    """The copy is an image for Apptainer and for us, byte for byte."""
    good(do("push", demo_sif, f"oras://{host}/sif:ours"))
    raw = tool("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{host}/sif:ours")
    (layer,) = json.loads(raw)["layers"]
    assert layer["size"] == demo_sif.stat().st_size
    copy(f"docker://{host}/sif:ours", f"docker://{host}/copied/sif:theirs")
    copy(f"docker://{host}/sif:ours", f"oci:{place}/sif-layout:ours")
    (blob,) = (place / "sif-layout/blobs/sha256").glob(layer["digest"].removeprefix("sha256:"))
    assert blob.read_bytes() == demo_sif.read_bytes()
    programs = [None, *([REAL] if images.have_real_apptainer() else [])]
    for program in programs:
        how = {"program": program} if program else {}
        good(do("pull", "--force", "back.sif", f"oras://{host}/copied/sif:theirs", **how))
        assert (home / "back.sif").read_bytes() == demo_sif.read_bytes()
