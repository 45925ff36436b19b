"""exec, run, shell and test in every flow: what starts, with which status, and what is said."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def described(readable_tmp: Path) -> Path:
    return images.described_tree(readable_tmp / "exec")


@pytest.fixture(params=FLOWS)
def launch(request: pytest.FixtureRequest, product: SimpleNamespace, user: object) -> Run:
    def launch(*words: str | Path, **how: object) -> subprocess.CompletedProcess[str]:
        return run(product.program, request.param, words, **how)  # type: ignore[arg-type]

    return launch


@pytest.fixture
def copied(described: Path, readable_tmp: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tree to change."""
    target = readable_tmp / f"tree-{os.getpid()}-{abs(hash(request.node.name))}"
    shutil.copytree(described, target, symlinks=True)
    yield target
    shutil.rmtree(target)


def test_each_kind_of_image_runs(launch: Run, described: Path, demo_sif: Path) -> None:
    folder = described.parent
    for image in (images.own_sif(folder), images.bare_squashfs(folder), described, demo_sif):
        done = launch("exec", image, "echo", "here")
        assert (done.stdout, done.stderr, done.returncode) == ("here\n", "", 0)


@pytest.mark.parametrize("status", [0, 1, 2, 126, 127, 134, 255])
def test_the_status_is_the_payloads(launch: Run, demo_sif: Path, status: int) -> None:
    assert launch("exec", demo_sif, "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_that_ends_the_payload_ends_us(
    launch: Run, demo_sif: Path, number: signal.Signals
) -> None:
    line = f"kill -{int(number)} $$"
    assert launch("exec", demo_sif, "sh", "-c", line).returncode == -number
    assert launch("exec", "-p", demo_sif, "sh", "-c", line).returncode == 128 + number


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("nonexistent", '"nonexistent": executable file not found in $PATH'),
        ("/nonexistent", "stat /nonexistent: no such file or directory"),
        ("/etc", "is a directory"),
        ("/etc/passwd", "permission denied"),
    ],
)
def test_what_cannot_start_is_one_line(
    launch: Run, demo_sif: Path, command: str, text: str
) -> None:
    done = launch("exec", demo_sif, command)
    assert (done.stderr, done.stdout, done.returncode) == (f"FATAL:   {text}\n", "", 255)


def test_a_missing_interpreter_is_explained(launch: Run, copied: Path) -> None:
    (copied / "bin/lost").write_text("#!/nonexistent\n")
    (copied / "bin/lost").chmod(0o755)
    done = launch("exec", copied, "lost")
    assert done.returncode == 255
    assert "FATAL:   exec /bin/lost failed: a shared library is likely missing" in done.stderr


def test_a_script_without_a_first_line_runs(launch: Run, copied: Path) -> None:
    (copied / "bin/bare").write_text('echo "ran $1"\n')
    (copied / "bin/bare").chmod(0o755)
    assert launch("exec", copied, "bare", "x").stdout == "ran x\n"


def test_an_image_without_a_shell_runs_a_static_program(launch: Run, readable_tmp: Path) -> None:
    tree = readable_tmp / "noshell"
    if not tree.exists():
        tree.mkdir()
        shutil.copy("/bin/busybox", tree / "busybox")
    done = launch("exec", tree, "/busybox", "echo", "static", env={"APPTAINERENV_X": "1"})
    assert (done.stdout, done.returncode) == ("static\n", 0)
    done = launch("exec", tree, "/busybox", "env", env={"APPTAINERENV_X": "1", "HOSTS": "yes"})
    assert {"X=1", "HOSTS=yes", "APPTAINER_NAME=noshell"} <= set(done.stdout.splitlines())
    done = launch("exec", tree, "/missing")
    assert (done.stdout, done.returncode) == ("", 255)
    assert "FATAL:   stat /missing: no such file or directory" in done.stderr
    done = launch("shell", tree)
    assert (done.returncode, done.stdout) == (255, "")
    assert "FATAL:   /bin/sh does not exist in container" in done.stderr


def test_a_shell_of_another_machine_leaves_exec_working(launch: Run, copied: Path) -> None:
    (copied / "bin/sh").unlink()
    (copied / "bin/sh").write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 57)
    (copied / "bin/sh").chmod(0o755)
    assert launch("exec", copied, "/bin/busybox", "echo", "on").stdout == "on\n"
    done = launch("run", copied)
    assert done.returncode == 255
    assert "Traceback" not in done.stderr


