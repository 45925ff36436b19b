"""A mount namespace of the ordinary user's own, where that user is root and mounts at will."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.own_install import Installation


@contextmanager
def namespace(own: Installation, script: str) -> Iterator[Path]:
    """Run a script of the shell there; yields its root, as the host sees it."""
    made = subprocess.Popen(
        ["unshare", "-U", "-r", "-m", "sh", "-c", f"{{ {script}\n}} && echo ready; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=own.environment(), **own.identity(),
    )  # fmt: skip
    assert made.stdin and made.stdout and made.stderr
    try:
        if made.stdout.readline() != "ready\n":
            made.stdin.close()
            pytest.skip(f"no such mounts in a user namespace here: {made.stderr.read()}")
        yield Path(f"/proc/{made.pid}/root")
    finally:
        made.stdin.close()
        made.wait(timeout=20)
        made.stdout.close()
        made.stderr.close()
