"""Libraries, remotes and their key servers, with the real Apptainer beside ours at one server.

The server is the same for both: what it is given by one, the other one takes.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_library, images
from tests.e2e.three_flows import Do, doing_at, good
from tests.fake_library import SECRET, TOKEN, Library
from tests.own_install import Installation

REAL = "/usr/bin/apptainer"
with_real = pytest.mark.skipif(
    not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
)


@pytest.fixture
def library(require_root: None) -> Iterator[Library]:
    # The real one takes no endpoint with a port; each process of tests has an address of its own.
    address = f"127.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}.9"
    with fake_library.running(address, fake_library.HTTP_PORT) as running:
        yield running


@pytest.fixture
def home(require_root: None) -> Iterator[Path]:
    user = images.ordinary_user()
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-home-", dir="/var/tmp"))
    (made / "token").write_text(f"{TOKEN}\n")
    os.chown(made, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def do(installed: Installation, home: Path) -> Do:
    return doing_at(home, installed.program)


@pytest.fixture
def logged_in(do: Do, library: Library) -> None:
    good(do("remote", "add", "-i", "--tokenfile", "token", "lib", library.url))


def test_an_image_of_a_library(
    do: Do, library: Library, home: Path, sif: Path, logged_in: None
) -> None:
    unsigned = do("push", sif, "library://me/col/img:1")
    assert unsigned.returncode == 255
    assert "unable to verify signature" in unsigned.stderr
    assert library.files == {}
    done = do("push", "-U", "-D", "words", sif, "library://me/col/img:1")
    assert done.returncode == 0, done.stderr
    pulled = do("pull", "library://me/col/img:1")
    assert "signature not found" in pulled.stderr
    assert (home / "img_1.sif").read_bytes() == sif.read_bytes()
    assert good(do("exec", "library://me/col/img:1", "echo", "in it")) == "in it\n"
    (home / "x.def").write_text("Bootstrap: library\nFrom: me/col/img:1\n")
    good(do("build", "x.sif", "x.def"))
    assert good(do("exec", "x.sif", "echo", "built")) == "built\n"
    found = json.loads(good(do("search", "--json", "img")))
    assert found["images"][0]["description"] == "words"
    assert "Are you sure" in good(do("delete", "library://me/col/img:1"))
    good(do("delete", "--force", "library://me/col/img:1"))
    gone = do("pull", "--force", "library://me/col/img:1")
    assert (gone.returncode, "does not exist in the library" in gone.stderr) == (255, True)
    everything = "".join(path.read_text(errors="ignore") for path in home.rglob("*.json"))
    assert TOKEN not in everything + str(done) + str(pulled)


@with_real
@pytest.mark.parity
def test_with_the_real_one(
    do: Do, library: Library, home: Path, sif: Path, logged_in: None
) -> None:
    """Each reads the other's file, and takes from the library what the other has put there."""
    file = home / ".apptainer/remote.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for words in (
        ("remote", "list"), ("remote", "status"), ("keyserver", "list", "lib"),
        ("remote", "get-login-password"),
    ):  # fmt: skip
        ours, theirs = (do(*words, **{"program": p} if p else {}) for p in ("", REAL))
        assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout), words
    assert theirs.stdout == f"{SECRET}\n"
    good(do("push", "-U", "-D", "about", sif, "library://me/col/img:1,2"))
    good(do("pull", "a.sif", "library://me/col/img:2", program=REAL))
    assert (home / "a.sif").read_bytes() == sif.read_bytes()
    assert "Using cached image" in do("pull", "b.sif", "library://me/col/img:1").stderr
    changed = home / "other.sif"
    changed.write_bytes(sif.read_bytes() + b"more")
    good(do("push", "-U", changed, "library://me/col/img:3", program=REAL))
    good(do("pull", "--disable-cache", "c.sif", "library://me/col/img:3"))
    assert (home / "c.sif").read_bytes() == changed.read_bytes()
    for words in (("search", "img"), ("search", "nothing"), ("delete", "-F", "library://me/col/x")):
        ours, theirs = (do(*words, **{"program": p} if p else {}) for p in ("", REAL))
        assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout), words
    good(do("remote", "add", "--no-login", "more", "h.example", program=REAL))
    assert "h.example" in good(do("remote", "list"))
    good(do("remote", "use", "lib"))
    good(do("remote", "logout"))
    assert "logged out" in good(do("remote", "status", program=REAL))
    assert TOKEN not in file.read_text()


