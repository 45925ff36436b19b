"""An ordinary user who runs containers: bundles that such a user may run, and where state lies."""

from __future__ import annotations

import functools
import os
import pwd
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.oci import bed as beds

HERE = Path(__file__).resolve().parent
ALL_CAPABILITIES = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_KILL"]


@functools.cache
def attacker() -> Path:
    """Return the static program that tries what a payload may not."""
    made = beds.shared_folder() / "attacker"
    argv = ["gcc", "-static", "-O1", "-o", str(made), str(HERE / "attacker.c")]
    subprocess.run(argv, check=True)
    return made


def subordinate(user: pwd.struct_passwd) -> tuple[int, int]:
    """Return the first subordinate uid of a user's, and how many there are."""
    for line in Path("/etc/subuid").read_text().splitlines():
        name, first, count = line.split(":")
        if name == user.pw_name:
            return int(first), int(count)
    raise AssertionError(f"{user.pw_name} has no subordinate ids")


class Rootless:
    """One user with a runtime directory and a place for bundles."""

    def __init__(self, program: Path | str, user: pwd.struct_passwd) -> None:
        self.program = program
        self.user = user
        self.place = Path(tempfile.mkdtemp(prefix="apptainer-py-rootless-", dir="/var/tmp"))
        self.place.chmod(0o755)
        self.runtime = self.place / "runtime"
        self.runtime.mkdir(mode=0o700)
        os.chown(self.runtime, user.pw_uid, user.pw_gid)
        self.state = self.runtime / "apptainer-py-oci"
        self._count = 0

    def bundle(self, *maps: tuple[int, int, int]) -> beds.Bundle:
        """Return a bundle that an ordinary user can run, with these lines for uids and gids."""
        self._count += 1
        made = beds.Bundle(self.place / f"bundle-{self._count}")
        made.space("user").without_space("network")
        made.replace_mount("/sys", "none", "/sys", "rbind", "nosuid", "noexec", "nodev", "ro")
        made.without_mount("/dev/mqueue")
        options = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
        made.replace_mount("/dev/pts", "devpts", "devpts", *options)
        del made.linux["resources"]
        made.config["root"]["readonly"] = False
        keys = ("containerID", "hostID", "size")
        for name in ("uidMappings", "gidMappings"):
            made.linux[name] = [dict(zip(keys, line, strict=True)) for line in maps]
        sets = ("bounding", "effective", "permitted")
        made.process["capabilities"] = dict.fromkeys(sets, ALL_CAPABILITIES)
        os.link(attacker(), made.rootfs / "bin/attacker")
        return made

    def hand_over(self, bundle: beds.Bundle, owner: int) -> beds.Bundle:
        """Write a bundle and give its root to the container's root."""
        bundle.write()
        for path in [bundle.rootfs, *bundle.rootfs.rglob("*")]:
            if "/bin/" not in str(path.relative_to(bundle.path)):
                os.chown(path, owner, owner, follow_symlinks=False)
        return bundle

    def how(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Return what makes subprocess run something as the user."""
        plain = {"PATH": "/usr/bin:/bin", "HOME": self.user.pw_dir, "USER": self.user.pw_name}
        plain["XDG_RUNTIME_DIR"] = str(self.runtime)
        return {
            "user": self.user.pw_uid, "group": self.user.pw_gid,
            "extra_groups": [self.user.pw_gid], "env": plain | (environment or {}), "cwd": "/",
        }  # fmt: skip

    def call(self, *words: str | Path, **more: Any) -> beds.Completed:
        """Run a command to its end."""
        how = {**self.how(more.pop("env", None)), **more}
        return subprocess.run(
            [str(self.program), *map(str, words)], stdin=subprocess.DEVNULL, timeout=60,
            capture_output=True, text=True, errors="replace", check=False, **how,
        )  # fmt: skip

    def start(self, *words: str | Path, out: Path, **more: Any) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to a file."""
        how = {**self.how(more.pop("env", None)), **more}
        with out.open("ab") as stream:
            return subprocess.Popen(
                [str(self.program), *map(str, words)], stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, **how,
            )  # fmt: skip

    def run_detached(self, name: str, bundle: beds.Bundle) -> None:
        """Start a container in the background."""
        out = self.place / f"{name}.out"
        process = self.start("run", "--detach", "--bundle", bundle.path, name, out=out)
        assert process.wait(timeout=60) == 0, out.read_bytes()

    def names(self) -> Sequence[str]:
        """Return the containers there are."""
        return os.listdir(self.state) if self.state.is_dir() else ()
