"""What master tells stage 2, packed and unpacked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from apptainer_py.engines.apptainer.message import pack, unpack


def _text(size: int) -> some.SearchStrategy[bytes]:
    return some.binary(max_size=size).map(lambda data: data.replace(b"\0", b""))


LISTS = some.dictionaries(_text(20), some.lists(_text(50)))


@given(LISTS)
def test_what_is_packed_is_unpacked(lists: dict[bytes, list[bytes]]) -> None:
    assert unpack(pack(lists)) == lists


@given(some.binary(max_size=200))
def test_no_bytes_do_more_than_raise_value_error(data: bytes) -> None:
    try:
        found = unpack(data)
    except ValueError:
        return
    assert isinstance(found, dict)


def test_a_message_is_neither_cut_nor_continued() -> None:
    data = pack({b"a": [b"b", b""]})
    for size in range(len(data)):
        with pytest.raises(ValueError, match="cut short"):
            unpack(data[:size])
    with pytest.raises(ValueError, match="too long"):
        unpack(data + b"\0")


@pytest.mark.parametrize("lists", [{b"a\0": []}, {b"a": [b"\0"]}])
def test_a_nul_is_refused(lists: dict[bytes, list[bytes]]) -> None:
    with pytest.raises(ValueError, match="NUL"):
        pack(lists)
