"""A master and a stage 2 that lie: what was not granted cannot be had, and nothing runs too early.

Both are Python of ours and closed to the user, so the lies come from a product built for the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import images
from tests.security import forge

CHOWN, NET_RAW, SYS_ADMIN = 1 << 0, 1 << 13, 1 << 21
# Master: --add-caps names the five sets as numbers, and nothing is asked of any file.
LYING_MASTER = """

def for_user(add, drop, uid, permitted, *, userns):
    sets = tuple(int(word) for word in add.split(",")) if add else (0,)
    return sets * 5 if len(sets) == 1 else sets
"""
# Stage 2: before it has said that it is sealed, it sends what the file named by /lie says.
LYING_STAGE = """

def lie(info):
    import json
    import socket
    kept = []
    with open("LIES") as source:
        shots = json.load(source)
    for number in range(3, 64):
        try:
            channel = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if channel.type != socket.SOCK_SEQPACKET or number == info["start_fd"]:
            continue
        for head, what in shots:
            files = []
            if what == "program":
                files = [sealed(os.memfd_create("x", 3), True)]
            elif what == "unsealed":
                files = [sealed(os.memfd_create("x", 3), False)]
            elif what == "short":
                files = [sealed(os.memfd_create("x", 3), True, b"/bin/sh")]
            elif what == "empty":
                files = [sealed(os.memfd_create("x", 3), True, b"")]
            elif what == "go":
                say_go()
                continue
            elif what == "wait":
                import select
                select.select([channel], [], [], 1)
                continue
            elif what:
                files = [os.open(what, os.O_RDONLY)]
            socket.send_fds(channel, [bytes.fromhex(head)], files)
        kept.append(channel)
    return kept

def say_go():
    # What keeper alone may say: an end for reading is opened for writing.
    import fcntl
    for number in range(3, 64):
        name = f"/proc/self/fd/{number}"
        try:
            ours = os.readlink(name).startswith("pipe:") and fcntl.fcntl(number, 3) & 3 == 0
            fd = os.open(name, os.O_WRONLY | os.O_NONBLOCK) if ours else -1
        except OSError:
            continue
        if fd >= 0:
            os.write(fd, b"GG")
            os.close(fd)

def sealed(fd, seal, data=None):
    import fcntl
    script = "grep Cap /proc/$PPID/status; echo own; grep Cap /proc/self/status; exit 9"
    text = f"/bin/sh\\0sh\\0-c\\0{script}\\0A=b\\0".encode()
    os.write(fd, text if data is None else data)
    if seal:
        fcntl.fcntl(fd, 1033, 15)
    return fd
