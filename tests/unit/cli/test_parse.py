"""Command line and environment to a request."""

from __future__ import annotations

import subprocess
import sys

import pytest

from apptainer_py.base.errors import ApptainerError, NotSupported, UsageError
from apptainer_py.base.log import INFO, WARN
from apptainer_py.cli.options import BadVariable, CommandLineWrong, OptionRefused
from apptainer_py.cli.parse import NoCommand, UnknownCommand, UnknownTransport, parse
from apptainer_py.cli.table import ACTIONS, FETCH, INSTANCES, OPTIONS, REFUSED
from apptainer_py.model.request import ActionRequest, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.cli.table import Option


def action(*arguments: str, **environ: str) -> ActionRequest:
    request = parse(arguments, environ)
    assert isinstance(request, ActionRequest)
    return request


def executed(*options: str, **environ: str) -> ActionRequest:
    return action("exec", *options, "image", "command", **environ)


@pytest.mark.parametrize(
    ("environ", "colour"),
    [({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": "", "TERM": "x"}, None)],
)
def test_colour_is_not_for_who_wants_none(environ: dict[str, str], colour: bool | None) -> None:
    assert executed(**environ).colour is colour


def test_a_plain_launch() -> None:
    assert action("exec", "i.sif", "ls", "-l", "--") == ActionRequest(
        command="exec", image="i.sif", arguments=("ls", "-l", "--")
    )
    assert action("run", "i.sif").arguments == ()


@pytest.mark.parametrize(
    "words", [("-B", "a"), ("-Ba",), ("-B=a",), ("--bind", "a"), ("--bind=a",), ("-cB", "a")]
)
def test_ways_to_give_a_value(words: tuple[str, ...]) -> None:
    assert executed(*words).bind == ("a",)


def test_clusters() -> None:
    request = executed("-Ccei", "-wpB/x")
    assert request.contain
    assert request.containall
    assert request.cleanenv
    assert request.writable
    assert request.bind == ("/x",)


def test_a_value_may_look_like_an_option() -> None:
    request = executed("-B", "-u", "--bind", "--userns", "-B=", "-B==")
    assert request.bind == ("-u", "--userns", "=", "=")
    assert not request.userns


def test_the_image_ends_the_options() -> None:
    assert action("run", "image", "-u", "--nonsense").arguments == ("-u", "--nonsense")
    assert action("run", "--", "-image", "-u").image == "-image"
    assert action("run", "-", "-u").image == "-"


@pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True"])
def test_true(value: str) -> None:
    assert executed(f"--userns={value}").userns
    assert executed(f"-u={value}").userns


@pytest.mark.parametrize("value", ["0", "f", "F", "FALSE", "false", "False"])
def test_false(value: str) -> None:
    assert not executed("-u", f"--userns={value}").userns


def test_lists() -> None:
    request = executed("--no-mount", "a,b", "--no-mount", "c", "--bind", "a,b", "-S", '"x,y",z')
    assert request.no_mount == ("a", "b", "c")
    assert request.bind == ("a,b",)
    assert request.scratch == ("x,y", "z")
    assert executed("--no-mount", "").no_mount == ()
    assert executed("--no-mount", "a\r\nb").no_mount == ("a",)
    assert executed("--no-mount", '"a""b"').no_mount == ('a"b',)


def test_env() -> None:
    assert executed("--env", "a=b,c").env == (("a", "b,c"),)
    assert executed("--env", "a=b,c=d").env == (("a", "b"), ("c", "d"))
    assert executed("--env", 'a=b,"c=d,e=f"').env == (("a", "b"), ("c", "d,e=f"))
    assert executed("--env", "a=", "--env", "=x").env == (("a", ""), ("", "x"))


def test_pwd_is_cwd() -> None:
    assert executed("--pwd", "/a").cwd == "/a"
    assert executed("--pwd", "/a", "--cwd", "/b").cwd == "/b"
    assert executed("--cwd", "/b", APPTAINER_PWD="/c").cwd == "/b"
    assert executed(APPTAINER_TARGET_PWD="/c").cwd == "/c"


def test_options_that_imply_others() -> None:
    request = executed("--compat")
    assert request.contain
    assert request.containall
    assert request.cleanenv
    assert request.ipc
    assert request.pid
    assert request.no_init
    assert request.no_umask
    assert request.no_eval
    assert request.writable_tmpfs
    assert not executed("--compat", "--no-pid").pid
    assert executed("--hostname", "h").uts


def test_deprecated_options_are_warned_of() -> None:
    request = executed("--underlay", "--nohttps")
    assert request.underlay
    assert request.notes == (
        (WARN, "Flag --underlay has been deprecated, default overlay is preferred"),
        (WARN, "Flag --nohttps has been deprecated, use --no-https"),
    )


@pytest.mark.parametrize(
    ("options", "environ", "level"),
    [
        ((), {}, 1),
        (("-d", "-q", "-s", "-v"), {}, 5),
        (("-v", "-q"), {}, 4),
        (("-q", "-s"), {}, -1),
        (("--silent",), {}, -3),
        ((), {"APPTAINER_DEBUG": "1"}, 5),
        ((), {"APPTAINER_MESSAGELEVEL": "3"}, 3),
        ((), {"APPTAINER_MESSAGELEVEL": "99"}, 5),
        ((), {"APPTAINER_MESSAGELEVEL": "-99"}, -4),
        ((), {"APPTAINER_MESSAGELEVEL": "x"}, 1),
        ((), {"SINGULARITY_MESSAGELEVEL": "4"}, 4),
        (("-q",), {"APPTAINER_MESSAGELEVEL": "5"}, -1),
    ],
)
def test_message_level(options: tuple[str, ...], environ: dict[str, str], level: int) -> None:
    assert action(*options, "run", "i", **environ).message_level == level


def test_what_stands_before_the_command() -> None:
    request = action("--nocolor", "-c", "/conf", "--trace=/t", "run", "i")
    assert (request.colour, request.config_file, request.trace_file) == (False, "/conf", "/t")
    assert action("run", "i").colour is None
    assert action("run", "i", APPTAINER_PY_TRACE="/t", APPTAINER_TRACE="/t").trace_file == ""
    assert action("run", "i", APPTAINER_CONFIG_FILE="/conf").config_file == "/conf"


class TestEnvironment:
    def test_either_prefix(self) -> None:
        assert executed(APPTAINER_WORKDIR="/w").workdir == "/w"
        request = executed(SINGULARITY_WORKDIR="/w")
        assert request.workdir == "/w"
        assert request.notes == (
            (
                INFO,
                "Environment variable SINGULARITY_WORKDIR is set, "
                "but APPTAINER_WORKDIR is preferred",
            ),
        )

    def test_both(self) -> None:
        request = executed(SINGULARITY_WORKDIR="/s", APPTAINER_WORKDIR="/a")
        assert request.workdir == "/a"
        assert request.notes == (
            (
                WARN,
                "SINGULARITY_WORKDIR and APPTAINER_WORKDIR have different values, using the latter",
            ),
        )
        assert executed(SINGULARITY_WORKDIR="/a", APPTAINER_WORKDIR="/a").notes == ()

    def test_an_empty_one_is_ignored_but_hides_the_old_name(self) -> None:
        assert executed(APPTAINER_WORKDIR="").workdir == ""
        assert executed(APPTAINER_WORKDIR=" ", SINGULARITY_WORKDIR="/s").workdir == ""

    def test_the_command_line_wins(self) -> None:
        assert executed("-W", "/c", APPTAINER_WORKDIR="/a").workdir == "/c"
        assert not executed("--userns=false", APPTAINER_USERNS="1").userns

    def test_binds_and_mounts_add_up(self) -> None:
        request = executed("-B", "a", APPTAINER_BIND="b,c", APPTAINER_BINDPATH="d")
        assert request.bind == ("a", "b,c", "d")
        request = executed("-B", "a", APPTAINER_BIND="b", SINGULARITY_BIND="c")
        assert request.bind == ("a", "b")
        assert executed("--mount", "a", APPTAINER_MOUNT=" b").mount == ("a", " b")

    def test_the_first_key_wins(self) -> None:
        assert not executed(APPTAINER_PID="0", APPTAINER_UNSHARE_PID="1").pid
        assert executed(APPTAINER_UNSHARE_PID="1").pid

    def test_items_of_lists_are_trimmed(self) -> None:
        assert executed(APPTAINER_NO_MOUNT=" a , b,c ").no_mount == ("a", "b", "c")

    def test_only_keys_of_the_command_count(self) -> None:
        assert executed(APPTAINER_SHELL="maybe", APPTAINER_BOOT="maybe").command == "exec"
        assert action("shell", "i", APPTAINER_SHELL="/bin/zsh").shell == "/bin/zsh"

    @pytest.mark.parametrize("name", ["APPTAINER_CONTAIN", "SINGULARITY_CONTAIN"])
    def test_a_bad_value(self, name: str) -> None:
        with pytest.raises(BadVariable) as caught:
            executed(**{name: "may\nbe"})
        assert str(caught.value) == (
            "While parsing environment variables: while updating flags from environment: "
            "unable to set flag contain to value may\\nbe: "
            'strconv.ParseBool: parsing "may\\nbe": invalid syntax'
        )
        assert caught.value.exit_code == 255

    def test_a_bad_global_value(self) -> None:
        with pytest.raises(BadVariable, match="While parsing global environment variables"):
            executed(APPTAINER_DEBUG="maybe")

    def test_what_only_matters_for_fetching_is_let_pass(self) -> None:
        request = executed(
            "--disable-cache",
            APPTAINER_TMPDIR="/t",
            APPTAINER_DOCKER_USERNAME="u",
            DOCKER_HOST="tcp://x",
        )
        assert request == executed()


def sample(row: Option) -> str:
    return {"bool": "true", "int": "17"}.get(str(row[2]), "x=y")


REFUSED_ACTIONS = [
    row for row in OPTIONS if row[6] == REFUSED and set(row[5]) & {*ACTIONS, *INSTANCES}
]


@pytest.mark.parametrize("row", REFUSED_ACTIONS, ids=lambda row: row[0])
def test_an_option_that_is_not_built_is_refused(row: Option) -> None:
    command = row[5][0].split()
    with pytest.raises(OptionRefused) as caught:
        action(*command, f"--{row[0]}={sample(row)}", "image", "x")
    assert str(caught.value) == f"`--{row[0]}` is not supported yet"
    assert caught.value.advice() == f"leave `--{row[0]}` out"
    assert caught.value.exit_code == 255
    for key in row[4]:
        with pytest.raises(OptionRefused) as caught:
            action(*command, "image", "x", **{f"APPTAINER_{key}": sample(row)})
        assert str(caught.value) == f"APPTAINER_{key} is not supported yet"


def test_an_option_that_is_switched_off_is_not_refused() -> None:
    assert executed("--fakeroot=false", "--network", "", "--pids-limit", "0x0") == executed()
    assert executed("--nv=false", APPTAINER_NV="1") == executed()


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("library:alpine", NotSupported),
        ("docker:alpine", NotSupported),
        ("docker:x/y", NotSupported),
        ("foo://x", UnknownTransport),
    ],
)
def test_an_image_from_elsewhere(image: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(["run", image], {})


@pytest.mark.parametrize("words", [["checkpoint", "x"], ["checkpoint"]])
def test_a_command_that_is_not_built(words: list[str]) -> None:
    with pytest.raises(NotSupported) as caught:
        parse(words, {})
    assert caught.value.exit_code == 255


WRONG = [
    (["exec"], "requires at least 2 arg(s), only received 0"),
    (["exec", "i"], "requires at least 2 arg(s), only received 1"),
    (["run"], "requires at least 1 arg(s), only received 0"),
    (["inspect"], "accepts 1 arg(s), received 0"),
    (["inspect", "a", "--json"], "accepts 1 arg(s), received 2"),
    (["sif", "dump", "x"], "accepts 2 arg(s), received 1"),
    (["config", "global"], "accepts between 1 and 2 arg(s), received 0"),
    (["buildcfg", "a", "b"], "accepts at most 1 arg(s), received 2"),
    (["exec", "--badopt"], "unknown flag: --badopt"),
    (["exec", "--cont", "i", "c"], "unknown flag: --cont"),
    (["exec", "--config", "f"], "unknown flag: --config"),
    (["exec", "-x", "i", "c"], "unknown shorthand flag: 'x' in -x"),
    (["exec", "-cxe", "i", "c"], "unknown shorthand flag: 'x' in -xe"),
    (["exec", "-c=", "i", "c"], "unknown shorthand flag: '=' in -="),
    (["exec", "-B"], "flag needs an argument: 'B' in -B"),
    (["exec", "-cB"], "flag needs an argument: 'B' in -B"),
    (["exec", "--bind"], "flag needs an argument: --bind"),
    (["exec", "--=x"], "bad flag syntax: --=x"),
    (["exec", "---x"], "bad flag syntax: ---x"),
    (
        ["exec", "--contain=maybe", "i", "c"],
        'invalid argument "maybe" for "-c, --contain" flag: '
        'strconv.ParseBool: parsing "maybe": invalid syntax',
    ),
    (
        ["exec", "--pid=", "i", "c"],
        'invalid argument "" for "-p, --pid" flag: strconv.ParseBool: parsing "": invalid syntax',
    ),
    (
        ["exec", "--cpu-shares", "x", "i", "c"],
        'invalid argument "x" for "--cpu-shares" flag: '
        'strconv.ParseInt: parsing "x": invalid syntax',
    ),
    (
        ["exec", "--pids-limit=99999999999999999999", "i", "c"],
        'invalid argument "99999999999999999999" for "--pids-limit" flag: '
        'strconv.ParseInt: parsing "99999999999999999999": value out of range',
    ),
    (
        ["exec", "--env", "foo", "i", "c"],
        'invalid argument "foo" for "--env" flag: foo must be formatted as key=value',
    ),
    (
        ["exec", "--env", 'a=b,c=d"x', "i", "c"],
        'invalid argument "a=b,c=d\\"x" for "--env" flag: '
        'parse error on line 1, column 8: bare " in non-quoted-field',
    ),
    (
        ["exec", "--no-mount", 'a,"b"c,d', "i", "c"],
        'invalid argument "a,\\"b\\"c,d" for "--no-mount" flag: '
        'parse error on line 1, column 5: extraneous or missing " in quoted-field',
    ),
    (
        ["exec", "--no-mount", '"a', "i", "c"],
        'invalid argument "\\"a" for "--no-mount" flag: '
        'parse error on line 1, column 3: extraneous or missing " in quoted-field',
    ),
]


@pytest.mark.parametrize(("words", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_usage_errors(words: list[str], text: str) -> None:
    with pytest.raises(CommandLineWrong) as caught:
        parse(words, {})
    command = words[1] if words[0] in ("sif", "config") else words[0]
    assert str(caught.value) == f'Error for command "{command}": {text}'
    assert caught.value.exit_code == 1


def test_errors_before_the_command() -> None:
    with pytest.raises(CommandLineWrong, match='for command "apptainer-py": unknown flag: --no'):
        parse(["--no", "exec"], {})
    with pytest.raises(CommandLineWrong, match="flag needs an argument: --config"):
        parse(["--config"], {})


@pytest.mark.parametrize("words", [[], [""], ["-d"], ["--"], ["--version=false"]])
def test_nothing_asked_for(words: list[str]) -> None:
    with pytest.raises(NoCommand):
        parse(words, {})


@pytest.mark.parametrize("word", ["nosuch", "sif list", "EXEC", "exe", "\x1b[2J"])
def test_an_unknown_command(word: str) -> None:
    with pytest.raises(UnknownCommand) as caught:
        parse([word, "--help"], {})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--help"], ""),
        (["-h", "nosuch"], ""),
        (["exec", "--help"], "exec"),
        (["exec", "-ch", "i"], "exec"),
        (["sif", "list", "a", "-h"], "sif list"),
        (["config", "show", "-h"], "config show"),
    ],
)
def test_help_is_asked_for(words: list[str], command: str) -> None:
    parsed = parse(words, {"APPTAINER_CONTAIN": "maybe"})
    assert parsed == Parsed(command=command, options={}, help=True)


def test_other_commands() -> None:
    parsed = parse(["-q", "inspect", "-lj", "--app=x", "image"], {})
    assert isinstance(parsed, Parsed)
    assert (parsed.command, parsed.arguments, parsed.message_level) == ("inspect", ("image",), -1)
    on = {name for name, value in parsed.options.items() if value}
    assert on == {"labels", "json", "app"}
    parsed = parse(["sif", "list", "image", "--json"], {})
    assert isinstance(parsed, Parsed)
    assert parsed.arguments == ("image",)
    assert parsed.options == {"json": True}


@pytest.mark.parametrize(
    "words",
    [
        ["exec", "--\x1b[31m", "i"],
        ["exec", "-\n", "i"],
        ["exec", "--env", "\x07\udcff", "i"],
        ["exec", "--contain=\x1b]0;x\x07", "i"],
        ["\udcff\n"],
        ["run", "\x1b[2J://x"],
        ["run", "docker:\x1b[2J"],
    ],
)
def test_what_was_typed_cannot_reach_the_terminal(words: list[str]) -> None:
    with pytest.raises((UsageError, NotSupported, UnknownTransport)) as caught:
        parse(words, {})
    assert str(caught.value).isprintable()
    assert (caught.value.advice() or "").isprintable()


def test_the_run_path_imports_little() -> None:
    code = (
        "import sys; before = set(sys.modules); from apptainer_py.cli.parse import parse;"
        "parse(['exec', '-c', 'i', 'c'], {}); print(*sorted(set(sys.modules) - before))"
    )
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if not name.startswith("apptainer_py")] == [
        "__future__"
    ]


@pytest.mark.parametrize("uri", ["docker://a", "oras://h/a", "https://h/a.sif", "http://h/a"])
def test_an_image_that_is_fetched_first(uri: str) -> None:
    found = parse(["exec", "--no-https", uri, "true", "-x"], {})
    assert (found.command, found.arguments) == (FETCH, (uri, "true", "-x"))
    with pytest.raises(UnknownCommand):
        parse([FETCH, uri], {})


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--net", "-B", "/a"], "--bind, --net"),
        (["--memory", "1G", "-f", "--env", "A=1", "--net=false"], ""),
        (["-C"], "--containall"),
    ],
)
def test_options_that_change_nothing_of_an_instance_are_named(typed, named):
    line = f"{named}: without effect on an instance that runs; for `instance start`"
    variables = {"APPTAINER_BIND": "/b", "APPTAINER_NV": "1"}
    for environ in ({}, variables):
        joins = parse(["exec", *typed, "instance://x", "true"], environ)
        assert joins.notes == (((WARN, line),) if named else ())
        assert parse(["exec", *typed, "x.sif", "true"], environ).notes == ()


def test_an_instance_is_not_joined_with_oci():
    with pytest.raises(ApptainerError, match="instances cannot be joined with --oci"):
        parse(["exec", "--oci", "instance://x", "true"], {})


def test_an_instance_is_started_from_no_other_and_has_its_pid_namespace():
    with pytest.raises(ApptainerError, match="starting an instance from another is not allowed"):
        parse(["instance", "start", "instance://x", "y"], {})
    with pytest.raises(CommandLineWrong, match="unknown flag: --no-pid"):
        parse(["instance", "start", "--no-pid", "x.sif", "y"], {})
    assert parse(["instance", "run", "x.sif", "y"], {"APPTAINER_NO_PID": "1"}).pid
