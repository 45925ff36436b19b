"""The slow commands from end to end, in this process, and beside the real Apptainer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import apptainer_py.base
from apptainer_py.base import log
from apptainer_py.cli import commands, main, plugins, signing, table
from apptainer_py.cli.help import full, topic

FACTS = {
    "VERSION": "0.1.0", "BUILD_ID": "x", "PREFIX": "/p", "BINDIR": "/p/bin", "LIBEXECDIR": "/p/l",
    "LIBDIR": "/p/lib", "SYSCONFDIR": "/etc/apptainer-py", "CONFIG_FILE": "/etc/apptainer-py/c",
    "SESSIONDIR": "/p/l/session", "STARTER": "/p/l/starter", "STARTER_SUID": "/p/l/suid",
    "PYTHON": "/usr/bin/python3", "LIBPYTHON": "/l", "SETUID": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build module and message settings of these tests' own."""
    module = ModuleType("apptainer_py.base.build")
    module.__dict__.update(FACTS)
    monkeypatch.setitem(sys.modules, "apptainer_py.base.build", module)
    monkeypatch.setattr(apptainer_py.base, "build", module, raising=False)
    monkeypatch.setattr(log, "level", log.INFO)
    monkeypatch.setattr(log, "colour", False)


def test_messages_show_what_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.warning("é\tb\nc\x1b\udcff\u202e")
    assert capsys.readouterr().err == "WARNING: é\tb\\nc\\x1b\\xff\\u202e\n"


def run(capsys: pytest.CaptureFixture[str], *words: str, **environ: str) -> tuple[int, str, str]:
    status = main.main(["apptainer-py", *words], environ)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "version") == (0, "0.1.0\n", "")
    assert run(capsys, "version", "x") == (0, "0.1.0\n", "")
    assert run(capsys, "--version", "nosuch") == (0, "apptainer-py version 0.1.0\n", "")


def test_buildcfg(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "buildcfg")
    assert (status, err) == (0, "")
    assert "SESSIONDIR=/p/l/session\n" in out
    assert "APPTAINER_SUID_INSTALL=1\n" in out
    assert run(capsys, "buildcfg", "APPTAINER_CONFDIR") == (0, "/etc/apptainer-py\n", "")
    status, out, err = run(capsys, "buildcfg", "x")
    assert (status, err) == (1, 'Error for command "buildcfg": no variable named "x"\n\n')
    assert out.startswith("Usage:\n  apptainer-py [global options...] buildcfg [parameter]\n")


@pytest.mark.parametrize("row", table.COMMANDS, ids=lambda row: row[0])
def test_each_command_has_help_and_is_built_or_refused(
    capsys: pytest.CaptureFixture[str], row: table.Command
) -> None:
    path = row[0]
    status, out, err = run(capsys, "help", *path.split())
    assert (status, err) == (0, "")
    assert out == full(path)
    assert f"Usage:\n  apptainer-py {path}" in out
    # Those of `oci` are another program's.
    built = path in {**commands._COMMANDS, **signing.COMMANDS, **plugins.COMMANDS}
    built = built or path in (*table.ACTIONS, *table.INSTANCES, *table.GROUPS)
    built = built or path.startswith("oci ")
    assert built is (row[4] == table.SUPPORTED)
    if not built:
        status, out, err = run(capsys, *path.split())
        assert (status, out) == (255, "")
        assert err == f"FATAL:   the command `{path}` is not supported yet\n"


def test_help_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "exec", "--help", "--", "x") == (0, full("exec"), "")
    assert run(capsys, "--help") == (0, full(""), "")
    assert run(capsys, "sif") == (0, full("sif"), "")
    assert run(capsys, "sif", "nosuch") == (0, full("sif"), "")
    status, out, err = run(capsys, "help", "no\x1bsuch")
    assert (status, err) == (0, "")
    assert out.startswith("Unknown help topic [`no\\x1bsuch`]\nUsage:\n")
    assert topic(["exec", "x"]) == full("exec")


def test_help_fits_a_terminal() -> None:
    for path in ("", *(row[0] for row in table.COMMANDS)):
        assert [line for line in full(path).splitlines() if len(line) > 100] == []


def test_hidden_options_are_not_shown() -> None:
    shown = full("exec")
    assert not [name for name in table.HIDDEN if f"--{name} " in shown]
    assert "--bind stringArray" in shown


def test_help_has_no_option_that_does_not_work() -> None:
    for command in table.ACTIONS:
        shown = full(command)
        refused = [row[0] for row in table.options_of(command) if row[6] == table.REFUSED]
        assert not [name for name in refused if f"--{name} " in shown or f"--{name}\n" in shown]
        assert "not supported yet" not in shown


