"""The launcher against starters that write down what they were given."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from apptainer_py.base.errors import ApptainerError, NotSupported
from apptainer_py.cli.parse import parse
from apptainer_py.model.request import ActionRequest

TREE = Path(__file__).resolve().parents[2]
FLAGS = """
-std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -Wconversion -Wshadow -Wstrict-prototypes
-Wmissing-prototypes -Wvla -Walloca -Wformat=2 -Wundef -Wswitch-enum -Wwrite-strings
-Wnull-dereference -Wduplicated-cond -Wduplicated-branches -Wlogical-op -Wcast-qual
-Wimplicit-fallthrough=3 -Wframe-larger-than=8192 -D_FORTIFY_SOURCE=3
-fstack-protector-strong -fPIE -pie
""".split()
SETUID, USERNS, ROOT = 1, 2, 3
NONE, ASKED, NO_BIT, NOSUID, NNP, INSIDE, BOUNDING, NOROOT = range(8)
HEADER = struct.Struct("=8s2I64s3Ii8I4IQ")
SEALS = 0x1 | 0x2 | 0x4 | 0x8
ORDINARY = 65534

# Copies the request to DUMP; beside it, who ran and with what environment.
STUB = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
extern char **environ;
int main(int argc, char *argv[]) {
    int fd = atoi(argv[1]), count = 0;
    struct stat st;
    if (argc != 2 || fstat(fd, &st) != 0)
        return 1;
    char *all = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    while (environ[count] != NULL)
        count++;
    FILE *out = fopen(DUMP, "w");
    if (out == NULL || all == MAP_FAILED)
        return 2;
    fprintf(out, "%s\n%s\n%d %d %d %d\n", NAME, argv[0], fd, fcntl(fd, F_GET_SEALS), count,
            (int)geteuid());
    fwrite(all, 1, (size_t)st.st_size, out);
    return fclose(out) == 0 ? 42 : 3;
}
"""
PYTHON_STUB = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char *argv[]) {
    FILE *out = fopen(DUMP, "w");
    if (out == NULL)
        return 2;
    fputs("python\n", out);
    for (int i = 0; i < argc; i++)
        fprintf(out, "%s%c", argv[i], 0);
    fputs(getenv("MARK") ? getenv("MARK") : "-", out);
    return fclose(out) == 0 ? 43 : 3;
}
"""


class Request:
    """A dumped request, taken apart by the rules of request.h."""

    def __init__(self, dump: bytes) -> None:
        starter, title, facts, self.body = dump.split(b"\n", 3)
        self.starter, self.title = starter.decode(), title
        self.fd, self.seals, self.environment, self.euid = map(int, facts.split())
        fields = HEADER.unpack_from(self.body)
        self.magic, self.version, self.size, build_id = fields[:4]
        self.build_id = build_id.rstrip(b"\0")
        self.flow, self.reason, self.flags, self.trace_fd = fields[4:8]
        argc, envc, argv_at, env_at, cwd_at, engine_at, file_at, self.total = fields[8:16]
        self.forecast, self.forecast_spaces, self.forecast_flags, self.image_arg = fields[16:20]
        self.stack_limit = fields[20]
        assert argv_at == HEADER.size == self.size
        assert self.total == len(self.body)
        self.argv = self._strings(argv_at, env_at, argc)
        self.env = self._strings(env_at, cwd_at, envc)
        (self.cwd,) = self._strings(cwd_at, engine_at, 1)
        (self.engine,) = self._strings(engine_at, file_at, 1)
        (self.engine_file,) = self._strings(file_at, self.total, 1)

    def _strings(self, start: int, end: int, count: int) -> list[bytes]:
        parts = self.body[start:end].split(b"\0")
        assert parts.pop() == b""
        assert len(parts) == count
        return parts


class Installation:
    """A launcher, two starters and an interpreter in a directory of their own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.dump = place / "dump"
        self.launcher = place / "apptainer-py"
        generated = place / "generated"
        generated.mkdir()
        subprocess.run(
            ["/usr/bin/python3", TREE / "tools/gen_options.py", generated / "options.h"],
            check=True,
        )
        self._write_build(generated / "build.h")
        for name, source in (("starter", STUB), ("starter-suid", STUB), ("python3", PYTHON_STUB)):
            self._compile_stub(name, source)
        self._compile_stub("launcher", PYTHON_STUB.replace("python", "names"))
        self._compile_stub("apptainer-py-oci", PYTHON_STUB.replace("python", "oci"))
        self._compile_launcher(generated)
        (place / "starter-suid").chmod(0o4755)
        place.chmod(0o777)

    def _write_build(self, file: Path) -> None:
        file.write_text(
            '#define APY_BUILD_ID "test build"\n'
            f'#define APY_LIBEXECDIR "{self.place}"\n'
            f'#define APY_BINDIR "{self.place}"\n'
            f'#define APY_STARTER "{self.place}/starter"\n'
            f'#define APY_STARTER_SUID "{self.place}/starter-suid"\n'
            f'#define APY_PYTHON "{self.place}/python3"\n'
        )

    def _compile_stub(self, name: str, source: str) -> None:
        file = self.place / f"{name}.c"
        file.write_text(source)
        words = [f'-DNAME="{name}"', f'-DDUMP="{self.dump}"']
        subprocess.run(["gcc", *words, "-o", self.place / name, file], check=True)

    def _compile_launcher(self, generated: Path) -> None:
        sources = [*sorted((TREE / "starter").glob("launcher*.c")), TREE / "starter/subids.c"]
        subprocess.run(["gcc", *FLAGS, f"-I{generated}", "-o", self.launcher, *sources], check=True)

    def run(self, *arguments: str | bytes, status: int = 42, **options: object) -> Request:
        """Run the launcher as an ordinary user; return what the starter saw."""
        self.dump.unlink(missing_ok=True)
        options.setdefault("user", ORDINARY)
        options.setdefault("env", {})
        options.setdefault("executable", self.launcher)
        done = subprocess.run(["apptainer-py", *arguments], capture_output=True, **options)
        assert done.returncode == status, done.stderr
        return Request(self.dump.read_bytes())

    def run_under(self, *before: str, arguments: tuple[str, ...] = ("run", "image")) -> Request:
        """Run the launcher through another program."""
        self.dump.unlink(missing_ok=True)
        done = subprocess.run(
            [*before, self.launcher, *arguments],
            capture_output=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert done.returncode == 42, done.stderr
        return Request(self.dump.read_bytes())

    def run_elsewhere(self, *arguments: str, **options: object) -> list[str]:
        """Run the launcher; return what the interpreter was given after `main.py`."""
        self.dump.unlink(missing_ok=True)
        options.setdefault("user", ORDINARY)
        options.setdefault("env", {})
        done = subprocess.run(["apptainer-py", *arguments], executable=self.launcher, **options)
        assert done.returncode == 43
        head, _, rest = self.dump.read_text().partition("\n")
        assert head == "python"
        words = rest.split("\0")
        main = [f"{self.place}/python3", "-I", "-S", "-B", f"{self.place}/main.py"]
        assert words[:5] == main
        self.mark = words.pop()
        return words[5:]


@pytest.fixture(scope="module")
def installed() -> object:
    if os.geteuid() != 0:
        pytest.fail("the launcher's tests need root: they install a setuid program")
    place = Path("/var/lib/apptainer-py-launcher-test")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    yield Installation(place)
    shutil.rmtree(place)


def test_an_ordinary_user_takes_the_setuid_flow(installed: Installation) -> None:
    request = installed.run("exec", "image.sif", "true")
    assert (request.flow, request.reason) == (SETUID, NONE)
    assert request.starter == "starter-suid"
    assert request.euid == 0


@pytest.mark.parametrize(
    "words", [("instance", "start", "image.sif", "i"), ("exec", "--fakeroot", "image.sif", "true")]
)
def test_an_account_of_other_name_services_is_found_by_another(
    installed: Installation, words: tuple[str, ...]
) -> None:
    nobody = 4_000_123_456  # in no /etc/passwd
    installed.dump.unlink(missing_ok=True)
    argv = ["apptainer-py", *words]
    done = subprocess.run(argv, executable=installed.launcher, user=nobody, env={"MARK": "kept"})
    assert done.returncode == 43
    head, *rest = installed.dump.read_text().replace("\n", "\0").split("\0")
    assert head == "names"
    assert rest == [*argv, "kept"]


def test_an_account_that_is_not_needed_is_not_looked_for(installed: Installation) -> None:
    installed.run("exec", "image.sif", "true", user=4_000_123_456)


def test_the_request_has_its_form(installed: Installation) -> None:
    request = installed.run("exec", "image.sif", "true")
    assert request.magic == b"APYREQ1\0"
    assert request.version == 3
    assert request.build_id == b"test build"
    assert request.seals & SEALS == SEALS
    assert (request.flags, request.trace_fd) == (0, -1)
    assert (request.engine, request.engine_file) == (b"apptainer", b"")
    assert request.title == b"Apptainer runtime parent: image.sif"
    assert request.environment == 0
    assert request.stack_limit == resource.getrlimit(resource.RLIMIT_STACK)[0] % (1 << 64)
    assert request.fd > 2


def test_arguments_environment_and_directory_arrive_unchanged(installed: Installation) -> None:
    arguments = [b"exec", b"-B", b"-u", b"im age", b"", b"\xff\n", b"--", b"-u"]
    environ = {b"A": b"1", b"B": b"=\xfe", b"TMPDIR": b"/x", b"LD_PRELOAD": b""}
    request = installed.run(*arguments, env=environ, cwd="/usr/bin")
    assert request.argv == [b"apptainer-py", *arguments]
    assert request.env == [name + b"=" + value for name, value in environ.items()]
    assert request.cwd == b"/usr/bin"
    assert request.flow == SETUID


def test_malformed_environment_arrives_as_it_is(installed: Installation) -> None:
    code = (
        "import ctypes,os,sys; f=sys.argv[1].encode(); libc=ctypes.CDLL(None);"
        "argv=(ctypes.c_char_p*4)(f,b'run',b'i',None);"
        "env=(ctypes.c_char_p*4)(b'noequals',b'',b'A=1',None);"
        "os.setresuid(65534,65534,65534); libc.execve(f,argv,env)"
    )
    done = subprocess.run(["/usr/bin/python3", "-c", code, installed.launcher])
    assert done.returncode == 42
    request = Request(installed.dump.read_bytes())
    assert request.env == [b"noequals", b"", b"A=1"]


def test_a_directory_without_a_path_is_empty(installed: Installation, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec setpriv --reuid=65534 {installed.launcher} run i"
    done = subprocess.run(["sh", "-c", script])
    assert done.returncode == 42
    assert Request(installed.dump.read_bytes()).cwd == b""


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
def test_it_works_through_a_link(installed: Installation, name: str) -> None:
    link = installed.place / name
    link.symlink_to("apptainer-py")
    try:
        assert installed.run("run", "image", executable=link).flow == SETUID
    finally:
        link.unlink()


@pytest.mark.parametrize(
    "arguments",
    [
        ("exec", "-u", "i", "c"),
        ("exec", "--userns", "i", "c"),
        ("exec", "-cu", "i", "c"),
        ("exec", "-eu=true", "i", "c"),
        ("exec", "--userns=1", "i", "c"),
        ("exec", "-f", "i", "c"),
        ("-d", "run", "-B", "x", "-u", "i"),
        ("run", "-B=x", "--fakeroot", "i"),
    ],
)
def test_a_user_namespace_can_be_asked_for(
    installed: Installation, arguments: tuple[str, ...]
) -> None:
    request = installed.run(*arguments)
    assert (request.flow, request.reason, request.starter) == (USERNS, ASKED, "starter")
    assert request.euid == ORDINARY


@pytest.mark.parametrize(
    "arguments",
    [
        ("exec", "-B", "-u", "i", "c"),
        ("exec", "-Bu", "i", "c"),
        ("exec", "i", "-u"),
        ("exec", "--", "i", "-u"),
        ("exec", "-u", "--userns=false", "i", "c"),
        ("exec", "-u=f", "i", "c"),
        ("shell", "-s", "-u", "i"),
        ("-c", "-u", "test", "i"),
        ("--config=-u", "run", "i", "--help"),
        ("--version=false", "exec", "--help=false", "i", "c"),
    ],
)
def test_what_only_looks_like_asking(installed: Installation, arguments: tuple[str, ...]) -> None:
    request = installed.run(*arguments)
    assert (request.flow, request.reason) == (SETUID, NONE)


@pytest.mark.parametrize(
    ("environ", "arguments", "reason"),
    [
        ({"APPTAINER_USERNS": "1"}, (), ASKED),
        ({"APPTAINER_USERNS": " true\n"}, (), ASKED),
        ({"APPTAINER_UNSHARE_USERNS": "T"}, (), ASKED),
        ({"SINGULARITY_USERNS": "1"}, (), ASKED),
        ({"SINGULARITY_UNSHARE_USERNS": "1"}, (), ASKED),
        ({"APPTAINER_FAKEROOT": "1"}, (), ASKED),
        ({"APPTAINER_USERNS": "maybe"}, (), ASKED),
        ({"APPTAINER_USERNS": ""}, (), NONE),
        ({"APPTAINER_USERNS": "0"}, (), NONE),
        ({"APPTAINER_USERNS": "0", "SINGULARITY_USERNS": "1"}, (), NONE),
        ({"APPTAINER_USERNS": "", "SINGULARITY_USERNS": "1"}, (), NONE),
        ({"APPTAINER_USERNS": "0", "APPTAINER_UNSHARE_USERNS": "1"}, (), NONE),
        ({"APPTAINER_USERNS": "1"}, ("--userns=false",), NONE),
        ({"APPTAINER_USERNSX": "1", "USERNS": "1"}, (), NONE),
    ],
)
def test_a_variable_can_ask_for_it(
    installed: Installation, environ: dict[str, str], arguments: tuple[str, ...], reason: int
) -> None:
    assert installed.run("run", *arguments, "image", env=environ).reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda place: (place / "starter-suid").chmod(0o755), NO_BIT),
        (lambda place: os.chown(place / "starter-suid", ORDINARY, 0), NO_BIT),
        (lambda place: (place / "starter-suid").rename(place / "away"), NO_BIT),
    ],
)
def test_a_starter_without_the_bit(installed: Installation, change: object, reason: int) -> None:
    starter, copy = installed.place / "starter-suid", installed.place / "copy"
    shutil.copy2(starter, copy)
    try:
        change(installed.place)
        request = installed.run("run", "image")
    finally:
        copy.replace(starter)
        os.chown(starter, 0, 0)
        starter.chmod(0o4755)
    assert (request.flow, request.reason, request.starter) == (USERNS, reason, "starter")


