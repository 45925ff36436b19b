"""What reaches the payload's environment, whatever image and caller have put there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.e2e.three_flows import FLOWS, run
from tests.parity.place import with_shell

Run = Callable[..., subprocess.CompletedProcess[str]]
LATER = "90-environment.sh"


@pytest.fixture(scope="module")
def trees(readable_tmp: Path) -> dict[str, Path]:
    """Images whose /bin/sh is busybox, dash, dash beside bash, and bash."""
    folder = readable_tmp / "environment"
    described = images.described_tree(folder)
    found = {"busybox": described}
    for shell in ("dash", "bash"):
        found[shell] = folder / shell
        with_shell(described, found[shell], shell)
    found["both"] = folder / "both"
    with_shell(found["bash"], found["both"], "dash")
    return found


@pytest.fixture(params=["busybox", "dash", "both", "bash"])
def tree(trees: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path,
         readable_tmp: Path) -> Iterator[Path]:  # fmt: skip
    target = readable_tmp / f"env-{tmp_path.name}"
    shutil.copytree(trees[request.param], target, symlinks=True)
    yield target
    shutil.rmtree(target)


@pytest.fixture
def launch(product: SimpleNamespace, user: object) -> Run:
    def launch(*words: str | Path, **how: object) -> subprocess.CompletedProcess[str]:
        flow = str(how.pop("flow", "setuid"))
        return run(product.program, flow, words, **how)  # type: ignore[arg-type]

    return launch


def put(tree: Path, name: str, text: str) -> None:
    path = tree / ".singularity.d/env" / name
    path.write_text(text)
    path.chmod(0o755)


def variables(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    entries = [entry for entry in done.stdout.split("\0") if entry]
    return dict(entry.split("=", 1) for entry in entries)


def show(launch: Run, tree: Path, *options: str, **how: object) -> dict[str, str]:
    words = ["exec", *options, tree, "cat", "/proc/self/environ"]
    return variables(launch(*words, **how))


@pytest.mark.parametrize(
    "line",
    ["export B=\"it's `", "export B='", "if true; then", "${", "x=${y//a/b}; )", "((", "done"],
)
def test_a_file_that_no_shell_can_read_stops_nothing(launch: Run, tree: Path, line: str) -> None:
    put(tree, "10-docker2singularity.sh", f"export A=before\n{line}\n")
    put(tree, LATER, "export LATER=yes\n")
    found = show(launch, tree)
    assert found["LATER"] == "yes"
    assert "/bin" in found["PATH"].split(":")


@pytest.mark.parametrize(
    "line",
    ["set -e", "set -u", "set -f", "set -a; INNER=1", "IFS=/", "cd /etc",
     "set -- echo hijacked", "return 3", "alias cat=false", "unset HOME", "PATH=",
     "trap 'echo trapped' EXIT", "cat() { echo function; }", "exec 3</dev/null", "unset -f __say"],
)  # fmt: skip
def test_what_a_file_does_to_its_shell_does_not_reach_the_command(
    launch: Run, tree: Path, line: str
) -> None:
    put(tree, "50-odd.sh", f"{line}\n")
    put(tree, LATER, "export LATER=yes\n")
    done = launch("exec", tree, "/bin/sh", "-c", "pwd; echo $LATER", cwd="/tmp")
    assert done.stdout == "/tmp\nyes\n", done.stderr


def test_nothing_of_our_own_leaks(launch: Run, tree: Path) -> None:
    put(tree, "50-all.sh", "set -a\n")
    found = show(launch, tree, env={"APPTAINERENV_X": "1", "HOSTS": "own"})
    assert [name for name in found if name.startswith("__") or "FUNC" in name] == []
    assert (found["X"], found["HOSTS"]) == ("1", "own")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[ a == a* ]] && export B=match\n", "match"),
        ("words=(one two)\nexport B=${words[1]}\n", "two"),
        ("export A=xyx\nexport B=${A//x/-}\n", "-y-"),
        ("declare -x B=declared\n", "declared"),
        ("function f { export B=called; }\nf\n", "called"),
        ("source /.singularity.d/more\n", "sourced"),
    ],
)
def test_bash_reads_what_only_bash_can(
    launch: Run, trees: dict[str, Path], readable_tmp: Path, text: str, expected: str
) -> None:
    for name in ("both", "bash"):
        target = readable_tmp / "bashisms"
        shutil.copytree(trees[name], target, symlinks=True)
        (target / ".singularity.d/more").write_text("export B=sourced\n")
        put(target, "20-once.sh", 'export ONCE="$ONCE+"\n')
        put(target, "30-bash.sh", text)
        found = show(launch, target)
        shutil.rmtree(target)
        assert (found.get("B"), found["ONCE"]) == (expected, "+"), name


VALUES = {
    "PLAIN": "a b",
    "QUOTES": 'it\'s "both"',
    "NEWLINE": "one\ntwo\n",
    "BACKSLASH": "a\\b\\\\c",
    "LAST": "ends with \\",
    "GLOB": "*?[a]",
    "MARK": "@INJECT@ @PATH@ @INFO@",
    "UNICODE": "Zoë",
}


def test_values_are_kept_byte_by_byte(launch: Run, tree: Path) -> None:
    hostile = {"TICK": "`", "DOLLAR": "$(", "BRACE": "${X", "SEMI": "; exit 9"}
    found = show(launch, tree, env={**VALUES, **hostile})
    assert {name: found[name] for name in (*VALUES, *hostile)} == {**VALUES, **hostile}
    injected = {f"APPTAINERENV_{name}": value for name, value in {**VALUES, **hostile}.items()}
    found = show(launch, tree, "--no-eval", env=injected)
    assert {name: found[name] for name in (*VALUES, *hostile)} == {**VALUES, **hostile}


def test_injected_values_are_evaluated_inside_and_bad_ones_left_out(
    launch: Run, tree: Path
) -> None:
    env = {"APPTAINERENV_A": "$(cat /etc/test-release)", "APPTAINERENV_B": "$HOME/x",
           "APPTAINERENV_BAD": "`", "APPTAINERENV_C": "fine", "APPTAINERENV_D": "$(exit 3)",
           "APPTAINERENV_LAST": "ends with \\"}  # fmt: skip
    done = launch("exec", tree, "cat", "/proc/self/environ", env=env)
    found = variables(done)
    assert found["A"] == "a small tree"
    assert found["B"] == f"{images.ordinary_user().pw_dir}/x"
    assert (found["C"], found["D"], found["LAST"]) == ("fine", "", "ends with \\")
    assert "BAD" not in found
    assert "WARNING: Skipping environment variable BAD" in done.stderr


def test_many_and_long_values_arrive(launch: Run, trees: dict[str, Path]) -> None:
    many = {f"V{number}": "x" * 1000 for number in range(500)}
    found = show(launch, trees["dash"], env=many)
    assert all(found[name] == value for name, value in many.items())


ODD = {"BASH_FUNC_g%%": "() { echo said; }", "A-B": "1", "9X": "2", "dot.name": "a\nb", "É": "4"}


def test_names_that_no_shell_can_hold_arrive(launch: Run, trees: dict[str, Path]) -> None:
    """As long as the image's files need no shell of the image's, which would drop them."""
    found = show(launch, trees["dash"], env={**ODD, "PPID": "1"})
    assert {name: found.get(name) for name in ODD} == ODD
    assert "PPID" not in found
    assert not ODD.keys() & show(launch, trees["dash"], "-e", env=ODD).keys()
    assert launch("exec", trees["bash"], "bash", "-c", "g", env=ODD).stdout == "said\n"


@pytest.mark.parametrize("text", ["export B=$(echo b)\n", "x=(a b); export B=${x[1]}\n"])
def test_names_that_no_shell_can_hold_arrive_through_the_shells(
    launch: Run, tree: Path, text: str
) -> None:
    """By the image's env(1), which is not there in each."""
    put(tree, "20-needs.sh", text)
    found = show(launch, tree, env=ODD)
    assert {name: found.get(name) for name in ODD} == ODD
    done = launch("exec", tree, "sh", "-c", "exit 7", env=ODD)
    assert done.returncode == 7
    for name in ("usr/bin/env", "bin/env"):
        (tree / name).unlink(missing_ok=True)
    done = launch("exec", tree, "sh", "-c", "exit 7", env=ODD)
    assert (done.returncode, "no shell can forward" in done.stderr) == (7, True)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("set -u\nexport X=a$nosuch\n", 1),
        ("set -u\nX=$nosuch\n", 1),
        ("declare -x A=1\nset -u\nexport X=$nosuch\n", 1),
        ("export X=a${nosuch?}\n", 1),
        ("declare -x A=1\nX=${nosuch:?is missing}\n", 1),
        ("declare -x A=1\nexit 127\n", 127),
        ("declare -x A=1\neval 'exit 127'\n", 127),
        ("declare -x A=1\n(exit 127) || exit\n", 127),
        ("trap 'exit 9' EXIT\ndeclare -x A=1\n", 3),
    ],
)
def test_bash_ends_with_the_status_of_other_shells(
    launch: Run, trees: dict[str, Path], readable_tmp: Path, text: str, status: int
) -> None:
    for name in ("both", "bash"):
        target = readable_tmp / "unbound"
        shutil.copytree(trees[name], target, symlinks=True)
        put(target, "30-bash.sh", text)
        done = launch("exec", target, "sh", "-c", "exit 3")
        shutil.rmtree(target)
        assert done.returncode == status, (name, done.stderr)


