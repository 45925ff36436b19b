"""runc's command line, as its own parser takes it."""

from __future__ import annotations

import pytest

from apptainer_py.base.errors import UsageError
from apptainer_py.cli.oci.parse import HelpWanted, OciUsage, parse, parse_typed
from apptainer_py.cli.oci.table import COMMANDS, flags_of
from apptainer_py.model.oci_call import OciCall


def words(line: str) -> list[str]:
    return ["oci", *line.split()]


def test_flags_before_and_behind_the_name() -> None:
    for line in ("delete --force c", "delete c --force", "delete -f c", "delete c -force=true"):
        call = parse(words(line), {}, own_user=False)
        assert (call.command, call.arguments, call.flag("force")) == ("delete", ("c",), True)


def test_exec_takes_no_flag_behind_the_name() -> None:
    call = parse(words("exec -e A=1 --env B=2,3 -t c ls -l --force"), {}, own_user=False)
    assert call.arguments == ("c", "ls", "-l", "--force")
    assert call.words("env") == ("A=1", "B=2,3")
    assert call.flag("tty")


def test_root_directory() -> None:
    assert parse(words("list"), {}, own_user=False).root == "/run/apptainer-py-oci"
    own = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert parse(words("list"), own, own_user=True).root == "/run/user/7/apptainer-py-oci"
    assert parse(words("--root /r list"), own, own_user=True).root == "/r"


@pytest.mark.parametrize(
    ("line", "text", "status"),
    [
        ("zonk", "No help topic for 'zonk'\n", 3),
        ("--foo list", "flag provided but not defined: -foo", 1),
        ("create --zonk", "flag provided but not defined: -zonk", 1),
        ("state", 'oci: "state" requires exactly 1 argument(s)', 1),
        ("kill", 'oci: "kill" requires a minimum of 1 argument(s)', 1),
        ("run --preserve-fds x c", 'invalid value "x" for flag -preserve-fds: parse error', 1),
        ("create --bundle", "flag needs an argument: -bundle", 1),
    ],
)
def test_what_is_wrong(line: str, text: str, status: int) -> None:
    with pytest.raises(OciUsage) as caught:
        parse(words(line), {}, own_user=False)
    assert (str(caught.value), caught.value.status) == (text, status)


def test_help_and_version() -> None:
    for line, command, version in (
        ("--version", "", True),
        ("", "", False),
        ("run --help", "run", False),
        ("help run", "run", False),
    ):
        with pytest.raises(HelpWanted) as caught:
            parse(words(line), {}, own_user=False)
        assert (caught.value.command, caught.value.version) == (command, version)


def test_cgroup_managers() -> None:
    assert parse(words("--systemd-cgroup list"), {}, own_user=False).cgroup_manager == "systemd"
    call = parse(words("--cgroup-manager disabled list"), {}, own_user=False)
    assert call.cgroup_manager == "disabled"
    with pytest.raises(OciUsage):
        parse(words("--cgroup-manager other list"), {}, own_user=False)


def apptainer(line: str, **environment: str) -> OciCall:
    return parse_typed(["/bin/apptainer-py", *line.split()], environment, uid=0)


def test_the_other_surface() -> None:
    call = apptainer("oci kill -s INT c")
    assert (call.apptainer, call.text("signal"), call.arguments) == (True, "INT", ("c",))
    assert not parse_typed(["apptainer-py-oci", "list"], {}, uid=0).apptainer
    made = apptainer("-d oci --root /r create c -b/b --log-format=json -l f --empty-process")
    assert (made.root, made.debug, made.arguments) == ("/r", True, ("c",))
    assert made.text("bundle") == "/b"
    assert (made.text("log-format"), made.text("log-path")) == ("json", "f")
    assert made.flag("empty-process")
    assert apptainer("oci kill -t 3 c").number("timeout") == 3
    assert apptainer("oci exec c ls -l").arguments == ("c", "ls", "-l")
    assert apptainer("oci list -q").flag("quiet")


def test_variables_of_the_other_surface() -> None:
    made = apptainer(
        "oci create c",
        APPTAINER_BUNDLE="/b",
        APPTAINER_SYNC_SOCKET="/s",
        APPTAINER_EMPTY_PROCESS="1",
        APPTAINER_LOG_PATH="/l",
        APPTAINER_LOG_FORMAT="basic",
        APPTAINER_PID_FILE="/p",
    )
    names = ("bundle", "sync-socket", "log-path", "log-format", "pid-file")
    assert [made.text(name) for name in names] == ["/b", "/s", "/l", "basic", "/p"]
    assert made.flag("empty-process")
    assert apptainer("oci run -b /x c", APPTAINER_BUNDLE="/b").text("bundle") == "/x"
    killed = apptainer("oci kill c", APPTAINER_SIGNAL="HUP", APPTAINER_FORCE="1")
    assert (killed.text("signal"), killed.flag("force")) == ("HUP", True)
    assert apptainer("oci update c", APPTAINER_FROM_FILE="/f").text("from-file") == "/f"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("oci run c", 'Error for command "run": required flag(s) "bundle" not set'),
        ("oci state", 'Error for command "state": accepts 1 arg(s), received 0'),
        ("oci kill", 'Error for command "kill": requires at least 1 arg(s), only received 0'),
        ("oci kill -s", "Error for command \"kill\": flag needs an argument: 's' in -s"),
        ("oci create --nosuch c", 'Error for command "create": unknown flag: --nosuch'),
    ],
)
def test_a_wrong_line_of_the_other_surface(line: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        apptainer(line)
    assert str(caught.value) == text


@pytest.mark.parametrize("line", ["", "oci", "oci nosuch", "oci create --help", "oci exec -h"])
def test_help_of_the_other_surface(line: str) -> None:
    with pytest.raises(HelpWanted) as caught:
        apptainer(line)
    assert caught.value.apptainer


def test_every_command_has_flags_that_can_be_read() -> None:
    for flags, least, most, _ in COMMANDS.values():
        assert all(name for name, _ in flags_of(flags).values())
        assert most == -1 or least <= most