def test_streams_are_the_callers(launch: Run, demo_sif: Path) -> None:
    text = "line\n" * 20000
    done = launch("exec", demo_sif, "cat", stdin=text)
    assert (done.stdout, done.stderr) == (text, "")
    done = launch("exec", demo_sif, "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_run_shell_and_test(launch: Run, described: Path) -> None:
    assert launch("run", described, "a", "b c").stdout == "run a b c\n"
    assert launch("test", described).stdout == "tested\n"
    assert launch("shell", described, stdin="echo in shell; exit 3\n").returncode == 3
    done = launch("shell", "--shell", "/bin/cat", described, stdin="through\n")
    assert done.stdout == "through\n"


def test_no_test_script_is_no_failure(launch: Run, readable_tmp: Path) -> None:
    done = launch("test", images.small_tree(readable_tmp / "exec"))
    assert (done.returncode, done.stderr) == (
        0,
        "INFO:    No test script found in container, exiting\n",
    )


def test_the_old_names_work(
    launch: Run,
    product: SimpleNamespace,
    demo_sif: Path,
    readable_tmp: Path,
    request: pytest.FixtureRequest,
) -> None:
    flow = request.node.callspec.params["launch"]
    for name in ("apptainer", "singularity"):
        link = readable_tmp / name
        if not link.is_symlink():
            link.symlink_to(product.program)
        assert run(link, flow, ["exec", demo_sif, "echo", name]).stdout == f"{name}\n"


def test_root_is_root_without_more_than_it_had(product: SimpleNamespace, demo_sif: Path) -> None:
    done = run(product.program, "root", ["exec", demo_sif, "sh", "-c",
                                         "id -u; cat /proc/self/status"])  # fmt: skip
    own = Path("/proc/self/status").read_text()
    lines = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    mine = dict(line.split(":\t", 1) for line in own.splitlines() if ":\t" in line)
    assert done.stdout.startswith("0\n")
    assert int(lines["CapEff"], 16) & ~int(mine["CapPrm"], 16) == 0
    done = run(product.program, "root", ["exec", "--no-privs", demo_sif, "cat",
                                         "/proc/self/status"])  # fmt: skip
    lines = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert (lines["CapEff"], lines["NoNewPrivs"]) == ("0" * 16, "1")
    drop = run(product.program, "root", ["exec", "--drop-caps", "CAP_CHOWN", demo_sif, "cat",
                                         "/proc/self/status"])  # fmt: skip
    lines = dict(line.split(":\t", 1) for line in drop.stdout.splitlines() if ":\t" in line)
    assert int(lines["CapEff"], 16) & 1 == 0


# ---- --runscript-timeout ----


def hanging(copied: Path, text: str) -> Path:
    """Make a copy whose environment takes that long to read."""
    folder = copied / ".singularity.d/env"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "50-slow.sh").write_text(text)
    (folder / "50-slow.sh").chmod(0o755)
    return copied


def test_an_environment_that_does_not_end(launch: Run, copied: Path) -> None:
    image = hanging(copied, "while :; do :; done\n")
    for more in ((), ("-p",)):
        done = launch("run", *more, "--runscript-timeout", "200ms", image)
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert done.stderr.count("FATAL") == 1
        assert "context deadline exceeded: the image's environment was not read" in done.stderr


def test_a_runscript_may_take_its_time(launch: Run, copied: Path) -> None:
    image = hanging(copied, "A=$(echo b); export A\n")
    script = image / ".singularity.d/runscript"
    script.write_text("#!/bin/sh\nsleep 1\necho done $A\n")
    script.chmod(0o755)
    done = launch("run", "--runscript-timeout", "300ms", image)
    assert (done.returncode, done.stdout) == (0, "done b\n"), done.stderr


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("bad", 'time: invalid duration "bad"'),
        ("5", 'time: missing unit in duration "5"'),
        ("0s", "context deadline exceeded: --runscript-timeout 0s"),
    ],
)
def test_what_is_no_timeout(launch: Run, described: Path, value: str, said: str) -> None:
    for words, env in (
        (("--runscript-timeout", value), {}),
        ((), {"APPTAINER_RUNSCRIPT_TIMEOUT": value}),
    ):
        done = launch("run", *words, described, env=env)
        assert (done.returncode, done.stdout) == (255, "")
        assert done.stderr.splitlines()[0] == f"FATAL:   {said}"
