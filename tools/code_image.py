"""Lay code objects out as CPython 3.11 has them in memory, so that a stage need not unmarshal them.

Unmarshalling makes some ten thousand objects one by one, which takes a stage longer than running
them. An image is one piece of memory with all of them in it: starter/stagehost_image.c copies it
and puts the addresses in. It knows the structures of one minor version (Include/cpython/code.h,
unicodeobject.h); for any other, and wherever these structures differ, bundles are marshalled.
"""

from __future__ import annotations

import dis
import itertools
import struct
import sys
from types import CodeType

# Never freed: more references than a launch can ever drop.
_REFERENCES = 1 << 40
_GC_HEAD = bytes(16)
_UNKNOWN_HASH = -1
# struct PyASCIIObject, `state`: compact, ready, ascii; and where `kind` is.
_COMPACT, _ASCII, _READY, _KIND_SHIFT = 1 << 5, 1 << 6, 1 << 7, 2
_DIGIT_BITS = 30
# CO_FAST_* of Include/internal/pycore_code.h
_LOCAL, _CELL, _FREE = 0x20, 0x40, 0x80
# struct PyCodeObject after ob_type, the addresses in it left out
_CODE = struct.Struct("=q24xihh10i72xi4x8x")
# What a slot holds until its address is known: a place in the image, or a number in one of the
# tables of stagehost_image.c, in the upper half which.
_INSIDE, _OUTSIDE, _NAME = range(3)
_OUTSIDE_OBJECTS = ("str", "bytes", "int", "float", "tuple", "code", None, True, False, ...)


def possible() -> bool:
    """Return whether the running interpreter is the one whose structures are known here."""
    return (
        sys.version_info[:2] == (3, 11)
        and sys.implementation.name == "cpython"
        and sys.byteorder == "little"
        and struct.calcsize("P") == 8
    )


def _outside(wanted: object) -> int:
    for number, one in enumerate(_OUTSIDE_OBJECTS):
        if one is wanted or (type(one) is str and one == wanted):
            return number
    raise TypeError(f"an image cannot hold {wanted!r}")


