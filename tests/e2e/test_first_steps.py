"""README's way from a definition file to a signed image that another account runs."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import docker_registry, images
from tests.own_install import Installation

pytestmark = pytest.mark.skipif(
    not docker_registry.is_here(), reason="did not run: docker-registry is not installed"
)
README = Path(__file__).resolve().parents[2] / "README.md"
DEFINITION = """Bootstrap: localimage
From: {base}

%environment
    export GREETING=hello

%runscript
    echo "$GREETING from $1"
"""
OTHER = pwd.struct_passwd(("other", "x", 61_234, 61_234, "", "/", "/bin/sh"))
# What README says, without its comments; then what is said in its place, and to the questions.
MAKER = (
    ("build image.sif image.def", (), ""),
    ("key newpair", ("--bit-length", "2048"), "Maker\nmaker@here\nnote\nsecret\nsecret\nn\n"),
    ("key export me.asc", (), ""),
    ("sign image.sif", (), "secret\n"),
    ("push image.sif oras://HOST/lab/image:1", ("--no-https",), ""),
)
TAKER = (
    ("key import me.asc", (), ""),
    ("pull oras://HOST/lab/image:1", ("--no-https",), ""),
    ("verify image_1.sif", (), ""),
)


@pytest.fixture
def place(require_root: None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-first-", dir="/var/tmp"))
    made.chmod(0o755)
    for name, user in (("maker", images.ordinary_user()), ("taker", OTHER)):
        (made / name).mkdir(mode=0o700)
        os.chown(made / name, user.pw_uid, user.pw_gid)
    yield made
    shutil.rmtree(made)


def do(
    program: Path, home: Path, user: pwd.struct_passwd, words: list[str], stdin: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [program, *words],
        input=stdin,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
    )
    assert done.returncode == 0, (words, done.stderr)
    return done


def test_from_a_definition_to_another_account(installed: Installation, place: Path) -> None:
    said = README.read_text()
    base = images.small_tree(images.shared_folder())
    (place / "maker/image.def").write_text(DEFINITION.format(base=base))
    with docker_registry.running(place) as host:
        for home, user, rows in (
            (place / "maker", images.ordinary_user(), MAKER),
            (place / "taker", OTHER, TAKER),
        ):
            for line, more, stdin in rows:
                assert line in said
                command, *rest = line.replace("HOST", host).split()
                if command == "key":
                    command, rest = f"key {rest[0]}", rest[1:]
                words = [*command.split(), *more, *rest]
                do(installed.program, home, user, words, stdin)
            if user is not OTHER:
                shutil.copy(home / "me.asc", place / "taker/me.asc")
                (place / "taker/me.asc").chmod(0o644)
        ran = do(installed.program, place / "taker", OTHER, ["run", "image_1.sif", "there"], "")
    assert ran.stdout == "hello from there\n"
