"""Images of registries, against a real one: pull, push, launches, accounts, the cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests import docker_registry, images
from tests.e2e.test_image_environment import layout
from tests.e2e.three_flows import Do, doing_at, good
from tests.own_install import Installation

pytestmark = pytest.mark.skipif(
    not docker_registry.is_here(), reason="did not run: docker-registry is not installed"
)
VARIABLES = {"PATH": "/usr/bin:/bin", "OF_IMAGE": "a 'c'"}


@pytest.fixture(scope="module")
def place(require_root: None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-registry-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def pushed(place: Path) -> Path:
    layout(place / "layout", images.small_tree(images.shared_folder()), VARIABLES)
    return place / "layout"


@pytest.fixture(scope="module")
def host(place: Path, pushed: Path) -> Iterator[str]:
    (place / "plain").mkdir()
    with docker_registry.running(place / "plain") as found:
        docker_registry.push(pushed, found, "lib/small:1")
        yield found


@pytest.fixture(scope="module")
def closed(place: Path, pushed: Path) -> Iterator[str]:
    (place / "closed").mkdir()
    with docker_registry.running(place / "closed", closed=True) as found:
        docker_registry.push(pushed, found, "lib/small:1", folder=place / "closed")
        yield found


@pytest.fixture
def home() -> Iterator[Path]:
    user = images.ordinary_user()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-home-", dir="/var/tmp"))
    os.chown(made, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def do(installed: Installation, home: Path) -> Do:
    """Run a command line of ours, or of another program, as the ordinary user at home."""

    return doing_at(home, installed.program)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 255, done.stderr
    first = done.stderr.splitlines()[-2 if "INFO:" in done.stderr.splitlines()[-1] else -1]
    assert first.startswith("FATAL:"), done.stderr
    for part in parts:
        assert part in first, done.stderr
    assert "Traceback" not in done.stderr


def names_of_cache(home: Path) -> list[str]:
    return sorted(
        str(path.relative_to(home))
        for path in (home / ".apptainer/cache").rglob("*")
        if ".part" in path.name or ".lease" in path.name
    )


def test_an_image_of_layers(do: Do, host: str, home: Path) -> None:
    """As a file whose mode is a program's, with the image's environment."""
    good(do("pull", "--no-https", f"docker://{host}/lib/small:1"))
    made = home / "small_1.sif"
    assert stat.S_IMODE(made.stat().st_mode) == 0o755
    found = good(do("exec", made, "env"))
    assert "OF_IMAGE=a 'c'\n" in found
    assert names_of_cache(home) == []
    refused(do("pull", "--no-https", f"docker://{host}/lib/small:1"), "already exists")
    again = do("pull", "--no-https", "--force", f"docker://{host}/lib/small:1")
    assert "Using cached SIF image" in again.stderr and again.returncode == 0


@pytest.mark.parametrize("command", ["exec", "run", "instance"])
def test_a_launch_fetches_its_image(do: Do, host: str, home: Path, command: str) -> None:
    uri, plain = f"docker://{host}/lib/small:1", {"APPTAINER_NOHTTPS": "1"}
    if command == "instance":
        good(do("instance", "start", uri, "fetched", **plain))
        assert good(do("exec", "instance://fetched", "echo", "in")) == "in\n"
        good(do("instance", "stop", "fetched"))
        return
    words = ("sh", "-c", 'echo "$OF_IMAGE"; exit 7')
    done = do(command, uri, *words, **plain)
    assert (done.returncode, done.stdout) == (7, "a 'c'\n"), done.stderr


def test_a_launch_without_the_cache_leaves_nothing(do: Do, host: str, home: Path) -> None:
    done = do(
        "exec", "--no-https", "--disable-cache", f"docker://{host}/lib/small:1", "sh", "-c",
        "exit 3", TMPDIR=str(home),
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert [path.name for path in home.iterdir() if path.name != ".apptainer"] == []
    assert not (home / ".apptainer/cache").exists()


def test_a_mirror(do: Do, host: str, home: Path) -> None:
    """In place of a host that there is not; what says who one is stays with that host."""
    folder = home / ".config/containers"
    folder.mkdir(parents=True)
    (folder / "registries.conf").write_text(
        f'[[registry]]\nprefix = "images.invalid/org"\n'
        f'[[registry.mirror]]\nlocation = "127.0.0.1:1/none"\n'
        f'[[registry.mirror]]\nlocation = "{host}/lib"\ninsecure = true\n'
        f'[[registry]]\nlocation = "blocked.invalid"\nblocked = true\n'
    )
    uri = "docker://images.invalid/org/small:1"
    good(do("pull", uri))
    assert good(do("exec", home / "small_1.sif", "echo", "in")) == "in\n"
    assert good(do("exec", uri, "echo", "again")) == "again\n"
    (home / "x.def").write_text("Bootstrap: docker\nFrom: images.invalid/org/small:1\n")
    good(do("build", "x.sif", "x.def"))
    refused(do("pull", "docker://blocked.invalid/x:1"), "blocked.invalid/x:1 may not be fetched")
    refused(do("pull", "docker://images.invalid/org/absent:1"), "images.invalid")
    (folder / "registries.conf").write_text("[[registry]\n")
    refused(do("pull", "--force", uri), "registries.conf: it is no TOML")
    if images.have_real_apptainer():
        (folder / "registries.conf").write_text(
            f'[[registry]]\nprefix = "images.invalid/org"\nlocation = "{host}/lib"\n'
            f"insecure = true\n"
        )
        good(do("pull", "theirs.sif", uri, program="/usr/bin/apptainer"))


def test_an_image_as_docker_runs_it(do: Do, host: str) -> None:
    done = do("run", "--oci", "--no-https", f"docker://{host}/lib/small:1", "id", "-u")
    assert done.stdout == "0\n", done.stderr


def test_a_definition_file_from_a_registry(do: Do, host: str, home: Path) -> None:
    (home / "x.def").write_text(
        f"Bootstrap: docker\nFrom: {host}/lib/small:1\n%post\necho made > /made\n"
    )
    good(do("build", "--no-https", "x.sif", "x.def"))
    assert good(do("exec", "x.sif", "cat", "/made")) == "made\n"


def test_a_sif_file_goes_to_a_registry_and_back(do: Do, host: str, home: Path, sif: Path) -> None:
    good(do("push", "--no-https", "--annotation", "a.b=c d", sif, f"oras://{host}/lib/sif:ours"))
    good(do("pull", "--no-https", "back.sif", f"oras://{host}/lib/sif:ours"))
    assert (home / "back.sif").read_bytes() == sif.read_bytes()
    manifest = json.loads(
        subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{host}/lib/sif:ours"],
            check=True, capture_output=True,
        ).stdout
    )  # fmt: skip
    assert manifest["annotations"] == {"a.b": "c d"}
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.sylabs.sif.layer.v1.sif"
    assert layer["annotations"]["org.opencontainers.image.title"] == sif.name
    assert manifest["config"]["mediaType"] == "application/vnd.sylabs.sif.config.v1+json"


def test_one_more_tag(do: Do, host: str, home: Path, sif: Path) -> None:
    """It is the same manifest, byte for byte; a digest names one too."""
    uri = f"oras://{host}/lib/tags"
    good(do("push", "--no-https", sif, f"{uri}:1.2.3"))
    done = do("tag", f"{uri}:1.2.3", "latest", APPTAINER_NOHTTPS="1")
    assert done.returncode == 0 and f'Image //{host}/lib/tags:1.2.3 tagged "latest".' in done.stderr
    good(do("pull", "--no-https", "back.sif", f"{uri}:latest"))
    assert (home / "back.sif").read_bytes() == sif.read_bytes()
    raw = [
        subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{host}/lib/tags:{tag}"],
            check=True, capture_output=True,
        ).stdout
        for tag in ("1.2.3", "latest")
    ]  # fmt: skip
    assert raw[0] == raw[1]
    digest = hashlib.sha256(raw[0]).hexdigest()
    good(do("tag", "--no-https", f"{uri}@sha256:{digest}", "1.2"))
    good(do("pull", "--no-https", "again.sif", f"{uri}:1.2"))
    refused(do("tag", "--no-https", f"{uri}:absent", "x"), "Unable to tag", "absent")
    refused(do("tag", "--no-https", f"{uri}:1.2.3", "a b"), "'a b' is no tag")
    refused(do("tag", f"docker://{host}/lib/small:1", "x"), "Unsupported transport type: docker")
    refused(do("tag", "small.sif", "x"), "bad uri small.sif")
    assert do("tag", f"{uri}:1.2.3").returncode == 1


def test_an_account_that_is_asked_for(
    do: Do, closed: str, home: Path, place: Path, sif: Path
) -> None:
    trusted = {"SSL_CERT_FILE": str(place / "closed/cert.pem")}
    name, password = docker_registry.ACCOUNT
    uri = f"docker://{closed}/lib/small:1"
    for words in (
        ("pull", "--docker-login", "a.sif", uri),
        ("exec", "--docker-login", uri, "true"),
    ):
        done = do(*words, stdin=f"{name}\n{password}\n", **trusted)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "Enter Docker Username: Enter Docker Password: "
    push = ("push", "--docker-login", sif, f"oras://{closed}/lib/sif:1")
    assert do(*push, stdin=f"{name}\n{password}\n", **trusted).returncode == 0
    refused(do(*push, stdin=f"{name}\nwrong\n", **trusted), "authentication required")
    done = do(*push, stdin="\n", **trusted)
    assert done.returncode == 1 and "no user name, or no password, was given" in done.stderr
    assert not (home / ".docker").exists()


@pytest.mark.parity
def test_with_the_real_one(do: Do, host: str, home: Path, sif: Path) -> None:
    """Each takes from a registry what the other has put there, and from the other's cache."""
    if not images.have_real_apptainer():
        pytest.skip("did not run: no real Apptainer on this machine")
    real = "/usr/bin/apptainer"
    good(do("push", "--no-https", sif, f"oras://{host}/lib/sif:a"))
    good(do("pull", "--no-https", "a.sif", f"oras://{host}/lib/sif:a", program=real))
    assert (home / "a.sif").read_bytes() == sif.read_bytes()
    good(do("push", "--no-https", sif, f"oras://{host}/lib/sif:b", program=real))
    good(do("pull", "--no-https", "b.sif", f"oras://{host}/lib/sif:b"))
    assert (home / "b.sif").read_bytes() == sif.read_bytes()
    good(do("pull", "--no-https", "c.sif", f"docker://{host}/lib/small:1", program=real))
    theirs = do("pull", "--no-https", "d.sif", f"docker://{host}/lib/small:1")
    assert "Using cached SIF image" in theirs.stderr
    assert (home / "d.sif").read_bytes() == (home / "c.sif").read_bytes()
    listed = good(do("cache", "list", program=real))
    assert listed == good(do("cache", "list"))


