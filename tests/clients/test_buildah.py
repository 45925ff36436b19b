"""buildah with our program: a Dockerfile is built, step by step, in containers of ours."""

from __future__ import annotations

import pytest

from tests.clients import images

FLAGS = ["--isolation", "oci", "--network", "none"]
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]


@pytest.fixture
def build(buildah, runtime, tmp_path):
    """Builds a Dockerfile of some lines; returns what it said."""

    def run(*lines: str, tag: str = "localhost/made"):
        (tmp_path / "Dockerfile").write_text("\n".join([f"FROM {images.NAME}", *lines]) + "\n")
        return buildah.call(
            "bud", "--runtime", runtime.program, *FLAGS, *LIMITS, "--tag", tag, tmp_path
        )

    return run


def test_a_dockerfile(build, buildah):
    done = build("RUN echo one >/one", "USER 1000", "WORKDIR /tmp", "RUN id -u >two; pwd")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "/tmp" in done.stdout.split("\n")
    name = buildah.good("from", "localhost/made").strip()
    folder = buildah.good("mount", name).strip()
    assert buildah.read(f"{folder}/one") == "one\n"
    assert buildah.read(f"{folder}/tmp/two") == "1000\n"
    buildah.good("umount", name)
    buildah.good("rm", name)


def test_a_step_that_fails(build):
    done = build("RUN echo before; exit 7")
    assert done.returncode != 0
    assert "before" in done.stdout
    assert "7" in done.stderr


def test_a_program_that_is_not_there(build):
    done = build('RUN ["/no/such"]')
    assert done.returncode != 0
    assert "no such file or directory" in done.stderr


def test_run_in_a_working_container(buildah, runtime):
    name = buildah.good("from", *LIMITS, images.NAME).strip()
    words = [
        "run",
        "--runtime",
        runtime.program,
        *FLAGS,
        name,
        "--",
        "sh",
        "-c",
        "echo ran; exit 3",
    ]
    done = buildah.call(*words)
    buildah.good("rm", name)
    assert (done.returncode, done.stdout) == (3, "ran\n"), done.stderr


def test_a_secret_mount(build, tmp_path, buildah):
    done = build(
        "RUN --mount=type=tmpfs,target=/scratch touch /scratch/x && grep scratch /proc/mounts"
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "tmpfs" in done.stdout
