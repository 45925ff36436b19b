"""Containers of `apptainer-py oci`: the same bed, and the other program's words."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.oci import bed as beds


class Desk(beds.Bed):
    """A bed whose words are those of Apptainer's own `oci` commands."""

    def __init__(self, runtime: beds.Runtime, place: Path) -> None:
        super().__init__(runtime, place)
        self.sockets: list[socket.socket] = []

    def attach(self, name: str) -> Client:
        """Connect to the streams of a container."""
        made = Client(self.folder(name) / "attach.sock")
        self.sockets.append(made.socket)
        return made

    def listener(self, name: str) -> Listener:
        """Listen for the changes of a container."""
        made = Listener(self.place / name)
        self.sockets.append(made.socket)
        return made

    def argv(self, *words: str | Path) -> list[str]:
        program = str(Path(self.runtime.program).with_name("apptainer-py"))
        return [program, "oci", "--root", str(self.root), *(str(word) for word in words)]

    def fails(self, *words: str | Path, **how: Any) -> str:
        """Run a command that must fail as Apptainer's do; return its message."""
        done = self.call(*words, **how)
        assert (done.returncode, done.stdout) == (255, ""), (words, done)
        assert done.stderr.startswith("FATAL:   ")
        assert done.stderr.count("\n") == 1
        return done.stderr.removeprefix("FATAL:   ").rstrip("\n")

    def make(self, bundle: beds.Bundle, *flags: str | Path, stdin: Any = None) -> str:
        """Create a container, whose own streams are files of the bundle; return its name."""
        bundle.write()
        name = self.name()
        out, err = self.out(name), self.err(name)
        with out.open("w") as stdout, err.open("w") as stderr:
            done = subprocess.run(
                self.argv("create", "-b", bundle.path, *flags, name),
                stdin=stdin if stdin is not None else subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=60,
                check=False,
            )
        assert done.returncode == 0, err.read_text()
        return name

    def out(self, name: str) -> Path:
        return self.place / f"{name}.out"

    def err(self, name: str) -> Path:
        return self.place / f"{name}.err"

    def state(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.good("state", name).stdout))

    def folder(self, name: str) -> Path:
        return self.root / name

    def until(self, name: str, status: str) -> dict[str, Any]:
        """Return the state once it has a status."""
        beds.eventually(lambda: self.state(name)["status"] == status, f"{name} is {status}")
        return self.state(name)

    def monitor(self, name: str) -> int:
        """Return the process that stays with a container."""
        title = f"Apptainer OCI {name}"
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].decode(errors="replace") == title:
                return int(entry.parent.name)
        return 0


class Client:
    """A connection to a container's attach.sock."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(beds.DEADLINE_S)
        self.socket.connect(str(path))
        self.got = bytearray()

    def until(self, wanted: bytes) -> bytearray:
        """Read until something has come."""
        while wanted not in self.got:
            more = self.socket.recv(65536)
            assert more, (wanted, self.got[-500:])
            self.got += more
        return self.got

    def rest(self) -> bytearray:
        """Read to the end."""
        while more := self.socket.recv(65536):
            self.got += more
        return self.got

    def close(self) -> None:
        self.socket.close()


def command(path: Path, data: bytes) -> None:
    """Say something to a control.sock, and wait for the answer, which is the end."""
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(beds.DEADLINE_S)
        made.connect(str(path))
        made.sendall(data)
        try:
            assert made.recv(1) == b""
        except ConnectionResetError:
            return


class Listener:
    """A socket that is told of each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(64)
        self.socket.settimeout(beds.DEADLINE_S)

    def next(self) -> dict[str, Any]:
        connection, _ = self.socket.accept()
        text = b""
        with connection:
            connection.settimeout(beds.DEADLINE_S)
            while more := connection.recv(65536):
                text += more
        return dict(json.loads(text))

    def quiet(self) -> bool:
        return not select.select([self.socket], [], [], 0)[0]


@pytest.fixture
def desk(request: pytest.FixtureRequest, require_root: None) -> Iterator[Desk]:
    """A place for one test; it fails if a container, mount, cgroup or monitor is left."""
    program = os.environ.get("OCI_OURS")
    if program is None:
        program = f"{request.getfixturevalue('product').bindir}/apptainer-py-oci"
    place = Path(tempfile.mkdtemp(dir=beds.shared_folder()))
    place.chmod(0o755)
    made = Desk(beds.Runtime("ours", program), place)
    beds.subreaper(on=True)
    try:
        yield made
    finally:
        for one in made.sockets:
            one.close()
        for name in made.ids:
            made.call("delete", "--force", name)
        beds.reap()
        beds.subreaper(on=False)
        left = beds.mounts_below(place)
        states = os.listdir(made.root) if made.root.is_dir() else []
        staying = [name for name in made.ids if made.monitor(name)]
        groups = [found for name in made.ids for found in beds.cgroups_named(name)]
        shutil.rmtree(place, ignore_errors=True)
    assert (left, states, staying, groups) == ([], [], [], [])