def test_an_image_with_bash_and_no_sh(launch: Run, trees: dict[str, Path], tree: Path) -> None:
    """Its environment is read all the same: without a shell, or by bash."""
    (tree / "bin/sh").unlink()
    put(tree, "20-plain.sh", "export A=plain\n")
    assert show(launch, tree)["A"] == "plain"
    if (tree / "bin/bash").exists():
        put(tree, "21-array.sh", "x=(a b); export B=${x[1]}\n")
        assert show(launch, tree)["B"] == "b"


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_has_the_same_environment(
    launch: Run, trees: dict[str, Path], flow: str
) -> None:
    found = show(launch, trees["dash"], flow=flow, env={"FOO": "host", "APPTAINERENV_X": "$FOO"})
    assert (found["FOO"], found["X"]) == ("bar", "bar")
    assert found["PATH"] == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert found["HOME"] == ("/root" if flow == "root" else images.ordinary_user().pw_dir)


def test_an_exit_in_a_file_is_the_status(launch: Run, tree: Path) -> None:
    put(tree, "20-exit.sh", "exit 5\n")
    assert launch("exec", tree, "echo", "no").returncode == 5


def test_env_file(launch: Run, trees: dict[str, Path], user_tmp: Path) -> None:
    path = user_tmp / "env"
    path.write_text("# words\nexport A='one two'\nB=$A/x\nC=\n\nD=`echo out`\n")
    found = show(launch, trees["dash"], "--env-file", str(path), "--env", "C=cli")
    assert [found[name] for name in "ABCD"] == ["one two", "one two/x", "cli", "out"]
    path.write_text("A='\n")
    done = launch("exec", "--env-file", path, trees["dash"], "true")
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL:   while setting environment: while processing")
    for odd in ("/nonexistent", "/dev/zero", "/tmp"):
        done = launch("exec", "--env-file", odd, trees["dash"], "true")
        assert done.returncode == 255, odd
        assert "Traceback" not in done.stderr
