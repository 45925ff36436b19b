"""JSON as runc reads it: the texts are those of runc 1.3.6 for a config.json of these bytes."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apptainer_py.model.json_text import JsonWrong, Number, loads

WRONG = [
    (b"", "EOF"),
    (b" \n", "EOF"),
    (b"{", "unexpected EOF"),
    (b'{"a" 1}', "invalid character '1' after object key"),
    (b'{"a":1,}', "invalid character '}' looking for beginning of object key string"),
    (b'{"a":}', "invalid character '}' looking for beginning of value"),
    (b"{'a':1}", "invalid character '\\'' looking for beginning of object key string"),
    (b'{"a":01}', "invalid character '1' after object key:value pair"),
    (b'{"a":nul}', "invalid character '}' in literal null (expecting 'l')"),
    (b'{"a":"\x01"}', "invalid character '\\x01' in string literal"),
    (b'{"a":"\\q"}', "invalid character 'q' in string escape code"),
    (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
    (b"[1 2]", "invalid character '2' after array element"),
    (b'{"a":"abc', "unexpected EOF"),
    (b"x", "invalid character 'x' looking for beginning of value"),
    (b'{"a":1.}', "invalid character '}' after decimal point in numeric literal"),
    (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
    (b"[" * 20000, "invalid character '[' exceeded max depth"),
    (b'{"a":' * 20000, "invalid character '{' exceeded max depth"),
    (b"\xff", "invalid character 'ÿ' looking for beginning of value"),
    (b'{"a":"\\u12"}', "invalid character '\"' in \\u hexadecimal character escape"),
    (b'{"a":-}', "invalid character '}' in numeric literal"),
    (b'{"a":truf}', "invalid character 'f' in literal true (expecting 'e')"),
    (b"\xef\xbb\xbf{}", "invalid character 'ï' looking for beginning of value"),
    (b'{"a":1e}', "invalid character '}' in exponent of numeric literal"),
    (b'{"a":tru', "unexpected EOF"),
]


@pytest.mark.parametrize(("data", "text"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_json_is_told_as_runc_tells_it(data: bytes, text: str) -> None:
    with pytest.raises(JsonWrong) as caught:
        loads(data)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b" \r\n\t{} ", {}),
        (b'{"a":1} garbage', {"a": 1}),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b'{"a":1.5,"b":1e3}', {"a": "1.5", "b": "1e3"}),
        (b'["\\ud800x"]', ["\ufffdx"]),
        (b'["\\ud83d\\ude00"]', ["\U0001f600"]),
        (b'["a\xffb"]', ["a\ufffdb"]),
        (b'["a\\u0000b"]', ["a\0b"]),
        (b"null", None),
        (b"[true,false,null,-0,[]]", [True, False, None, 0, []]),
    ],
)
def test_first_value_as_go_takes_it(data: bytes, value: object) -> None:
    assert loads(data) == value


def test_a_fraction_is_no_integer() -> None:
    assert type(loads(b"[1.0]")[0]) is Number


def test_a_number_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(JsonWrong):
        loads(b"[" + b"9" * 10000 + b"]")


def test_json_itself_is_not_loaded() -> None:
    code = (
        "import sys; from apptainer_py.model.json_text import loads\n"
        "loads(b'{}')\n"
        "try: loads(b'{')\n"
        "except Exception as error: assert str(error) == 'unexpected EOF'\n"
        "assert not {'json', 're', 'enum', 'typing'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-ISc", f"import sys; sys.path.insert(0, '.')\n{code}"], check=True
    )


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(_VALUES, st.booleans())
def test_agrees_with_json(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    expected = json.loads(text.encode("utf-8", "replace").decode())
    if "\\ud" in text:
        return
    assert loads(text.encode("utf-8", "replace")) == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123456789eE+-.\\untrfalse', max_size=20))
def test_any_bytes_give_a_value_or_one_line(data: bytes | str) -> None:
    raw = data.encode() if isinstance(data, str) else data
    try:
        loads(raw)
    except JsonWrong as error:
        assert str(error)
        assert "\n" not in str(error)