AS_USER = ("setpriv", "--reuid=65534", "--clear-groups")


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ((*AS_USER, "--no-new-privs"), NNP),
        ((*AS_USER, "--bounding-set=-sys_admin"), BOUNDING),
        ((*AS_USER, "--bounding-set=-setuid"), BOUNDING),
        ((*AS_USER, "--bounding-set=-setgid"), BOUNDING),
        ((*AS_USER, "--securebits=+noroot"), NOROOT),
        ((*AS_USER, "unshare", "--user"), INSIDE),
        ((*AS_USER, "unshare", "--user", "--map-current-user"), INSIDE),
        ((*AS_USER, "unshare", "--user", "--map-root-user"), INSIDE),
        (("setpriv", "--bounding-set=-sys_admin"), BOUNDING),
    ],
)
def test_what_makes_the_bit_useless(
    installed: Installation, before: tuple[str, ...], reason: int
) -> None:
    request = installed.run_under(*before)
    assert (request.flow, request.reason, request.starter) == (USERNS, reason, "starter")


def test_a_starter_on_a_nosuid_mount(installed: Installation) -> None:
    place = installed.place
    script = (
        f"mount --bind {place} {place} && mount -o remount,bind,nosuid {place} && "
        f"exec setpriv --reuid=65534 {place}/apptainer-py run image"
    )
    request = installed.run_under("unshare", "--mount", "sh", "-c", script)
    assert (request.flow, request.reason) == (USERNS, NOSUID)


