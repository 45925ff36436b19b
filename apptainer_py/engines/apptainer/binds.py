"""Bind specifications: `-B src[:dst[:opts]]` and `--mount type=bind,…` (facts: Apptainer 1.4)."""

from __future__ import annotations

import os

from apptainer_py.base.errors import BindError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Bind(Record):
    """One bind as it was asked for; both paths are absolute, and not looked up yet."""

    source: str
    target: str
    read_only: bool = False
    image_source: str = ""
    image_id: int = 0


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark`, except where a backslash protects it; other backslashes are kept."""
    parts = [""]
    i = 0
    while i < len(text):
        if text[i] == "\\" and text[i + 1 : i + 2] == mark:
            parts[-1] += "\\" + mark
            i += 2
            continue
        if text[i] == mark:
            parts.append("")
        else:
            parts[-1] += text[i]
        i += 1
    return parts


def _plain(text: str) -> str:
    return text.replace("\\:", ":").replace("\\,", ",")


_OPTIONS = ("ro", "rw")


def _is_option(text: str) -> bool:
    return text in _OPTIONS or text.startswith(("image-src=", "id="))


def _specs(text: str) -> list[str]:
    """Split a list of specifications at commas; a comma before an option belongs to it."""
    specs: list[str] = []
    for part in _split(text, ","):
        if specs and len(_split(specs[-1], ":")) == 3 and _is_option(part.strip()):
            specs[-1] += "," + part
        else:
            specs.append(part)
    return specs


def _bad(reason: str) -> BindError:
    return BindError(text=f"While setting bind mount configuration: {reason}")


def _whole(path: str, cwd: str, doing: str) -> str:
    """Return a source as an absolute path."""
    if not cwd and not os.path.isabs(path):
        raise _bad(f"{doing}{path}: the current directory has no path (was it removed?)")
    return os.path.normpath(os.path.join(cwd, path))


def parse_bind(spec: str, cwd: str) -> Bind | None:
    """Parse one `src[:dst[:opts]]`; None for an empty one.

    Raises:
        BindError: the syntax or an option is wrong, or not supported.
    """
    # As in "a, b": what stands before a word is no part of it.
    fields = [_plain(field.lstrip()) for field in _split(spec, ":")]
    if not fields[0] and len(fields) > 1:
        fields.pop(0)
    if not fields[0]:
        return None
    doing = "while parsing bind path: while getting bind path: "
    if len(fields) > 3:
        first = ":".join(fields[:3])
        raise _bad(f'{doing}bad bind syntax "{first}:": should be {first}')
    source = _whole(fields[0], cwd, doing)
    target = fields[1] if len(fields) > 1 else source
    options = [word.lstrip() for word in fields[2].split(",")] if len(fields) > 2 else []
    inside, number = "", ""
    for option in options:
        key, _, value = option.partition("=")
        if key == "image-src":
            inside = value or "/"
        elif key == "id":
            number = value
        elif option not in _OPTIONS:
            raise _bad(f"{doing}{option} is not a valid bind option")
    return _from_image(_checked(source, target, read_only="ro" in options), inside, number)


def _from_image(bind: Bind, inside: str, number: str) -> Bind:
    """Return a bind with `image-src=` and `id=`, either of which makes it one from an image."""
    if not inside and not number:
        return bind
    if number and not (number.isascii() and number.isdigit() and 0 < int(number) < 1 << 32):
        reason = "id number must be greater than 0"
        if number.strip("0"):
            reason = f"while parsing id bind option: {number} is not the number of an object"
        raise BindError(text=f"container creation failed: {reason}")
    return Bind(
        source=bind.source,
        target=bind.target,
        read_only=bind.read_only,
        image_source=os.path.normpath("/" + inside.lstrip("/")),
        image_id=int(number or 0),
    )


def _checked(source: str, target: str, *, read_only: bool) -> Bind:
    if not os.path.isabs(target):
        reason = "destination must be an absolute path"
        if not target and not read_only:
            reason = "mount point must contain a destination"
        raise BindError(
            text=f"container creation failed: unable to add {source} to mount list: {reason}"
        )
    for path in (source, target):
        if "\0" in path or len(path) > 4000:
            raise _bad("a path is too long, or has a NUL in it")
    return Bind(source=source, target=os.path.normpath(target), read_only=read_only)


_KEYS = {"source": "source", "src": "source"}
_KEYS.update(dict.fromkeys(("destination", "dst", "target"), "target"))


def parse_mount(spec: str, cwd: str) -> Bind:
    """Parse one `type=bind,source=…,destination=…[,ro]`, fields as in CSV.

    Raises:
        BindError: the syntax, the type or a key is wrong, or not supported.
    """
    kind = "bind"
    paths: dict[str, str] = {}
    read_only = False
    doing = f'while parsing mount "{spec}": '
    for field in _csv_fields(spec, doing):
        key, _, value = field.partition("=")
        if key == "type":
            kind = value
        elif key in _KEYS:
            paths[_KEYS[key]] = value
        elif key in ("ro", "readonly"):
            read_only = True
        elif key in ("image-src", "id"):
            if not value:
                raise _bad(f"{doing}{key} cannot be empty")
            paths[key] = value
        elif key == "bind-propagation":
            raise _bad(
                f"{doing}bind-propagation not supported for individual mounts, check "
                "apptainer.conf for global setting"
            )
        else:
            raise _bad(f'{doing}invalid key "{key}" in mount specification')
    if kind != "bind":
        raise _bad(f"{doing}unsupported mount type \"{kind}\", only 'bind' is supported")
    if not paths.get("source") or not paths.get("target"):
        raise _bad(f"{doing}mounts must specify a source and a destination")
    source = _whole(paths["source"], cwd, doing)
    bind = _checked(source, paths["target"], read_only=read_only)
    return _from_image(bind, paths.get("image-src", ""), paths.get("id", ""))


def _csv_fields(spec: str, doing: str) -> list[str]:
    if '"' not in spec:
        return spec.split(",")
    import csv
    import re

    field = '(?:"(?:[^"]|"")*"|[^",]*)'
    if not re.fullmatch(f"{field}(?:,{field})*", spec):
        raise _bad(f"{doing}bad quoting: a quote that is not around a whole field")
    return next(csv.reader([spec], strict=True))


def parse_all(binds: Iterable[str], mounts: Iterable[str], cwd: str) -> list[Bind]:
    """Return every bind of the command line and the environment, in order."""
    found = [parse_bind(spec, cwd) for text in binds for spec in _specs(text)]
    return [bind for bind in found if bind] + [parse_mount(spec, cwd) for spec in mounts]
