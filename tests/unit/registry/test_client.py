"""A registry's HTTP, against one that misbehaves."""

from __future__ import annotations

import gzip
import io
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest

from apptainer_py.builds import remote, uris
from apptainer_py.builds.fetching import Fetching
from apptainer_py.cache.store import Cache
from apptainer_py.registry import server, watch
from apptainer_py.registry.accounts import Account
from apptainer_py.registry.client import NotAllowed, NotThere, Registry, RegistryError
from apptainer_py.registry.reference import Reference
from tests import fake_registry
from tests.fake_registry import Fake, digest, send

HOW = Fetching(no_https=True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(server.time, "sleep", lambda _s: None)
    with fake_registry.running() as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(str(tmp_path / "cache"))
    made.prepare()
    return made


def fetch(fake: Fake, cache: Cache, tag: str = "1", **options: str) -> remote.Named:
    how = HOW.replace(**options)
    reference = Reference(host=fake.host, repository="lib/x", tag=tag)
    with remote.registry_of(reference, how, {"HOME": cache.folder}) as registry:
        named = remote.look_up(registry, reference, how)
        remote.Arriving(registry, named, cache, lambda _size: None).fetch()
        return named


def blobs(cache: Cache) -> dict[str, bytes]:
    return {f"sha256:{e.name}": Path(e.path).read_bytes() for e in cache.entries(("blob",))}


def test_an_image_arrives_whole(fake: Fake, cache: Cache) -> None:
    row = fake.add_image("1", b"one" * 100_000, b"two", b"two")
    named = fetch(fake, cache)
    assert named.manifest.digest == row["digest"]
    assert blobs(cache) == {**fake.blobs, row["digest"]: named.manifest.data}
    before = len(fake.asked)
    fetch(fake, cache)
    assert len(fake.asked) == before + 1


def test_the_image_for_the_machine_is_chosen(fake: Fake, cache: Cache) -> None:
    rows = [fake.add_image(m, m.encode(), machine=m) for m in ("s390x", "amd64", "arm64")]
    fake.add_index("1", *rows)
    assert fetch(fake, cache, arch="arm64").manifest.digest == rows[2]["digest"]
    with pytest.raises(
        RegistryError, match="no image for riscv64; there is one for: amd64, arm64, s390x"
    ):
        fetch(fake, cache, arch="riscv64")


def test_an_index_of_an_index_of_itself_ends(fake: Fake, cache: Cache) -> None:
    row = {"mediaType": fake_registry.INDEX, "platform": {"architecture": "amd64"}, "size": 1}
    fake.add_index("a", {**row, "digest": "sha256:" + "0" * 64})
    with pytest.raises(NotThere):
        fetch(fake, cache, "a")


def test_a_connection_that_breaks_is_gone_on_with(fake: Fake, cache: Cache) -> None:
    data = bytes(range(256)) * 4000
    fake.add_image("1", data)
    left = [3]

    def broken(handler: BaseHTTPRequestHandler) -> bool:
        if not left[0]:
            return False
        left[0] -= 1
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : start + 100_000])
        handler.close_connection = True
        return True

    fake.tricks[f"/v2/lib/x/blobs/{digest(data)}"] = broken
    fetch(fake, cache)
    assert blobs(cache)[digest(data)] == data
    ranges = [headers.get("Range") for _, path, headers in fake.asked if digest(data) in path]
    assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


@pytest.mark.parametrize("instead", [b"other", b"data and more", b"dat"])
def test_what_its_digest_does_not_say_is_refused(fake: Fake, cache: Cache, instead: bytes) -> None:
    fake.add_image("1", b"data")
    fake.blobs[digest(b"data")] = instead
    with pytest.raises(RegistryError):
        fetch(fake, cache)
    assert digest(b"data") not in blobs(cache)


def test_a_part_of_something_else_is_thrown_away(fake: Fake, cache: Cache) -> None:
    fake.add_image("1", b"data" * 10)
    part = cache.path("blob", digest(b"data" * 10).partition(":")[2]) + ".part.0"
    Path(part).write_bytes(b"what is this")
    fetch(fake, cache)
    assert blobs(cache)[digest(b"data" * 10)] == b"data" * 10