@with_real
@pytest.mark.parity
@pytest.mark.long
def test_a_large_image_in_parts_with_the_real_one(
    do: Do, library: Library, home: Path, sif: Path, logged_in: None
) -> None:
    """Both send the same requests for it, and so does a library that has them from both."""
    path = home / "large.sif"
    path.write_bytes(sif.read_bytes())
    asked = []
    for program, tag, size in (("", "a", 65 << 20), (REAL, "b", (65 << 20) - 1)):
        os.truncate(path, size)
        before = len(library.asked)
        more = {"program": program} if program else {}
        good(do("push", "-U", path, f"library://me/col/large:{tag}", **more))
        asked.append([
            (kind, where.partition("/_")[2])
            for kind, where, _ in library.asked[before:]
            if "/_multipart" in where
        ])  # fmt: skip
    assert asked[0] == asked[1]
    assert len(asked[0]) == 15
    assert sorted(map(len, library.files.values())) == [(65 << 20) - 1, 65 << 20]


@with_real
@pytest.mark.parity
def test_keys_of_a_remote(do: Do, library: Library, home: Path, sif: Path, logged_in: None) -> None:
    """The key server of the active remote has the keys that an image was signed with."""
    good(do("key", "newpair", "-N", "Ann", "-E", "a@b.c", "-C", "", "-P", "", "-b", "2048"))
    listed = good(do("key", "list"))
    (fingerprint,) = (line.split()[1] for line in listed.splitlines() if "Fingerprint" in line)
    good(do("key", "push", fingerprint))
    assert set(library.keys) == {fingerprint}
    shutil.copy(sif, home / "s.sif")
    os.chown(home / "s.sif", home.stat().st_uid, home.stat().st_gid)
    good(do("sign", "s.sif"))
    empty = {"APPTAINER_KEYSDIR": str(home / "none")}
    for program in ("", REAL):
        more = {"program": program, **empty} if program else empty
        assert do("verify", "--local", "s.sif", **more).returncode == 255
        found = do("verify", "s.sif", **more)
        assert (found.returncode, "[REMOTE]" in found.stdout) == (0, True), found.stderr
        assert "Ann" in found.stdout
        searched = do("key", "search", "Some", **more)
        assert fingerprint[-8:] in searched.stdout, searched.stderr
        good(do("push", "s.sif", f"library://me/col/s:{len(program)}", **more))
        pulled = do("pull", "--force", "p.sif", "library://me/col/s:0", **more)
        assert (pulled.returncode, "Skipping" in pulled.stderr) == (0, False), pulled.stderr
    good(do("key", "pull", fingerprint, program=REAL, **empty))
    assert fingerprint in good(do("key", "list", **empty))
    # Keys are told to the endpoint's own key server with the token that is kept for it.
    assert all(
        facts.get("Authorization") == f"Bearer {TOKEN}"
        for _, where, facts in library.asked
        if where.startswith("/pks/")
    )


def test_what_only_root_may(do: Do, library: Library) -> None:
    for words in (
        ("remote", "add", "-g", "x", "h"), ("remote", "use", "-e", "x"),
        ("keyserver", "add", "https://k"), ("keyserver", "remove", "https://k"),
    ):  # fmt: skip
        done = do(*words)
        assert (done.returncode, "not root user" in done.stderr) == (255, True), words
