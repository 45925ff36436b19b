"""An image's environment whose evaluation fails, in its own shell: busybox's ash, dash and bash.

Each says of an error what it says; what becomes of the start is what Apptainer makes of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.e2e.three_flows import run
from tests.own_install import Installation

SHELLS = ("busybox", "dash", "bash")
FILE = ".singularity.d/env/90-environment.sh"
# What the file says; status and what the payload prints.
SAME = {
    'export X="$(set -u; echo $NO)"; export Y=after': (0, "[] [after]\n"),
    "export X=$(echo ${NO?gone}); export Y=after": (0, "[] [after]\n"),
    "export X=$(echo a $(set -u; echo $NO) b); (set -u; echo $NO); export Y=after": (
        0,
        "[a b] [after]\n",
    ),
    'set -u; export X=$(echo "$NO" | cat); set +u; export Y=after': (0, "[] [after]\n"),
    "export X=$(exit 3); export Y=after": (0, "[] [after]\n"),
    'set -u; export X="$NO"; export Y=after': (1, ""),
    'set -u; export X="$(echo in)$NO"; export Y=after': (1, ""),
    'export X="${NO?gone}"; export Y=after': (1, ""),
    "set -u; f() { echo $NO; }; export X=a; f; export Y=after": (1, ""),
    "export X=$(echo in); exit 7": (7, ""),
}
OF_THE_LANGUAGE = {
    "export X=`echo in`; if then": "[] []\n",
    "export X=$(echo in)\nexport Y=$#\nif then": "[in] [0]\n",
}


@pytest.fixture(scope="module", params=SHELLS)
def image(request, require_root: None) -> Iterator[Path]:
    """A directory whose /bin/sh is that shell; bash is there where it is /bin/sh alone."""
    shell = str(request.param)
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-shell-", dir="/var/tmp"))
    tree = made / shell
    shutil.copytree(images.small_tree(images.shared_folder()), tree, symlinks=True)
    (tree / ".singularity.d/env").mkdir(parents=True)
    if shell != "busybox":
        (tree / "bin/sh").unlink()
        (tree / "bin/sh").symlink_to(shell)
        shutil.copy(f"/bin/{shell}", tree / "bin" / shell)
        found = subprocess.run(["ldd", f"/bin/{shell}"], capture_output=True, text=True, check=True)
        for word in found.stdout.split():
            if word.startswith("/"):
                (tree / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, tree / word[1:])
    user = images.ordinary_user()
    subprocess.run(["chown", "-hR", f"{user.pw_uid}:{user.pw_gid}", made], check=True)
    made.chmod(0o755)
    yield tree
    shutil.rmtree(made)


def start(program: Path | str, image: Path, text: str) -> subprocess.CompletedProcess[str]:
    (image / FILE).write_text(text + "\n")
    os.chmod(image / FILE, 0o755)
    # Printed by the program itself: what the environment says of `set -u` does not reach it.
    return run(program, "userns", ["exec", image, "sh", "-c", 'echo "[${X-}] [${Y-}]"'])


@pytest.mark.parametrize("text", list(SAME))
def test_an_error_in_the_environment(installed: Installation, image: Path, text: str) -> None:
    done = start(installed.program, image, text)
    assert (done.returncode, done.stdout) == SAME[text], done.stderr
    assert "WARNING" not in done.stderr
    if images.have_real_apptainer():
        theirs = start(images.REAL_APPTAINER, image, text)
        assert (theirs.returncode, theirs.stdout) == SAME[text], theirs.stderr


@pytest.mark.parametrize("text", list(OF_THE_LANGUAGE))
def test_what_is_no_shell_language_is_skipped(
    installed: Installation, image: Path, text: str
) -> None:
    if image.name == "bash":
        pytest.skip("bash has its own way to end")
    done = start(installed.program, image, text)
    assert (done.returncode, done.stdout) == (0, OF_THE_LANGUAGE[text]), done.stderr
    assert f"WARNING: Skipping the rest of /{FILE}\n" in done.stderr


def test_a_file_that_is_not_there_ends_nothing(installed: Installation, image: Path) -> None:
    """The files behind it are read, and the command's own words are as they were."""
    behind = image / ".singularity.d/env/91-environment.sh"
    behind.write_text('export Y="$(echo behind)"\n')
    try:
        done = start(installed.program, image, "export X=$(echo in); . /missing")
    finally:
        behind.unlink()
    assert (done.returncode, done.stdout) == (0, "[in] [behind]\n"), done.stderr
