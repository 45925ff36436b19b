"""Connections without a proxy: what is kept, what is not, and what a server cannot make of them."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader

import pytest

from apptainer_py.registry.direct import Connections, Headers
from apptainer_py.registry.server import RegistryError
from apptainer_py.registry.server import Server as RegistryServer

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


def test_an_ipv6_address_without_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(address: tuple[str, int], *_: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    client = Connections(lambda: pytest.fail("no TLS here"), (5, 5))
    with pytest.raises(ConnectionRefusedError):
        client.ask("GET", "http://[2001:db8::5]/", {}, None)
    assert asked == [("2001:db8::5", 80)]


def test_an_address_that_is_no_utf8() -> None:
    with asking([EMPTY]) as (server, ask):
        ask(path="/\udcff?\udcfe")
        with pytest.raises(http.client.InvalidURL):
            ask(path="/\ud800")
    assert server.asked[0][0].split(b" ")[1] == b"/%FF?%FE"


def test_an_answer_before_the_answer_ends_a_connection() -> None:
    with asking([b"HTTP/1.1 103 Early Hints\r\n\r\n", EMPTY], [EMPTY]) as (server, ask):
        ask()
        ask()
    assert len(server.asked) == 2


def test_nothing_is_read_of_an_end_without_bytes() -> None:
    """TLS says by an error that there is nothing to read."""
    with asking([EMPTY, EMPTY]) as (server, _):
        client = Connections(lambda: pytest.fail("no TLS here"), (5, 5))
        for _ in range(2):
            with client.ask("HEAD", server.url, {}, None) as answer:
                stream = answer._response.fp  # type: ignore[attr-defined]
                answer._response.fp = Unready(stream)  # type: ignore[attr-defined]
        client.close()
    assert len(server.asked) == 1


class Unready:
    def __init__(self, stream: BufferedReader) -> None:
        self.close = stream.close
        self.read = stream.read

    def peek(self, _size: int) -> bytes:
        raise ssl.SSLWantReadError


def test_a_small_answer_that_was_cut() -> None:
    server = Server([b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"a": 1}'])
    name = server.url.removeprefix("http://")
    with RegistryServer(name, https=False) as client:
        answer = client._ask("GET", "/", scope="")
        with answer, pytest.raises(RegistryError, match="the connection was cut"):
            client._small(answer, 1000)
    server.close()
