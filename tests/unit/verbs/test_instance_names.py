"""Patterns of `instance list` and `instance stop`: those of Go's filepath.Match."""

from __future__ import annotations

import pytest

from apptainer_py.base.glob import BadPattern, name_test


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("a*", "abc", "bac"),
        ("[^a]x", "bx", "ax"),
        ("[a-c]?", "bz", "dz"),
        (r"\*", "*", "a"),
        (r"[\]a]", "]", "b"),
        ("a.b", "a.b", "axb"),
        ("*[c-a]*", None, "abc"),
        ("!a", "!a", "b"),
        ("a*b?*c", "aabxbcc", "abc"),
        ("*" + "a*" * 40 + "[x-z]", "a" * 60 + "z", "a" * 60),
    ],
)
def test_what_fits(pattern: str, fitting: str | None, other: str) -> None:
    fits = name_test(pattern)
    assert fitting is None or fits(fitting)
    assert not fits(other)


@pytest.mark.parametrize("pattern", ["[", "[]", "[]a]", "[a", "[a-", "[a-]", "[-a]", "a\\", "[\\"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(BadPattern):
        name_test(pattern)
