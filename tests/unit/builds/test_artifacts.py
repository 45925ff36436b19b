"""A SIF file on its way into a registry, while somebody writes to it."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from apptainer_py.builds import artifacts
from apptainer_py.builds.digesting import Digesting, FileChanged
from apptainer_py.builds.fetching import Fetching
from apptainer_py.registry.reference import Reference
from tests import fake_registry
from tests.fake_registry import digest, send

SIZE = 3 << 20
BLOBS = "/v2/lib/x/blobs"


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(SIZE // 3)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(SIZE))


@pytest.mark.parametrize("proxy", [False, True], ids=["direct", "proxy"])
@pytest.mark.parametrize("change", [None, cut, lengthen], ids=["still", "shorter", "longer"])
def test_a_file_that_changes_while_it_is_pushed(
    change: Callable[[Path], None] | None,
    proxy: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x.sif"
    path.write_bytes(bytes(SIZE))
    taken = []

    def begin(handler: BaseHTTPRequestHandler) -> bool:
        if change is not None and digest(b"{}") in fake.blobs:
            change(path)
        send(handler, 202, b"", {"Location": f"{BLOBS}/up"})
        return True

    def take(handler: BaseHTTPRequestHandler) -> bool:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        fake.blobs[digest(data)] = data
        taken.append(len(data))
        send(handler, 201, b"")
        return True

    def name(handler: BaseHTTPRequestHandler) -> bool:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        send(handler, 201, b"")
        return True

    with fake_registry.running() as fake:
        host, start = fake.host, ""
        if proxy:
            # Whatever it is asked for, a proxy is asked by the whole address.
            host, start = "registry.invalid", "http://registry.invalid"
            monkeypatch.setenv("http_proxy", f"http://{fake.host}")
            monkeypatch.delenv("no_proxy", raising=False)
        fake.tricks[f"{start}{BLOBS}/uploads/"] = begin
        fake.tricks[f"{start}{BLOBS}/up"] = take
        fake.tricks[f"{start}/v2/lib/x/manifests/1"] = name
        reference = Reference(host=host, repository="lib/x", tag="1")
        with path.open("rb") as file, Digesting(file) as digesting:
            words = (str(path), digesting, reference, Fetching(no_https=True), {}, {})
            if change is None:
                assert artifacts.push(*words)
                assert taken == [2, SIZE]
                return
            with pytest.raises(FileChanged, match=r"x\.sif has changed while it was pushed"):
                artifacts.push(*words)
        # No byte of the file behind the end that it had; no manifest names what is not there.
        assert taken in ([2], [2, 0], [2, SIZE // 3], [2, SIZE])
        assert not [one for one in fake.asked if "/manifests/" in one[1]]
