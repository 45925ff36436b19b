"""Every option of a launch, from the table of options, with an odd value: it works, or says why.

One clear line, a documented status, nothing left behind, and nothing that passes in silence.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.cli import table
from apptainer_py.cli.table import BOOL, FETCHING, INT
from tests.e2e.three_flows import run
from tests.own_install import Completed, Installation, eventually, files

ODD = "!odd!"
# What is said of `--NAME !odd!`: status, and words of the message. A new option needs a row.
TOLD = {
    "add-caps": (0, "WARNING: won't add unknown capability: CAP_!ODD!"),
    "apply-cgroups": (255, "open !odd!: no such file or directory"),
    "bind": (255, "/!odd! doesn't exist"),
    "blkio-weight-device": (255, "must be in <device>:<weight> format"),
    "containlibs": (255, "mount source !odd! doesn't exist"),
    "cpus": (255, "can't convert !odd! to decimal"),
    "cpuset-cpus": (255, ""),
    "cpuset-mems": (255, ""),
    "cwd": (255, "chdir !odd!: no such file or directory"),
    "device": (255, 'invalid CDI device name "!odd!"'),
    "dns": (255, "!odd!"),
    "drop-caps": (0, "WARNING: won't drop unknown capability: CAP_!ODD!"),
    "env": (1, "!odd! must be formatted as key=value"),
    "env-file": (255, "open !odd!: no such file or directory"),
    "fusemount": (255, "no whitespace separators found"),
    "home": (255, "!odd! is not an absolute path"),
    "hostname": (255, "!odd! is not a valid hostname"),
    "memory": (255, "invalid size: '!odd!'"),
    "memory-reservation": (255, "invalid size: '!odd!'"),
    "memory-swap": (255, "invalid size: '!odd!'"),
    "mount": (255, 'invalid key "!odd!"'),
    "netns-path": (255, "stat !odd!: no such file or directory"),
    "network": (255, "network !odd!"),
    "network-args": (255, "network bridge"),
    "no-mount": (0, "WARNING: Ignoring unknown mount type '!odd!'"),
    "overlay": (255, "failed to open overlay image !odd!"),
    "pem-path": (255, "Specified PEM file !odd!: does not exist."),
    "pwd": (255, "chdir !odd!: no such file or directory"),
    "runscript-timeout": (255, 'invalid duration "!odd!"'),
    "security": (255, "--security !odd!: there is no such setting"),
    "shell": (0, "WARNING: !odd! is no program of the container"),
}  # fmt: skip
# Any text is right there: places that are made, directories that need not exist, variables; of an
# application the image's own scripts speak.
ANY = {"app", "cdi-dirs", "no-env", "scratch", "workdir"}
# What an ordinary user is refused, and what this machine may lack.
ROOTS = {"allow-setuid", "keep-privs", "boot"}
MAY_FAIL = {"net", "nvccli", "oom-kill-disable", "writable"}
ROWS = [
    row for row in table.OPTIONS if row[6] != table.REFUSED and set(row[5]) & set(table.ACTIONS)
]


@pytest.fixture(scope="module")
def place(installed: Installation) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-odd-", dir="/var/tmp"))
    os.chown(made, installed.user.pw_uid, installed.user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(installed: Installation, place: Path) -> Iterator[None]:
    folders = (installed.session, place)
    before = files(*folders)
    yield
    eventually(lambda: set(files(*folders)) == set(before), "no file is left")


def said(done: Completed, *, fatal: bool) -> str:
    """Return what was said, of which one line is the reason where the launch failed."""
    text = done.stderr
    assert "internal error" not in text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line]
    lines = [line for line in lines if not line.startswith(("WARNING:", "INFO:"))]
    assert len(lines) == (1 if fatal else 0), text
    return text


def launch(installed: Installation, place: Path, sif: Path, row: tuple, *given: str) -> Completed:
    command = next(name for name in table.ACTIONS if name in row[5])
    words = [command, *given, sif, *(["true"] if command == "exec" else [])]
    return run(installed.program, "setuid", words, cwd=place)


def rows(*kinds: str) -> list[tuple]:
    return [pytest.param(row, id=row[0]) for row in ROWS if row[2] in kinds]


@pytest.mark.parametrize("row", rows(table.STRING, table.LIST, table.REPEAT, table.MAP))
def test_an_odd_value(installed, place, sif, row):
    name = row[0]
    odd = launch(installed, place, sif, row, f"--{name}", ODD)
    empty = launch(installed, place, sif, row, f"--{name}", "")
    if row[6] == FETCHING or name in ANY:
        assert (odd.returncode, said(odd, fatal=False)) == (0, "")
    else:
        status, words = TOLD[name]
        assert odd.returncode == status
        assert words in said(odd, fatal=status != 0)
    # An empty value asks for nothing, unless it can only be a mistake.
    status = {"env": 1, "mount": 255}.get(name, 0)
    assert empty.returncode == status
    said(empty, fatal=status != 0)


@pytest.mark.parametrize("row", rows(BOOL))
def test_a_switch_that_is_on_twice_and_off(installed, place, sif, row):
    name = row[0]
    twice = launch(installed, place, sif, row, f"--{name}", f"--{name}")
    off = launch(installed, place, sif, row, f"--{name}", f"--{name}=false")
    if name in ROOTS:
        assert twice.returncode == 255
        assert f"--{name} requires root" in said(twice, fatal=True)
    elif twice.returncode != 0:
        assert (twice.returncode, name in MAY_FAIL) == (255, True)
        said(twice, fatal=True)
    else:
        said(twice, fatal=False)
    assert off.returncode == 0
    assert said(off, fatal=False).count("WARNING") == (name in ("nohttps", "underlay")) * 2


@pytest.mark.parametrize("row", rows(INT))
def test_a_number_that_cannot_be(installed, place, sif, row):
    for value in ("99999999999999999999", "-5"):
        done = launch(installed, place, sif, row, f"--{row[0]}", value)
        assert done.returncode in (1, 255)
        said(done, fatal=True)


def test_the_table_names_options_that_there_are():
    assert set(TOLD) | ANY <= {row[0] for row in ROWS}


PAIRS = [
    ("exec -w --writable-tmpfs", 255, "WARNING: Disabling --writable-tmpfs flag"),
    ("exec --sharens --pid", 255, "--sharens cannot be used with a namespace of its own"),
    ("exec --pid --no-pid", 0, ""),
    ("exec --nv --no-nv", 0, ""),
    ("exec --no-home -H /tmp", 0, ""),
    ("exec -C --contain=false", 0, ""),
    ("exec --network none --net=false", 0, "INFO:    Setting --net (required by --network)"),
    ("exec --hostname box --uts=false", 0, ""),
    ("exec --env A=1 --no-env A", 0, ""),
    ("exec --cwd /etc --pwd /usr", 0, ""),
    ("exec --underlay --writable-tmpfs", 0, "WARNING: Flag --underlay has been deprecated"),
]


@pytest.mark.parametrize(("line", "status", "words"), PAIRS)
def test_options_that_contradict_each_other(installed, place, sif, line, status, words):
    done = run(installed.program, "setuid", [*line.split(), sif, "true"], cwd=place)
    assert done.returncode == status, done.stderr
    assert words in said(done, fatal=status != 0)
