"""The administrator's file as the starter reads it: built with ASan and UBSan, run from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TREE = HERE.parent.parent
SHIPPED = TREE / "etc/apptainer-py.conf"
REAL = Path("/etc/apptainer/apptainer.conf")
FLAGS = """
-std=gnu11 -g -O1 -Wall -Wextra -Werror -Wconversion -Wshadow -Wstrict-prototypes
-Wmissing-prototypes -Wvla -Wformat=2 -Wundef -Wswitch-enum -Wwrite-strings -Wcast-qual
-Wimplicit-fallthrough=3 -fno-sanitize-recover=all -fsanitize=address,undefined
""".split()
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of several owners")


def build(name: str, target: Path) -> Path:
    subprocess.run(["gcc", *FLAGS, str(HERE / name), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("test_config.c", tmp_path_factory.mktemp("config") / "test_config")


@pytest.fixture(scope="session")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("fuzz_config.c", tmp_path_factory.mktemp("config") / "fuzz_config")


class Answer:
    """What the test program says about one file."""

    def __init__(self, output: bytes) -> None:
        self.problems: list[list[str]] = []
        self.values: dict[str, str] = {}
        self.lines: dict[str, int] = {}
        for line in output.decode(errors="surrogateescape").splitlines():
            kind, *fields = line.split("|")
            if kind == "problem":
                self.problems.append(fields)
            elif kind == "value":
                self.values[fields[0]] = fields[2]
                self.lines[fields[0]] = int(fields[1])
            else:
                self.result = fields[0]


def ask(program: Path, file: Path, *, trusted: bool = False) -> Answer:
    how = "trusted" if trusted else "any"
    done = subprocess.run([program, how, file], stdout=subprocess.PIPE, check=True)
    return Answer(done.stdout)


@pytest.fixture
def written(program: Path, tmp_path: Path):
    def answer(text: str | bytes) -> Answer:
        file = tmp_path / "some.conf"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return ask(program, file)

    return answer


@pytest.fixture
def folder():
    """A directory that nobody but root could have written, as none below /tmp is."""
    path = Path(tempfile.mkdtemp(dir="/run"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def good(folder: Path) -> Path:
    file = folder / "etc" / "some.conf"
    file.parent.mkdir(mode=0o755)
    file.write_text("allow setuid = no\n")
    file.chmod(0o644)
    return file


def test_every_row_in_c(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@root_only
def test_real_file_of_apptainer(program: Path) -> None:
    if not REAL.exists():
        pytest.skip("Apptainer is not installed")
    answer = ask(program, REAL, trusted=True)
    assert (answer.result, answer.problems) == ("good", [])
    assert answer.values["bind path"] == "/etc/localtime,/etc/hosts"
    assert answer.values["apptheus socket path"] == "/run/apptheus/gateway.sock"
    assert answer.lines["allow setuid"] == 16


def test_shipped_file_spells_out_the_defaults(program: Path, written) -> None:
    answer = ask(program, SHIPPED)
    assert (answer.result, answer.problems) == ("good", [])
    empty = written("").values
    assert answer.values == {**empty, "bind path": "/etc/localtime,/etc/hosts"}


def test_missing_file(program: Path, tmp_path: Path) -> None:
    assert ask(program, tmp_path / "none").result == "ENOENT"


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("allow setid = yes", "allow setid", "allow setuid"),
        ("ALLOW SETUID = no", "ALLOW SETUID", "allow setuid"),
        ("allow_setuid = no", "allow_setuid", "allow setuid"),
        ("bind paths = /opt", "bind paths", "bind path"),
        ("limit containers paths = /opt", "limit containers paths", "limit container paths"),
        ("zzzzzzzz = 1", "zzzzzzzz", ""),
        ("allow setuid" + "x" * 52 + " = 1", "allow setuid" + "x" * 52, ""),
        ("x" * 300 + " = 1", "x" * 252 + "...", ""),
    ],
)
def test_unknown_directive_has_line_and_nearest(written, line, key, nearest) -> None:
    answer = written(f"# first\n\n{line}\nmount home = no\n")
    assert answer.result == "EINVAL"
    assert answer.problems == [["3", key, "is not a directive", nearest]]
    assert answer.values["mount home"] == "no"


@pytest.mark.parametrize(
    ("line", "key", "text"),
    [
        ("allow setuid = maybe", "allow setuid", '"maybe" is not one of [yes no]'),
        ("mount dev = all", "mount dev", '"all" is not one of [yes no minimal]'),
        ("max loop devices = x", "max loop devices", '"x" is not a number within [0 1048576]'),
        ("audit log = file", "audit log", '"file" is not an absolute path or one of [none syslog]'),
        ("bind path = /a, b", "bind path", '"b" is not an absolute path'),
        (
            "binary path = /bin::/sbin",
            "binary path",
            '"/bin::/sbin" is not absolute directories with colons between or one of [$PATH]',
        ),
        (
            "suidbinary path = $PATH",
            "suidbinary path",
            '"$PATH" is not absolute directories with colons between',
        ),
    ],
)
def test_bad_value_has_line_and_choice(written, line, key, text) -> None:
    answer = written(f"\n{line}\n")
    assert answer.problems == [["2", key, text, ""]]


@pytest.mark.parametrize("line", ["allow setuid no", "= yes", "\ufeffallow setuid", "==", "yes"])
def test_line_of_another_form(written, line) -> None:
    answer = written(f"{line}\n")
    assert [problem[0] for problem in answer.problems] == ["1"]
    assert "neither a comment nor" in answer.problems[0][2]


def test_scalar_twice(written) -> None:
    answer = written("allow setuid = no\nmount tmp = no\nallow setuid = yes\n")
    assert answer.problems == [["3", "allow setuid", "is given already in line 1", ""]]
    assert answer.values["allow setuid"] == "no"


def test_all_problems_are_named(written) -> None:
    answer = written("".join(f"key number {'x' * n} = 1\n" for n in range(1, 20)))
    assert [problem[0] for problem in answer.problems] == [str(n) for n in range(1, 17)]


def test_spaces_comments_and_line_ends(written) -> None:
    text = "\t allow setuid\t=  no \t\r\n  # mount tmp = no\r\n\r\nmount home=no\r\n"
    text += "bind path = /a b ,\r"
    answer = written(text)
    assert (answer.result, answer.problems) == ("good", [])
    assert answer.values["allow setuid"] == answer.values["mount home"] == "no"
    assert answer.values["mount tmp"] == "yes"
    assert answer.values["bind path"] == "/a b"


def test_bytes_that_hide_text(written) -> None:
    assert written(b"allow setuid = no\n\0mount tmp = no\n").problems == [
        ["2", "", "holds a NUL byte", ""]
    ]
    answer = written(b"image driver = a\033[2Jb\n")
    assert answer.problems == [["1", "image driver", "the value holds a control character", ""]]
    answer = written(b"a\033[2J = b\n")
    assert answer.problems[0][:3] == ["1", "a?[2J", "is not a directive"]


def test_too_large(program: Path, written, tmp_path: Path) -> None:
    assert written(b"#" * 65536).result == "good"
    assert written(b"#" * 65537).result == "EFBIG"
    assert written(b"").values["bind path"] == ""


def test_huge_list(written) -> None:
    names = [f"u{n}" for n in range(8000)]
    text = "".join(
        f"allow setuid users = {','.join(names[n : n + 100])}\n" for n in range(0, 8000, 100)
    )
    answer = written(text)
    assert answer.result == "good"
    assert answer.values["allow setuid users"].split(",") == names
    assert written("allow setuid users = " + "a," * 9000).result == "EINVAL"


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_not_a_regular_file(program: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    answer = ask(program, path)
    assert (answer.result, answer.problems[0][2]) == ("EINVAL", "is not a regular file")


@root_only
def test_trusted_file(program: Path, good: Path) -> None:
    answer = ask(program, good, trusted=True)
    assert (answer.result, answer.problems) == ("good", [])
    assert answer.values["allow setuid"] == "no"


@root_only
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("owner", "mode", "text"),
    [
        (1, 0o755, "must be owned by root, not by uid 1"),
        (0, 0o775, "must be writable by root only (mode 0775)"),
        (0, 0o757, "must be writable by root only (mode 0757)"),
        (0, 0o1777, "must be writable by root only (mode 1777)"),
    ],
)
def test_writable_by_somebody_else(program, good, above, owner, mode, text) -> None:
    part = good.parent if above else good
    os.chown(part, owner, 0)
    part.chmod(mode)
    answer = ask(program, good, trusted=True)
    assert answer.result == "EPERM"
    assert answer.problems == [["0", str(part), text, ""]]
    assert answer.values == {}


@root_only
def test_every_fault_of_the_path_is_named(program: Path, good: Path) -> None:
    good.chmod(0o666)
    good.parent.chmod(0o775)
    os.chown(good.parent, 1, 1)
    answer = ask(program, good, trusted=True)
    assert [problem[1] for problem in answer.problems] == [str(good.parent)] * 2 + [str(good)]


@root_only
def test_links_are_not_followed(program: Path, good: Path) -> None:
    link = good.with_name("link.conf")
    link.symlink_to(good)
    answer = ask(program, link, trusted=True)
    assert answer.problems == [["0", str(link), "is a symbolic link", ""]]
    above = good.parent.with_name("other")
    above.symlink_to(good.parent)
    answer = ask(program, above / good.name, trusted=True)
    assert answer.problems == [
        ["0", str(above), "is a symbolic link or not a directory", ""],
    ]
    assert ask(program, link).result == "good"


@root_only
@pytest.mark.parametrize(
    "shape", ["{name}", "/run//x", "/run/./x", "/run/../x", "/run/x/", "/..", "/", ""]
)
def test_only_plain_paths_are_trusted(program: Path, good: Path, shape: str) -> None:
    done = subprocess.run(
        [program, "trusted", shape.format(name=good.name)],
        stdout=subprocess.PIPE,
        check=True,
        cwd=good.parent,
    )
    assert Answer(done.stdout).result == "EINVAL"


def test_random_text(fuzzer: Path, tmp_path: Path) -> None:
    corpus = [SHIPPED, *sorted((HERE / "seeds_config").glob("*"))]
    done = subprocess.run(
        [fuzzer, "1", "4000", *corpus], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
