"""`config fakeroot`: both files of a copy of /etc, as root, and nobody else."""

from __future__ import annotations

from tests import fixtures
from tests.e2e.subids import launch, range_of
from tests.own_install import Installation

COPY = """
    mkdir -p {0}/etc-copy
    mount -t tmpfs tmpfs {0}/etc-copy
    cp -a /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.cache {0}/etc-copy
    printf '%s' '{1}' >{0}/etc-copy/subuid; cp {0}/etc-copy/subuid {0}/etc-copy/subgid
    mount --bind {0}/etc-copy /etc
    run() {{ {2} config fakeroot "$@" || echo "status $?"; }}
    {3}
    cat /etc/subuid; ls /etc; cmp /etc/subuid /etc/subgid"""


own = fixtures.own()


def after(own: Installation, text: str, script: str) -> tuple[list[str], str]:
    before = COPY.format(own.place, text, own.program, script)
    done = launch(own, "version", before=before, root=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[:-1]
    names = {"group", "ld.so.cache", "nsswitch.conf", "passwd", "subgid", "subuid"}
    assert set(lines[-6:]) == names
    return lines[:-6], done.stderr


def test_add_disable_enable_remove(own):
    user, number = own.user.pw_name, own.user.pw_uid
    line = f"{number}:4294836224:65536"
    assert after(own, "x:1:2\n", f"run --add {user}; run -a {user}") == (["x:1:2", line], "")
    for option, shown in (("--disable", "!" + line), ("-d", "!" + line), ("--enable", line)):
        assert after(own, f"x:1:2\n{line}\n", f"run {option} {user}") == (["x:1:2", shown], "")
    assert after(own, f"{line}\nx:1:2\n", f"run --remove {user}") == (["x:1:2"], "")
    assert after(own, range_of(own), f"run -r {user}")[0] == []


def test_what_it_refuses(own):
    user = own.user.pw_name
    shown, said = after(own, "x:1:2\n", f"run --remove {user}; run --add nobody-there; run {user}")
    shown = [line for line in shown if line.startswith(("status", "x:"))]  # without the usage
    assert shown == ["status 255", "status 255", "status 1", "x:1:2"]
    assert f"FATAL:   while removing {user}: no mapping entry found in /etc/subuid for" in said
    assert "FATAL:   while adding nobody-there: could not retrieve user information" in said
    assert "you must specify an option (eg: --add/--remove)" in said


def test_root_alone(own):
    done = own.run("config", "fakeroot", "--add", own.user.pw_name)
    assert done.returncode == 255
    assert done.stderr == (
        'FATAL:   "apptainer-py config fakeroot" command requires root privileges\n'
    )
