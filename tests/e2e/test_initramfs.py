"""A host whose root is an initramfs, which pivot_root(2) cannot exchange."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fixtures, images

HERE = Path(__file__).parent / "initramfs.py"
# The host's directories are not there: not by name, not from above, not through the process.
ABOVE = "'' /.. /proc/self/root /proc/1/root"
LOOK = f"echo in; for up in {ABOVE}; do ls -d $up/opt/*; done 2>/dev/null"


own = fixtures.own()


@pytest.mark.parametrize("options", [(), ("-p",), ("-u",), ("-u", "-p"), ("--writable-tmpfs",)])
@pytest.mark.parametrize("as_root", [False, True])
def test_the_container_has_a_root_of_its_own(own, options, as_root):
    uid = 0 if as_root else own.user.pw_uid
    image = images.own_sif(images.shared_folder())
    words = [own.program, "exec", *options, image, "sh", "-c", LOOK]
    argv = [sys.executable, HERE, str(uid), *map(str, words)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd="/"
    )
    assert done.stdout == "in\n", done.stderr
    assert "FATAL" not in done.stderr
