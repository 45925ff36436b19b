"""The administrator's record of each launch: complete, one line, not to be forged or split."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import own_install
from tests.own_install import Installation
from tests.security import elsewhere

HOSTILE = [
    "new\nline",
    "carriage\rreturn",
    'quote"s, {"uid":0}',
    "back\\slash\\",
    "tab\tbell\x07escape\x1b[2J",
    "delete\x7f",
    "bidi \u202eevil\u202c \u2066x\u2069",
    "line\u2028separator\u2029next\u0085line",
    "not utf-8 \udcff\udcfe",
    '"}\n{"program":"apptainer-py","uid":0,"decision":"allowed"}',
    "%s%n%x",
    "<13>forged: priority",
    "long " + "x" * 240,
]


@pytest.fixture
def sink(own) -> Iterator[Path]:
    path = own.place / "audit.log"
    own.configure(f"audit log = {path}")
    yield path
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def records(sink: Path) -> list[dict[str, Any]]:
    """Return the records; each must be one line of plain ASCII and valid JSON."""
    content = sink.read_bytes()
    assert content.endswith(b"\n")
    lines = content[:-1].split(b"\n")
    for line in lines:
        assert all(0x20 <= byte < 0x7F for byte in line), line
        assert len(line) < 4096
    return [json.loads(line) for line in lines]


def test_one_record_for_each_launch(own, sif, sink):
    for number in range(3):
        assert own.run("exec", sif, "sh", "-c", f"exit {number}").returncode == number
    found = records(sink)
    assert len(found) == 3
    for record in found:
        assert record["program"] == "apptainer-py"
        assert (record["uid"], record["gid"]) == (own.user.pw_uid, own.user.pw_gid)
        assert record["decision"] == "begun"
        assert record["image"] == str(sif)
        assert record["payload_caps"] == 0
    assert len({record["pid"] for record in found}) == 3
    facts = sink.stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (0, 0, 0o600)


def test_an_image_of_another_namespace_is_recorded_as_such(own, sif, sink):
    """There the user puts any file into any directory, and the kernel tells that path of it."""
    script = f"mount -t tmpfs none /mnt && cp {sif} /mnt/image.sif"
    with elsewhere.namespace(own, script) as root:
        done = own.run("exec", f"{root}/mnt/image.sif", "true")
    assert done.returncode == 0, done.stderr
    begun, judged = records(sink)
    assert begun["image"] == f"{root}/mnt/image.sif"  # as typed: keeper itself sees nothing there
    assert judged["image"] == "(unreachable)/mnt/image.sif"


def test_a_join_is_recorded_by_whom_it_enters(own, sif, sink):
    """The instance's own record is its user's file, and says what that user likes."""
    assert own.run("instance", "start", sif, "audited").returncode == 0
    try:
        folder = Path(own.user.pw_dir, ".apptainer/instances/app")
        record = next(folder.glob("*/*/audited/audited.json"))
        said = json.loads(record.read_text())
        record.write_text(json.dumps({**said, "image": "/approved.sif"}))
        assert own.run("exec", "instance://audited", "true").returncode == 0
    finally:
        assert own.run("instance", "stop", "audited").returncode == 0
    shown = [record["image"] for record in records(sink)]
    assert shown[0] == str(sif)
    assert shown[-1] == f"/proc/{said['pid']}"


def test_record_is_there_before_the_payload(own, sif, sink):
    """Whoever kills the launch is on record already."""
    go = own.start("exec", sif, "sh", "-c", "echo ready; exec sleep 100")
    with go:
        own_install.read_until(go.stdout.fileno(), b"ready")
        assert len(records(sink)) == 1
        go.kill()


def test_other_flows_write_none(own, sif, sink):
    assert own.run("exec", "-u", sif, "true").returncode == 0
    assert own.run("exec", sif, "true", root=True).returncode == 0
    assert not sink.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_forges_nothing(own, sif, sink, name):
    place = Path(tempfile.mkdtemp(dir=own.place))
    place.chmod(0o755)
    image = place / name.replace("/", "_")
    try:
        os.link(sif, image)
    except OSError:
        image.write_bytes(sif.read_bytes())
        image.chmod(0o644)
    try:
        done = own.run("exec", image, "true")
        assert done.returncode == 0, done.stderr
    finally:
        image.unlink()
        place.rmdir()
    found = records(sink)
    assert len(found) == 1
    assert found[0]["uid"] == own.user.pw_uid
    # Bytes, each escaped by itself: what was typed can be had back.
    shown = found[0]["image"].encode("latin-1")
    assert os.fsencode(image).startswith(shown)
    assert len(shown) > 40


def test_a_path_of_four_thousand_bytes(own, sif, sink):
    """As long as a path may be, of bytes that each need six: cut, but whole as a record."""
    top = Path(tempfile.mkdtemp(dir=own.place))
    top.chmod(0o755)
    here = os.open(top, os.O_RDONLY)
    parts = ["\x01" * 250] * 14
    opened = [here]
    for part in parts:
        os.mkdir(part, 0o755, dir_fd=opened[-1])
        opened.append(os.open(part, os.O_RDONLY, dir_fd=opened[-1]))
    fd = os.open("i.sif", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=opened[-1])
    with open(fd, "wb") as file:
        file.write(sif.read_bytes())
    image = "/".join([str(top), *parts, "i.sif"])
    done = own.run("exec", image, "true")
    for number in range(len(parts), 0, -1):
        if number == len(parts):
            os.unlink("i.sif", dir_fd=opened[number])
        os.rmdir(parts[number - 1], dir_fd=opened[number - 1])
    for fd in opened:
        os.close(fd)
    top.rmdir()
    found = records(sink)
    assert len(found) == 1, done.stderr
    assert found[0]["decision"] == "begun"


def test_refused_callers_are_recorded(own, sif, sink):
    own.configure(f"audit log = {sink}\nallow setuid users = daemon")
    assert own.run("exec", sif, "true").returncode == 0  # in the other flow
    found = records(sink)
    assert len(found) == 1
    assert found[0]["decision"] != "begun"
    assert found[0]["uid"] == own.user.pw_uid
    assert "allow setuid users" in found[0]["decision"]


def test_refused_images_are_recorded(own, sif, sink):
    own.configure(f"audit log = {sink}\nlimit container owners = daemon")
    assert own.run("exec", sif, "true").returncode == 255
    found = records(sink)
    assert [record["decision"] for record in found] == ["begun", "refused"]
    assert {record["image"] for record in found} == {str(sif)}


@pytest.mark.parametrize(
    ("directive", "words"),
    [
        ("user bind control = no", ("-H", "/tmp")),
        ("enable overlay = no", ("--writable-tmpfs",)),
        ("enable underlay = no", ("--underlay",)),
        ("allow container sif = no", ()),
    ],
)
def test_what_the_administrator_forbids_is_recorded_as_refused(own, sif, sink, directive, words):
    own.configure(f"audit log = {sink}\n{directive}")
    done = own.run("exec", *words, sif, "true")
    assert done.returncode == 255
    found = records(sink)
    decisions = [record["decision"] for record in found]
    assert decisions in (["begun", "refused"], ["refused"]), done.stderr
    assert {record["image"] for record in found} == {str(sif)}


@pytest.mark.parametrize(
    "words",
    [
        ("-B", "/nonexistent:/given", "{sif}", "true"),
        ("-H", "relative:also", "{sif}", "true"),
        ("--writable", "{sif}", "true"),
        ("/nonexistent.sif", "true"),
    ],
)
def test_launches_of_which_nothing_came_are_recorded(own, sif, sink, words):
    done = own.run("exec", *(word.format(sif=sif) for word in words))
    assert done.returncode == 255
    found = records(sink)
    assert [record["decision"] for record in found] == ["begun", "failed"]
    assert len({record["image"] for record in found}) == 1
    assert len({record["pid"] for record in found}) == 1


def test_a_launch_that_is_interrupted_is_recorded(own, sif, sink):
    """Before the payload; once it runs, keeper has no right left to write with."""
    with own.start("exec", sif, "sleep", "100") as process:
        own_install.eventually(sink.exists, "it has begun")
        process.terminate()
        process.wait(timeout=10)
    decisions = [record["decision"] for record in records(sink)]
    assert decisions in (["begun"], ["begun", "failed"])


@pytest.mark.parametrize("kind", ["owner", "group-writable", "link", "directory", "fifo", "gone"])
def test_sink_that_is_not_to_be_trusted(own, sif, sink, kind):
    """No record, no launch."""
    victim = own.place / "victim"
    victim.write_text("")
    if kind == "owner":
        sink.touch()
        os.chown(sink, own.user.pw_uid, 0)
    elif kind == "group-writable":
        sink.touch()
        sink.chmod(0o620)
    elif kind == "link":
        sink.symlink_to(victim)
    elif kind == "directory":
        sink.mkdir()
    elif kind == "fifo":
        os.mkfifo(sink)
    else:
        own.configure("audit log = /nonexistent/audit.log")
    done = own.run("exec", sif, "true", timeout_s=20)
    assert done.returncode == 255
    assert "audit record cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert victim.read_text() == ""
    victim.unlink()
    assert own.run("exec", "-u", sif, "true").returncode == 0


def test_full_sink(own, sif, sink):
    own.configure("audit log = /dev/full")
    assert own.run("exec", sif, "true").returncode == 255
    script = (
        'mount -t tmpfs -o size=4k,mode=755 tmpfs "$1"; head -c 4096 /dev/zero > "$1/audit.log"; '
        'shift; exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"'
    )
    point = own.place / "small"
    point.mkdir()
    own.configure(f"audit log = {point}/audit.log")
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script,
            str(own.user.pw_uid), point, own.program, "exec", sif, "true"]  # fmt: skip
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd="/", env=own.environment()
    )
    point.rmdir()
    assert done.returncode == 255
    assert "audit record cannot be written" in done.stderr


def test_file_is_appended_to(own, sif, sink):
    sink.write_text('{"before":1}\n')
    sink.chmod(0o600)
    assert own.run("exec", sif, "true").returncode == 0
    assert records(sink)[0] == {"before": 1}
    assert len(records(sink)) == 2


CREDENTIALS = struct.Struct("=3i")  # struct ucred: pid, uid, gid


def with_dev_log(own: Installation, sif: Path, serve: str) -> SimpleNamespace:
    """Launch with a /dev/log of our own, in a mount namespace of its own; return what it got.

    The kernel tells who sent each message, as it tells the real logger.
    """
    place = Path(tempfile.mkdtemp(dir=own.place))
    place.chmod(0o755)
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(place / "log"))
    (place / "log").chmod(0o666)
    log.setblocking(False)
    log.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if serve == "full":
        log.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        filler.setblocking(False)
        try:
            while True:
                filler.sendto(b"x", str(place / "log"))
        except BlockingIOError:
            filler.close()
    # A new tmpfs over /dev with what a launch needs of it.
    script = (
        'mkdir "$1/dev"; mount --rbind /dev "$1/dev"; mount -t tmpfs -o mode=755 tmpfs /dev; '
        "for n in null zero full random urandom tty fuse loop-control; do : > /dev/$n; "
        'mount --bind "$1/dev/$n" /dev/$n; done; ln -s "$1/log" /dev/log; shift; '
        'exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"'
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script,
            str(own.user.pw_uid), place, own.program, "exec", sif, "true"]  # fmt: skip
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd="/", env=own.environment(),
        timeout=20,
    )  # fmt: skip
    got, senders = [], []
    try:
        while True:
            message, extra, _, _ = log.recvmsg(65536, socket.CMSG_SPACE(CREDENTIALS.size))
            got.append(message)
            senders += [CREDENTIALS.unpack(data) for _, _, data in extra]
    except BlockingIOError:
        log.close()
    (place / "log").unlink()
    (place / "dev").rmdir()
    place.rmdir()
    return SimpleNamespace(status=done.returncode, got=got, senders=senders, err=done.stderr)


def test_syslog(own, sif):
    own.configure("audit log = syslog")
    done = with_dev_log(own, sif, "ready")
    assert done.status == 0, done.err
    assert len(done.got) == 1
    head, _, record = done.got[0].partition(b": ")
    assert head == b"<85>apptainer-py"
    assert json.loads(record)["uid"] == own.user.pw_uid
    assert b"\n" not in done.got[0]


def test_syslog_sees_that_root_sent_the_record(own, sif):
    """Anybody may write to /dev/log; what the caller sends itself has the caller's number on it."""
    own.configure("audit log = syslog")
    done = with_dev_log(own, sif, "ready")
    assert done.status == 0, done.err
    pids = [json.loads(message.partition(b": ")[2])["pid"] for message in done.got]
    assert [(pid, uid) for pid, uid, _ in done.senders] == [(pid, 0) for pid in pids]


def test_syslog_that_takes_nothing_stops_nobody(own, sif):
    own.configure("audit log = syslog")
    done = with_dev_log(own, sif, "full")
    assert done.status == 0, done.err
    assert all(message == b"x" for message in done.got)


def test_no_record_where_none_is_wanted(own, sif):
    own.configure("audit log = none")
    done = with_dev_log(own, sif, "ready")
    assert (done.status, done.got) == (0, []), done.err
