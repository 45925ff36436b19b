"""Values in the text form of GLib's GVariant, which annotations for systemd are written in."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Where a type may be written as a word before the value.
_KEYWORDS = {
    "boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "handle": "h",
    "uint32": "u", "int64": "x", "uint64": "t", "double": "d", "string": "s", "objectpath": "o",
    "signature": "g",
}  # fmt: skip
_RANGES = {
    "y": (0, 255), "n": (-(1 << 15), (1 << 15) - 1), "q": (0, (1 << 16) - 1),
    "i": (-(1 << 31), (1 << 31) - 1), "h": (0, (1 << 31) - 1), "u": (0, (1 << 32) - 1),
    "x": (-(1 << 63), (1 << 63) - 1), "t": (0, (1 << 64) - 1),
}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_TOKEN = (
    r"\s*(?:(@[a-z(){}]+)|(b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\")|([\[\]{}():,<>])"
    r"|([-+]?[0-9][0-9A-Za-z.+-]*|[-+]?(?:inf|nan)\b)|([A-Za-z][A-Za-z0-9]*))"
)
_DEPTH_MAX = 16


class GVariantWrong(ValueError):
    """A text that is no value."""


def parse(text: str) -> tuple[str, Any]:
    """Return a value's signature (D-Bus) and the value.

    Raises:
        GVariantWrong: it is none.
    """
    reader = _Reader(text)
    node = reader.node(0)
    if reader.tokens:
        raise GVariantWrong(f"unexpected {reader.tokens[0][1]} after the value")
    signature = _signature(node)
    return signature, _value(node, signature)


# A node is (kind, content): a typed one holds (signature, node), the others what they consist of.
_Node = tuple[str, "Any"]


class _Reader:
    def __init__(self, text: str) -> None:
        import re

        self.tokens: list[tuple[str, str]] = []
        place, text = 0, text.strip()
        kinds = ("type", "string", "mark", "number", "word")
        while place < len(text):
            found = re.compile(_TOKEN).match(text, place)
            if found is None:
                raise GVariantWrong(f"unexpected {text[place]}")
            number = found.lastindex or 1
            self.tokens.append((kinds[number - 1], found.group(number)))
            place = found.end()

    def _next(self) -> tuple[str, str]:
        if not self.tokens:
            raise GVariantWrong("unexpected end of the value")
        return self.tokens.pop(0)

    def _expect(self, mark: str) -> None:
        kind, text = self._next()
        if (kind, text) != ("mark", mark):
            raise GVariantWrong(f"unexpected {text}, {mark} was expected")

    def _at(self, mark: str) -> bool:
        return bool(self.tokens) and self.tokens[0] == ("mark", mark)

    def node(self, depth: int) -> _Node:
        if depth > _DEPTH_MAX:
            raise GVariantWrong("the value is nested too deeply")
        kind, text = self._next()
        if kind == "type":
            return "typed", (text[1:], self.node(depth + 1))
        if kind == "word":
            if text in ("true", "false"):
                return "b", text == "true"
            if text not in _KEYWORDS:
                raise GVariantWrong(f"unexpected {text}")
            return "typed", (_KEYWORDS[text], self.node(depth + 1))
        if kind == "number":
            return "number", text
        if kind == "string":
            if text[0] == "b":
                return "bytes", _unquoted(text[1:]).encode("latin-1", "replace") + b"\0"
            return "s", _unquoted(text)
        return self._container(text, depth + 1)

    def _container(self, mark: str, depth: int) -> _Node:
        if mark == "[":
            return "a", self._rest("]", depth)
        if mark == "(":
            return "(", self._rest(")", depth)
        if mark == "<":
            inner = self.node(depth)
            self._expect(">")
            return "v", inner
        if mark != "{":
            raise GVariantWrong(f"unexpected {mark}")
        pairs = []
        while not self._at("}"):
            key = self.node(depth)
            self._expect(":")
            pairs.append((key, self.node(depth)))
            if not self._at("}"):
                self._expect(",")
        self._expect("}")
        return "{", pairs

    def _rest(self, end: str, depth: int) -> list[_Node]:
        nodes = []
        while not self._at(end):
            nodes.append(self.node(depth))
            if not self._at(end):
                self._expect(",")
        self._expect(end)
        return nodes


def _unquoted(text: str) -> str:
    out = ""
    escaped = False
    for c in text[1:-1]:
        if escaped:
            out += _ESCAPES.get(c, c)
        elif c != "\\":
            out += c
        escaped = c == "\\" and not escaped
    return out


def _signature(node: _Node) -> str:
    """Return the type that a node has where none is said."""
    kind, content = node
    if kind == "typed":
        return str(content[0])
    if kind == "number":
        plain = content.lower().startswith(("0x", "-0x", "+0x"))
        return "d" if not plain and set(content.lower()) & set(".einf") else "i"
    if kind == "bytes":
        return "ay"
    if kind == "(":
        return "(" + "".join(map(_signature, content)) + ")"
    if kind == "a":
        return "a" + _common([_signature(one) for one in content])
    if kind == "{":
        keys = _common([_signature(key) for key, _ in content])
        return "a{" + keys + _common([_signature(value) for _, value in content]) + "}"
    return kind


def _common(signatures: list[str]) -> str:
    found = set(signatures)
    if not found:
        raise GVariantWrong("the type of an empty array must be said")
    # One number with a fraction makes all of them such; a type that is said makes all of them so.
    for weak in ("i", "d"):
        if len(found) > 1:
            found.discard(weak)
    if len(found) > 1:
        raise GVariantWrong("the elements of an array differ in type")
    return found.pop()


def _parts(signature: str) -> list[str]:
    """Split a signature into complete types."""
    found = []
    while signature:
        size = 0
        while size < len(signature) and signature[size] == "a":
            size += 1
        if size < len(signature) and signature[size] in "({":
            depth = 0
            while True:
                depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(signature[size : size + 1], 0)
                size += 1
                if not depth:
                    break
                if size >= len(signature):
                    raise GVariantWrong(f"{signature} is no type")
        else:
            size += 1
        found.append(signature[:size])
        signature = signature[size:]
    return found


def _value(node: _Node, signature: str) -> Any:
    """Return a node as a value of that type."""
    kind, content = node
    if kind == "typed" and content[0] == signature:
        return _value(content[1], signature)
    if kind == "number":
        return _number(content, signature)
    if kind == "v" and signature == "v":
        inner = _signature(content)
        return inner, _value(content, inner)
    plain = {"bytes": ("ay",), "s": ("s", "o", "g"), "b": ("b",)}
    if signature in plain.get(kind, ()):
        return content
    if kind in ("a", "(", "{"):
        return _composed(kind, content, signature)
    raise GVariantWrong(f"a value is not of type {signature}")


def _composed(kind: str, content: list[Any], signature: str) -> Any:
    if kind == "a" and signature[:1] == "a":
        made = [_value(one, signature[1:]) for one in content]
        return bytes(made) if signature == "ay" else made
    if kind == "(" and signature[:1] == "(":
        kinds = _parts(signature[1:-1])
        if len(kinds) == len(content):
            return tuple(_value(one, part) for one, part in zip(content, kinds, strict=True))
    if kind == "{" and signature[:2] == "a{":
        first, second = _parts(signature[2:-1])
        return {_value(key, first): _value(value, second) for key, value in content}
    raise GVariantWrong(f"a value is not of type {signature}")


def _number(text: str, signature: str) -> int | float:
    try:
        if signature == "d":
            return float(text)
        if signature in _RANGES:
            octal = text.lstrip("+-")[:1] == "0" and text.lstrip("+-").isdecimal()
            number = int(text, 8 if octal else 0)
            least, most = _RANGES[signature]
            if least <= number <= most:
                return number
    except ValueError:
        pass
    raise GVariantWrong(f"{text} is no value of type {signature}")
