"""Where accounts come from, and how they are kept."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest

from apptainer_py.registry import accounts
from apptainer_py.registry.accounts import Account, AccountError


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


def put(home: dict[str, str], name: str, content: object) -> Path:
    file = Path(home["HOME"], name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_apptainers_file_comes_before_dockers(home: dict[str, str]) -> None:
    put(home, ".docker/config.json", {"auths": {"r.io": auth("d:1"), "s.io": auth("s:1")}})
    put(home, ".apptainer/docker-config.json", {"auths": {"r.io": auth("a:x:y")}})
    assert accounts.find("r.io", home) == Account(username="a", password="x:y")
    assert accounts.find("s.io", home) == Account(username="s", password="1")
    assert accounts.find("t.io", home) is None


def test_docker_hub_has_a_name_of_its_own(home: dict[str, str]) -> None:
    put(home, ".docker/config.json", {"auths": {"https://index.docker.io/v1/": auth("d:1")}})
    assert accounts.find("docker.io", home) == Account(username="d", password="1")


def test_a_given_file_is_the_only_one_and_must_be_there(home: dict[str, str]) -> None:
    put(home, ".docker/config.json", {"auths": {"r.io": auth("d:1")}})
    other = put(home, "other.json", {"auths": {}})
    assert accounts.find("r.io", home, str(other)) is None
    with pytest.raises(AccountError, match="no such file"):
        accounts.find("r.io", home, f"{other}.none")


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"r.io": {"auth": "%%%"}}}',
                                  '{"auths": {"r.io": {"auth": "YWJj"}}}', "\udce9"])  # fmt: skip
def test_a_damaged_file_is_told_of(home: dict[str, str], text: str) -> None:
    file = Path(home["HOME"], "own.json")
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AccountError, match=r"own\.json"):
        accounts.find("r.io", home, str(file))


def test_an_identity_token(home: dict[str, str]) -> None:
    put(home, ".docker/config.json", {"auths": {"r.io": {"identitytoken": "t0"}}})
    assert accounts.find("r.io", home) == Account(token="t0")


@pytest.mark.parametrize("content", [{"credHelpers": {"r.io": "test"}}, {"credsStore": "test"}])
def test_a_helper_is_asked(home: dict[str, str], content: object) -> None:
    put(home, ".docker/config.json", content)
    helper = Path(home["HOME"], "bin/docker-credential-test")
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\nread host\n[ "$1 $host" = "get r.io" ] || exit 1\n'
        'echo \'{"ServerURL":"r.io","Username":"h","Secret":"s"}\'\n'
    )
    helper.chmod(0o755)
    assert accounts.find("r.io", home) == Account(username="h", password="s")
    if "credsStore" in str(content):
        assert accounts.find("t.io", home) is None


def test_a_helper_that_is_not_there_is_told_of(home: dict[str, str]) -> None:
    put(home, ".docker/config.json", {"credsStore": "none"})
    with pytest.raises(AccountError, match="docker-credential-none is not installed"):
        accounts.find("r.io", home)
    put(home, ".docker/config.json", {"credsStore": "../x"})
    with pytest.raises(AccountError, match="no name of a credential helper"):
        accounts.find("r.io", home)


def test_what_is_kept_is_its_owners_alone(home: dict[str, str]) -> None:
    file = f"{home['HOME']}/.docker/config.json"
    accounts.store(file, "r.io", Account(username="u", password="p"))
    accounts.store(file, "docker.io", Account(username="v", password="q"))
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    assert accounts.find("r.io", home) == Account(username="u", password="p")
    assert accounts.forget(file, "r.io")
    assert not accounts.forget(file, "r.io")
    assert list(json.loads(Path(file).read_text())["auths"]) == ["https://index.docker.io/v1/"]


def test_what_else_a_file_says_stays(home: dict[str, str]) -> None:
    file = put(home, ".docker/config.json", {"HttpHeaders": {"a": "b"}, "auths": {}})
    accounts.store(str(file), "r.io", Account(username="u", password="p"))
    assert json.loads(file.read_text())["HttpHeaders"] == {"a": "b"}


def test_an_account_is_never_printed() -> None:
    assert "secret" not in repr(Account(username="u", password="secret", token="secret"))