def test_a_manifest_is_what_its_digest_says(fake: Fake, cache: Cache) -> None:
    row = fake.add_image("1", b"data")
    fake.manifests[str(row["digest"])] = fake.manifests["1"][0], fake.manifests["1"][1] + b" "
    reference = Reference(host=fake.host, repository="lib/x", digest=str(row["digest"]))
    with Registry(fake.host, https=False) as registry:
        with pytest.raises(RegistryError, match="another one"):
            remote.look_up(registry, reference, HOW)


def test_a_registry_that_is_busy_is_asked_again(fake: Fake, cache: Cache) -> None:
    fake.add_image("1", b"data")
    answers = iter([(429, {"Retry-After": "1"}), (503, {}), (500, {})])

    def busy(handler: BaseHTTPRequestHandler) -> bool:
        status, headers = next(answers, (0, {}))
        if status:
            send(handler, status, b"", headers)
        return bool(status)

    fake.tricks["/v2/lib/x/manifests/1"] = busy
    fetch(fake, cache)


def test_a_wait_without_end_is_not_waited(fake: Fake, cache: Cache) -> None:
    path = "/v2/lib/x/manifests/1"
    fake.tricks[path] = lambda h: send(h, 429, b"", {"Retry-After": "86400"}) or True
    with pytest.raises(RegistryError, match="asks to wait"):
        fetch(fake, cache)


@pytest.mark.parametrize("bearer", [False, True])
def test_accounts(fake: Fake, cache: Cache, bearer: bool) -> None:
    fake.account, fake.bearer = ("alice", "s:cret"), bearer
    fake.add_image("1", b"data")
    if not bearer:
        with pytest.raises(NotAllowed):
            fetch(fake, cache)
        with pytest.raises(NotAllowed, match="alice"):
            fetch(fake, cache, docker_username="alice", docker_password="wrong")
    fetch(fake, cache, docker_username="alice", docker_password="s:cret")
    assert digest(b"data") in blobs(cache)


def test_an_account_does_not_follow_to_another_host(fake: Fake, cache: Cache) -> None:
    fake.account = ("alice", "secret")
    fake.add_image("1", b"data")
    with fake_registry.running() as other:
        other.blobs = fake.blobs
        path = f"/v2/lib/x/blobs/{digest(b'data')}"
        there = {"Location": f"http://{other.host}{path}"}

        def lead(handler: BaseHTTPRequestHandler) -> bool:
            send(handler, 307, b"", there) if handler.headers.get("Authorization") else None
            return bool(handler.headers.get("Authorization"))

        fake.tricks[path] = lead
        fetch(fake, cache, docker_username="alice", docker_password="secret")
        assert [h.get("Authorization") for _, p, h in other.asked if p == path] == [None]


def test_redirections_end(fake: Fake, cache: Cache) -> None:
    path = "/v2/lib/x/manifests/1"
    fake.tricks[path] = lambda h: send(h, 302, b"", {"Location": path}) or True
    with pytest.raises(RegistryError, match="without end"):
        fetch(fake, cache)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://x/y", "//"])
def test_redirections_stay_with_http(fake: Fake, cache: Cache, place: str) -> None:
    path = "/v2/lib/x/manifests/1"
    fake.tricks[path] = lambda h: send(h, 302, b"", {"Location": place}) or True
    with pytest.raises(RegistryError):
        fetch(fake, cache)


def test_https_does_not_become_http() -> None:
    registry = Registry("r.io", account=Account(username="a", password="b"))
    with pytest.raises(RegistryError, match="from HTTPS to HTTP"):
        registry._checked("http://r.io/x", "https://r.io/x")
    with pytest.raises(RegistryError, match="from HTTPS to HTTP"):
        registry._token({"realm": "http://r.io/token"}, "s")