def test_root_takes_the_root_flow(installed: Installation) -> None:
    request = installed.run("run", "image", user=0)
    assert (request.flow, request.reason, request.starter) == (ROOT, NONE, "starter")
    assert installed.run("run", "-u", "image", user=0).flow == USERNS


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("",),
        ("help", "exec"),
        ("exec", "--help", "i", "c"),
        ("exec", "-ch", "i", "c"),
        ("--help", "exec", "i", "c"),
        ("--version", "run", "i"),
        ("exec", "i"),
        ("exec", "--bind"),
        ("exec", "-B"),
        ("exec", "--nonsense", "i", "c"),
        ("exec", "--boot", "i", "c"),
        ("exec", "-x", "i", "c"),
        ("exec", "-s", "sh", "i", "c"),
        ("exec", "--bin=x", "i", "c"),
        ("exec", "--contain=maybe", "i", "c"),
        ("exec", "---", "i", "c"),
        ("exec", "--=", "i", "c"),
        ("exec", "-c=", "i", "c"),
        ("run", "docker://x"),
        ("run", "foo://x"),
        ("run", "oci-archive:x"),
        ("inspect", "i"),
        ("sif", "list", "i"),
        ("--nonsense", "exec", "i", "c"),
        ("exec", "--config", "f", "i", "c"),
    ],
)
def test_all_else_goes_to_the_interpreter(
    installed: Installation, arguments: tuple[str, ...]
) -> None:
    assert installed.run_elsewhere(*arguments) == list(arguments)


