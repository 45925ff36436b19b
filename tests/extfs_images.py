"""ext3 images for tests, and SIF files with partitions beside the root."""

from __future__ import annotations

import subprocess
from pathlib import Path

MIB = 1 << 20


def extfs(target: Path, tree: Path | None = None, *, mib: int = 16, owner: int = 0) -> Path:
    """Make an ext3 image of a directory; without one, of an overlay's two empty directories."""
    if tree is None:
        tree = target.with_suffix(".tree")
        for name in ("upper", "work"):
            (tree / name).mkdir(parents=True, exist_ok=True)
            (tree / name).chmod(0o755)
            subprocess.run(["chown", f"{owner}:{owner}", tree / name], check=True)
        subprocess.run(["chown", f"{owner}:{owner}", tree], check=True)
    with target.open("wb") as image:
        image.truncate(mib * MIB)
    command = ["/usr/sbin/mkfs.ext3", "-q", "-d", tree, target]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def is_clean(image: Path) -> bool:
    """Return whether e2fsck finds nothing to complain about."""
    done = subprocess.run(["/usr/sbin/e2fsck", "-f", "-n", image], capture_output=True, check=False)
    return done.returncode == 0
