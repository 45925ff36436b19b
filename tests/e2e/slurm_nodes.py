"""Two Slurm nodes on this machine, for as long as a test module needs them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.own_install import eventually

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CONF = """\
ClusterName=apytest
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CryptoType=crypto/munge
SlurmUser=slurm
SlurmctldPort={ports[0]}
StateSaveLocation={place}/state
SlurmctldPidFile={place}/slurm/ctld.pid
SlurmctldLogFile={place}/slurm/ctld.log
SlurmdSpoolDir={place}/spool-%n
SlurmdPidFile={place}/%n.pid
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
TmpFS={place}/tmp
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES State=UP OverSubscribe=YES
"""


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _become(user: str, line: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "sh", "-c", line]


def _asked(conf: Path, *words: str) -> str:
    environment = {"PATH": _PATH, "SLURM_CONF": str(conf)}
    done = subprocess.run(words, capture_output=True, check=False, env=environment, text=True)
    return done.stdout.strip()


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Return the configuration file of two nodes that are idle."""
    environment = {"PATH": _PATH, "LANG": "C.UTF-8"}
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-slurm-", dir="/var/tmp"))
    place.chmod(0o755)
    for name, owner in (("munge", "munge"), ("state", "slurm"), ("slurm", "slurm")):
        (place / name).mkdir()
        shutil.chown(place / name, owner)
    (place / "tmp").mkdir()
    (place / "tmp").chmod(0o1777)
    key = place / "munge/key"
    key.write_bytes(os.urandom(128))
    shutil.chown(key, "munge")
    key.chmod(0o400)
    conf = place / "slurm.conf"
    conf.write_text(_CONF.format(host=os.uname().nodename, place=place, ports=_free_ports()))
    (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    own = f"{place}/munge"
    # PMIx has a directory of its own for each node, always by the same name.
    node = f"mount --bind {place}/tmp {place}/tmp && mount -t tmpfs none {place}/tmp && "
    lines = [
        _become("munge", f"exec munged -F --key-file={key} --socket={place}/munge.socket "
                f"--pid-file={own}/pid --seed-file={own}/seed --log-file={own}/log --force"),
        _become("slurm", f"SLURM_CONF={conf} exec slurmctld -D -f {conf}"),
        *(["unshare", "-m", "--propagation", "slave", "sh", "-c",
           f"{node} chmod 1777 {place}/tmp && exec slurmd -D -f {conf} -N {name}"]
          for name in ("n1", "n2")),
    ]  # fmt: skip
    shutil.chown(place, "munge")
    started: list[subprocess.Popen[bytes]] = []

    try:
        with (place / "output").open("wb") as output:
            for line in lines:
                started.append(
                    subprocess.Popen(
                        line, env=environment, cwd="/", stdin=subprocess.DEVNULL,
                        stdout=output, stderr=output, start_new_session=True,
                    )
                )  # fmt: skip
                if line is lines[0]:
                    eventually((place / "munge.socket").exists, "munged listens")
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        eventually(lambda: _asked(conf, *idle) == "2", "both nodes are idle", 60)
        yield conf
        # What has run a step stays when its node's daemon is gone.
        eventually(lambda: not _asked(conf, "squeue", "-h"), "no job is left", 30)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(place)