def test_the_interpreter_keeps_the_environment(installed: Installation) -> None:
    installed.run_elsewhere("version", env={"MARK": "here"})
    assert installed.mark == "here"


@pytest.mark.parametrize("image", ["foo:bar", ":x", "://x", "./docker:x", "a/docker", "-"])
def test_a_path_with_a_colon_is_a_path(installed: Installation, image: str) -> None:
    assert installed.run("run", image).argv[-1] == image.encode()


def test_the_trace_file_is_opened_as_the_caller(installed: Installation) -> None:
    trace = installed.place / "trace"
    trace.write_text("before\n")
    trace.chmod(0o666)
    request = installed.run("--trace", str(trace), "run", "image")
    assert request.flags == 1
    assert request.trace_fd > 2
    assert request.trace_fd != request.fd
    assert trace.read_text() == "before\n"
    trace.chmod(0o600)
    done = subprocess.run(
        [installed.launcher, "--trace", trace, "run", "image"], capture_output=True, user=ORDINARY
    )
    assert done.returncode == 255
    assert done.stderr == (b"FATAL:   the file of --trace cannot be opened: Permission denied\n")


def test_a_missing_starter_is_one_line(installed: Installation) -> None:
    starter = installed.place / "starter"
    starter.rename(installed.place / "away")
    try:
        done = subprocess.run(
            [installed.launcher, "run", "-u", "image"], capture_output=True, user=ORDINARY
        )
    finally:
        (installed.place / "away").rename(starter)
    assert done.returncode == 255
    assert done.stderr.decode() == (
        f"FATAL:   {starter}: not found, please check your installation\n"
    )