def test_a_file_of_the_web(do: Do, home: Path, place: Path, sif: Path) -> None:
    (place / "web").mkdir()
    shutil.copy(sif, place / "web/tool.sif")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *words: object, **more: object) -> None:
            super().__init__(*words, directory=str(place / "web"), **more)  # type: ignore[arg-type,misc]

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            assert good(do("exec", f"{url}/tool.sif", "echo", "from the web")) == "from the web\n"
            good(do("pull", f"{url}/tool.sif"))
            refused(do("pull", f"{url}/none.sif"), "there is no /none.sif")
        finally:
            server.shutdown()
            thread.join()
    assert (home / "tool.sif").read_bytes() == sif.read_bytes()


# ---- accounts ----


def test_accounts(do: Do, closed: str, home: Path, place: Path) -> None:
    trusted = {"SSL_CERT_FILE": str(place / "closed/cert.pem")}
    uri = f"docker://{closed}/lib/small:1"
    name, password = docker_registry.ACCOUNT
    refused(do("pull", uri), "certificate", "SSL_CERT_FILE")
    refused(do("pull", uri, **trusted), "authentication required")
    given = {"APPTAINER_DOCKER_USERNAME": name, "APPTAINER_DOCKER_PASSWORD": password}
    good(do("pull", "by-environment.sif", uri, **trusted, **given))
    given["APPTAINER_DOCKER_PASSWORD"] = "wrong"
    refused(do("pull", "x.sif", uri, **trusted, **given), "authentication required", repr(name))
    login = ("registry", "login", "-u", name, "--password-stdin", f"docker://{closed}")
    refused(do(*login, stdin="wrong\n", **trusted), "authentication required")
    assert not (home / ".docker").exists()
    good(do(*login, stdin=f"{password}\n", **trusted))
    assert stat.S_IMODE((home / ".docker/config.json").stat().st_mode) == 0o600
    good(do("pull", "by-login.sif", uri, **trusted))
    assert f"docker://{closed}" in good(do("registry", "list"))
    (row,) = json.loads(good(do("registry", "list", "--json")))
    assert row == {"uri": f"docker://{closed}", "file": f"{home}/.docker/config.json"}
    good(do("registry", "logout", f"docker://{closed}"))
    refused(do("pull", "y.sif", uri, **trusted), "authentication required")
    refused(do("registry", "logout", f"docker://{closed}"), "no account")
    own = home / "own.json"
    good(do(*login, "--authfile", own, stdin=password, **trusted))
    good(do("pull", "--authfile", own, "by-file.sif", uri, **trusted))