def test_run_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    two_lines = "    two\n    lines\n"
    meta = tmp_path / "box/.singularity.d"
    meta.mkdir(parents=True)
    nothing = (0, "No help sections were defined for this image\n", "")
    assert run(capsys, "run-help", str(tmp_path / "box")) == nothing
    (meta / "runscript.help").write_text(two_lines)
    app = tmp_path / "box/scif/apps/foo/scif"
    app.mkdir(parents=True)
    (app / "runscript.help").write_text("of foo")
    box = str(tmp_path / "box")
    assert run(capsys, "run-help", box) == (0, two_lines, "")
    assert run(capsys, "run-help", "--app", "foo", box) == (0, "of foo\n", "")
    assert run(capsys, "run-help", "--app", "bar", box) == nothing
    assert run(capsys, "run-help", "/nonexist") == (
        255,
        "",
        "FATAL:   container not found: stat /nonexist: no such file or directory\n",
    )


def test_errors_of_launches(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "run", "docker-daemon:x")
    assert (status, out) == (255, "")
    assert "x has neither a tag nor a digest, as in docker-daemon:NAME:latest" in err
    _, _, err = run(capsys, "run", "docker:x")
    assert err == "FATAL:   docker:x names no image\nINFO:    write `docker://x`\n"
    _, _, err = run(capsys, "run", "shub://x")
    assert "ended in 2021" in err
    status, out, err = run(capsys, "run", "docker://UPPER")
    assert (status, out) == (255, "")
    assert err.startswith("FATAL:   docker://UPPER is no name of an image")
    assert run(capsys, "run", "foo://x") == (255, "", "FATAL:   Unsupported transport type: foo\n")


def test_a_launch_is_not_for_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "exec", "i", "c")
    assert (status, out) == (255, "")
    assert "/p/bin/apptainer-py" in err


def test_notes_are_shown_at_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    old = {"SINGULARITY_QUIET": "0"}
    assert run(capsys, "version", **old)[2] == (
        "INFO:    Environment variable SINGULARITY_QUIET is set, but APPTAINER_QUIET is preferred\n"
    )
    assert run(capsys, "-q", "version", **old)[2] == ""


def test_a_bug_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_parsed: object) -> int:
        raise RuntimeError("a\x1bb")

    monkeypatch.setitem(commands._COMMANDS, "version", broken)
    status, out, err = run(capsys, "version")
    assert (status, out) == (255, "")
    assert err.startswith("FATAL:   RuntimeError: a\\x1bb\nINFO:    ")
    assert "Traceback" in run(capsys, "-d", "version")[2]


def test_sif_of_a_wrong_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "sif", "list", "/etc/passwd") == (
        1,
        "",
        'Error for command "list": invalid SIF magic\n',
    )


def test_config_show_of_a_user_is_what_is_effective(capsys: pytest.CaptureFixture[str]) -> None:
    got, out, err = run(capsys, "config", "show", "--user", "root")
    assert got == 1
    assert "--effective" in err.splitlines()[0]
    assert "allow setuid" not in out


def test_config_global_needs_one_operation(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "config", "global", "bind path")
    assert status == 1
    assert err == ('Error for command "global": you must specify an option (eg: --set/--unset)\n\n')
    assert out.startswith("Usage:\n  apptainer-py [global options...] config global <option>")
    assert run(capsys, "config", "global", "-g", "-r", "bind path")[0] == 1


