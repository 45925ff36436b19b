"""Which addresses an image is asked for at: containers-registries.conf(5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry import mirrors
from apptainer_py.registry.reference import parse

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mirrors, "_SYSTEM", str(tmp_path / "etc"))
    (tmp_path / "etc/registries.conf.d").mkdir(parents=True)
    (tmp_path / "home/.config/containers").mkdir(parents=True)
    return tmp_path / "home"


def asked(home: Path, name: str) -> list[tuple[str, bool]]:
    found = mirrors.places(parse(name), {"HOME": str(home)})
    return [(str(place.reference), place.insecure) for place in found]


def put(home: Path, text: str, file: str = ".config/containers/registries.conf") -> None:
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    (home / file).write_text(text)


TABLES = """
unqualified-search-registries = ["elsewhere.org"]
[[registry]]
prefix = "docker.io"
[[registry.mirror]]
location = "hub.example.org:5000/hub"
insecure = true
[[registry.mirror]]
location = "second.example.org"

[[registry]]
prefix = "docker.io/library/python"
location = "python.example.org/py"

[[registry]]
location = "plain.example.org"
insecure = true

[[registry]]
prefix = "*.wild.org/a"

[[registry]]
prefix = "*.moved.org"
location = "new.org/m"

[[registry]]
prefix = "digests.org"
location = "digests.org"
mirror-by-digest-only = true
[[registry.mirror]]
location = "d.example.org"
[[registry.mirror]]
location = "t.example.org"
pull-from-mirror = "tag-only"
"""


@pytest.mark.parametrize(
    ("name", "places"),
    [
        (
            "alpine:3",
            [
                ("hub.example.org:5000/hub/library/alpine:3", True),
                ("second.example.org/library/alpine:3", False),
                ("docker.io/library/alpine:3", False),
            ],
        ),
        ("python:3", [("python.example.org/py:3", False)]),
        ("plain.example.org/x", [("plain.example.org/x:latest", True)]),
        # A host with a port is another registry; so is a longer name of a host or repository.
        ("plain.example.org:5000/x", [("plain.example.org:5000/x:latest", False)]),
        ("plain.example.org.evil.org/x", [("plain.example.org.evil.org/x:latest", False)]),
        ("docker.io/library/pythonic", None),
        ("sub.wild.org/a/b:1", [("sub.wild.org/a/b:1", False)]),
        ("a.b.moved.org/x/y:1", [("new.org/m/x/y:1", False)]),
        (
            f"digests.org/x@{DIGEST}",
            [(f"d.example.org/x@{DIGEST}", False), (f"digests.org/x@{DIGEST}", False)],
        ),
        ("digests.org/x:1", [("t.example.org/x:1", False), ("digests.org/x:1", False)]),
        ("other.org/x:1", [("other.org/x:1", False)]),
    ],
)
def test_places(home: Path, name: str, places: list[tuple[str, bool]] | None) -> None:
    put(home, TABLES)
    found = asked(home, name)
    if places is None:
        assert [place for place, _ in found] == [
            "hub.example.org:5000/hub/library/pythonic:latest",
            "second.example.org/library/pythonic:latest",
            "docker.io/library/pythonic:latest",
        ]
    else:
        assert found == places


def test_without_a_file_its_host_is_asked(home: Path) -> None:
    assert asked(home, "x.org/y:1") == [("x.org/y:1", False)]


def test_which_file(home: Path) -> None:
    """The user's stands in place of the administrator's; parts add to either."""
    etc = "../etc/"
    put(home, '[[registry]]\nprefix="x.org"\nlocation="etc.org"\n', f"{etc}registries.conf")
    assert asked(home, "x.org/y:1") == [("etc.org/y:1", False)]
    put(home, '[[registry]]\nprefix="z.org"\nlocation="own.org"\n')
    assert asked(home, "x.org/y:1") == [("x.org/y:1", False)]
    put(
        home,
        '[[registry]]\nprefix="z.org"\nlocation="part.org"\n',
        f"{etc}registries.conf.d/10.conf",
    )
    put(home, "not = 'read'", f"{etc}registries.conf.d/11.other")
    assert asked(home, "z.org/y:1") == [("part.org/y:1", False)]


def test_what_is_blocked_is_not_asked_for(home: Path) -> None:
    put(home, '[[registry]]\nlocation="bad.org/x"\nblocked=true\n')
    with pytest.raises(mirrors.Blocked, match=r"bad\.org/x/y:1 may not be fetched"):
        asked(home, "bad.org/x/y:1")
    assert asked(home, "bad.org/z:1") == [("bad.org/z:1", False)]


def test_the_older_form(home: Path) -> None:
    put(
        home,
        '[registries.insecure]\nregistries=["i.org"]\n[registries.block]\nregistries=["b.org"]\n',
    )
    assert asked(home, "i.org/x:1") == [("i.org/x:1", True)]
    with pytest.raises(mirrors.Blocked):
        asked(home, "b.org/x:1")


@pytest.mark.parametrize(
    "text",
    [
        "[[registry]\n",
        "registry = 3\n",
        "[[registry]]\nblocked = true\n",
        '[[registry]]\nlocation = "x.org"\nblocked = "yes"\n',
        "[[registry]]\nlocation = 3\n",
        '[[registry]]\nprefix = "x.org"\nlocation = "no host/"\n',
        '[[registry]]\nlocation = "x.org"\nmirror = 3\n',
        '[[registry]]\nlocation = "x.org"\n[[registry.mirror]]\ninsecure = true\n',
        '[[registry]]\nlocation = "x.org"\n[[registry.mirror]]\n'
        'location = "y.org"\npull-from-mirror = "never"\n',
    ],
)
def test_what_is_wrong_is_told_with_its_file(home: Path, text: str) -> None:
    put(home, text)
    with pytest.raises(ApptainerError, match=r"registries\.conf: ") as caught:
        asked(home, "x.org/y:1")
    assert "\n" not in str(caught.value)