# ---- what is refused ----


@pytest.mark.parametrize(("words", "said"), [
    (("pull", "foo"), "No transport type URI supplied"),
    (("pull", "foo://x"), "Unsupported transport type: foo"),
    (("pull", "--no-https", "docker://HOST/lib/small:2"), "manifest unknown"),
    (("pull", "docker://HOST/lib/small:1"), "does not speak HTTPS; --no-https"),
    (("pull", "docker://127.0.0.1:1/a"), "connection refused"),
    (("pull", "--no-https", "--arch", "s390x", "docker://HOST/lib/many:1"), "one for: amd64"),
    (("pull", "--arch", "nope", "docker://HOST/lib/many:1"), "arch: nope is not valid"),
    (("pull", "--no-https", "oras://HOST/lib/small:1"), "is no SIF image"),
    (("pull", "--dir", "none", "docker://HOST/lib/small:1"), "there is no directory none"),
    (("pull", "shub://a/b"), "Singularity Hub ended"),
    (("pull", "library://a/b/c"), "no library client"),
    (("pull", "docker://a//b"), "is no name of an image"),
    (("push", "SIF", "docker://HOST/a"), "Unsupported transport type: docker"),
    (("push", "SIF", "foo"), "bad uri foo"),
    (("push", "none.sif", "oras://HOST/a"), "none.sif"),
    (("push", "--annotation", "x", "SIF", "oras://HOST/a"), "not NAME=VALUE"),
    (("push", "SIF", "oras://a"), "has no host"),
    (("registry", "login", "-u", "a", "-p", "b", "foo"), "transport is not supported"),
    (("registry", "login", "docker://HOST"), "user name and a password are needed"),
    (("cache", "list", "-T", "some"), "no kind of cache entry"),
    (("exec", "--no-https", "docker://HOST/none", "true"), "manifest unknown"),
])  # fmt: skip
def test_what_is_refused(
    do: Do, host: str, pushed: Path, home: Path, sif: Path, words: tuple[str, ...], said: str
) -> None:
    if "many" in str(words):
        _index(pushed, host)
    line = [word.replace("HOST", host).replace("SIF", str(sif)) for word in words]
    refused(do(*line), said)
    assert [path.name for path in home.iterdir() if path.name != ".apptainer"] == []
    if (home / ".apptainer/cache").exists():
        assert names_of_cache(home) == []


