from __future__ import annotations

import pytest

from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import arguments, definition
from apptainer_py.builds.scripts import Script

TWO = """\
# first
Bootstrap: localimage
From: base.sif   # of the site
Stage: one

%post
    echo a
%files
    a /b
%post
    echo b
bootstrap: scratch
%files from one
    /b
%POST -c /bin/bash -e
    true
%apprun foo
    echo foo
"""


def test_stages_headers_and_sections() -> None:
    first, second = definition.parse(TWO, file="two.def")
    assert first.header == {"bootstrap": "localimage", "from": "base.sif", "stage": "one"}
    post = first.joined("post")
    assert post is not None
    assert [(line.number, line.text.strip()) for line in post.lines] == [
        (7, "echo a"),
        (11, "echo b"),
    ]
    assert second.all("files")[0].words == ("from", "one")
    assert second.all("post")[0].words == ("-c", "/bin/bash", "-e")
    assert second.apps() == ["foo"]
    assert first.text + second.text == TWO


def test_a_header_goes_on_after_a_backslash() -> None:
    (stage,) = definition.parse("Bootstrap: \\\n  scratch\n", file="x")
    assert stage.header == {"bootstrap": "scratch"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no stages found in definition file"),
        ("# nothing\n\n", "no stages found in definition file"),
        ("Bootsrap: x\n", "invalid header keyword found: bootsrap (line 1)"),
        ("Bootstrap: scratch\nFrom\n", "header key from had no val (line 2)"),
        ("Bootstrap: scratch\n%foo\n", "invalid section(s) specified: foo (line 2)"),
        ("Bootstrap: scratch\n%apprun\n", "%apprun needs the name of an application"),
        ("Bootstrap: scratch\n%apprun ../x\n", "%apprun needs the name of an application"),
        ("From: x\n", "no bootstrap specification found"),
        ("%post\n true\n", "multiple stages detected, all must have headers"),
    ],
)
def test_what_is_no_definition_file(text: str, says: str) -> None:
    with pytest.raises(ApptainerError) as caught:
        definition.parse(text, file="x.def")
    assert says in str(caught.value)


def test_arguments_come_from_the_caller_then_from_the_section_of_the_stage() -> None:
    text = (
        "Bootstrap: scratch\n%arguments\n A=1\n B={{ A }}2\n%post\n# {{ NOT }}\n"
        "echo {{ A }} {{B}} {{ C }}\nBootstrap: scratch\n%arguments\n A=9\n%post\necho {{ A }}\n"
    )
    filled, unused = arguments.fill(text, {"C": "c", "D": "d"}, file="x")
    assert "echo 1 12 c\n" in filled
    assert "# {{ NOT }}" in filled
    assert filled.endswith("echo 9\n")
    assert unused == ["D"]
    assert "echo 5 52 c" in arguments.fill(text, {"A": "5", "C": "c"}, file="x")[0]
    with pytest.raises(arguments.Undefined, match="build var C is not defined"):
        arguments.fill(text, {}, file="x")


def test_pairs_and_files_of_pairs(tmp_path) -> None:
    file = tmp_path / "args"
    file.write_text("# c\nA=1\n\nB='x y'\n")
    assert arguments.from_file(str(file)) == {"A": "1", "B": "x y"}
    with pytest.raises(arguments.ArgumentWrong):
        arguments.pairs(["novalue"], "--build-arg")
    with pytest.raises(ApptainerError, match="Unable to read build arguments"):
        arguments.from_file(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("number", "command", "says"),
    [
        (3, "false", "line 11 of section %post: false"),  # the shell counts its own line too
        (0, "echo 'a b'", "line 10 of section %post"),
        (0, "unknown", "in section %post at: unknown"),
    ],
)
def test_the_failing_line_is_found(number: int, command: str, says: str) -> None:
    script = Script(section="post", lines=((10, ' echo "a b"'), (11, " false"), (0, "cd /")))
    assert says in script.where(number, command)


def test_a_line_ends_where_a_shell_ends_it() -> None:
    text = "\ufeffBootstrap: scratch\r\n%post\r\n echo a\x0cb\u2028c\x85d\r\n"
    (stage,) = definition.parse(text, file="x.def")
    (section,) = stage.all("post")
    assert [line.text for line in section.lines] == [" echo a\x0cb\u2028c\x85d"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%files foo", "the section %files takes `from` and a stage, or nothing (line 3)"),
        ("%files from", "the section %files takes `from` and a stage, or nothing (line 3)"),
        ("%files build app", "the section %files takes `from` and a stage, or nothing (line 3)"),
        ("%post bash", "the section %post takes -c and an interpreter, or options of the shell"),
        ("%test -c", "the section %test has -c without an interpreter (line 3)"),
        ("%apprun", "the section %apprun needs the name of an application (line 3)"),
        ("%apprun ../x", "the section %apprun needs the name of an application (line 3)"),
    ],
)
def test_words_after_a_sections_name_that_mean_nothing(line: str, reason: str) -> None:
    with pytest.raises(definition.DefinitionWrong) as wrong:
        definition.parse(f"Bootstrap: scratch\n\n{line}\n echo\n", file="x.def")
    assert reason in str(wrong.value)
