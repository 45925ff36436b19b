"""JSON as runc reads it, without `json`, whose import alone costs three milliseconds.

The scanner is the C one of the standard library. What follows the first value is ignored, the last
of several equal keys counts, and what is no JSON is told in the words of Go's decoder, which
clients of a runtime know.
"""

from __future__ import annotations

from _json import make_scanner

from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_SPACE = " \t\r\n"
_DEEPEST = 10000  # Go's decoder refuses more
_ESCAPES = b'"\\/bfnrt'
_HEX = b"0123456789abcdefABCDEF"
_DIGITS = b"0123456789"
_LITERALS = {0x74: b"true", 0x66: b"false", 0x6E: b"null"}


class JsonWrong(ApptainerError):
    """Bytes that are no JSON text."""

    message = "{text}"
    exit_code = 1


class Number(str):
    """A number with a fraction or an exponent, as it was written; no key of ours takes one."""

    __slots__ = ()


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


class _Rules:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = Number
    parse_int = int
    parse_constant = staticmethod(_constant)
    memo: dict[str, str] = {}


_scan = make_scanner(_Rules())  # type: ignore[arg-type] # typeshed wants one of its own


def loads(data: bytes) -> Any:
    """Return the first JSON value of `data`, bytes that are not UTF-8 replaced.

    Raises:
        JsonWrong: with the text of Go's encoding/json.
    """
    text = data.decode("utf-8", "replace")
    start = 0
    while text[start : start + 1] in _SPACE and start < len(text):
        start += 1
    try:
        value, _ = _scan(text, start)
    except RecursionError:
        # Our limit is the interpreter's; nothing that means something comes near either.
        raise JsonWrong(
            text=f"invalid character {_first_bracket(data)} exceeded max depth"
        ) from None
    except (ValueError, StopIteration, SystemError):
        # SystemError: the scanner wants the exception of json.decoder, which nobody loaded.
        raise JsonWrong(text=_what_is_wrong(data)) from None
    if "\\ud" in text or "\\uD" in text:
        return _without_surrogates(value)
    return value


def _first_bracket(data: bytes) -> str:
    return "'['" if data.count(b"[") > data.count(b"{") else "'{'"


def _without_surrogates(value: Any) -> Any:
    """Half a surrogate pair cannot be encoded again: Go puts U+FFFD in its place."""
    if type(value) is str:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if type(value) is list:
        return [_without_surrogates(item) for item in value]
    if type(value) is dict:
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _quoted(byte: int) -> str:
    if byte == 0x27:
        return "'\\''"
    if byte == 0x5C:
        return "'\\\\'"
    if byte < 0x20 or 0x7F <= byte < 0xA0 or byte == 0xAD:
        short = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r"}.get(byte)
        if short:
            return f"'\\{short}'"
        return f"'\\x{byte:02x}'" if byte < 0x80 else f"'\\u{byte:04x}'"
    return f"'{chr(byte)}'"


class _Wrong(Exception):
    pass


class _Check:
    """Walks bytes as Go's scanner does, to find the byte at which it would stop."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def peek(self) -> int:
        if self.at >= len(self.data):
            raise _Wrong("unexpected EOF")
        return self.data[self.at]

    def skip(self) -> int:
        while self.peek() in b" \t\r\n":
            self.at += 1
        return self.data[self.at]

    def stop(self, where: str) -> NoReturn:
        raise _Wrong(f"invalid character {_quoted(self.data[self.at])} {where}")

    def value(self) -> None:
        """Without recursion: `open_` holds the brackets that are not closed yet."""
        open_: list[int] = []
        self.skip()
        while True:
            self.begin(open_)
            while open_ and self.after(open_):
                open_.pop()
            if not open_:
                return

    def begin(self, open_: list[int]) -> None:
        """Read one value, or the opening of one with something in it (pushed on `open_`)."""
        while True:
            byte = self.skip()
            if byte not in b"[{":
                self.scalar(byte)
                return
            if len(open_) >= _DEEPEST:
                self.stop("exceeded max depth")
            self.at += 1
            open_.append(byte)
            if self.skip() == byte + 2:  # "]" is "[" + 2, "}" is "{" + 2
                open_.pop()
                self.at += 1
                return
            if byte == 0x7B:
                self.key()

    def after(self, open_: list[int]) -> bool:
        """Read what follows a value in a bracket; True if it is the closing one."""
        byte = self.skip()
        if byte == open_[-1] + 2:
            self.at += 1
            return True
        in_array = open_[-1] == 0x5B
        if byte != 0x2C:
            self.stop("after array element" if in_array else "after object key:value pair")
        self.at += 1
        if not in_array:
            self.key()
        return False

    def key(self) -> None:
        if self.skip() != 0x22:
            self.stop("looking for beginning of object key string")
        self.string()
        if self.skip() != 0x3A:
            self.stop("after object key")
        self.at += 1

    def string(self) -> None:
        self.at += 1
        while (byte := self.peek()) != 0x22:
            if byte < 0x20:
                self.stop("in string literal")
            self.at += 1
            if byte == 0x5C:
                self.escape()
        self.at += 1

    def escape(self) -> None:
        byte = self.peek()
        if byte == 0x75:
            for _ in range(4):
                self.at += 1
                if self.peek() not in _HEX:
                    self.stop("in \\u hexadecimal character escape")
        elif byte not in _ESCAPES:
            self.stop("in string escape code")
        self.at += 1

    def scalar(self, byte: int) -> None:
        if byte == 0x22:
            self.string()
        elif byte in _LITERALS:
            self.literal(_LITERALS[byte])
        elif byte == 0x2D or byte in _DIGITS:
            self.number(byte)
        else:
            self.stop("looking for beginning of value")

    def literal(self, word: bytes) -> None:
        for expected in word:
            if self.peek() != expected:
                self.stop(f"in literal {word.decode()} (expecting {_quoted(expected)})")
            self.at += 1

    def number(self, byte: int) -> None:
        if byte == 0x2D:
            self.at += 1
            byte = self.peek()
        self.digits("in numeric literal", only_one=byte == 0x30)
        if self.data[self.at : self.at + 1] == b".":
            self.at += 1
            self.digits("after decimal point in numeric literal")
        if self.data[self.at : self.at + 1] in (b"e", b"E"):
            self.at += 1
            if self.peek() in b"+-":
                self.at += 1
            self.digits("in exponent of numeric literal")

    def digits(self, where: str, *, only_one: bool = False) -> None:
        if self.peek() not in _DIGITS:
            self.stop(where)
        self.at += 1
        while not only_one and self.data[self.at : self.at + 1].isdigit():
            self.at += 1


def _what_is_wrong(data: bytes) -> str:
    if not data.strip(b" \t\r\n"):
        return "EOF"
    try:
        _Check(data).value()
    except _Wrong as wrong:
        return str(wrong)
    return "a number is too long"
