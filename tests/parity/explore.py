"""Random command lines by both programs: prints where they disagree, for a maintainer to judge.

    APY_TEST_PREFIX=/usr/local build/venv/bin/python -m tests.parity.explore [SEED] [LINES]

A seed gives the same lines again.  What is a defect becomes a row of table.py, and so does what is
meant to differ, with its reason; the reasons that stand there for every line are left out here.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests import images
from tests.parity.place import make_place, shared_names
from tests.parity.rows import BOTH, Case, payload
from tests.parity.test_table import _cleaned, run

OPTIONS = (
    "-B {data}", "-B {data}:/mnt", "-B {data}:/mnt:ro", "-B {data}:/new/deep", "-B {data}:{work}",
    "-B {data}/file:/etc/hosts", "-B '{data}: /opt, {other}:/srv'", "-B {data}:/tmp/in", "-B /root",
    "-B {data}:{home}/in", "-B /dev/full",
    "--mount type=bind,src={data},dst=/mnt,ro", "--mount type=tmpfs,dst=/mnt", "-H {other}",
    "-H {other}:/h", "-H {other}:/tmp", "-H /nonexistent", "--no-home", "-c", "-C", "-e", "-p",
    "-p --no-init", "-i", "--uts", "--hostname box", "--no-umask", "--no-privs", "--no-eval",
    "--compat", "--writable-tmpfs", "-W {away}", "-S /scr", "-S /tmp/scr",
    "--no-mount tmp", "--no-mount home", "--no-mount cwd", "--no-mount bind-paths", "--pwd /etc",
    "--no-mount proc,sys", "--no-mount dev", "--cwd /nonexistent", "--app foo", "--app missing",
    "--env A=1,B=$HOME", "--env 'A=`id -u`'", "--env-file {env}", "--env-file {env3}",
    "--overlay {squash}:ro", "--overlay {sandbox}:ro", "--drop-caps all", "--add-caps net_raw",
)  # fmt: skip
IMAGES = "sif zstd squash sandbox plain dash bash busy linked onetmp".split()
PLACES = ("{work}", "{work}", "{work}/link", "{data}/inner", "{home}", "/", "/tmp", "/srv", "/etc")
VARIABLES = (
    ("APPTAINERENV_A", "$(echo evaluated)"), ("SINGULARITYENV_A", "old"), ("A", "it's `x`\n$"),
    ("APPTAINER_BIND", "{other}:/opt"), ("SINGULARITY_CONTAIN", "1"), ("APPTAINER_NO_HOME", "1"),
    ("APPTAINERENV_PREPEND_PATH", "/first"), ("APPTAINERENV_FOO", ""), ("FOO", "host"),
)  # fmt: skip


def line(choice: random.Random) -> Case:
    """Return a line of one to four options."""
    options = " ".join(choice.sample(OPTIONS, choice.randint(1, 4)))
    more = {
        "cwd": choice.choice(PLACES),
        "env": dict(choice.sample(VARIABLES, choice.choice((0, 0, 1, 2)))),
        "umask": choice.choice((0o022, 0o077)),
    }
    image = f"{{{choice.choice(IMAGES)}}}"
    if choice.random() < 0.3:
        verb = choice.choice(("run", "shell", "test"))
        return Case(f"{verb} {options} {image} -c 'pwd; id -u; ls -A /mnt'", **more)
    return payload(options, image, **more)


def main(seed: int, lines: int) -> int:
    """Run so many lines; return how many the programs disagree about."""
    user = images.ordinary_user()
    ours = f"{os.environ.get('APY_TEST_PREFIX', '/usr/local')}/bin/apptainer-py"
    folder = Path(tempfile.mkdtemp(prefix="explore-", dir="/var/lib"))
    folder.chmod(0o755)
    differ = 0
    try:
        names = make_place(folder / "place", shared_names(folder, user), user)
        choice = random.Random(seed)
        for _ in range(lines):
            case, flow = line(choice), choice.choice(BOTH)
            real = run(str(images.REAL_APPTAINER), case, flow, names, user)
            mine = run(ours, case, flow, names, user)
            same_kind = real.keys() == mine.keys()
            theirs, mine = _cleaned(real, mine, flow) if same_kind else (real, mine)
            aspects = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
            if "status" in aspects:
                aspects = ["status", "said"]
            differ += bool(aspects)
            if aspects:
                print(f"[{flow}] {case.line.partition(' sh -c')[0]} {case.env} in {case.cwd}")
            for name in aspects:
                print(f"    {name}\n        real {theirs.get(name)}\n        ours {mine.get(name)}")
    finally:
        shutil.rmtree(folder)
    print(f"seed {seed}: {lines} lines, {differ} differ")
    return differ


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:3]]
    sys.exit(main(*(arguments + [1, 100][len(arguments) :])) > 0)
