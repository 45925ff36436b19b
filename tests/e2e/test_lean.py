"""Which launches need no interpreter beside master's, and that nobody else can tell."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fixtures, images, refused_calls
from tests.e2e import steps
from tests.e2e.test_trace import lines_of
from tests.own_install import (
    HostState,
    Installation,
    assert_nothing_left,
    eventually,
    household,
)

FLOWS = ("setuid", "userns", "root")


own = fixtures.own()


@pytest.fixture
def place(own) -> Iterator[Path]:
    """A directory of the user's, with a link to one below it."""
    made = Path(tempfile.mkdtemp(prefix="apptainer-py-lean-", dir="/var/tmp"))
    (made / "real").mkdir()
    (made / "link").symlink_to("real")
    for path in (made, made / "real"):
        os.chown(path, own.user.pw_uid, own.user.pw_gid)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def sandbox(require_root: None) -> Path:
    return images.small_tree(images.shared_folder())


def interpreters(own: Installation, place: Path, sif: Path, flow: str, *words: str) -> set[str]:
    """Launch, and return the processes that loaded Python."""
    path = place / "trace"
    path.unlink(missing_ok=True)
    command, *options = words
    given = ["-u"] if flow == "userns" else []
    arguments = ["true"] if command == "exec" else []
    done = own.run("--trace", path, command, *given, *options, sif, *arguments, root=flow == "root")
    assert done.returncode == 0, done.stderr
    loaded = {line["process"] for line in lines_of(path) if line.get("name", "")[:5] == "LOAD_"}
    births = [line for line in lines_of(path) if line.get("name") == "EXEC_PAYLOAD"]
    assert [line["process"] for line in births] == ["STAGE2"]
    return loaded


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("options", [(), ("-p",), ("-p", "--no-init"), ("-C",), ("-w",)])
def test_one_interpreter_is_enough(own, sif, sandbox, place, flow, options):
    image = sandbox if "-w" in options else sif
    assert interpreters(own, place, image, flow, "exec", *options) == {"MASTER"}


@pytest.mark.parametrize("command", ["run", "test"])
def test_scripts_need_no_other(own, sif, place, command):
    assert interpreters(own, place, sif, "setuid", command) == {"MASTER"}


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        ("userns", ("--fakeroot",)),
        ("root", ("--no-privs",)),
        ("root", ("--security", "uid:12")),
        ("userns", ("--add-caps", "CAP_CHOWN")),
    ],
)
def test_who_is_another_than_master_judges_itself(own, sif, place, flow, options):
    assert interpreters(own, place, sif, flow, "exec", *options) == {"MASTER", "STAGE2"}


def test_directory_and_program_are_the_payloads(own, sif, place):
    """PWD is where the kernel says that it is; a relative program is below it."""
    tool = place / "real/tool"
    tool.write_text("#!/bin/sh\necho $0 $PWD; pwd\n")
    tool.chmod(0o755)
    for pwd in (place / "link", place / "real"):
        done = own.run("exec", "-B", place, "--pwd", pwd, sif, "./tool")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [str(tool), str(place / "real"), str(place / "real")]


def test_what_differs_for_each_process_is_left_to_the_shell(own, sandbox, place):
    """Below /proc master would see itself."""
    image = place / "image"
    shutil.copytree(sandbox, image, symlinks=True)
    folder = image / ".singularity.d/env"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "#!/bin/sh", "if [ -e /proc/1/stat ] && [ -d /proc/self/fd ]; then", "    SEEN=yes", "fi",
        "export SEEN",
    ]  # fmt: skip
    (folder / "90-environment.sh").write_text("\n".join([*lines, ""]))
    done = own.run("exec", "-p", image, "sh", "-c", "echo $SEEN $$")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "yes"
    folder.joinpath("90-environment.sh").write_text("#!/bin/sh\nexport PATH=/proc/self/cwd:$PATH\n")
    done = own.run("exec", "--pwd", "/bin", image, "sh", "-c", "echo ran; echo $0")
    assert (done.returncode, done.stdout.split()[0]) == (0, "ran"), done.stderr
    done = own.run("exec", image, "/proc/self/cwd/nothing")
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.endswith("no such file or directory\n"), done.stderr


