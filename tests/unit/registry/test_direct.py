"""Connections without a proxy: what is kept, what is not, and what a server cannot make of them."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from apptainer_py.registry.direct import Connections, Headers

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Server:
    """Gives fixed answers, each connection the next ones of the list; then it closes."""

    def __init__(self, *connections: list[bytes]) -> None:
        self.asked: list[list[bytes]] = []
        self._answers = connections
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answers in self._answers:
            connection, _ = self._listening.accept()
            self.asked.append([])
            with connection, connection.makefile("rb") as stream:
                for answer in answers:
                    first = line = stream.readline()
                    while line not in (b"", b"\r\n"):
                        line = stream.readline()
                    self.asked[-1].append(first)
                    connection.sendall(answer)

    def close(self) -> None:
        self._thread.join(10)
        self._listening.close()


@contextmanager
def asking(*connections: list[bytes]) -> Iterator[tuple[Server, Callable[..., bytes]]]:
    server = Server(*connections)
    client = Connections(lambda: pytest.fail("no TLS here"), (5, 5))

    def ask(method: str = "GET", path: str = "/", most: int = 1 << 20, token: str = "") -> bytes:
        headers = {"Authorization": token} if token else {}
        with client.ask(method, server.url + path, headers, None) as answer:
            return answer.read(most) if most else b""

    try:
        yield server, ask
    finally:
        client.close()
        server.close()


def test_one_connection_does_for_all() -> None:
    missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"
    with asking([missing, missing + b"not there", EMPTY]) as (server, ask):
        ask("HEAD")
        ask(most=0)  # a short end that has come is read, for the next one
        ask(path="/a b?c=d e")
    assert [line.split(b" ")[:2] for line in server.asked[0]] == [
        [b"HEAD", b"/"], [b"GET", b"/"], [b"GET", b"/a%20b?c=d%20e"],
    ]  # fmt: skip


def test_what_is_not_read_is_not_taken_for_the_next_answer() -> None:
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + bytes(99999)
    with asking([long], [EMPTY]) as (server, ask):
        assert ask(most=10) == bytes(10)
        assert ask() == b""
    assert len(server.asked) == 2


def test_a_connection_that_was_closed_meanwhile() -> None:
    with asking([EMPTY], [EMPTY]) as (server, ask):
        ask()
        server._thread.join(0.1)
        ask()
    assert len(server.asked) == 2


def test_an_end_that_comes_too_early() -> None:
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
    with asking([cut]) as (_, ask), pytest.raises(http.client.IncompleteRead):
        ask()


@pytest.mark.parametrize("size", [b"-1", b"-5", b"ffffffffffffffff", b"x"])
def test_the_size_of_a_chunk_is_no_ones_memory(size: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with asking([head + size + b"\r\n" + bytes(1 << 20)]) as (_, ask):
        try:
            assert len(ask(most=1000)) <= 1000
        except (http.client.HTTPException, OSError):
            pass


def test_a_header_that_cannot_be_sent_is_not_told() -> None:
    with asking([EMPTY]) as (_, ask):
        with pytest.raises(http.client.InvalidURL) as caught:
            ask(token="secret\nX: y")
        assert "secret" not in str(caught.value)


def test_headers_are_found_in_any_case() -> None:
    headers = Headers([("WWW-Authenticate", "Basic"), ("www-authenticate", "Bearer")])
    assert headers.get("Www-Authenticate") == headers["WWW-AUTHENTICATE"] == "Basic, Bearer"
    assert "location" not in headers
    assert headers.get("Location") is None
