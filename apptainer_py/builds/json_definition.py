"""Definitions as JSON: the fields of Apptainer's type `Definition`, rewritten as a definition file.

An object is a stage, an array has several. `raw`, `fullraw` and `metadata` hold what a build makes
anew, and are not read.
"""

from __future__ import annotations

from apptainer_py.builds import definition
from apptainer_py.builds.definition import DefinitionWrong
from apptainer_py.model.json_text import JsonWrong, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Part = tuple[str, str]

_MADE_ANEW = ("raw", "fullraw", "metadata")
_IMAGE_SCRIPTS = {
    "help": "help",
    "environment": "environment",
    "runScript": "runscript",
    "test": "test",
    "startScript": "startscript",
}
_BUILD_SCRIPTS = {name: name for name in ("pre", "setup", "post", "test", "arguments")}


def as_text(text: str, *, file: str) -> str:
    """Return the definition file that a JSON text stands for.

    Raises:
        DefinitionWrong: it is no JSON, has fields that are unknown, or says what no section can.
    """
    try:
        value = loads(text.encode("utf-8", "surrogateescape"))
    except JsonWrong as error:
        raise DefinitionWrong(file=file, reason=f"it is no JSON: {error}") from None
    stages = value if isinstance(value, list) else [value]
    return "\n".join(_Stage(one, file).text() for one in stages)


class _Stage:
    """One object on its way to a text."""

    def __init__(self, value: object, file: str) -> None:
        self._file = file
        self._fields = self._object(
            value, "", "header", "imageData", "buildData", "customData", "appOrder", *_MADE_ANEW
        )

    def text(self) -> str:
        """Return the text of a definition file that is read as what the object says."""
        header = self._strings(self._fields, "header")
        header = {key.lower(): value for key, value in header.items()}
        names = sorted(header, key=lambda name: name != "bootstrap")
        text = "".join(f"{name}: {header[name]}\n" for name in names) + "\n"
        text += "".join(f"%{name}\n{body}\n" for name, body in self._parts())
        stages = definition.parse(text, file=self._file)
        if len(stages) != 1 or stages[0].header != header:
            raise self._wrong("its header has what the header of a definition file cannot have")
        return text

    def _parts(self) -> Iterator[Part]:
        fields = self._fields
        image = self._object(fields.get("imageData"), "imageData", *_MADE_ANEW, "labels",
                             "imageScripts")  # fmt: skip
        build = self._object(fields.get("buildData"), "buildData", "files", "buildScripts")
        yield from self._scripts(build, "buildScripts", _BUILD_SCRIPTS)
        labels = self._strings(image, "labels")
        if labels:
            yield "labels", "".join(f"{key} {value}\n" for key, value in labels.items())
        yield from self._files(build)
        yield from self._scripts(image, "imageScripts", _IMAGE_SCRIPTS)
        yield from self._apps()

    def _scripts(self, holder: dict[str, Any], key: str, known: dict[str, str]) -> Iterator[Part]:
        scripts = self._object(holder.get(key), key, *known)
        for name, section in known.items():
            script = self._object(scripts.get(name), name, "args", "script")
            body = self._body(script, "script")
            if body:
                yield f"{section} {self._string(script, 'args', lines=1)}".rstrip(), body

    def _files(self, build: dict[str, Any]) -> Iterator[Part]:
        for group in self._list(build, "files"):
            fields = self._object(group, "files", "args", "files")
            lines = []
            for entry in self._list(fields, "files"):
                pair = self._object(entry, "files", "source", "destination")
                names = [self._string(pair, name, lines=1) for name in ("source", "destination")]
                lines.append(" ".join(filter(None, map(_quoted, names))))
            yield (
                f"files {self._string(fields, 'args', lines=1)}".rstrip(),
                "".join(f"{line}\n" for line in lines),
            )

    def _apps(self) -> Iterator[Part]:
        sections = self._strings(self._fields, "customData", lines=0)
        order = [name for name in self._list(self._fields, "appOrder") if isinstance(name, str)]

        def place(section: str) -> int:
            app = section.partition(" ")[2].strip()
            return order.index(app) if app in order else len(order)

        for name in sorted(sections, key=place):
            if name.partition(" ")[0].lower() not in definition.APP_SECTIONS or "\n" in name:
                raise self._wrong(f"customData has {name!r}, which is no section of an application")
            yield name, self._body(sections, name)

    # -- values of the kinds that they have to be

    def _wrong(self, reason: str) -> DefinitionWrong:
        return DefinitionWrong(file=self._file, reason=reason)

    def _object(self, value: object, name: str, *known: str) -> dict[str, Any]:
        if value is None and name:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(f"{name or 'a stage'} is no object")
        for key in value:
            if key not in known:
                place = f" of {name}" if name else ""
                raise self._wrong(f"the field {key!r}{place} is unknown")
        return value

    def _list(self, fields: dict[str, Any], name: str) -> list[Any]:
        value = fields.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(f"{name} is no array")
        return value or []

    def _strings(self, fields: dict[str, Any], name: str, *, lines: int = 1) -> dict[str, str]:
        value = fields.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self._wrong(f"{name} is no object")
        return {key: self._string(value, key, lines=lines) for key in value}

    def _body(self, fields: dict[str, Any], name: str) -> str:
        """Return a script; a line of it must not begin a section or a stage."""
        body = self._string(fields, name)
        for line in definition.lines_of(body):
            if line.lstrip().startswith("%") or definition.key_of(line) == "bootstrap":
                reason = f"{name} has the line {line!r}, which starts something else in its text"
                raise self._wrong(reason)
        return body

    def _string(self, fields: dict[str, Any], name: str, *, lines: int = 0) -> str:
        value = fields.get(name)
        value = "" if value is None else value
        if not isinstance(value, str) or "\0" in value:
            raise self._wrong(f"{name} is no string")
        if lines and ("\n" in value or "\n" in name):
            raise self._wrong(f"{name} has more than one line")
        return value


def _quoted(name: str) -> str:
    return f'"{name}"' if " " in name and not name.startswith(("'", '"')) else name
