from __future__ import annotations

import subprocess

import pytest

from apptainer_py.builds import oci_scripts, skeleton
from apptainer_py.builds.metadata import build_date
from apptainer_py.image.oci_config import ImageConfig

ODD = "a b \"q\" $HOME `id` \\ 'x'\nline"


def started(tmp_path, config: ImageConfig, *arguments: str, **environ: str) -> list[str]:
    skeleton.make(str(tmp_path))
    oci_scripts.write_scripts(str(tmp_path), config)
    argv = ["/bin/sh", str(tmp_path / ".singularity.d/runscript"), *arguments]
    env = {"PATH": "/usr/bin:/bin", "HOME": "/h", **environ}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


PRINT = ("printf", "%s\\0")


@pytest.mark.parametrize(
    ("command", "arguments", "environ", "words"),
    [
        (("one", "it's"), (), {}, ["one", "it's"]),
        (("$HOME",), (), {}, ["/h"]),
        (("$HOME",), (), {"APPTAINER_NO_EVAL": "1"}, ["$HOME"]),
        (("one",), ('a "b" $HOME', "c"), {}, ['a "b" /h', "c"]),
        (("one",), ('a "b" $HOME', "c"), {"SINGULARITY_NO_EVAL": "1"}, ['a "b" $HOME', "c"]),
        ((ODD,), (), {"APPTAINER_NO_EVAL": "1"}, [ODD]),
    ],
)
def test_entry_point_command_and_arguments(tmp_path, command, arguments, environ, words) -> None:
    config = ImageConfig(entrypoint=PRINT, command=command)
    assert started(tmp_path, config, *arguments, **environ) == words


def test_variables_have_exactly_the_values_of_the_image(tmp_path) -> None:
    text = oci_scripts.variables((f"ODD={ODD}", "PATH=/p", "KEPT=x", "1BAD=x", "BAD-NAME=x"))
    assert "BAD" not in text
    script = tmp_path / "env.sh"
    script.write_text(text)
    argv = ["/bin/sh", "-c", f'. {script}; printf "%s|%s|%s" "$ODD" "$PATH" "$KEPT"']
    env = {"KEPT": "caller's", "PATH": "/bin"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ODD}|/p|caller's"


def test_a_skeleton_does_not_write_through_links_of_the_base(tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    root = tmp_path / "root"
    (root / ".singularity.d/env").mkdir(parents=True)
    (root / ".singularity.d/env/99-base.sh").symlink_to(outside)
    (root / "etc").symlink_to("/etc")
    skeleton.make(str(root))
    assert outside.read_text() == "mine"
    assert "LD_LIBRARY_PATH" in (root / ".singularity.d/env/99-base.sh").read_text()


def test_the_date_label_has_apptainers_form() -> None:
    assert build_date(1795287734) == "Saturday_21_November_2026_19:2:14_UTC"