@pytest.mark.parametrize(("data", "reason"), [
    (b"{", "no JSON"), (b"[]", "manifest is none"), (b"[" * 100_000, "no JSON"),
    (b'{"schemaVersion":1}', "version"),
    (b'{"schemaVersion":2,"layers":[],"manifests":[]}', "none"),
    (b'{"schemaVersion":2,"layers":[{}]}', "descriptor"),
    (b'{"schemaVersion":2,"layers":{}}', "no layers"),
    (b'{"schemaVersion":2,"layers":[' + b"{}," * 600 + b"{}]}", "more than 512"),
    (b" " * (5 << 20), "more than 4194304 bytes"),
    (b'{"schemaVersion":2,"manifests":[{"digest":1}]}', "descriptor"),
    (b'{"schemaVersion":2,"layers":[],"config":{"digest":"sha256:../../x","size":1}}', "digest"),
    (b'{"schemaVersion":2,"layers":[],"config":{"digest":"sha256:'
     + b"0" * 64 + b'","size":-1}}', "descriptor"),
])  # fmt: skip
def test_hostile_manifests(fake: Fake, cache: Cache, data: bytes, reason: str) -> None:
    fake.manifests["1"] = (fake_registry.MANIFEST, data)
    with pytest.raises(RegistryError, match=reason):
        fetch(fake, cache)
    assert not blobs(cache)


def test_what_is_not_there_is_told_in_the_registrys_words(fake: Fake, cache: Cache) -> None:
    with pytest.raises(NotThere, match="manifest unknown"):
        fetch(fake, cache, "none")