"""


@pytest.fixture(scope="module")
def lying(require_root, repository) -> Iterator[SimpleNamespace]:
    """A product whose Python is compromised; its starter is ours."""
    place = Path(tempfile.mkdtemp(prefix="apptainer-py-lies-", dir="/opt"))
    place.chmod(0o755)
    copy = place / "copy"
    ignored = shutil.ignore_patterns("build", ".git", "generated", "__pycache__", "*.so", "tests")
    shutil.copytree(repository, copy, ignore=ignored)
    master = copy / "apptainer_py/engines/apptainer/capabilities.py"
    master.write_text(master.read_text() + LYING_MASTER)
    stage = copy / "apptainer_py/runtime/stages.py"
    text = stage.read_text() + LYING_STAGE.replace("LIES", str(place / "lies"))
    at = "    seal()\n    streams: list[int] = []"
    assert text.count(at) == 1
    stage.write_text(text.replace(at, "    kept = lie(info)\n" + at))
    argv = [copy / "install", "--prefix", place / "prefix", "--sysconfdir", place / "etc"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    forge.adopt_orphans()
    made = SimpleNamespace(
        program=str(place / "prefix/bin/apptainer-py"),
        lies=place / "lies",
        file=place / "etc/capability.json",
        sif=images.own_sif(images.shared_folder()),
    )
    made.lies.write_text("[]")
    (place / "etc/apptainer-py.conf").write_text("audit log = none\n")
    yield made
    shutil.rmtree(place)


def run(lying, user, sets, *words, flags=()) -> SimpleNamespace:
    names = {"users": {user.pw_name: ["CAP_NET_RAW", "CAP_CHOWN"], "root": ["CAP_SYS_ADMIN"]}}
    lying.file.write_text(json.dumps(names))
    lying.file.chmod(0o644)
    line = ["exec", *flags, "--add-caps", ",".join(map(str, sets)), lying.sif, "sh", "-c", *words]
    env = {"PATH": "/usr/bin:/bin", "HOME": user.pw_dir}
    done = forge.finish(forge.start(lying.program, list(map(str, line)), user=user, env=env))
    assert forge.left_behind() == []
    return done


def caps(text: str) -> list[int]:
    return [int(line.split()[1], 16) for line in text.splitlines() if line.startswith("Cap")]


@pytest.mark.parametrize("held", [CHOWN, NET_RAW, CHOWN | NET_RAW])
def test_what_was_granted_can_be_had(lying, user, held):
    """Otherwise the refusals would prove nothing."""
    done = run(lying, user, [held], "grep Cap /proc/self/status")
    assert (done.status, caps(done.out)) == (0, [held] * 5), done.err


GRANTED = CHOWN | NET_RAW
FORGED = [
    [SYS_ADMIN],
    [GRANTED | SYS_ADMIN],
    [(1 << 41) - 1],
    [(1 << 64) - 1],
    [1 << 63],
    *([SYS_ADMIN if n == which else CHOWN for n in range(5)] for which in range(5)),
    *([SYS_ADMIN if n == which else 0 for n in range(5)] for which in range(5)),
    # Less than the grant, but not the same in each set.
    *([CHOWN if n == which else 0 for n in range(5)] for which in range(5)),
    *([0 if n == which else CHOWN for n in range(5)] for which in range(5)),
]


@pytest.mark.parametrize("sets", FORGED, ids=lambda sets: "-".join(f"{s:x}" for s in sets))
def test_what_was_not_granted_cannot_be_had(lying, user, sets):
    done = run(lying, user, sets, "echo ran; grep Cap /proc/self/status")
    assert (done.status, done.out) == (255, ""), done.err
    # The last line but those of a launch that was given up for a malformed plan.
    assert "not permitted" in done.err or "malformed" in done.err


@pytest.mark.parametrize("spoil", ["owner", "mode", "link", "form", "absent", "large", "folder"])
def test_c_reads_no_file_that_it_cannot_trust(lying, user, spoil):
    names = {"users": {user.pw_name: ["CAP_CHOWN"]}}
    aside = lying.file.with_suffix(".aside")
    lying.file.write_text(json.dumps(names))
    lying.file.chmod(0o644)
    folder = lying.file.parent
    try:
        if spoil == "owner":
            os.chown(lying.file, user.pw_uid, user.pw_gid)
        elif spoil == "mode":
            lying.file.chmod(0o664)
        elif spoil == "link":
            lying.file.rename(aside)
            lying.file.symlink_to(aside)
        elif spoil == "form":
            lying.file.write_text(json.dumps({**names, "more": 1}))
        elif spoil == "absent":
            lying.file.unlink()
        elif spoil == "large":
            lying.file.write_text(json.dumps(names) + " " * 70_000)
        else:
            folder.chmod(0o775)
        line = ["exec", "--add-caps", str(CHOWN), str(lying.sif), "sh", "-c", "echo ran"]
        done = forge.finish(forge.start(lying.program, line, user=user))
        # In a folder that others can write, the configuration too is not to be trusted.
        assert (done.status, done.out) == (255, ""), done.err
    finally:
        folder.chmod(0o755)
        lying.file.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    assert forge.left_behind() == []


def head(part: int, number: int = 0, argc: int = 0, envc: int = 0) -> str:
    return b"".join(n.to_bytes(4, "little") for n in (part, number, argc, envc)).hex()


STREAM, DIRECTORY, PROGRAM = 1, 2, 3
GOOD = head(PROGRAM, 0o22, 3, 1)


def test_a_program_that_is_asked_for_too_early_waits_until_keeper_has_nothing(lying, user):
    lying.lies.write_text(json.dumps([[GOOD, "program"]]))
    done = run(lying, user, [CHOWN], "echo the asked one")
    lying.lies.write_text("[]")
    keeper, _, own = done.out.partition("own\n")
    assert (caps(keeper), caps(own)) == ([0] * 5, [CHOWN] * 5), done.err
    assert done.status == 9


def test_nobody_but_keeper_says_go(lying, user):
    """Else the program would run on the host's root: nothing has been mounted so far."""
    lying.lies.write_text(json.dumps([["", "go"], [GOOD, "program"], ["", "wait"]]))
    done = run(lying, user, [CHOWN], "echo the asked one", flags=["-p"])
    lying.lies.write_text("[]")
    parent, _, own = done.out.partition("own\n")
    assert (caps(parent), caps(own)) == ([0] * 5, [CHOWN] * 5), done.err
    assert done.status == 9


MALFORMED = {
    "one byte": ["01", ""],
    "nothing": ["", "/etc/passwd"],
    "a longer frame": [GOOD + "00", "program"],
    "a shorter frame": [GOOD[:-2], "program"],
    "part zero": [head(0), "program"],
    "part unknown": [head(99), "program"],
    "no program": [GOOD, ""],
    "a file as program": [GOOD, "/etc/passwd"],
    "a folder as program": [GOOD, "/etc"],
    "not sealed": [GOOD, "unsealed"],
    "without its end": [head(PROGRAM, 0, 1, 0), "short"],
    "empty": [head(PROGRAM, 0, 1, 0), "empty"],
    "no argument": [head(PROGRAM, 0o22, 0, 4), "program"],
    "too few": [head(PROGRAM, 0o22, 2, 1), "program"],
    "too many": [head(PROGRAM, 0o22, 3, 2), "program"],
    "far too many": [head(PROGRAM, 0o22, 2**32 - 1, 2**32 - 1), "program"],
    "an odd umask": [head(PROGRAM, 0o7777, 3, 1), "program"],
    "a fourth stream": [head(STREAM, 3), "/etc/passwd"],
    "stream -1": [head(STREAM, 2**32 - 1), "/etc/passwd"],
    "no stream": [head(STREAM, 0), ""],
    "a stream with words": [head(STREAM, 0, 1), "/etc/passwd"],
    "a file as directory": [head(DIRECTORY), "/etc/passwd"],
    "no directory": [head(DIRECTORY), ""],
    "directory one": [head(DIRECTORY, 1), "/etc"],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_ends_the_launch(lying, user, name):
    lying.lies.write_text(json.dumps([MALFORMED[name]]))
    done = run(lying, user, [CHOWN], "echo ran")
    lying.lies.write_text("[]")
    assert (done.status, done.out) == (255, ""), done.err
    if name != "nothing":  # no bytes are how an end looks
        assert "malformed" in done.err
