"""Hostile frames on every socket: the launch ends with a line, a status, and nothing left.

Nobody but a stage holds these sockets, and the setuid flow takes no engine from a user, so the
frames come from an engine in the user-namespace flow, where keeper and rpc run the same code.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from apptainer_py.model import protocol as p
from tests import images
from tests.security import forge

SEED = 20250101
HEAD = struct.Struct("<2I6Q2HI")
ENGINE = """
import os, socket
from apptainer_py.kernel import _starter
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.runtime.engine import Operations, register_operations

SHOTS = {shots!r}
WHERE = {where!r}

def fire(name):
    fd = _starter.stage()[name]
    channel = socket.socket(fileno=os.dup(fd))
    for shot, extra in SHOTS:
        if extra == "silence":
            channel.close()
            os.close(fd)
            return
        try:
            socket.send_fds(channel, [shot], [2] * extra)
        except OSError:
            break
    channel.settimeout(0.2)
    try:
        while channel.recv(65536):
            pass
    except OSError:
        pass

class Hostile(Operations):
    def prepare_config(self, context):
        self.root = context.arguments[1]
        if WHERE == "keeper in prepare":
            fire("keeper_fd")
        facts = context.facts
        context.plan(ContainerPlan(image="x", uid=facts.uid, gid=facts.gid, flags=16))

    def create_container(self, context):
        mounting = context.mounting
        if WHERE == "keeper in setup":
            fire("keeper_fd")
        if WHERE == "rpc at first":
            fire("rpc_fd")
        mounting.session(1)
        facts = os.stat(self.root)
        mounting.root_directory(self.root, facts.st_dev, facts.st_ino, 0, "the root")
        if WHERE == "rpc before the layer":
            fire("rpc_fd")
        mounting.layer(protocol.LAYERKIND_NONE, "no layer")
        if WHERE == "rpc before the pivot":
            fire("rpc_fd")
        mounting.pivot()

    def start_process(self, context):
        raise context.execve(b"/bin/sleep", [b"sleep", b"1000"], [])

    def post_start_process(self, context):
        if WHERE == "keeper in run":
            fire("keeper_fd")