def test_a_closed_pipe_is_quiet(tmp_path: object) -> None:
    code = "import sys; from apptainer_py.cli.main import main; sys.exit(main(['x', 'help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_output_is_named_wherever_it_is_found(tmp_path: Path) -> None:
    """A help text is more than fits the buffer: its first part fails when it is written."""
    code = (
        "import sys; from apptainer_py.cli.main import main; sys.exit(main(['x', 'help', 'exec']))"
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr.splitlines()[0] == (
        "FATAL:   cannot write to the standard output: no space left on device"
    )
    assert "should not happen" not in done.stderr


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    code = (
        "import os, sys; from apptainer_py.cli.main import main; os.mkdir('d'); os.chdir('d');"
        "os.rmdir('../d'); sys.exit(main(['x', 'overlay', 'create', 'o.img']))"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    text = "FATAL:   the current directory has no path (was it removed?): go to another one\n"
    assert (done.returncode, done.stderr) == (255, text)


PARITY = [
    ["exec"],
    ["exec", "--badopt"],
    ["exec", "-B"],
    ["exec", "-cx", "a", "b"],
    ["exec", "--contain=maybe", "a", "b"],
    ["exec", "--env", "foo", "a", "b"],
    ["exec", "--env", "", "a", "b"],
    ["exec", "--no-mount", 'a"b', "a", "b"],
    ["exec", "--no-mount", '"a"b', "a", "b"],
    ["exec", "--cpu-shares", "x", "a", "b"],
    ["exec", "--pids-limit", "", "a", "b"],
    ["exec", "--=x"],
    ["exec", "---x"],
    ["exec", "-=x"],
    ["exec", "-"],
    ["exec", "--boot", "a", "b"],
    ["exec", "--help=false"],
    ["exec", "--debug", "a", "b"],
    ["run"],
    ["run", "-h", "--nosuch"],
    ["shell"],
    ["shell", "-s"],
    ["test"],
    ["inspect"],
    ["inspect", "a", "--json"],
    ["inspect", "--nosuch", "a"],
    ["sif", "list"],
    ["sif", "list", "a", "-x"],
    ["sif", "-x"],
    ["sif", "info"],
    ["sif", "dump", "x"],
    ["sif", "header", "a", "b"],
    ["config", "global"],
    ["config", "global", "x"],
    ["config", "-x"],
    ["completion", "bash", "x"],
    ["buildcfg", "x"],
    ["buildcfg", "a", "b"],
    ["version", "-x"],
    ["help", "-x"],
    ["exek"],
    ["nosuch"],
    ["nosuch", "--help"],
    ["--nosuch"],
    ["--nosuch", "exec"],
    ["-x"],
    ["-dversion"],
    ["--config"],
    ["--debug=foo"],
    [""],
    [],
    ["--", "exec"][:1],
    ["--version=false"],
    ["run", "foo://x"],
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("words", PARITY, ids=lambda words: " ".join(words) or "(none)")
def test_usage_errors_are_those_of_the_real_one(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    program = shutil.which("apptainer")
    if program is None:
        pytest.skip("Apptainer is not installed")
    real = subprocess.run([program, *words], capture_output=True, text=True, env={"HOME": "/"})
    status, out, err = run(capsys, *words)
    assert status == real.returncode
    assert err.replace("apptainer-py", "apptainer") == real.stderr
    assert bool(out) == bool(real.stdout)
    head = out.replace("apptainer-py", "apptainer").splitlines()[:2]
    assert head == real.stdout.splitlines()[:2]
    assert out.splitlines()[-1:] == [
        line.replace("apptainer", "apptainer-py") for line in real.stdout.splitlines()[-1:]
    ]


@pytest.mark.parity
@pytest.mark.parametrize(
    "environ",
    [
        {"SINGULARITY_CONTAIN": "1"},
        {"SINGULARITY_CONTAIN": "1", "APPTAINER_CONTAIN": "0"},
        {"SINGULARITY_CONTAIN": "1", "APPTAINER_CONTAIN": ""},
        {"SINGULARITY_BIND": "a", "SINGULARITY_BINDPATH": "b"},
        {"SINGULARITY_TARGET_PWD": "/x", "SINGULARITY_QUIET": "0"},
    ],
    ids=str,
)
def test_notes_are_those_of_the_real_one(
    capsys: pytest.CaptureFixture[str], environ: dict[str, str]
) -> None:
    program = shutil.which("apptainer")
    if program is None:
        pytest.skip("Apptainer is not installed")
    # An image that both refuse, after the environment was read.
    words = ["exec", "foo://x", "c"]
    real = subprocess.run(
        [program, *words], capture_output=True, text=True, env={"HOME": "/", **environ}
    )
    notes = [line for line in real.stderr.splitlines() if not line.startswith("FATAL")]
    try:
        from apptainer_py.cli.parse import parse

        request = parse(["exec", "image", "c"], environ)
    finally:
        capsys.readouterr()
    ours = [("INFO:    " if level > 0 else "WARNING: ") + text for level, text in request.notes]
    assert ours == notes


# ---- commands of plug-ins ----


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plug-in's module with the command `extra`."""
    row = plugins.Extra(
        plugin="more",
        version="1",
        summary="Does more",
        target="apy_more:main",
        folder=str(tmp_path),
    )
    monkeypatch.setattr(plugins, "_found", {"extra": row})
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "apy_more", raising=False)
    return tmp_path / "apy_more.py"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("print(arguments)", 0, ""),
        ("return 258", 2, ""),
        ("raise SystemExit('no\\x1b')", 1, "no\\x1b\n"),
        ("raise SystemExit(9)", 9, ""),
        ("raise OSError(2, 'gone')", 255, "FATAL:   the plug-in more 1 failed: FileNotFoundError"),
        ("import apy_absent", 255, "FATAL:   the plug-in more 1 failed: ModuleNotFoundError"),
    ],
)
def test_the_status_of_a_plugins_command(
    capsys: pytest.CaptureFixture[str], extra: Path, body: str, status: int, said: str
) -> None:
    extra.write_text(f"def main(arguments):\n    {body}\n")
    got, out, err = run(capsys, "-v", "extra", "-h", "--x", "y")
    assert (got, err[: len(said)]) == (status, said)
    assert out == ("['-h', '--x', 'y']\n" if body.startswith("print") else "")
    sys.modules.pop("apy_more")


def test_help_and_suggestions_know_a_plugins_command(
    capsys: pytest.CaptureFixture[str], extra: Path
) -> None:
    assert "  extra  " in full("")
    assert "Does more\n\nUsage:\n  apptainer-py extra [arguments...]" in topic(["extra"])
    assert "\textra\n" in run(capsys, "extr")[2]
    assert not extra.exists()


def test_an_output_that_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 to close it fails
    monkeypatch.setattr(sys, "stdout", full)
    assert main.main(["apptainer-py", "version"]) == 255
    assert "cannot write to the standard output: no space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"):
        full.close()
