"""The environment file that Apptainer makes of an OCI image's variables, read as it was meant.

It writes `export NAME="${NAME:-"VALUE"}"` and escapes the value twice, which no shell undoes: a
backtick loses the whole file, `$` is expanded, quotes keep their backslashes. The escapes tell
which value it was, so the lines are written again in a form that every shell reads as that value.
"""

from __future__ import annotations

NAME = "10-docker2singularity.sh"
_FIRST = "#!/bin/sh\n"
_ESCAPES = (("\\\\\\\\", "\\"), ('\\\\\\"', '"'), ("\\\\`", "`"), ("\\\\$", "$"), ("\\n", "\n"))
# What else a Go string escapes: by a letter, or by a letter and digits.
_LETTERS = dict(zip("abfrtv", "\a\b\f\r\t\v", strict=True))
_DIGITS = {"x": 2, "u": 4, "U": 8}


def rewritten(text: str) -> str | None:
    """Return the file as it should have been; None for one that is right, or of another form."""
    if "\\" not in text or not text.startswith(_FIRST):
        return None
    lines = []
    for line in text[len(_FIRST) :].splitlines():
        if line.strip():
            found = _line(line)
            if found is None:
                return None
            lines.append(found)
    return "\n".join([*lines, ""])


def _line(line: str) -> str | None:
    if not line.startswith("export ") or not line.endswith('"'):
        return None
    name, equals, rest = line[7:].partition("=")
    if not equals or not name.isascii() or not name.replace("_", "a").isalnum():
        return None
    if name[0].isdigit():
        return None
    start, end = f'"${{{name}:-"', '"}"'
    if rest.startswith(start) and rest.endswith(end) and len(rest) >= len(start) + len(end):
        value = _value(rest[len(start) : -len(end)])
        if value is not None:
            return f'[ -n "${{{name}:-}}" ] || {name}={_quoted(value)}\nexport {name}'
    elif rest[0] == '"' and len(rest) > 1 and name == "PATH" and "\\" not in rest:
        return line
    return None


def _value(body: str) -> str | None:
    """Undo the escapes; None where something stands that they would not have left."""
    done = []
    at = 0
    while at < len(body):
        if body[at] in '"$`':
            return None
        if body[at] != "\\":
            done.append(body[at])
            at += 1
            continue
        for escape, meant in _ESCAPES:
            if body.startswith(escape, at):
                done.append(meant)
                at += len(escape)
                break
        else:
            letter, length = _letter(body[at + 1 : at + 10])
            if not length:
                return None
            done.append(letter)
            at += 1 + length
    return "".join(done)


def _letter(code: str) -> tuple[str, int]:
    """Return what an escape stands for and its length without the backslash; 0 for none."""
    if code[:1] in _LETTERS:
        return _LETTERS[code[0]], 1
    count = _DIGITS.get(code[:1], 0)
    digits = code[1 : 1 + count]
    if not count or len(digits) < count or digits.strip("0123456789abcdef"):
        return "", 0
    number = int(digits, 16)
    if code[0] == "x" and number >= 0x80:
        number += 0xDC00  # no text: as Python keeps such a byte
    return (chr(number), 1 + count) if 0 < number < 0x110000 else ("", 0)


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def assignment(text: str) -> str:
    """Return a shell line that gives `__docker` this text."""
    return f"__docker={_quoted(text)}"