register_operations("hostile", Hostile)
"""


def frame(
    op: int,
    *,
    flags: int = 0,
    numbers: tuple[int, ...] = (),
    first: bytes | None = None,
    second: bytes | None = None,
    reserved: int = 0,
    lengths: tuple[int, int] | None = None,
    tail: bytes | None = None,
) -> bytes:
    """Return the frame of an operation; `lengths` and `tail` may lie."""
    texts = [b"" if text is None else text + b"\0" for text in (first, second)]
    sizes = lengths or tuple(len(text) for text in texts)
    six = (*numbers, *[0] * (6 - len(numbers)))
    body = b"".join(texts) if tail is None else tail
    return HEAD.pack(op, flags, *six, *sizes, reserved) + body


def plan(**fields: int) -> bytes:
    """Return a CONTAINER frame; `fields` are those of struct container_plan."""
    names = "spaces flags fuse_count group_count uid gid".split()
    head = [fields.get(name, 16 if name == "flags" else 0) for name in names]
    caps = [fields.get("caps", 0)] * 5
    packed = struct.pack("<6I32I5Q", *head, *[0] * 32, *caps)
    return struct.pack("<2I", p.OP_CONTAINER, fields.get("image_length", 0)) + packed + b"\0" * 1024


def randomly() -> list[tuple[bytes, int]]:
    dice = random.Random(SEED)
    return [(dice.randbytes(dice.choice((1, 3, 4, 16, 64, 65, 300, 9000))), 0) for _ in range(20)]


BIND = {"flags": p.BINDFLAG_READ_ONLY, "numbers": (0,)}
LEAN_INSTANCE = 16 | p.PLANFLAG_LEAN | p.PLANFLAG_INSTANCE | p.PLANFLAG_SHIM
KEEPER_SHOTS = {
    "random bytes": randomly(),
    "one byte": [(b"\1", 0)],
    "three bytes": [(b"\1\0\0", 0)],
    "unknown operation": [(frame(999), 0)],
    "operation zero": [(frame(0), 0)],
    "another server's operation": [(frame(p.OP_PIVOT), 0)],
    "an event": [(struct.pack("<4I", p.EVENT_GO, 1, 0, 0), 0)],
    "huge frame": [(b"\1\0\0\0" + b"x" * 60000, 0)],
    "plan cut short": [(plan()[:-1], 0)],
    "plan too long": [(plan() + b"x", 0)],
    "plan with unknown spaces": [(plan(spaces=1 << 20), 0)],
    "plan with unknown flags": [(plan(flags=16 | 1 << 20), 0)],
    "lean plan with --fakeroot": [(plan(flags=16 | p.PLANFLAG_LEAN | p.PLANFLAG_FAKEROOT), 0)],
    "lean plan of an instance": [(plan(spaces=1, flags=LEAN_INSTANCE), 0)],
    "lean plan with groups": [(plan(flags=16 | p.PLANFLAG_LEAN | p.PLANFLAG_GROUPS), 0)],
    "lean plan with capabilities": [(plan(flags=16 | p.PLANFLAG_LEAN, caps=1), 0)],
    "plan with many devices": [(plan(fuse_count=5), 0)],
    "plan with many groups": [(plan(group_count=33), 0)],
    "plan with a long image": [(plan(image_length=1025), 0)],
    "helpers with fields": [(frame(p.OP_HOST_HELPERS, flags=1), 0)],
    "helpers twice": [(frame(p.OP_HOST_HELPERS), 0)] * 2,
    "plain starter with text": [(frame(p.OP_PLAIN_STARTER, first=b"x"), 0)],
}
SETUP_SHOTS = {
    "random bytes": randomly(),
    "a second container": [(plan(), 0)],
    "helpers out of phase": [(frame(p.OP_HOST_HELPERS), 0)],
    "plain starter out of phase": [(frame(p.OP_PLAIN_STARTER), 0)],
    "no device": [(frame(p.OP_SERVE_IMAGE, numbers=(0, 0)), 1)],
    "device out of range": [(frame(p.OP_SERVE_IMAGE, numbers=(1 << 40, 0)), 1)],
    "image without a descriptor": [(frame(p.OP_SERVE_IMAGE, numbers=(0, 0)), 0)],
    "many descriptors": [(frame(p.OP_SERVE_IMAGE, numbers=(0, 0)), 100)],
}
FIRST_SHOTS = {
    "random bytes": randomly(),
    "one byte": [(b"\1", 0)],
    "unknown operation": [(frame(999), 0)],
    "keeper's operation": [(frame(p.OP_HOST_HELPERS), 0)],
    "root before the session": [(frame(p.OP_ROOT_FUSE, numbers=(0,)), 0)],
    "layer before the session": [(frame(p.OP_LAYER, numbers=(0,)), 0)],
    "bind before the session": [(frame(p.OP_BIND, first=b"/", second=b"/", **BIND), 0)],
    "pivot before the session": [(frame(p.OP_PIVOT), 0)],
    "session with flags": [(frame(p.OP_SESSION, flags=1, numbers=(1,)), 0)],
    "session of a huge size": [(frame(p.OP_SESSION, numbers=(1 << 60,)), 0)],
    "session with another number": [(frame(p.OP_SESSION, numbers=(1, 1)), 0)],
    "session with text": [(frame(p.OP_SESSION, numbers=(1,), first=b"x"), 0)],
    "session twice": [(frame(p.OP_SESSION, numbers=(1,)), 0)] * 2,
    "reserved field": [(frame(p.OP_SESSION, numbers=(1,), reserved=1), 0)],
    "many descriptors": [(frame(999), 200)],
    "huge frame": [(b"\x0a\0\0\0" + b"x" * 60000, 0)],
}
LAYER_SHOTS = {
    "a second root": [(frame(p.OP_ROOT_DIRECTORY, first=b"/", numbers=(1, 1)), 0)],
    "unknown layer": [(frame(p.OP_LAYER, numbers=(77,)), 0)],
    "underlay without a target": [(frame(p.OP_UNDERLAY_BIND, first=b"/bin"), 0)],
    "underlay out of the image": [(frame(p.OP_UNDERLAY_BIND, first=b"..", second=b"x"), 0)] * 2
    + [(b"x", 0)],
    "pivot before the layer": [(frame(p.OP_PIVOT), 0)],
}
LAST_SHOTS = {
    "random bytes": randomly(),
    "a second session": [(frame(p.OP_SESSION, numbers=(1,)), 0)],
    "a second layer": [(frame(p.OP_LAYER, numbers=(0,)), 0)],
    "bind with unknown flags": [(frame(p.OP_BIND, flags=1 << 30, first=b"/", second=b"/"), 0)],
    "bind of an unknown area": [(frame(p.OP_BIND, numbers=(9,), first=b"/", second=b"/"), 0)],
    "bind without a target": [(frame(p.OP_BIND, first=b"/"), 0)],
    "bind of a relative path": [(frame(p.OP_BIND, first=b"etc", second=b"/etc"), 0)],
    "bind to a relative path": [(frame(p.OP_BIND, first=b"/etc", second=b"etc"), 0)],
    "string longer than a path": [(frame(p.OP_BIND, first=b"/" * 4096, second=b"/"), 0)],
    "length beyond the frame": [(frame(p.OP_BIND, lengths=(400, 400), tail=b"/etc\0"), 0)],
    "string without an end": [(frame(p.OP_BIND, lengths=(4, 2), tail=b"/etc/\0"), 0)],
    "string with a NUL": [(frame(p.OP_BIND, first=b"/a\0b", second=b"/"), 0)],
    "bytes after the strings": [(frame(p.OP_BIND, lengths=(2, 2), tail=b"/\0/\0x"), 0)],
    "mount of an unknown kind": [(frame(p.OP_MOUNT, numbers=(99,), first=b"/proc"), 0)],
    "host name twice": [(frame(p.OP_HOSTNAME, first=b"x"), 0)] * 2 + [(b"x", 0)],
    "host name too long": [(frame(p.OP_HOSTNAME, first=b"x" * 300), 0)],
    "pivot with a number": [(frame(p.OP_PIVOT, numbers=(1,)), 0)],
}
RUN_SHOTS = {
    "a second container": [(plan(), 0)],
    "an image": [(frame(p.OP_SERVE_IMAGE, numbers=(0, 0)), 1)],
    "plain starter": [(frame(p.OP_PLAIN_STARTER), 0)],
    "random bytes": randomly(),
}
TABLE = {
    "keeper in prepare": KEEPER_SHOTS,
    "keeper in setup": SETUP_SHOTS,
    "keeper in run": RUN_SHOTS,
    "rpc at first": FIRST_SHOTS,
    "rpc before the layer": LAYER_SHOTS,
    "rpc before the pivot": LAST_SHOTS,
}
CASES = [(where, name) for where, shots in TABLE.items() for name in shots]


@pytest.fixture(autouse=True, scope="module")
def orphans(require_root):
    forge.adopt_orphans()


@pytest.fixture(scope="module")
def root() -> Path:
    return images.small_tree(images.shared_folder())


def launch(product, user, folder, root, where, shots):
    file = folder / "engine.py"
    file.write_text(ENGINE.format(shots=shots, where=where))
    data = forge.request(
        product.build_id,
        ["hostile", str(root)],
        engine="hostile",
        engine_file=str(file),
        flow="userns",
    )
    return forge.run_starter(product.starter, data, user=user)


@pytest.mark.parametrize(("where", "name"), CASES)
def test_hostile_frames_end_the_launch(product, user, user_tmp, root, where, name):
    done = launch(product, user, user_tmp, root, where, TABLE[where][name])
    assert forge.left_behind() == []
    assert forge.host_mounts(product) == []
    assert done.status not in (0, -11, -6, -7), done.err
    lines = done.err.splitlines()
    assert lines, "no line"
    assert all(line.startswith(("FATAL:   ", "INFO:    ")) for line in lines), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("where", ["keeper in prepare", "keeper in setup", "rpc at first"])
def test_a_socket_that_is_closed_ends_the_launch(product, user, user_tmp, root, where):
    done = launch(product, user, user_tmp, root, where, [(b"", "silence")])
    assert forge.left_behind() == []
    assert done.status not in (0, -11, -6, -7), done.err
    assert done.err.splitlines()


def test_an_engine_that_fires_nothing_is_started(product, user, user_tmp, root):
    """The launches above end because of their frames, not because the engine is broken."""
    file = user_tmp / "engine.py"
    file.write_text(ENGINE.format(shots=[], where="").replace('b"1000"', 'b"0"'))
    data = forge.request(
        product.build_id, ["x", str(root)], engine="hostile", engine_file=str(file), flow="userns"
    )
    done = forge.run_starter(product.starter, data, user=user)
    assert (done.status, done.err) == (0, "")
