"""Bind specifications: Apptainer's syntax and the texts of its errors."""

from __future__ import annotations

import pytest

from apptainer_py.base.errors import BindError
from apptainer_py.engines.apptainer.binds import Bind, parse_all, parse_bind, parse_mount

CWD = "/here"


@pytest.mark.parametrize(
    ("spec", "source", "target", "read_only"),
    [
        ("/a", "/a", "/a", False),
        ("/a:/b", "/a", "/b", False),
        ("/a:/b:ro", "/a", "/b", True),
        ("/a:/b:rw", "/a", "/b", False),
        ("/a:/b:ro,rw", "/a", "/b", True),
        ("a", "/here/a", "/here/a", False),
        ("../a:/b", "/a", "/b", False),
        (":/a", "/a", "/a", False),
        (r"/a\:b:/c", "/a:b", "/c", False),
        (r"/a\,b:/c", "/a,b", "/c", False),
        (" /a: /b: rw, ro", "/a", "/b", True),
        ("/a//b/:/c/../d", "/a/b", "/d", False),
    ],
)
def test_a_bind(spec: str, source: str, target: str, read_only: bool) -> None:
    wanted = Bind(source=source, target=target, read_only=read_only)
    assert parse_bind(spec, CWD) == wanted


@pytest.mark.parametrize(
    ("spec", "inside", "number"),
    [
        ("/a:/b:image-src=/c", "/c", 0),
        ("/a:/b:image-src=c/../d,id=2", "/d", 2),
        ("/a:/b:id=3", "/", 3),
        ("/a:/b:image-src=/../../etc", "/etc", 0),
    ],
)
def test_a_bind_from_an_image(spec: str, inside: str, number: int) -> None:
    bind = parse_bind(spec, CWD)
    assert bind is not None
    assert (bind.source, bind.target) == ("/a", "/b")
    assert (bind.image_source, bind.image_id) == (inside, number)


@pytest.mark.parametrize("spec", ["", ":"])
def test_nothing_is_no_bind(spec: str) -> None:
    assert parse_bind(spec, CWD) is None


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("/a:/b:c:d", 'bad bind syntax "/a:/b:c:": should be /a:/b:c'),
        ("/a:/b:odd", "odd is not a valid bind option"),
        ("/a:/b:", " is not a valid bind option"),
        ("/a:b", "unable to add /a to mount list: destination must be an absolute path"),
        ("/a:", "unable to add /a to mount list: mount point must contain a destination"),
        ("/a::ro", "unable to add /a to mount list: destination must be an absolute path"),
        ("/a:/b:id=0", "id number must be greater than 0"),
        ("/a:/b:id=x", "x is not the number of an object"),
        ("/a\0b", "has a NUL in it"),
        ("/" + "a" * 5000, "too long"),
    ],
)
def test_a_wrong_bind(spec: str, text: str) -> None:
    with pytest.raises(BindError) as raised:
        parse_bind(spec, CWD)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("type=bind,source=/a,destination=/b", Bind(source="/a", target="/b")),
        ("src=/a,dst=/b", Bind(source="/a", target="/b")),
        ("type=bind,src=a,target=/b,ro", Bind(source="/here/a", target="/b", read_only=True)),
        ("src=/a,dst=/b,readonly", Bind(source="/a", target="/b", read_only=True)),
        ('"src=/a,1","dst=/b ""2"""', Bind(source="/a,1", target='/b "2"')),
    ],
)
def test_a_mount(spec: str, wanted: Bind) -> None:
    assert parse_mount(spec, CWD) == wanted


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("type=tmpfs,dst=/b", "unsupported mount type \"tmpfs\", only 'bind' is supported"),
        ("src=/a", "mounts must specify a source and a destination"),
        ("dst=/a", "mounts must specify a source and a destination"),
        ("src=/a,dst=/b,odd=1", 'invalid key "odd" in mount specification'),
        ("", 'invalid key "" in mount specification'),
        ('"src=/a', "bad quoting"),
        ("src=/a,dst=b", "destination must be an absolute path"),
    ],
)
def test_a_wrong_mount(spec: str, text: str) -> None:
    with pytest.raises(BindError) as raised:
        parse_mount(spec, CWD)
    assert text in str(raised.value)


def test_a_list_is_split_at_commas_but_not_inside_options() -> None:
    found = parse_all(["/a,/b:/c:ro,rw,/d", ""], ["src=/e,dst=/f"], CWD)
    assert [(bind.source, bind.target, bind.read_only) for bind in found] == [
        ("/a", "/a", False),
        ("/b", "/c", True),
        ("/d", "/d", False),
        ("/e", "/f", False),
    ]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("type=bind,src=/a,dst=/b,id", "id cannot be empty"),
        ("type=bind,src=/a,dst=/b,image-src=", "image-src cannot be empty"),
        ("type=bind,src=/a,dst=/b,bind-propagation=shared", "check apptainer.conf"),
        ('type=bind,src="/a",dst=/b', "a quote that is not around a whole field"),
        ('type=bind,"src=/a"x,dst=/b', "a quote that is not around a whole field"),
        ('type=bind,"src=/a,dst=/b', "a quote that is not around a whole field"),
    ],
)
def test_a_mount_is_not_read_in_a_way_that_was_not_meant(spec: str, text: str) -> None:
    with pytest.raises(BindError) as raised:
        parse_mount(spec, CWD)
    assert text in str(raised.value)


def test_a_quoted_field_of_a_mount_may_hold_anything() -> None:
    bind = parse_mount('type=bind,"src=/a,""b",dst=/c', CWD)
    assert (bind.source, bind.target) == ('/a,"b', "/c")