def test_two_megabytes_of_arguments(installed: Installation) -> None:
    words = [f"{n:07}" + "x" * 120_000 for n in range(14)]
    request = installed.run("exec", "image", *words)
    assert request.argv[3:] == [word.encode() for word in words]


def test_a_long_image_name_is_cut_in_the_title_only(installed: Installation) -> None:
    image = "i" * 131_000
    request = installed.run("run", image)
    assert request.argv[2] == image.encode()
    assert len(request.title) == 4095


def test_as_many_arguments_as_execve_takes(installed: Installation) -> None:
    assert len(installed.run("exec", "image", *["x"] * 200_000).argv) == 200_003


def test_no_argument_at_all(installed: Installation) -> None:
    code = (
        "import ctypes,sys; f=sys.argv[1].encode();"
        "n=(ctypes.c_char_p*1)(None); ctypes.CDLL(None).execve(f,n,n)"
    )
    installed.dump.unlink(missing_ok=True)
    done = subprocess.run(["/usr/bin/python3", "-c", code, installed.launcher], user=ORDINARY)
    assert done.returncode == 43
    assert installed.dump.read_text().startswith("python\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_filled(installed: Installation, closed: str) -> None:
    script = f"exec setpriv --reuid=65534 {installed.launcher} run image {closed}"
    done = subprocess.run(["sh", "-c", script])
    assert done.returncode == 42
    assert Request(installed.dump.read_bytes()).fd > 2


def test_a_soft_limit_on_file_size_does_not_matter(installed: Installation) -> None:
    script = f"ulimit -S -f 0; exec setpriv --reuid=65534 {installed.launcher} run image"
    installed.dump.unlink(missing_ok=True)
    done = subprocess.run(["sh", "-c", script], capture_output=True)
    # The stub cannot write its dump, but it was reached with a whole request.
    assert done.returncode in (3, -25, 153)


def test_a_hard_limit_on_file_size_is_one_line(installed: Installation) -> None:
    script = f"ulimit -f 0; exec setpriv --reuid=65534 {installed.launcher} run image"
    done = subprocess.run(["sh", "-c", script], capture_output=True)
    assert done.returncode == 255
    assert done.stderr == b"FATAL:   the request to the starter: File too large\n"


def test_no_descriptor_left_is_one_line(installed: Installation) -> None:
    command = f"{installed.launcher} --trace /dev/null run image"
    script = f"ulimit -n 4; exec setpriv --reuid=65534 {command}"
    done = subprocess.run(["sh", "-c", script], capture_output=True)
    assert done.returncode == 255
    assert done.stderr == b"FATAL:   the request to the starter: Too many open files\n"


def test_the_launcher_needs_libc_only(installed: Installation) -> None:
    shown = subprocess.run(
        ["readelf", "-d", installed.launcher], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split("[")[1] for line in shown.splitlines() if "NEEDED" in line] == ["libc.so.6]"]


WORDS = [
    "-u", "--userns", "--userns=false", "-u=0", "-f", "-c", "-Cc", "-cu", "-B", "-Bx", "-B=u",
    "--bind", "--bind=-u", "--", "-", "", "--help", "-h", "--help=false", "--version", "-d", "-q",
    "--trace=", "--config", "-s", "--nv", "--pwd", "exec", "run", "shell", "test", "sif", "list",
    "image", "docker://x", "oci:x", "a:b", "--no-mount", "--bad", "-x", "-c=maybe", "---",
]  # fmt: skip


def test_the_scanner_agrees_with_the_parser(installed: Installation) -> None:
    source = random.Random(4)
    launched = 0
    for _ in range(900):
        command = source.choice(["exec", "run", "shell", "test", ""])
        words = [source.choice(WORDS) for _ in range(source.randrange(1, 7))]
        if command:
            words.insert(source.randrange(min(3, len(words))), command)
        launched += _compare(installed, words)
    assert launched > 100


def _compare(installed: Installation, words: list[str]) -> bool:
    """Both see a launch or neither does; both see the same about user namespaces."""
    installed.dump.unlink(missing_ok=True)
    done = subprocess.run([installed.launcher, *words], user=ORDINARY, env={})
    try:
        parsed = parse(words, {})
    except NotSupported:
        return False
    except ApptainerError:
        assert done.returncode == 43, words
        return False
    assert (done.returncode == 42) is isinstance(parsed, ActionRequest), words
    if isinstance(parsed, ActionRequest):
        request = Request(installed.dump.read_bytes())
        # Nobody has a range of ids here, and one id is the user-namespace flow's to map.
        assert (request.reason == ASKED) is (parsed.userns or parsed.fakeroot), words
        assert request.title.decode().endswith(f": {parsed.image}")
        return True
    return False


@pytest.mark.parametrize("before", [(), ("-d",), ("--nocolor", "-q")])
def test_oci_goes_to_its_own_program_as_it_was_typed(installed, before):
    words = (*before, "oci", "run", "-b", "x", "id")
    argv = ["/some/where/apptainer-py", *words]
    installed.dump.unlink(missing_ok=True)  # another account's, from a test before
    done = subprocess.run(
        argv, executable=installed.launcher, user=ORDINARY, env={"MARK": "kept"}, check=False
    )
    assert done.returncode == 43
    head, _, rest = installed.dump.read_text().partition("\n")
    assert head == "oci"
    assert rest.split("\0") == ["apptainer-py", *words, "kept"]
