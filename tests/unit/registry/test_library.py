"""Libraries and remotes against a server of our own, which may lie."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import libraries, uris
from apptainer_py.builds.fetching import Fetching
from apptainer_py.cache.store import Cache
from apptainer_py.registry import active, keyserver, library, remotes, server, services
from apptainer_py.registry.accounts import Account
from apptainer_py.registry.library import BadName, Library, Name
from apptainer_py.registry.remotes import Endpoint, Keyserver, RemoteError
from apptainer_py.registry.server import NotAllowed, RegistryError
from apptainer_py.verbs import keyserver as keyserver_verb
from apptainer_py.verbs import library as library_verb
from apptainer_py.verbs import remote as remote_verb
from tests import fake_library
from tests.fake_library import TOKEN
from tests.fake_registry import send

NAME = Name(host="", path="me/col/img", tags=("v1",))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_library.Library]:
    monkeypatch.setattr(server.time, "sleep", lambda _s: None)
    with fake_library.running() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(build, "SYSCONFDIR", str(tmp_path / "etc"))
    (tmp_path / "etc").mkdir()
    return {"HOME": str(tmp_path)}


@pytest.fixture
def file(home: dict[str, str]) -> remote_verb.File:
    return remote_verb.File(path=remotes.user_file(home))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(str(tmp_path / "cache"))
    made.prepare()
    return made


@pytest.fixture
def logged_in(fake: fake_library.Library, file: remote_verb.File, home: dict[str, str]) -> None:
    remote_verb.add(file, "lib", fake.url, insecure=True, chosen=True)
    remote_verb.login(file, "", TOKEN, home)


def pushed(
    tmp_path: Path, home: dict[str, str], data: bytes = b"SIF" * 9999, name: Name = NAME
) -> bytes:
    path = tmp_path / "file"
    path.write_bytes(data)
    libraries.push(str(path), name, "amd64", Fetching(), home, "about it")
    return data


def trick(fake: fake_library.Library, path: str, status: int, data: bytes, **more: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, status, data, more)
        return True

    fake.tricks[path] = answer


# -- names


@pytest.mark.parametrize(("text", "host", "path", "tags"), [
    ("//a", "", "a", ()),
    ("//a/b/c:1,2", "", "a/b/c", ("1", "2")),
    ("//h/a", "h", "a", ()),
    ("//h:80/a/b/c:x", "h:80", "a/b/c", ("x",)),
    ("///a/b", "", "a/b", ()),
    ("a/b/c:x", "", "a/b/c", ("x",)),
    ("//a/b/c:sha256." + "0" * 64, "", "a/b/c", ("sha256." + "0" * 64,)),
])  # fmt: skip
def test_names(text: str, host: str, path: str, tags: tuple[str, ...]) -> None:
    assert library.parse(text) == Name(host=host, path=path, tags=tags)


@pytest.mark.parametrize("text", [
    "", "//", "//../b/c", "//a/../c", "//a/b/c/d/e", "//a/b/c:", "//a/b/c:x y", "//a?b", "//a#b",
    "//u@h/a", "//a/b/c:x,", "//a/b/c:..", "//a b", "//a/b/\n", "//-\x1b/b/c",
])  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(BadName) as caught:
        library.parse(text)
    assert str(caught.value).isprintable()


# -- there and back


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.usefixtures("logged_in")
def test_an_image_goes_and_comes(
    fake: fake_library.Library, home: dict[str, str], cache: Cache, tmp_path: Path, *, led: bool
) -> None:
    fake.led = led
    data = pushed(tmp_path, home)
    path = uris.fetch("library://me/col/img:v1", Fetching(), home, cache, uris.no_layers)
    assert Path(path).read_bytes() == data
    assert Path(path).parent.name == "library"
    assert Path(path).name.startswith("sha256.")
    asked = len(fake.asked)
    uris.fetch("library://me/col/img:v1", Fetching(), home, cache, uris.no_layers)
    assert not any("imagefile" in where for _, where, _ in fake.asked[asked:])
    # What is sent to an address that is signed for it has no token.
    assert all("Authorization" not in facts for kind, where, facts in fake.asked
               if kind == "PUT" and where.startswith("/data/"))  # fmt: skip


@pytest.mark.usefixtures("logged_in")
def test_a_large_image_goes_in_parts(
    fake: fake_library.Library,
    home: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_WHOLE_MOST", 1 << 20)
    data = pushed(tmp_path, home, os.urandom(1 << 20) * 11)
    assert list(fake.files.values()) == [data]
    assert sum("/_multipart" in path for path in fake.paths("PUT")) == 4


@pytest.mark.usefixtures("logged_in")
def test_an_image_that_is_there_is_not_sent_again(
    fake: fake_library.Library, home: dict[str, str], tmp_path: Path
) -> None:
    data = pushed(tmp_path, home)
    asked = len(fake.asked)
    pushed(tmp_path, home, data, NAME.replace(tags=("v2", "v3")))
    assert not any("/data/" in where for _, where, _ in fake.asked[asked:])
    (tags,) = fake.tags.values()
    assert set(tags["amd64"]) == {"v1", "v2", "v3"}


@pytest.mark.usefixtures("logged_in")
def test_a_connection_that_breaks_is_gone_on_with(
    fake: fake_library.Library, home: dict[str, str], cache: Cache, tmp_path: Path
) -> None:
    data = pushed(tmp_path, home)
    ranges = []

    def half(handler: BaseHTTPRequestHandler) -> bool:
        ranges.append(handler.headers.get("Range", ""))
        start = int((ranges[-1] or "bytes=0-")[6:-1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : start + len(data) // 2 + 1])
        handler.close_connection = True
        return True

    fake.tricks["/v1/imagefile/me/col/img:v1"] = half
    path = libraries.fetch(NAME, Fetching(), home, cache)
    assert Path(path).read_bytes() == data
    assert ranges[0] == ""
    assert ranges[1] == f"bytes={len(data) // 2 + 1}-"


@pytest.mark.usefixtures("logged_in")
def test_search_and_delete(
    fake: fake_library.Library, home: dict[str, str], cache: Cache, tmp_path: Path
) -> None:
    pushed(tmp_path, home)
    how: Any = {"arch": "amd64", "given": "", "signed": False}
    assert "library://me/col/img:v1\n\t\tabout it" in library_verb.search(
        "img", home, as_json=False, **how
    )
    (found,) = json.loads(library_verb.search("img", home, as_json=True, **how))["images"]
    assert (found["image"], found["tags"]) == ("library://me/col/img", ["v1"])
    with pytest.raises(library_verb.CannotSearch, match="at least 3 characters"):
        library_verb.search("im", home, as_json=False, **how)
    library_verb.delete(NAME, home, arch="amd64", given="", https=True)
    with pytest.raises(RegistryError, match="image does not exist in the library"):
        libraries.fetch(NAME, Fetching(), home, cache)
    with pytest.raises(library_verb.WrongScheme):
        library_verb.parsed("docker://x")


# -- who is told what


@pytest.mark.usefixtures("logged_in")
def test_a_token_is_for_its_own_library(
    fake: fake_library.Library, home: dict[str, str], cache: Cache, tmp_path: Path
) -> None:
    pushed(tmp_path, home)
    with fake_library.running() as other:
        other.__dict__.update({**fake.__dict__, "asked": [], "tricks": {}, "host": other.host})
        for how, name in (
            (Fetching(library=other.url), NAME),
            (Fetching(no_https=True), NAME.replace(host=other.host)),
        ):
            libraries.fetch(name, how, home, Cache(cache.folder))
        # A library that leads elsewhere does not lead its token there.
        trick(fake, "/v1/imagefile/me/col/img:v1", 303, b"",
              Location=f"{other.url}/v1/imagefile/me/col/img:v1?arch=amd64")  # fmt: skip
        fresh = Cache(str(tmp_path / "fresh"))
        fresh.prepare()
        libraries.fetch(NAME, Fetching(), home, fresh)
        assert len(other.asked) >= 3
        assert TOKEN not in str(other.asked)


@pytest.mark.usefixtures("logged_in")
def test_no_token_is_in_what_is_printed(home: dict[str, str], file: remote_verb.File) -> None:
    found = file.read()
    assert TOKEN not in repr(found) + str(found.endpoint()) + remote_verb.listing(
        file, as_json=True
    ) + remote_verb.listing(file, as_json=False)
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600


def test_who_is_logged_out_is_told(
    fake: fake_library.Library, file: remote_verb.File, home: dict[str, str], tmp_path: Path
) -> None:
    remote_verb.add(file, "lib", fake.url, insecure=True, chosen=True)
    with pytest.raises(NotAllowed) as caught:
        pushed(tmp_path, home)
    assert "remote login" in str(caught.value.advice())
    with pytest.raises(RemoteError, match="Invalid Credentials"):
        remote_verb.login(file, "", "bad", home)
    assert file.read().endpoint().token == ""


# -- servers that lie


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(("said", "reason"), [
    (b"x", "makes no sense"),
    (b"[]", "makes no sense"),
    (b'{"data": []}', "makes no sense"),
    (b"[" * 100000, "makes no sense"),
    (b'{"data": {"id": "../x", "hash": "h", "size": 1}}', "makes no sense"),
    (b'{"data": {"id": "x", "hash": "sha256.../../x", "size": 1}}', "it has no hash"),
    (b'{"data": {"id": "x", "hash": "sha256.%s", "size": -1}}' % (b"0" * 64), "size is none"),
    (b'{"data": {"id": "x", "hash": "sha256.%s", "size": %d}}' % (b"0" * 64, 1 << 61), "is room"),
    (b'{"data": {"id": "x", "hash": "sha256.%s", "size": 5}}' % (b"0" * 64), "more than the 5"),
    (b'{"data": {"id": "x", "hash": "sha256.%s", "size": 29997}}' % (b"0" * 64), "another image"),
    (b"x" * (2 << 20), "more than 1048576 bytes"),
])  # fmt: skip
def test_what_is_said_of_an_image_is_not_believed(
    fake: fake_library.Library,
    home: dict[str, str],
    cache: Cache,
    tmp_path: Path,
    said: bytes,
    reason: str,
) -> None:
    pushed(tmp_path, home)
    trick(fake, "/v1/images/me/col/img:v1", 200, said)
    with pytest.raises(ApptainerError, match=reason) as caught:
        libraries.fetch(NAME, Fetching(), home, cache)
    assert "\n" not in str(caught.value)
    assert [path for path in Path(cache.folder, "library").iterdir() if "lease" not in path.name
            and ".part" not in path.name] == []  # fmt: skip


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("said", [
    {"uploadID": 5, "totalParts": 1, "partSize": 1},
    {"uploadID": "u", "totalParts": 10**9, "partSize": 1},
    {"uploadID": "u", "totalParts": 2, "partSize": 0},
    {"uploadID": "u", "totalParts": 1, "partSize": 5},
    {},
])  # fmt: skip
def test_parts_that_make_no_sense(
    fake: fake_library.Library,
    home: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, object],
) -> None:
    monkeypatch.setattr(library, "_WHOLE_MOST", 1000)

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        if not handler.path.endswith("/_multipart"):
            return False
        send(handler, 200, json.dumps({"data": said}).encode())
        return True

    monkeypatch.setattr(fake, "_upload", lambda handler, *_: answer(handler))
    with pytest.raises(RegistryError, match="parts that it wants"):
        pushed(tmp_path, home)


@pytest.mark.parametrize(("said", "reason"), [
    (b"x", "names no services"),
    (b'{"libraryAPI": 5}', "names no services"),
    (b'{"libraryAPI": {"uri": "file:///etc/passwd"}}', "names no services"),
    (b"x" * (2 << 20), "more than 1048576 bytes"),
])  # fmt: skip
def test_an_endpoint_that_makes_no_sense(
    fake: fake_library.Library, said: bytes, reason: str
) -> None:
    trick(fake, "/assets/config/config.prod.json", 200, said)
    with pytest.raises(RegistryError, match=reason):
        services.of_endpoint(Endpoint(uri=fake.host, insecure=True), {})


def test_an_endpoint_that_leads_from_https_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"libraryAPI": {"uri": "http://elsewhere"}}
    monkeypatch.setattr(services.Service, "json", lambda *_words: said)
    with pytest.raises(RegistryError, match="HTTPS to HTTP"):
        services.of_endpoint(Endpoint(uri="host"), {})


# -- the file


def test_the_file_of_the_real_one_is_kept(file: remote_verb.File, home: dict[str, str]) -> None:
    text = (
        "Active: mine\nRemotes:\n    DefaultRemote:\n        URI: cloud.apptainer.org\n"
        "        System: true\n        Exclusive: false\n    mine:\n        URI: h.example\n"
        "        Token: t0ken\n        System: false\n        Exclusive: false\n"
        "        Keyservers:\n        - URI: https://k.example\n          Skip: false\n"
        "          External: true\n          Insecure: true\nCredentials:\n"
        "    - URI: docker://r.example\n      Insecure: false\n"
    )
    Path(file.path).parent.mkdir()
    Path(file.path).write_text(text)
    remote_verb.add(file, "more", "m.example/x/", insecure=False, chosen=False)
    found = remotes.read(file.path)
    assert found.active == "mine"
    assert found.endpoint("mine") == Endpoint(
        uri="h.example", token="t0ken",
        keyservers=(Keyserver(uri="https://k.example", external=True, insecure=True),),
    )  # fmt: skip
    assert found.endpoint("more").uri == "m.example/x"
    assert [one.uri for one in found.credentials] == ["docker://r.example"]


@pytest.mark.parametrize("text", [
    "- a", "Active: [", "Active: 5", "Foo: 1", "Remotes: 5", "Remotes: {a: {Bar: 1}}", "\x00",
    "Remotes: {a: {URI: 5}}", "Remotes: {a: {Keyservers: 5}}", "Credentials: 7", "Remotes: {5: {}}",
    "!!python/object/apply:os.system [true]", "a: &a [*a]",
])  # fmt: skip
def test_a_file_that_is_none(file: remote_verb.File, text: str) -> None:
    Path(file.path).parent.mkdir()
    Path(file.path).write_text(text)
    with pytest.raises(RemoteError) as caught:
        file.read()
    assert file.path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exclusive_endpoint(
    fake: fake_library.Library, file: remote_verb.File, home: dict[str, str]
) -> None:
    machine = remote_verb.File(path=remotes.system_file(), is_system=True)
    remote_verb.add(machine, "corp", fake.url, insecure=True, chosen=True)
    remote_verb.add(file, "mine", "h.example", insecure=False, chosen=True)
    remote_verb.use(machine, "corp", exclusive=True)
    assert stat.S_IMODE(os.stat(machine.path).st_mode) == 0o644
    found = file.read()
    assert (found.active, found.endpoint().exclusive) == ("corp", True)
    with pytest.raises(RemoteError, match="has been set exclusive by the system administrator"):
        remote_verb.use(file, "mine", exclusive=False)
    with pytest.raises(RemoteError, match="set as exclusive"):
        active.library(home, given="https://other.example")
    with pytest.raises(RemoteError, match="set as exclusive"):
        active.library(home, host="other.example")
    active.library(home, given=f"{fake.url}/")
    with pytest.raises(RemoteError, match="set as exclusive"):
        active.keyservers(home, given="https://other.example")
    # A user's endpoint of the same name is no way around it.
    own = remotes.Remotes(active="corp", endpoints={"corp": Endpoint(uri="evil", token="t")})
    remotes.write(file.path, own)
    assert file.read().endpoint() == Endpoint(
        uri=fake.host, system=True, exclusive=True, insecure=True
    )
    remote_verb.use(machine, "corp", exclusive=False)
    assert file.read().endpoint("corp").uri == "evil"


@pytest.mark.parametrize(("name", "address", "insecure"), [
    ("", "h", False), ("x", "", False), ("x", "http://h", False), ("x", "ftp://h", False),
    ("x", "https://u:p@h", False), ("x", "h h", False), ("x", "h:99999", False),
    ("DefaultRemote", "h", False),
])  # fmt: skip
def test_what_is_not_added(
    file: remote_verb.File, name: str, address: str, *, insecure: bool
) -> None:
    with pytest.raises(RemoteError) as caught:
        remote_verb.add(file, name, address, insecure=insecure, chosen=True)
    assert "p@" not in str(caught.value)
    assert not Path(file.path).exists()


def test_what_is_not_there(file: remote_verb.File) -> None:
    with pytest.raises(RemoteError, match="nope is not a remote"):
        remote_verb.use(file, "nope", exclusive=False)
    with pytest.raises(RemoteError, match="nope is not a remote"):
        remote_verb.remove(file, "nope")
    with pytest.raises(RemoteError, match="DefaultRemote is global and can't be removed"):
        remote_verb.remove(file, "DefaultRemote")


# -- key servers


def test_key_servers_have_an_order(home: dict[str, str]) -> None:
    how: Any = {"insecure": False}
    first, second = "https://a.example", "hkps://b.example"
    keyserver_verb.add("", first, home, order=None, **how)
    keyserver_verb.add("DefaultRemote", second, home, order=1, **how)
    path = remotes.user_file(home)
    said = keyserver_verb.listing(path, "", home, as_json=False)
    assert [line.split()[1] for line in said.splitlines() if "#" in line] == [
        second, remotes.DEFAULT_KEYSERVER, first
    ]  # fmt: skip
    assert [place.uri for place in active.keyservers(home)] == [second]
    assert len(active.keyservers(home, every=True)) == 3
    with pytest.raises(RemoteError, match="already configured"):
        keyserver_verb.add("", "https://b.example", home, order=None, **how)
    with pytest.raises(RemoteError, match="out of range"):
        keyserver_verb.add("", "https://c.example", home, order=9, **how)
    for uri in (second, remotes.DEFAULT_KEYSERVER):
        keyserver_verb.remove("", uri, home)
    with pytest.raises(RemoteError, match="can't be removed"):
        keyserver_verb.remove("", first, home)
    (only,) = json.loads(keyserver_verb.listing(path, "", home, as_json=True))["remotes"]
    assert [row["uri"] for row in only["keyservers"]] == [first]
    keyserver_verb.add("", remotes.DEFAULT_KEYSERVER, home, order=None, **how)
    assert len(active.keyservers(home, every=True)) == 2


def test_an_account_of_a_key_server(fake: fake_library.Library, home: dict[str, str]) -> None:
    path, account = remotes.user_file(home), Account(username="ann", password="pa55")
    with pytest.raises(keyserver_verb.CannotLogIn, match="no external keyserver configuration"):
        keyserver_verb.login(path, fake.url, account, home)
    keyserver_verb.add("", fake.url, home, order=1, insecure=False)
    with pytest.raises(keyserver_verb.CannotLogIn, match="404"):
        keyserver_verb.login(path, fake.url, account, home)
    trick(fake, "/", 200, b"")
    keyserver_verb.login(path, fake.url, account, home)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    fake.keys["ab" * 20] = "a key"
    (place,) = active.keyservers(home)
    assert keyserver.get(place, "AB" * 20) == b"a key"
    assert fake.asked[-1][2]["Authorization"].startswith("Basic ")
    assert "pa55" not in repr(place)
    keyserver_verb.logout(path, fake.url)
    with pytest.raises(keyserver_verb.CannotLogOut):
        keyserver_verb.logout(path, fake.url)
    assert not active.keyservers(home)[0].authorization


@pytest.mark.parametrize(("uri", "address"), [
    ("hkp://h", "http://h:11371"), ("hkp://h:80", "http://h:80"), ("hkps://h", "https://h"),
    ("https://h", "https://h"), ("hkp://[::1]", "http://[::1]:11371"),
])  # fmt: skip
def test_addresses_of_key_servers(uri: str, address: str) -> None:
    assert keyserver.address(uri) == address


def test_a_key_server_that_lies(fake: fake_library.Library) -> None:
    place = keyserver.Place(uri=fake.url, authorization="Bearer secret")
    trick(fake, "/pks/lookup", 200, b"x" * (2 << 20))
    with pytest.raises(keyserver.KeyserverError, match="more than 1048576 bytes"):
        keyserver.get(place, "ab")
    with fake_library.running() as other:
        trick(fake, "/pks/lookup", 302, b"", Location=f"{other.url}/pks/lookup?op=get&search=x")
        with pytest.raises(keyserver.KeyserverError, match="404"):
            keyserver.get(place, "ab")
        assert "secret" not in str(other.asked)


def test_the_library_of_an_endpoint_tells_the_registrys_password(
    fake: fake_library.Library, logged_in: None, home: dict[str, str], file: remote_verb.File
) -> None:
    assert remote_verb.login_password(home) == fake_library.SECRET
    text, valid = remote_verb.status(file, "", home, as_json=False)
    assert valid
    assert "Library    OK      v1.2.3" in text
    fake.token = "another"
    assert remote_verb.status(file, "", home, as_json=True)[1] is False
    remote_verb.logout(file, "")
    with pytest.raises(NotAllowed):
        remote_verb.login_password(home)


def test_an_address_with_an_account_is_in_no_message() -> None:
    with pytest.raises(RegistryError) as caught:
        Library("https://u:geheim@h", token="", environ={})
    assert "geheim" not in str(caught.value)
