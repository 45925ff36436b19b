"""An --env-file is the shell's language; its variables count, exported or not."""

from __future__ import annotations

import os

import pytest

from apptainer_py.engines.apptainer import envfile

HOST = {"HOST": "h", "HOME": "/h", "USER": "u", "PATH": "/usr/bin:/bin"}


@pytest.fixture(params=["/bin/bash", "/nonexistent"], ids=["bash", "sh"])
def bash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "/bin/bash" and not os.path.exists(request.param):
        pytest.skip("this machine has no /bin/bash")
    monkeypatch.setattr(envfile, "_BASH", request.param)
    return str(request.param) == "/bin/bash"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("A=1\nexport B='x y' # why\nC=\n", {"A": "1", "B": "x y", "C": ""}),
        ("A=$HOST-$HOME-$USER\nHOST=$HOST\n", {"A": "h-/h-u", "HOST": "h"}),
        ("A='two\nlines'\nB=\"$A\"", {"A": "two\nlines", "B": "two\nlines"}),
        ("A=1\nfalse\n", {"A": "1"}),
        ("A=$(echo x)\necho not seen\n", {"A": "x"}),
        ("cd /\nA=$PWD\n", {"A": "/"}),
        ("PATH=/x\nLD_LIBRARY_PATH=/l\n", {"PATH": "/x", "LD_LIBRARY_PATH": "/l"}),
    ],
)
def test_what_every_shell_reads(bash: bool, text: str, wanted: dict[str, str]) -> None:
    assert envfile.evaluate(text.encode(), HOST) == wanted


@pytest.mark.parametrize(
    "text", ['A="1\n', "A=1\nexit 3\n", "A=${B:?none}\n", "if\n", "exec true\n"]
)
def test_what_no_shell_gets_to_the_end_of(bash: bool, text: str) -> None:
    with pytest.raises(envfile.Failed) as raised:
        envfile.evaluate(text.encode(), HOST)
    assert "/proc/self/fd" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A=1;B=2 C=3\n", {"A": "1", "B": "2", "C": "3"}),
        ("if true; then A=1; fi\nreadonly B=2\ndeclare C=3\n", {"A": "1", "B": "2", "C": "3"}),
        ("A=$'a\\nb'\nA+=c\n", {"A": "a\nbc"}),
        ("A=(1 2)\n. /nonexistent\nB=1\n", {"B": "1"}),
    ],
)
def test_what_bash_reads(text: str, wanted: dict[str, str]) -> None:
    assert envfile.evaluate(text.encode(), HOST) == wanted


@pytest.mark.parametrize("text", ["A = 1\n", "A-B=1\nC=2\n", "A=1 2\n", "nonsense\n"])
def test_a_word_that_is_no_command_is_a_mistake(text: str) -> None:
    with pytest.raises(envfile.Failed, match="command not found"):
        envfile.evaluate(text.encode(), HOST)


def test_what_the_callers_environment_says_to_a_shell_is_not_obeyed(bash: bool) -> None:
    hostile = {"BASH_ENV": "/nonexistent", "SHELLOPTS": "noexec", "POSIXLY_CORRECT": "1",
               "BASH_FUNC_printf%%": "() { :; }", "IFS": "A"}  # fmt: skip
    assert envfile.evaluate(b"A=1\n", {**HOST, **hostile}) == {"A": "1"}
