"""Names of images in registries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from apptainer_py.base.errors import ApptainerError
from apptainer_py.registry.reference import BadReference, Reference, parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(("text", "host", "repository", "tag", "digest"), [
    ("//alpine", "docker.io", "library/alpine", "latest", ""),
    ("alpine:3.19", "docker.io", "library/alpine", "3.19", ""),
    ("//me/tool", "docker.io", "me/tool", "latest", ""),
    ("//index.docker.io/alpine", "docker.io", "library/alpine", "latest", ""),
    ("//quay.io/a/b/c:1", "quay.io", "a/b/c", "1", ""),
    ("//localhost/a", "localhost", "a", "latest", ""),
    ("//localhost:5000/a:x", "localhost:5000", "a", "x", ""),
    ("//127.0.0.1:5000/a", "127.0.0.1:5000", "a", "latest", ""),
    ("//[::1]:5000/a", "[::1]:5000", "a", "latest", ""),
    (f"//ghcr.io/a/b@{DIGEST}", "ghcr.io", "a/b", "", DIGEST),
    (f"//ghcr.io/a/b:t@{DIGEST}", "ghcr.io", "a/b", "t", DIGEST),
])  # fmt: skip
def test_what_a_name_means(text: str, host: str, repository: str, tag: str, digest: str) -> None:
    wanted = Reference(host=host, repository=repository, tag=tag, digest=digest)
    assert parse(text) == wanted
    assert parse(str(wanted)) == wanted


@pytest.mark.parametrize("text", [
    "", "//", "//UPPER/case", "//host.io/", "//host.io/a:", "//host.io/a:b:c", "//host.io/../x",
    "//host.io/a@sha256:12", "//host.io/a@md5:00", "//user@host.io/a", "//host.io/a?b",
    "//host.io/a b", "//host.io:99999999/a",
    "//host.io/a\n", "//-x.io/a", "//host.io/" + "a" * 300, "//host.io//a",
])  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(BadReference):
        parse(text)


def test_without_a_default_a_host_is_needed() -> None:
    assert parse("//host/a:1", docker=False).host == "host"
    with pytest.raises(BadReference):
        parse("//a", docker=False)


@given(some.text(max_size=60))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ApptainerError:
        return
    assert "/" not in found.tag
    assert ".." not in found.repository.split("/")
    assert found.file_stem.isprintable()
    assert "/" not in found.file_stem


def test_names_of_files() -> None:
    assert parse("//quay.io/a/b:1").file_stem == "b_1"
    assert parse(f"//quay.io/a/b@{DIGEST}").file_stem == "b_aaaaaaaaaaaa"