def test_a_registry_that_is_not_there(
    cache: Cache, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(server.time, "sleep", waits.append)
    fake.host = "127.0.0.1:1"
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1: connection refused"):
        fetch(fake, cache)
    assert waits == []


def test_http_where_https_was_expected(fake: Fake, cache: Cache) -> None:
    with Registry(fake.host) as registry:
        with pytest.raises(RegistryError, match="does not speak HTTPS; --no-https"):
            registry.check()


def test_an_upload_to_another_host_is_told_nothing_of_the_account(fake: Fake) -> None:
    fake.account = ("alice", "secret")
    with fake_registry.running() as other:
        place = {"Location": f"http://{other.host}/there?x=1"}

        def begin(handler: BaseHTTPRequestHandler) -> bool:
            known = bool(handler.headers.get("Authorization"))
            send(handler, 202, b"", place) if known else None
            return known

        def ask(handler: BaseHTTPRequestHandler) -> bool:
            send(handler, 401, b"", {"WWW-Authenticate": "Basic"})
            return True

        fake.tricks["/v2/lib/x/blobs/uploads/"] = begin
        other.tricks["/there"] = ask
        account = Account(username="alice", password="secret")
        reference = Reference(host=fake.host, repository="lib/x", tag="1")
        with Registry(fake.host, account=account, https=False) as registry:
            with pytest.raises(RegistryError):
                registry.put_blob(reference, digest(b"{}"), 2, io.BytesIO(b"{}"))
        assert other.asked
        assert not [one for one in other.asked if "Authorization" in one[2]]


@pytest.mark.parametrize("kind", ["Basic", 'Bearer realm="http://{host}/token",service="s"'])
def test_another_hosts_question_is_not_answered(fake: Fake, cache: Cache, kind: str) -> None:
    fake.add_image("1", b"data")
    with fake_registry.running() as other:
        path = f"/v2/lib/x/blobs/{digest(b'data')}"
        challenge = {"WWW-Authenticate": kind.format(host=other.host)}

        def lead(handler: BaseHTTPRequestHandler) -> bool:
            send(handler, 307, b"", {"Location": f"http://{other.host}{path}"})
            return True

        def ask(handler: BaseHTTPRequestHandler) -> bool:
            send(handler, 401, b"", challenge)
            return True

        fake.tricks[path], other.tricks[path] = lead, ask
        with pytest.raises(NotAllowed):
            fetch(fake, cache, docker_username="alice", docker_password="secret")
        assert [one[1] for one in other.asked] == [path]
        assert "Authorization" not in other.asked[0][2]


@pytest.mark.parametrize("name", ["foo", "shake_128:aa", "md5:" + "0" * 32, "sha256:../../x"])
def test_an_index_names_digests(fake: Fake, cache: Cache, name: str) -> None:
    row = fake.add_image("2", b"data")
    fake.manifests[name] = fake.manifests["2"]
    fake.add_index("1", {**row, "digest": name})
    with pytest.raises(RegistryError, match="digest"):
        fetch(fake, cache)


def test_a_compressed_answer_has_its_limit_too(fake: Fake, cache: Cache) -> None:
    packed = gzip.compress(bytes(200 << 20), 1)

    def pack(handler: BaseHTTPRequestHandler) -> bool:
        assert handler.headers.get("Accept-Encoding") == "identity"
        send(handler, 200, packed, {"Content-Encoding": "gzip"})
        return True

    fake.tricks["/v2/lib/x/manifests/1"] = pack
    tracemalloc.start()
    try:
        with pytest.raises(RegistryError, match="more than 4194304 bytes"):
            fetch(fake, cache)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_what_comes_with_a_redirection_is_not_read(fake: Fake, cache: Cache) -> None:
    fake.add_image("1", b"data")

    def lead(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(307)
        handler.send_header("Location", "/v2/lib/x/manifests/1")
        handler.send_header("Content-Length", str(1 << 50))
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(bytes(1 << 20))
        return True

    fake.tricks["/v2/lib/x/manifests/2"] = lead
    tracemalloc.start()
    try:
        fetch(fake, cache, "2")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_compressed_manifest_is_read(fake: Fake, cache: Cache) -> None:
    fake.add_image("1", b"data")
    data = fake.manifests["1"][1]

    def pack(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 200, gzip.compress(data), {"Content-Encoding": "gzip"})
        return True

    fake.tricks["/v2/lib/x/manifests/1"] = pack
    assert fetch(fake, cache).manifest.digest == digest(data)


@pytest.mark.parametrize("place", ["http://[::1", "http://h:99999/", "http://h:x/"])
def test_what_is_no_address_is_told(fake: Fake, cache: Cache, place: str) -> None:
    def lead(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 307, b"", {"Location": place})
        return True

    def ask(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 401, b"", {"WWW-Authenticate": f'Bearer realm="{place}"'})
        return True

    for trick in (lead, ask):
        fake.tricks["/v2/lib/x/manifests/1"] = trick
        with pytest.raises(RegistryError, match="no place of HTTP"):
            fetch(fake, cache)


@pytest.mark.parametrize("proxy", ["http://me:secret@h:1x", "http://me:secret@", "//me:secret@["])
def test_a_proxys_password_is_in_no_message(
    fake: Fake, cache: Cache, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(RegistryError, match="http_proxy is no address") as caught:
        fetch(fake, cache)
    assert "secret" not in str(caught.value)


def test_files_of_the_web(fake: Fake, cache: Cache) -> None:
    url = f"http://{fake.host}/tool.sif"
    count = iter(range(9))

    def give(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 200, f"{next(count)}".encode())
        return True

    def get() -> bytes:
        return Path(uris.fetch(url, HOW, {}, cache, uris.no_layers)).read_bytes()

    fake.tricks["/tool.sif"] = give
    assert get() != get()  # it has no version

    def no_head(handler: BaseHTTPRequestHandler) -> bool:
        head = handler.command == "HEAD"
        send(handler, 405 if head else 200, b"" if head else b"file")
        return True

    fake.tricks["/tool.sif"] = no_head
    assert get() == b"file"

    def refuse(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 403, b"")
        return True

    fake.tricks["/tool.sif"] = refuse
    with pytest.raises(RegistryError, match="it answers 403") as caught:
        get()
    assert not caught.value.advice()


@pytest.mark.parametrize("url", ["http://[::1", "http://h:99999/x", "http:///x", "http://u:pw@h/"])
def test_addresses_that_are_none(cache: Cache, url: str) -> None:
    with pytest.raises(RegistryError, match="the address has no host") as caught:
        uris.fetch(url, HOW, {}, cache, uris.no_layers)
    assert "pw" not in str(caught.value)


def test_no_host_names_anothers_file(fake: Fake, cache: Cache) -> None:
    def give(version: str, content: bytes) -> Callable[[BaseHTTPRequestHandler], bool]:
        def do(handler: BaseHTTPRequestHandler) -> bool:
            send(handler, 200, content, {"ETag": version})
            return True

        return do

    fake.tricks["/a"] = give("b1", b"hostile")
    fake.tricks["/ab"] = give("1", b"good")
    for path, content in (("a", b"hostile"), ("ab", b"good")):
        url = f"http://{fake.host}/{path}"
        found = uris.fetch(url, HOW, {}, cache, uris.no_layers)
        assert Path(found).read_bytes() == content


def test_a_port_that_is_none(cache: Cache) -> None:
    for host in ("h:99999", "h:0x"):
        with pytest.raises(RegistryError, match="no place of HTTP"):
            Registry(host)


def test_the_first_failure_is_told_at_once(fake: Fake, cache: Cache) -> None:
    fake.add_image("1", b"slow", b"wrong")
    ended = Event()

    def wait(handler: BaseHTTPRequestHandler) -> bool:
        ended.wait(20)
        return False

    def lie(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 200, b"other")
        return True

    fake.tricks[f"/v2/lib/x/blobs/{digest(b'slow')}"] = wait
    fake.tricks[f"/v2/lib/x/blobs/{digest(b'wrong')}"] = lie
    begun = time.monotonic()
    try:
        with pytest.raises(RegistryError, match="damaged"):
            fetch(fake, cache)
        assert time.monotonic() - begun < 10
    finally:
        ended.set()


def _drip(pieces: int, gap_s: float, head: bytes = b"") -> Callable[[BaseHTTPRequestHandler], bool]:
    """Answer a byte at a time, each long before a packet's own timeout."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        handler.close_connection = True
        try:
            handler.wfile.write(head)
            for _ in range(pieces):
                handler.wfile.write(b"x")
                handler.wfile.flush()
                if Event().wait(gap_s):
                    break
        except OSError:
            pass
        return True

    return answer


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_an_answer_has_an_end_in_time(
    fake: Fake, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "HEAD_S", 0.2)
    monkeypatch.setattr(server, "_ANSWER_S", 0.2)
    monkeypatch.setattr(watch, "_LOOK_S", 0.05)
    fake.tricks["/v2/o/manifests/a"] = _drip(2000, 0.02, head)
    registry = Registry(fake.host, https=False)
    with registry, pytest.raises(RegistryError, match="does not answer in time"):
        registry.manifest(Reference(host=fake.host, repository="o", tag="a"))


def test_a_blob_that_drips_is_cut_off(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_S", 0.05)
    monkeypatch.setattr(server, "_PIECE_S", 0.2)
    fake.tricks["/v2/o/blobs/b"] = _drip(2000, 0.02, b"HTTP/1.1 200 OK\r\n\r\n")
    reference = Reference(host=fake.host, repository="o", tag="a")
    with Registry(fake.host, https=False) as registry:
        _, pieces = registry.blob(reference, "b")
        with pytest.raises(server.Interrupted, match="in time"):
            list(pieces)


def test_the_callers_own_time_is_not_counted(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_S", 0.02)
    monkeypatch.setattr(server, "_PIECE_S", 0.1)
    data = bytes(3 << 20)
    fake.blobs[digest(data)] = data
    reference = Reference(host=fake.host, repository="o", tag="a")
    with Registry(fake.host, https=False) as registry:
        _, pieces = registry.blob(reference, digest(data))
        got = 0
        for number, piece in enumerate(pieces):
            got += len(piece)
            if number == 0:
                Event().wait(0.3)
    assert got == len(data)
