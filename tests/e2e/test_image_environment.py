"""Values arrive as they are: an OCI image's that the real Apptainer packed, and the caller's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests import images
from tests.e2e.three_flows import FLOWS, run
from tests.own_install import Installation

OF_THE_IMAGE = {
    "PATH": "/opt/tool:/usr/bin:/bin",
    "PLAIN": "a",
    "TICK": "a`b",
    "QUOTES": 'it\'s "q"',
    "DOLLAR": "$HOME and $(id) ${x}",
    "LINES": "one\ntwo\n",
    "BACKSLASH": "back\\slash\\",
    "SPELLED": "a\\nb",
    "BRACE": "a}b",
    "EMPTY": "",
    "SPACES": "  two  spaces ",
    "LAST": "end",
}
TEXT = some.text(some.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)
HOSTILE = some.text(some.sampled_from("`$\"'\\\n(){}; #!*~=,\té"), max_size=12)
VALUES = some.lists(TEXT | HOSTILE, min_size=1, max_size=8)
Show = Callable[..., dict[str, str]]


def layout(folder: Path, tree: Path, variables: dict[str, str]) -> None:
    """Write an OCI image layout with one layer."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(kind: str, content: bytes) -> dict[str, object]:
        name = hashlib.sha256(content).hexdigest()
        (blobs / name).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{name}",
                "size": len(content)}  # fmt: skip

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(tree, arcname=".")
    layer = blob("layer.v1.tar", packed.getvalue())
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"{name}={value}" for name, value in variables.items()]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    parts = {"config": blob("config.v1+json", json.dumps(config).encode()), "layers": [layer]}
    manifest = blob("manifest.v1+json", json.dumps({"schemaVersion": 2, **parts}).encode())
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    index = {"schemaVersion": 2, "manifests": [manifest]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


@pytest.fixture(scope="module")
def packed(require_root: None) -> Iterator[Path]:
    """An image that the real Apptainer made of one with such variables."""
    if not images.have_real_apptainer():
        pytest.skip("did not run: no real Apptainer on this machine")
    user = images.ordinary_user()
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-packed-", dir="/var/tmp"))
    place.chmod(0o755)
    layout(place / "layout", images.small_tree(images.shared_folder()), OF_THE_IMAGE)
    subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", place], check=True)
    done = images.real_apptainer("build", place / "packed.sif", f"oci:{place}/layout", cwd=place)
    assert done.returncode == 0, done.stderr
    yield place / "packed.sif"
    shutil.rmtree(place)


@pytest.fixture
def show(installed: Installation) -> Show:
    """Returns the payload's variables; nothing is to be complained about."""

    def show(flow: str, *words: str | Path, env: dict[str, str] | None = None) -> dict[str, str]:
        line = ["exec", *words, "cat", "/proc/self/environ"]
        done = run(installed.program, flow, line, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("WARNING") == 0, done.stderr
        return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)

    return show


@pytest.mark.parametrize("flow", FLOWS)
def test_variables_of_an_oci_image(show: Show, packed: Path, flow: str) -> None:
    found = show(flow, packed)
    assert found["PATH"].startswith(OF_THE_IMAGE["PATH"])
    wanted = {name: value for name, value in OF_THE_IMAGE.items() if name != "PATH"}
    assert {name: found.get(name) for name in wanted} == wanted
    assert [name for name in found if name.startswith("__")] == []


def test_they_are_the_same_through_the_images_shell(show: Show, packed: Path) -> None:
    """A value that only a shell can evaluate leaves all of it to that shell."""
    found = show("setuid", "--env", "ASKED=$(echo asked)", packed)
    wanted = {name: value for name, value in OF_THE_IMAGE.items() if name != "PATH"}
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["ASKED"] == "asked"
    assert [name for name in found if name.startswith("__")] == []


def test_the_caller_wins_over_the_image(show: Show, packed: Path) -> None:
    found = show("setuid", "--env", "TICK=mine,LAST=", packed, env={"PLAIN": "of the host"})
    assert (found["TICK"], found["LAST"], found["PLAIN"]) == ("mine", "", "a")


@pytest.mark.parametrize("flow", FLOWS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=VALUES)
def test_any_value_arrives(show: Show, sif: Path, flow: str, values: list[str]) -> None:
    """As the host's own variable, as APPTAINERENV_, as its old name, and from the option."""
    expected, env = {}, {}
    for number, value in enumerate(values):
        env[f"HOST{number}"] = expected[f"HOST{number}"] = value
        env[f"APPTAINERENV_NEW{number}"] = expected[f"NEW{number}"] = value
        env[f"SINGULARITYENV_OLD{number}"] = expected[f"OLD{number}"] = value
    words: list[str | Path] = ["--no-eval"]
    for number, value in enumerate(values):
        # A pair with one equals sign is taken as it stands, but for quotes at its ends.
        plain = "=" not in value and not value.startswith('"') and not value.endswith('"')
        if plain:
            words += ["--env", f"OPT{number}={value}"]
            expected[f"OPT{number}"] = value
    found = show(flow, *words, sif, env=env)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("flow", FLOWS)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=VALUES)
def test_any_value_of_a_file_arrives(show: Show, sif: Path, flow: str, values: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "env")
        quoted = ["'" + value.replace("'", "'\\''") + "'" for value in values]
        file.write_text("".join(f"V{n}={value}\n" for n, value in enumerate(quoted)))
        file.chmod(0o644)
        found = show(flow, "--no-eval", "--env-file", file, sif)
    assert [found.get(f"V{n}") for n in range(len(values))] == values


@pytest.mark.parametrize("flow", FLOWS)
def test_no_env_keeps_variables_out(show: Show, sif: Path, flow: str) -> None:
    env = {"SECRET": "x", "OTHER": "y", "KEPT": "z"}
    found = show(flow, "--no-env", "SECRET,OTHER", sif, env=env)
    assert "SECRET" not in found
    assert "OTHER" not in found
    assert found["KEPT"] == "z"
    found = show(flow, sif, env={**env, "APPTAINER_NOENV": "KEPT"})
    assert "KEPT" not in found
    found = show(flow, "--no-env", "SECRET", "--env", "SECRET=given", sif, env=env)
    assert found["SECRET"] == "given"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"PREPEND_LD_LIBRARY_PATH": "/a"}, "/a:/own:/.singularity.d/libs"),
        ({"APPEND_LD_LIBRARY_PATH": "/b"}, "/own:/.singularity.d/libs:/b"),
        ({"PREPEND_LD_LIBRARY_PATH": "/a", "APPEND_LD_LIBRARY_PATH": "/b c"},
         "/a:/own:/.singularity.d/libs:/b c"),
    ],
)  # fmt: skip
def test_the_loaders_path(show: Show, sif: Path, env: dict[str, str], expected: str) -> None:
    given = {f"APPTAINERENV_{name}": value for name, value in env.items()}
    found = show("setuid", sif, env={**given, "APPTAINERENV_LD_LIBRARY_PATH": "/own"})
    assert found["LD_LIBRARY_PATH"] == expected
