"""Images of layers on this machine by their URI: `docker save`, a daemon, layouts."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import docker_images
from tests.conftest import AsUser


@pytest.fixture(scope="module")
def place(readable_tmp: Path, user: pwd.struct_passwd) -> Iterator[SimpleNamespace]:
    """A directory of the user's with an archive, and a daemon that has the same image."""
    folder = readable_tmp / "sources"
    folder.mkdir()
    os.chown(folder, user.pw_uid, user.pw_gid)
    busybox = Path("/bin/busybox").read_bytes()
    lower = docker_images.layer(*((f"bin/{name}", busybox) for name in ("busybox", "sh", "echo")))
    upper = docker_images.layer(("mine", b"x"))
    config = docker_images.image(folder / "d.tar", lower, upper)
    with docker_images.daemon(folder / "s", folder / "d.tar", config) as asked:
        yield SimpleNamespace(folder=folder, config=config, asked=asked)


@pytest.fixture
def call(product: SimpleNamespace, as_user: AsUser, place: SimpleNamespace) -> Callable[..., Any]:
    def run(*words: str, **environ: str):
        environ = {
            "DOCKER_HOST": f"unix://{place.folder}/s",
            "APPTAINER_CACHEDIR": f"{place.folder}/cache",
            **environ,
        }
        return as_user([product.program, *words], cwd=place.folder, env=environ)

    return run


URIS = ("docker-archive:d.tar", "docker-archive://d.tar", "docker-daemon:localhost/busybox:1")


@pytest.mark.parametrize("uri", URIS)
def test_an_image_is_built_pulled_and_run(call, place: SimpleNamespace, uri: str) -> None:
    done = call("build", "--force", "built.sif", uri)
    assert done.returncode == 0, done.stderr
    done = call("pull", "--force", "pulled.sif", uri)
    assert done.returncode == 0, done.stderr
    for image in ("built.sif", "pulled.sif", uri):
        done = call("run", image)
        assert (done.returncode, done.stdout) == (0, "from docker\n"), done.stderr
        assert call("exec", image, "sh", "-c", "test -e /mine").returncode == 0
    assert sorted(os.listdir(place.folder)) == ["built.sif", "cache", "d.tar", "pulled.sif", "s"]
    for name in ("built.sif", "pulled.sif"):
        (place.folder / name).unlink()


def test_the_daemon_gives_an_image_once_for_all_launches(call, place: SimpleNamespace) -> None:
    cache = f"{place.folder}/cache2"
    before = len(place.asked)
    for _ in range(2):
        done = call("exec", URIS[2], "echo", "x", APPTAINER_CACHEDIR=cache)
        assert done.stdout == "x\n", done.stderr
    asked = [line.rpartition("/")[2] for line in place.asked[before:]]
    assert asked.count("get") == 1
    # The archive holds the same image: it is not converted again.
    done = call("exec", URIS[0], "echo", "x", APPTAINER_CACHEDIR=cache)
    assert "Using cached SIF image" in done.stderr


def test_names_of_pulled_files(call, place: SimpleNamespace) -> None:
    for uri, name in ((URIS[0], "d.tar_latest.sif"), (URIS[2], "busybox_1.sif")):
        assert call("pull", uri).returncode == 0
        (place.folder / name).unlink()


def test_the_option_names_another_daemon(call, place: SimpleNamespace) -> None:
    wrong = {"DOCKER_HOST": "unix:///none"}
    done = call("build", "o.sif", URIS[2], "--docker-host", f"unix://{place.folder}/s", **wrong)
    assert done.returncode == 0, done.stderr
    (place.folder / "o.sif").unlink()


WRONG = [
    ("docker-daemon:none:1", {}, "No such image: none:1"),
    ("docker-daemon:busybox", {}, "neither a tag nor a digest"),
    (URIS[2], {"DOCKER_HOST": "unix:///none"}, "it cannot be reached: no such file"),
    (URIS[2], {"DOCKER_HOST": "tcp://127.0.0.1:1"}, "it cannot be reached: connection refused"),
    (URIS[2], {"DOCKER_HOST": "ssh://h"}, "none of unix://PATH and tcp://HOST:PORT"),
    (URIS[2], {"DOCKER_HOST": "tcp://h"}, "has no host, or no port"),
    ("docker-archive:none.tar", {}, "no such file or directory"),
    ("docker-archive:d.tar:none:1", {}, "it has no image none:1; it has: localhost/busybox:1"),
    ("oci-archive:d.tar", {}, "it has no oci-layout"),
    ("oci:none", {}, "no such file or directory"),
]


@pytest.mark.parametrize(("uri", "environ", "says"), WRONG, ids=[one[2] for one in WRONG])
@pytest.mark.parametrize("words", [("build", "w.sif"), ("pull", "w.sif"), ("exec",)])
def test_what_is_not_there_is_one_clear_line(call, place, words, uri, environ, says) -> None:
    done = call(*words, uri, *(["true"] if words == ("exec",) else []), **environ)
    assert done.returncode == 255
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL:")]
    assert len(fatal) == 1 and says in fatal[0], done.stderr
    assert not (place.folder / "w.sif").exists()


def test_a_daemon_that_gives_less_or_another_image(call, place: SimpleNamespace) -> None:
    other = json.dumps({**json.loads(place.config), "created": "x"}).encode()
    cases = ((place.config, True, "it ended after"), (other, False, "gave another image"))
    for number, (config, cut, says) in enumerate(cases):
        at = place.folder / f"s{number}"
        with docker_images.daemon(at, place.folder / "d.tar", config, cut=cut):
            environ = {"DOCKER_HOST": f"unix://{at}", "APPTAINER_CACHEDIR": f"{place.folder}/c3"}
            done = call("exec", URIS[2], "true", **environ)
        at.unlink()
        assert done.returncode == 255 and says in done.stderr, done.stderr
