"""Values as annotations for systemd write them."""

from __future__ import annotations

import pytest

from apptainer_py.host.gvariant import GVariantWrong, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", ("i", 5)),
        ("-0x10", ("i", -16)),
        ("1.5", ("d", 1.5)),
        ("[1, 2.5]", ("ad", [1.0, 2.5])),
        ("true", ("b", True)),
        (r"'it\'s'", ("s", "it's")),
        (r'"a\n\"b"', ("s", 'a\n"b')),
        ("uint64 18446744073709551615", ("t", (1 << 64) - 1)),
        ("@t 5", ("t", 5)),
        ("['a', \"b\"]", ("as", ["a", "b"])),
        ("@as []", ("as", [])),
        ("[byte 1, 2]", ("ay", b"\x01\x02")),
        ("b'ab'", ("ay", b"ab\0")),
        ("@a(ss) [('/dev/null', 'rw')]", ("a(ss)", [("/dev/null", "rw")])),
        ("(1, 'a', [true])", ("(isab)", (1, "a", [True]))),
        ("{'a': <5>}", ("a{sv}", {"a": ("i", 5)})),
    ],
)
def test_a_value(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "'a",
        "[]",
        "[1,'a']",
        "foo",
        "5 5",
        "byte 256",
        "uint32 -1",
        "(",
        "{1}",
        "[" * 99,
        "@a( 5",
    ],
)
def test_what_is_none(text):
    with pytest.raises(GVariantWrong):
        parse(text)
