"""Capabilities as the real Apptainer gives them, with the same grants in both files."""

from __future__ import annotations

import json
import os
import pwd
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
REAL_FILE = Path("/etc/apptainer/capability.json")
SHOW = ["sh", "-c", "grep -e Cap -e NoNewPrivs -e Uid -e Gid -e Groups /proc/self/status"]
# The sets of root that we leave empty: a change to another user would take them along.
ROOT_DIFFERS = ("CapInh", "CapAmb")
USER = [
    "--add-caps CAP_NET_RAW",
    "--add-caps net_raw,chown,kill",
    "--add-caps Cap_Chown",
    "--add-caps chown,foo",
    "--add-caps kill",
    "--add-caps chown,net_raw --drop-caps chown",
    "--drop-caps chown",
    "--drop-caps foo",
    "--no-privs",
    "--no-privs --add-caps chown",
    "-p --add-caps chown",
    "-p --no-init --add-caps chown",
    "-C --add-caps chown",
    "--writable-tmpfs --add-caps chown",
    "--keep-privs",
    "--keep-privs --add-caps chown",
    "--allow-setuid",
]
# Some machines lack a capability, and the real one refuses to start without all of them.
ROOT = [
    "",
    "--add-caps chown",
    "--add-caps foo",
    "--no-privs",
    "--no-privs --add-caps net_raw",
    "--keep-privs",
    "--keep-privs --no-privs",
    "--allow-setuid",
    "-u",
    "-u --no-privs",
    "-u --no-privs --add-caps net_raw",
    "-u --keep-privs",
]


@pytest.fixture(scope="module")
def granted(
    product: SimpleNamespace, user: pwd.struct_passwd, open_fuse: None
) -> Iterator[list[str]]:
    """Both programs, with the same grants."""
    text = json.dumps(
        {
            "users": {user.pw_name: ["CAP_NET_RAW"], "root": ["CAP_KILL"]},
            "groups": {user.pw_name: ["CAP_CHOWN"]},
        }
    )
    files = [REAL_FILE, Path(product.sysconfdir) / "capability.json"]
    before = [file.read_bytes() if file.exists() else None for file in files]
    for file in files:
        file.write_text(text)
        file.chmod(0o644)
    yield [str(images.REAL_APPTAINER), product.program]
    for file, old in zip(files, before, strict=True):
        if old is None:
            file.unlink()
        else:
            file.write_bytes(old)


def run(program: str, options: str, user: pwd.struct_passwd | None) -> dict[str, object]:
    how: dict[str, object] = {"env": {"PATH": "/usr/bin:/bin", "HOME": "/root", "USER": "root"}}
    if user is not None:
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        how = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
        how["env"] = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir, "USER": user.pw_name}
    image = images.own_sif(images.shared_folder())
    done = subprocess.run(  # type: ignore[call-overload]
        [program, "exec", *options.split(), image, *SHOW],
        cwd="/", capture_output=True, text=True, check=False, timeout=60, **how,
    )  # fmt: skip
    return {
        "status": done.returncode,
        "sets": dict(line.split(":", 1) for line in done.stdout.splitlines()),
        "said": sample.said(done.stderr),
    }


@pytest.mark.parametrize("flow", ["", "-u "], ids=["setuid", "userns"])
@pytest.mark.parametrize("options", USER)
def test_user(granted: list[str], user: pwd.struct_passwd, flow: str, options: str) -> None:
    real, ours = (run(program, flow + options, user) for program in granted)
    assert ours == real


@pytest.mark.parametrize("options", ROOT)
def test_root(granted: list[str], options: str) -> None:
    real, ours = (run(program, f"--drop-caps sys_resource {options}", None) for program in granted)
    assert isinstance(ours["sets"], dict)
    assert isinstance(real["sets"], dict)
    for name in ROOT_DIFFERS:
        assert int(ours["sets"].pop(name), 16) == 0
        real["sets"].pop(name)
    assert ours == real
