"""runc's command line, as its own parser takes it."""

from __future__ import annotations

import pytest

from apptainer_py.cli.oci.parse import HelpWanted, OciUsage, parse, parse_typed
from apptainer_py.cli.oci.table import COMMANDS, flags_of


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


def test_the_other_surface() -> None:
    call = parse_typed(["/bin/apptainer-py", "oci", "kill", "-s", "INT", "c"], {}, uid=0)
    assert (call.apptainer, call.text("signal")) == (True, "INT")
    assert not parse_typed(["apptainer-py-oci", "list"], {}, uid=0).apptainer
    with pytest.raises(OciUsage, match="log-path is not supported yet"):
        parse_typed(["apptainer-py", "oci", "run", "--log-path", "f", "c"], {}, uid=0)


def test_every_command_has_flags_that_can_be_read() -> None:
    for flags, least, most, _ in COMMANDS.values():
        assert all(name for name, _ in flags_of(flags).values())
        assert most == -1 or least <= most