@pytest.mark.parametrize("options", [(), ("-p",)])
@pytest.mark.parametrize("flow", FLOWS)
def test_a_root_that_cannot_be_changed_ends_it(own, sif, flow, options):
    """Stage 2 waits for master, and master for what it looks up in the root that is to come."""
    if refused_calls.PIVOT_ROOT < 0:
        pytest.skip("this machine's number of pivot_root(2) is not known here")
    root = flow == "root"

    def become() -> None:
        refused_calls.refuse(refused_calls.PIVOT_ROOT, errno.EPERM, no_new_privs=False)
        if not root:
            os.setgroups([])
            os.setresgid(own.user.pw_gid, own.user.pw_gid, own.user.pw_gid)
            os.setresuid(own.user.pw_uid, own.user.pw_uid, own.user.pw_uid)

    given = ["-u"] if flow == "userns" else []
    with household() as home:
        host = HostState(own.session)
        process = home.adopt(
            # Only the child itself can refuse its calls; no thread runs here.
            subprocess.Popen(
                [own.program, "exec", *given, *options, sif, "echo", "ran"],
                env=own.environment(), cwd="/", stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                preexec_fn=become,  # noqa: PLW1509
            )
        )  # fmt: skip
        status, out, err = steps.finish(process)
        assert_nothing_left(home, host)
    assert (status, out) == (255, b""), err
    assert err.endswith(b"the root cannot be changed: operation not permitted\n"), err
    assert err.count(b"FATAL") == 1, err


def test_a_shim_that_ends_late_is_not_the_payload_s_end(world, monkeypatch):
    """Where nothing could be started, master's word is the status, whoever of them ends first."""
    words = ("apptainer-py", "exec", "-p", "{image}", "/nosuch")
    monkeypatch.setitem(steps.FLOWS, "no program", (words, "", "sif", []))
    with household() as home, steps.gate() as stop:
        host = HostState(world.own.session, world.place)
        place = f"{steps.number_of('RPC_DONE')}:-1:{steps.END}:{stop.fd}"
        process = home.adopt(steps.launch(world, "no program", wait=place, inherited=[stop.fd]))
        status, out, err = steps.finish(process)  # with a shim that waits until keeper kills it
        assert stop.waiting() == "SHIM"
        assert_nothing_left(home, host)
    assert (status, out) == (255, b""), err
    assert err.splitlines() == [b"FATAL:   stat /nosuch: no such file or directory"]


def test_a_seal_is_its_own_container_s(world):
    """What is begun early and undone has sealed itself; the next stage 2 has not, while it loads.

    While that one stands before it has, rpc must wait with the root.
    """
    with household() as home, steps.gate() as stop:
        host = HostState(world.own.session, world.place)
        place = f"{steps.number_of('CONTAINER')}:-1:{steps.BEGIN}:{stop.fd}"
        flow = "early, wrong"
        process = home.adopt(steps.launch(world, flow, wait=place, inherited=[stop.fd]))
        eventually(stop.reached, "keeper has the request of another container")
        assert stop.waiting() == "KEEPER"
        assert "STAGE2" in steps.settled(home)  # it has said so, and waits for the word to go on
        stop.move(steps.number_of("DROP_STAGE2"), steps.BEGIN)
        eventually(stop.reached, "the next stage 2 begins")
        assert stop.waiting() == "STAGE2"
        assert "RPC" in steps.settled(home)  # which ends with the change of the root
        stop.open()
        status, out, err = steps.finish(process)
        assert_nothing_left(home, host)
    assert (status, out) == (0, b"ran\n"), err
