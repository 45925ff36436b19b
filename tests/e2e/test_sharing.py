"""A second launch of an image that is in use shows the mount that is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apptainer_py.base.errors import ImageGone
from tests import images, own_install
from tests.e2e import sharing
from tests.e2e.sharing import hold, is_offered, servers, tell
from tests.own_install import (
    HostState,
    assert_nothing_left,
    descendants,
    eventually,
    read_until,
)

FLOWS = {"setuid": (), "userns": ("-u",)}


@pytest.fixture(scope="module")
def own(require_root) -> Iterator[own_install.Installation]:
    sharing.need_copies()
    made = own_install.installation()
    made.restore()
    yield made
    made.restore()


@pytest.fixture(params=list(FLOWS))
def flow(request) -> tuple[str, ...]:
    if request.param == "userns":
        request.getfixturevalue("open_fuse")
    return FLOWS[request.param]


@pytest.fixture
def image(own, user_tmp) -> Path:
    """A copy, which nobody else runs."""
    target = user_tmp / "image.sif"
    shutil.copyfile(images.own_sif(images.shared_folder()), target)
    target.chmod(0o644)
    os.chown(target, own.user.pw_uid, own.user.pw_gid)
    return target


def test_one_server_serves_both(own, home, flow, image):
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, *flow, image)
    assert len(servers(home)) == 1
    assert tell(first) == tell(second) == b"still\n"


def test_the_server_ends_with_its_last_user(own, home, flow, image):
    host = HostState(own.session)
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, *flow, image)
    assert tell(first) == b"still\n"
    assert first.wait(20) == 0
    assert len(servers(home)) == 1
    assert tell(second) == b"still\n"
    assert second.wait(20) == 0
    assert_nothing_left(home, host)


@pytest.mark.parametrize("victim", ["keeper", "master"])
def test_the_first_launch_is_killed(own, home, flow, image, victim):
    host = HostState(own.session)
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, *flow, image)
    os.kill(first.pid if victim == "keeper" else sharing.master_of(first), signal.SIGKILL)
    first.wait(20)
    assert tell(second) == b"still\n"
    assert second.wait(20) == 0
    assert_nothing_left(home, host)


def test_the_servers_end_is_told_to_both(own, home, flow, image):
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, *flow, image, stderr=subprocess.PIPE)
    os.kill(servers(home)[0], signal.SIGKILL)
    assert first.wait(20) == second.wait(20) == -signal.SIGKILL
    assert second.stderr is not None
    assert second.stderr.read().decode() == f"FATAL:   {ImageGone()}\n"


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "not reaped"])
def test_a_bus_error_on_a_lent_mount_is_told_by_its_reason(own, home, flow, image, reaped):
    """Keeper hears of the payload's end first; who started the server may be late to reap it."""
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    words = ("sh", "-c", "echo on; read line; kill -BUS $$")
    second = home.adopt(
        own.start("exec", *flow, image, *words, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    )
    read_until(second.stdout.fileno(), b"on\n")
    below = descendants(second.pid).items()
    (payload,) = [pid for pid, (_, _, name) in below if name == "sh"]
    (server,) = servers(home)
    if not reaped:
        os.kill(first.pid, signal.SIGSTOP)
    os.kill(second.pid, signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not servers(home), "the server ends")
    second.stdin.write(b"\n")
    second.stdin.flush()
    eventually(lambda: home.alive()[payload][1] == "Z", "the payload ends")
    os.kill(second.pid, signal.SIGCONT)
    assert second.wait(20) == -signal.SIGBUS
    assert second.stderr.read().decode() == f"FATAL:   {ImageGone()}\n"
    os.kill(first.pid, signal.SIGCONT)


def test_a_third_takes_it_from_the_second(own, home, flow, image):
    """Who has taken the mount offers it when the first has ended, and so does the next."""
    host = HostState(own.session)
    first = hold(own, home, *flow, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, *flow, image)
    waiting = hold(own, home, *flow, image)
    assert not is_offered(second)
    tell(first)
    first.wait(20)
    eventually(lambda: is_offered(second) != is_offered(waiting), "one of them offers it")
    third = hold(own, home, *flow, image)
    assert len(servers(home)) == 1
    for process in (second, waiting):
        assert tell(process) == b"still\n"
        process.wait(20)
    eventually(lambda: is_offered(third), "the last one offers it")
    assert tell(third) == b"still\n"
    assert third.wait(20) == 0
    assert_nothing_left(home, host)


@pytest.mark.parametrize("victim", ["first", "second"])
def test_who_offers_it_is_killed(own, home, image, victim):
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    second = hold(own, home, image)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(20)
    eventually(lambda: is_offered(second), "the second offers it")
    if victim == "second":
        third = hold(own, home, image)
        os.kill(second.pid, signal.SIGKILL)
        second.wait(20)
        eventually(lambda: is_offered(third), "the third offers it")
    hold(own, home, image)
    assert len(servers(home)) == 1


CHANGES = {
    "touched": os.utime,
    "replaced": lambda image: (
        shutil.copyfile(image, f"{image}.new"),
        os.rename(f"{image}.new", image),
    ),
    "another mode": lambda image: image.chmod(0o640),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_an_image_that_has_changed_is_another(own, home, image, change):
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    CHANGES[change](image)
    os.chown(image, own.user.pw_uid, own.user.pw_gid)
    hold(own, home, image)
    assert len(servers(home)) == 2


def test_the_flows_do_not_share(own, home, image, open_fuse):
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    hold(own, home, "-u", image)
    assert len(servers(home)) == 2


def test_another_control_group_has_a_server_of_its_own(own, home, image):
    """A batch system ends all that a step has begun."""
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    with sharing.another_group():
        second = hold(own, home, image)
        assert len(servers(home)) == 2
        tell(second)
        second.wait(20)


@pytest.mark.parametrize("rule", ["limit", "ecl"])
def test_where_rules_bind_images_nothing_is_shared(own, home, image, rule):
    """Neither is it offered, nor taken from a launch before the rule."""
    first = hold(own, home, image)
    eventually(lambda: is_offered(first), "the mount is offered")
    ecl = own.sysconfdir / "ecl.toml"
    try:
        if rule == "limit":
            own.configure(
                f"limit container owners = {own.user.pw_name}\nallow setuid-mount squashfs = no"
            )
        else:
            ecl.write_text("activated = false\n")
        second = hold(own, home, image)
        assert len(servers(home)) == 2
        tell(first)
        first.wait(20)
        assert not is_offered(second)
    finally:
        ecl.unlink(missing_ok=True)
        own.restore()


def test_many_at_once(own, home, flow, image):
    """Whoever comes first offers; nobody waits, and nothing stays."""
    host = HostState(own.session)
    started = [home.adopt(own.start("exec", *flow, image, "true")) for _ in range(8)]
    assert [process.wait(60) for process in started] == [0] * 8
    assert_nothing_left(home, host)