class Image:
    """Objects on their way into one piece of memory.

    `slots` are the places of addresses, `names` those of strings that are to be interned, `sets`
    pairs of a slot and the tuple of whose items a frozenset is made.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.slots: list[int] = []
        self.names: list[int] = []
        self.sets: list[tuple[int, int]] = []
        self._interned: dict[str, int] = {}
        self._known: dict[object, int] = {}

    def add(self, root: object, names: set[str]) -> int:
        """Put an object in with all that it refers to, and intern `names`; returns its place."""
        for name in sorted(names):
            self._interned[name] = len(self.names)
            # Whoever interns it gives it its type before.
            self.names.append(self._text(name, typed=False))
        return self._place(root)

    def gaps(self) -> list[int]:
        """Return the slots as steps of eight bytes, each from the one before."""
        places = [0, *sorted(self.slots)]
        return [(after - before) // 8 for before, after in itertools.pairwise(places)]

    def _begin(self, kind: str, size: int, *, tracked: bool = False, typed: bool = True) -> int:
        """Begin an object: its references and, if `typed`, its type; returns its place."""
        self.data += bytes(-len(self.data) % 8)
        if tracked:
            self.data += _GC_HEAD
        place = len(self.data)
        self.data += struct.pack("=q", _REFERENCES) + bytes(8 + size)
        if typed:
            self._slot(place + 8, _OUTSIDE, _outside(kind))
        return place

    def _slot(self, where: int, table: int, number: int) -> None:
        self.slots.append(where)
        struct.pack_into("=II", self.data, where, number, table)

    def _refer(self, where: int, target: object) -> None:
        """Have a slot refer to an object."""
        if target is None or target is ... or type(target) is bool:
            self._slot(where, _OUTSIDE, _outside(target))
        elif type(target) is str and target in self._interned:
            self._slot(where, _NAME, self._interned[target])
        elif type(target) is frozenset:
            self.sets.append((where, self._place(tuple(sorted(target, key=repr)))))
        else:
            self._slot(where, _INSIDE, self._place(target))

    def _place(self, target: object) -> int:
        key = _key(target)
        if key not in self._known:
            self._known[key] = self._make(target)
        return self._known[key]

    def _make(self, target: object) -> int:
        if type(target) is str:
            return self._text(target)
        if type(target) is bytes:
            return self._bytes(target)
        if type(target) is int:
            return self._number(target)
        if type(target) is float:
            place = self._begin("float", 8)
            struct.pack_into("=d", self.data, place + 16, target)
            return place
        if type(target) is tuple:
            return self._tuple(target)
        if type(target) is CodeType:
            return self._code(target)
        raise TypeError(f"an image cannot hold {target!r}")

    def _text(self, text: str, *, typed: bool = True) -> int:
        highest = max(map(ord, text), default=0)
        width = 1 if highest < 256 else 2 if highest < 65536 else 4
        state = _COMPACT | _READY | width << _KIND_SHIFT
        if highest < 128:
            state |= _ASCII
        head = struct.pack("=qqI", len(text), _UNKNOWN_HASH, state)
        encoding = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[width]
        content = text.encode(encoding, "surrogatepass" if width > 1 else "strict") + bytes(width)
        start = 48 if highest < 128 else 72
        place = self._begin("str", start - 16 + len(content), typed=typed)
        self.data[place + 16 : place + 16 + len(head)] = head
        self.data[place + start : place + start + len(content)] = content
        return place

    def _bytes(self, content: bytes) -> int:
        place = self._begin("bytes", 16 + len(content) + 1)
        struct.pack_into("=qq", self.data, place + 16, len(content), _UNKNOWN_HASH)
        self.data[place + 32 : place + 32 + len(content)] = content
        return place

    def _number(self, number: int) -> int:
        digits, rest = [], abs(number)
        while rest:
            digits.append(rest & (1 << _DIGIT_BITS) - 1)
            rest >>= _DIGIT_BITS
        place = self._begin("int", 8 + 4 * max(len(digits), 1))
        size = -len(digits) if number < 0 else len(digits)
        struct.pack_into(f"=q{len(digits)}I", self.data, place + 16, size, *digits)
        return place

    def _tuple(self, items: tuple[object, ...]) -> int:
        place = self._begin("tuple", 8 + 8 * len(items), tracked=True)
        struct.pack_into("=q", self.data, place + 16, len(items))
        for number, item in enumerate(items):
            self._refer(place + 24 + 8 * number, item)
        return place

    def _code(self, code: CodeType) -> int:
        plain = [name for name in code.co_cellvars if name not in code.co_varnames]
        names = (*code.co_varnames, *plain, *code.co_freevars)
        kinds = [_LOCAL | (_CELL if name in code.co_cellvars else 0) for name in code.co_varnames]
        kinds += [_CELL] * len(plain) + [_FREE] * len(code.co_freevars)
        words = code.co_code
        place = self._begin("code", _CODE.size + len(words))
        _CODE.pack_into(
            self.data,
            place + 16,
            len(words) // 2,
            code.co_flags,
            # Never quickened: a launch runs nothing often enough to win back what that costs.
            0,
            0,
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            code.co_stacksize,
            code.co_firstlineno,
            len(names),
            len(code.co_varnames),
            len(plain),
            len(code.co_cellvars),
            len(code.co_freevars),
            words[::2].index(dis.opmap["RESUME"]),
        )
        start = place + 16 + _CODE.size
        self.data[start : start + len(words)] = words
        for number, part in enumerate((code.co_consts, code.co_names, code.co_exceptiontable)):
            self._refer(place + 24 + 8 * number, part)
        texts = (code.co_filename, code.co_name, code.co_qualname)
        for number, part in enumerate((names, bytes(kinds), *texts, code.co_linetable)):
            self._refer(place + 96 + 8 * number, part)
        return place


def _key(target: object) -> object:
    """Return what tells constants apart: 1 is not True, nor 0.0 -0.0."""
    if type(target) is tuple:
        return (tuple, *map(_key, target))
    if type(target) is frozenset:
        return (frozenset, *sorted(map(repr, target)))
    if type(target) is CodeType:
        return (CodeType, id(target))
    return (type(target), repr(target))


def names_of(code: CodeType) -> set[str]:
    """Return the names by which code looks things up, which are to be the interpreter's own."""
    found = set(code.co_names)
    for inner in code.co_consts:
        if type(inner) is CodeType:
            found |= names_of(inner)
    return found
