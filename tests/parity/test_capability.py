"""The `capability` commands, by both programs, one line after another on the same file."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.parity import sample

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not images.have_real_apptainer(), reason="did not run: no real Apptainer on this machine"
    ),
]
REAL = Path("/etc/apptainer")
# A copy of the administrator's directory lies over it, for this process alone.
ALONE = 'mount --make-rprivate / && mount --bind "$0" /etc/apptainer && exec "$@"'
LINES = (
    "add", "add chown", "add -u root", "drop chown", "list", "list a b", "bad",
    "add -u {user} chown,net_raw,bogus", "add -u {user} bogus", "add -u {user} ' chown , CAP_KILL'",
    "add --user nosuchuser chown", "add --group nosuchgroup chown", "add -g {user} Cap_Net_Admin",
    "add --user {user} --group {user} fowner", "list", "list {user}", "list nosuch", "list ''",
    "drop --user {user} chown", "drop --user {user} chown", "drop --user {user} bogus,kill",
    "drop --user nosuchuser kill", "drop -u root kill", "drop -g root kill",
    "add -u 0 chown", "add -u {user} -- ''", "add -u {user} chown kill", "add chown --user {user}",
    "add -u {user} all", "drop -u {user} all", "drop -g {user} all", "list",
    "avail bogus", "avail chown,bogus,b2", "avail ' '", "avail chown kill", "avail chown,net_raw",
)  # fmt: skip
AS_USER = ("list", "add -u {user} chown", "add -u nosuch chown", "drop -u {user} chown", "add x")
# The real one writes the user before it has looked for the group: a half of what was asked for.
OURS_ALONE = "add -g nosuch -u {user} chown"


class Bed:
    """Both programs, each with a capability.json of its own."""

    def __init__(self, product: SimpleNamespace, user: pwd.struct_passwd, folder: Path) -> None:
        self.product, self.user, self.folder = product, user, folder
        self.files = {
            "real": folder / "capability.json",
            "ours": Path(product.sysconfdir) / "capability.json",
        }

    def run(self, which: str, line: str, *, root: bool = True) -> dict[str, object]:
        words = shlex.split(line.replace("{user}", self.user.pw_name))
        program = str(images.REAL_APPTAINER) if which == "real" else str(self.product.program)
        argv = [program, "capability", *words]
        if not root:
            argv = ["setpriv", f"--reuid={self.user.pw_uid}", "--clear-groups", *argv]
        if which == "real":
            argv = ["unshare", "-m", "sh", "-c", ALONE, str(self.folder), *argv]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=60, cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        )  # fmt: skip
        text = self.files[which].read_text() or "{}"
        stdout = done.stdout
        if "Usage:" in stdout:
            stdout = "usage"
        elif words[0] == "avail":
            stdout = " ".join(word for word in stdout.split() if word.endswith(":"))
        return {
            "status": done.returncode,
            "stdout": stdout,
            "said": sample.said(done.stderr),
            "file": {
                section: {name: sorted(words) for name, words in entries.items()}
                for section, entries in json.loads(text).items()
            },
        }


@pytest.fixture(scope="module")
def bed(
    product: SimpleNamespace,
    user: pwd.struct_passwd,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bed]:
    folder = tmp_path_factory.mktemp("etc") / "apptainer"
    shutil.copytree(REAL, folder)
    made = Bed(product, user, folder)
    ours = made.files["ours"]
    before = ours.read_bytes() if ours.exists() else None
    for file in made.files.values():
        file.write_text("")
        file.chmod(0o644)
    yield made
    ours.unlink() if before is None else ours.write_bytes(before)


def test_the_administrator_changes_the_same_in_the_same_words(bed: Bed) -> None:
    for line in LINES:
        assert bed.run("ours", line) == bed.run("real", line), line


def test_a_user_changes_nothing(bed: Bed) -> None:
    before = bed.files["ours"].read_bytes()
    for line in AS_USER:
        assert bed.run("ours", line, root=False) == bed.run("real", line, root=False), line
    assert bed.files["ours"].read_bytes() == before


def test_half_of_what_was_asked_for_is_not_done(bed: Bed) -> None:
    for which in ("real", "ours"):
        bed.files[which].write_text("")
    real, ours = (bed.run(which, OURS_ALONE) for which in ("real", "ours"))
    assert ours["status"] == real["status"] == 255
    assert ours["said"] == [line for line in real["said"] if line.startswith("FATAL")]  # type: ignore[attr-defined]
    assert ours["file"] == {}


def test_the_file_belongs_to_root_and_all_may_read_it(bed: Bed) -> None:
    bed.run("ours", "add -u root chown")
    status = os.stat(bed.files["ours"])
    assert (status.st_uid, status.st_mode & 0o7777) == (0, 0o644)
