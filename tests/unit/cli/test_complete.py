"""Completion scripts, run by the shells that are here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from apptainer_py.cli.complete import script

ASK = """
source /dev/stdin <<'SCRIPT'
{script}
SCRIPT
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
__apptainer_py_complete apptainer-py "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(*words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    text = ASK.format(script=script("bash"), words=quoted)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands() -> None:
    assert completed("apptainer-py", "ex") == ["exec"]
    assert completed("apptainer-py", "-q", "sh") == ["shell"]
    assert completed("apptainer-py", "sif", "s") == ["setprim"]
    assert completed("apptainer-py", "help", "insp") == ["inspect"]
    assert completed("apptainer-py", "plugin", "un") == ["uninstall"]
    assert "checkpoint" not in completed("apptainer-py", "")


def test_options() -> None:
    assert completed("apptainer-py", "exec", "--cont") == ["--contain", "--containall"]
    assert completed("apptainer-py", "exec", "-B", "x", "--usern") == ["--userns"]
    assert completed("apptainer-py", "--tra") == ["--trace"]
    assert completed("apptainer-py", "config", "show", "--u") == ["--user"]
    assert completed("apptainer-py", "exec", "--nv") == ["--nv", "--nvccli"]


def test_values_and_arguments_are_files() -> None:
    assert completed("apptainer-py", "exec", "--bind", "") == []
    assert completed("apptainer-py", "exec", "-u", "im") == []
    assert completed("apptainer-py", "exec", "image", "--cont") == []
    assert completed("apptainer-py", "--config", "ex") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_its_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-n", "/dev/stdin"], input=script(shell), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_descriptions_can_be_left_out() -> None:
    assert " -d '" in script("fish")
    assert " -d '" not in script("fish", descriptions=False)
