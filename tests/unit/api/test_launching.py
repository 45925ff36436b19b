"""What a child of ours says is told from what it has started; its pipes and its end are kept."""

from __future__ import annotations

import os
import threading

import pytest

import apptainer_py
from apptainer_py.api import launching


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Puts a shell script in the launcher's place; its words are in $@."""

    def put(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        file = folder / "apptainer-py"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(launching.build, "BINDIR", str(folder))

    return put


def test_words_streams_and_status(launcher):
    launcher('printf "%s|" "$@"; cat; echo err >&2; exit 3')
    done = apptainer_py.exec("-odd.sif", ["cat", "-"], input="in", nv=True)
    assert done.text == "exec|--nv=true|--|-odd.sif|cat|-|in"
    assert (done.returncode, done.stderr, done.args) == (
        3,
        b"err\n",
        ("exec", "-odd.sif", "cat", "-"),
    )


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        ("echo 'FATAL:   no such image' >&2; exit 255", apptainer_py.LaunchError, "no such image"),
        (
            "printf 'WARNING: w\\nFATAL:   why\\nINFO:    a hint\\n' >&2; exit 255",
            apptainer_py.LaunchError,
            "why",
        ),
        ("echo 'Error for command \"exec\": odd' >&2; exit 1", apptainer_py.UsageError, "odd"),
    ],
)
def test_a_refusal_is_an_error_with_its_line(launcher, script, kind, text):
    launcher(script)
    with pytest.raises(kind) as error:
        apptainer_py.exec("i", ["true"])
    assert str(error.value) == text


@pytest.mark.parametrize("script", ["exit 255", "echo 'FATAL:   x' >&2; exit 1", "exit 1"])
def test_what_the_payload_does_is_no_refusal(launcher, script):
    launcher(script)
    done = apptainer_py.exec("i", ["true"])
    assert done.returncode in (1, 255)
    with pytest.raises(apptainer_py.CommandFailed, match="exec i true ended with status") as error:
        done.raise_for_status()
    assert error.value.result is done


def test_a_child_that_takes_too_long_is_killed(launcher):
    launcher("echo begun; exec sleep 600")
    with pytest.raises(
        apptainer_py.TimedOut, match=r"exec i true did not end within 0\.5 s"
    ) as error:
        apptainer_py.exec("i", ["true"], timeout=0.5)
    assert error.value.stdout == b"begun\n"


def test_streams_go_where_they_are_wanted(launcher, tmp_path):
    launcher("echo out; echo err >&2; cat")
    with open(tmp_path / "file", "w+b") as file:
        done = apptainer_py.run("i", stdout=file, stderr=file, input=b"in")
        file.seek(0)
        assert file.read() == b"out\nerr\nin"
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_stream_is_read_while_it_runs_and_ends_with_the_block(launcher):
    launcher("while read line; do echo got $line; done; exec sleep 600")
    with apptainer_py.stream("i", ["cat"]) as running:
        lines = running.lines()
        for word in ("one", "two"):
            running.stdin.write(f"{word}\n".encode())
            running.stdin.flush()
            assert next(lines) == f"got {word}"
        assert running.returncode is None
        with pytest.raises(apptainer_py.TimedOut):
            running.wait(0.05)
    assert running.returncode == 137


def test_a_password_is_in_no_list_of_words(launcher):
    launcher('echo "$@" $APPTAINER_DOCKER_PASSWORD')
    done = apptainer_py.exec(
        "docker://x", ["true"], docker_password="s3cret", environ=dict(os.environ)
    )
    assert done.text.split()[-1] == "s3cret"
    assert done.text.count("s3cret") == 1


def test_one_word_is_no_list_of_words(launcher):
    launcher("true")
    with pytest.raises(TypeError, match="list"):
        apptainer_py.exec("i", "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no command"):
        apptainer_py.exec("i", [])


def test_many_threads_at_once(launcher):
    launcher('echo "$4"')
    found = {}

    def call(number: int) -> None:
        found[number] = apptainer_py.exec("i", [str(number)]).text.strip()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(8)}


def test_the_package_loads_nothing_until_it_is_asked(repository):
    import subprocess

    script = (
        f"import sys; sys.path.insert(0, {str(repository)!r}); import apptainer_py; "
        "print([m for m in sys.modules if m.startswith('apptainer_py')])"
    )
    argv = ["/usr/bin/python3", "-I", "-S", "-B", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "['apptainer_py']\n"


def test_every_name_that_is_offered_is_there():
    for names in apptainer_py._PLACES.values():
        for name in names:
            assert callable(getattr(apptainer_py, name))
            assert name in dir(apptainer_py)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apptainer_py.nothing  # type: ignore[attr-defined]
