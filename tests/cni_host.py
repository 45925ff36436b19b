"""A host that is a namespace of its own: bridges, addresses and rules go with the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.own_install import Installation

PLUGINS = Path("/usr/lib/cni/bridge")


class Host:
    """A network, with its own /var/lib/cni, in which launches of root's find themselves."""

    def __init__(self, installed: Installation, sif: Path) -> None:
        self.installed, self.sif = installed, sif
        made = "mkdir -p /var/lib/cni; mount -t tmpfs none /var/lib/cni; mount -t tmpfs none /run;"
        script = f"{made} ip link set lo up; echo ready; exec sleep 600"
        line = ["unshare", "-n", "-m", "sh", "-c", script]
        self.holder = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"ready\n"
        self.inside = ["nsenter", "-t", str(self.holder.pid), "-n", "-m"]
        own = installed.user
        ids = [f"--reuid={own.pw_uid}", f"--regid={own.pw_gid}", "--clear-groups"]
        self.as_user = ["setpriv", *ids, "env", "-i", "PATH=/usr/bin", f"HOME={own.pw_dir}"]

    def end(self) -> None:
        self.holder.kill()
        self.holder.communicate()

    def start(self, *words: str | Path, user: bool = False) -> subprocess.Popen[str]:
        who = self.as_user if user else ()
        line = [*self.inside, *who, str(self.installed.program), "exec", *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd="/")

    def run(self, *words: str | Path, user: bool = False) -> tuple[int, str, str]:
        started = self.start(*words, user=user)
        out, err = started.communicate(timeout=60)
        return started.returncode, out, err

    def sh(self, script: str) -> str:
        done = subprocess.run(
            [*self.inside, "sh", "-c", script], capture_output=True, text=True, check=False
        )
        return done.stdout

    def traces(self) -> list[str]:
        """Return what a container leaves behind if nobody cleans up."""
        found = self.sh("ip -o link | grep -o 'veth[0-9a-f]*'; find /var/lib/cni -name '10.*'")
        own = r"'apptainer-py-[0-9]|^:CNI-(DN-)?[0-9a-f]{16}|-A CNI-F.* -[ds] '"
        rules = self.sh(f"iptables-save | grep -E {own}")
        return [*found.split(), *rules.splitlines()]