def _index(pushed: Path, host: str) -> None:
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false", f"oci:{_many(pushed)}",
         f"docker://{host}/lib/many:1"],
        check=True, capture_output=True,
    )  # fmt: skip


def _many(pushed: Path) -> Path:
    """Return a layout whose one entry is an index."""
    import hashlib

    many = pushed.parent / "many"
    if many.exists():
        return many
    shutil.copytree(pushed, many)
    index = json.loads((many / "index.json").read_text())
    row = {**index["manifests"][0], "platform": {"architecture": "amd64", "os": "linux"}}
    row.pop("annotations")
    kind = "application/vnd.oci.image.index.v1+json"
    inner = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [row]}).encode()
    name = hashlib.sha256(inner).hexdigest()
    (many / "blobs/sha256" / name).write_bytes(inner)
    entry = {"mediaType": kind, "digest": f"sha256:{name}", "size": len(inner)}
    (many / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return many


# ---- layers ----


def test_what_layers_take_away(do: Do, host: str, place: Path, home: Path) -> None:
    """Whiteouts, an opaque directory, hard links: the tree is what Docker makes of it."""
    tree = place / "layered"
    layout(tree, images.small_tree(images.shared_folder()), VARIABLES)
    _add_layer(tree, {"kept": b"1", "gone": b"2", "folder/old": b"3", "other/old": b"4"})
    _add_layer(tree, {".wh.gone": b"", "folder/.wh..wh..opq": b"", "folder/new": b"5"})
    docker_registry.push(tree, host, "lib/layered:1")
    good(do("build", "--no-https", "--sandbox", "tree", f"docker://{host}/lib/layered:1"))
    root = home / "tree"
    assert (root / "kept").read_bytes() == b"1"
    assert not (root / "gone").exists()
    assert [path.name for path in (root / "folder").iterdir()] == ["new"]
    assert (root / "other/old").read_bytes() == b"4"


UNTOLD = "the layers are unpacked first"


@pytest.mark.parametrize("plain", [True, False], ids=["streamed", "by a tree"])
def test_the_same_bytes_again(do: Do, host: str, place: Path, home: Path, plain: bool) -> None:
    """Also where a layer brings metadata of its own, for which a tree is made."""
    tree = place / f"again-{plain}"
    name = f"lib/again-{plain}:1".lower()
    layout(tree, images.small_tree(images.shared_folder()), VARIABLES)
    _add_layer(tree, {"kept": b"1", "gone": b"2"})
    more = {} if plain else {".singularity.d/labels.json": b"{}"}
    _add_layer(tree, {".wh.gone": b"", "new": b"5", **more})
    docker_registry.push(tree, host, name)
    found = []
    for number in range(2):
        target = f"{number}.sif"
        words = ("-v", "build", "--no-https", target, f"docker://{host}/{name}")
        done = do(*words, SOURCE_DATE_EPOCH="1700000000")
        good(done)
        assert (UNTOLD in done.stderr) is not plain, done.stderr
        found.append((home / target).read_bytes())
    assert found[0] == found[1]
    paths = ("/kept", "/gone", "/new", "/bin/sh", "/.singularity.d/runscript")
    script = "for one; do [ ! -e $one ] || echo $one; done"
    there = good(do("exec", "0.sif", "/bin/sh", "-c", script, "sh", *paths)).split()
    assert there == ["/kept", "/new", "/bin/sh", "/.singularity.d/runscript"]


def _add_layer(folder: Path, files: dict[str, bytes]) -> None:
    import hashlib

    blobs = folder / "blobs/sha256"

    def put(data: bytes) -> tuple[str, int]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return f"sha256:{name}", len(data)

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    index = json.loads((folder / "index.json").read_text())
    row = index["manifests"][0]
    manifest = json.loads((blobs / row["digest"][7:]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())
    digest, size = put(packed.getvalue())
    kind = "application/vnd.oci.image.layer.v1.tar"
    manifest["layers"].append({"mediaType": kind, "digest": digest, "size": size})
    config["rootfs"]["diff_ids"].append(digest)
    manifest["config"]["digest"], manifest["config"]["size"] = put(json.dumps(config).encode())
    row["digest"], row["size"] = put(json.dumps(manifest).encode())
    (folder / "index.json").write_text(json.dumps(index))


# ---- the cache ----


def test_the_cache_is_listed_and_cleaned(do: Do, host: str, home: Path) -> None:
    uri = f"docker://{host}/lib/small:1"
    good(do("pull", "--no-https", uri))
    rows = json.loads(good(do("cache", "list", "--json")))["entries"]
    assert sorted(row["type"] for row in rows) == ["blob", "blob", "blob", "oci-tmp"]
    assert [row["source"] for row in rows if row["type"] == "oci-tmp"] == [uri]
    assert "1 container file(s)" in good(do("cache", "list"))
    assert f"oci-tmp   {uri}\n" in good(do("cache", "list", "-v"))
    good(do("cache", "clean", "--dry-run"))
    good(do("cache", "clean", "--force", "--days", "1"))
    assert "1 container file(s)" in good(do("cache", "list"))
    asked = do("cache", "clean", stdin="n\n")
    assert "Do you want to continue? [y/N]" in good(asked)
    assert "1 container file(s)" in good(do("cache", "list"))
    of_a_kind = json.loads(good(do("cache", "list", "--json", "-T", "blob")))["entries"]
    assert [row["type"] for row in of_a_kind] == ["blob"] * 3
    good(do("cache", "clean", "--force", "--type", "oci-tmp"))
    rows = json.loads(good(do("cache", "list", "--json")))["entries"]
    assert [row["type"] for row in rows] == ["blob"] * 3
    good(do("cache", "clean", "--force"))
    assert "There are 0 container file(s)" in good(do("cache", "list"))


def test_many_launches_convert_once(host: str, home: Path, installed: Installation) -> None:
    user = images.ordinary_user()
    line = [installed.program, "exec", "--no-https", f"docker://{host}/lib/small:1", "echo", "x"]
    running = [
        subprocess.Popen(
            line,
            env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
        )
        for _ in range(10)
    ]
    ended = [process.communicate(timeout=120) for process in running]
    assert [out for out, _ in ended] == ["x\n"] * 10
    assert [err.count("Converting OCI blobs") for _, err in ended].count(1) == 1
    assert names_of_cache(home) == []


def test_a_cache_that_cannot_be_written_is_done_without(do: Do, host: str, home: Path) -> None:
    (home / "file").touch()
    done = do(
        "pull", "--no-https", "x.sif", f"docker://{host}/lib/small:1",
        APPTAINER_CACHEDIR=str(home / "file"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING: cache" in done.stderr and "nothing is kept" in done.stderr
    assert (home / "x.sif").exists()
