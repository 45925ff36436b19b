"""Definition files: a header and sections for each stage (Apptainer's grammar, facts §7.1).

Sections begin with a line whose first word starts with `%`; a section that stands there twice is
taken as one. What is kept of a section is its text and the line of the file that it starts on, so
that a failure can name the line.
"""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER_KEYS = frozenset(
    "bootstrap includecmd mirrorurl updateurl osversion include library registry namespace stage "
    "product user regcode productpgp registerurl modules fingerprints confurl setopt from target "
    "frontend filename buildargs".split()
)
SECTIONS = frozenset(
    "help setup files labels environment pre post runscript test startscript arguments".split()
)
APP_SECTIONS = frozenset(
    "appinstall applabels appfiles appenv apptest apphelp apprun appstart".split()
)
# Scripts that Apptainer runs itself: their words may be options of the shell.
_RUN_BY_US = frozenset(("pre", "setup", "post"))
_SCRIPTS = _RUN_BY_US | {"runscript", "startscript", "test"}
_OTHER_URL = "otherurl"


class DefinitionWrong(ApptainerError):
    """The text is no definition file; `file` is what the user named."""

    message = "Unable to build from {file}: while parsing definition: {file}: {reason}"


class NoHeader(ApptainerError):
    message = "Unable to create build: {reason}"


class Line(Record):
    """One line of a section and where it stands in the file, counted from 1."""

    number: int
    text: str


class Section(Record):
    """`words` follow the name on its line: `from build`, `-c /bin/bash`, the name of an app.

    `number` is that line's.
    """

    name: str
    words: tuple[str, ...]
    lines: tuple[Line, ...]
    number: int = 0

    @property
    def text(self) -> str:
        """The body, each line ended."""
        return "".join(f"{line.text}\n" for line in self.lines)

    @property
    def app(self) -> str:
        """The application that a section of one is for."""
        return self.words[0] if self.words else ""


class Stage(Record):
    """From one `Bootstrap:` to the next; `text` is that part of the file, `line` that key's."""

    header: dict[str, str]
    sections: tuple[Section, ...]
    text: str
    line: int = 0

    @property
    def name(self) -> str:
        """What `%files from` of a later stage calls it."""
        return self.header.get("stage", "")

    def all(self, name: str) -> list[Section]:
        """Return the sections of this name, in their order."""
        return [section for section in self.sections if section.name == name]

    def joined(self, name: str) -> Section | None:
        """Return the sections of this name as one; the last words count."""
        found = self.all(name)
        if not found:
            return None
        words = next((one.words for one in reversed(found) if one.words), ())
        lines = tuple(line for one in found for line in one.lines)
        return Section(name=name, words=words, lines=lines)

    def apps(self) -> list[str]:
        """Return the names of applications, in the order in which they appear."""
        return list(dict.fromkeys(one.app for one in self.sections if one.name in APP_SECTIONS))


def parse(text: str, *, file: str) -> tuple[Stage, ...]:
    """Return the stages of a definition file.

    Raises:
        DefinitionWrong: a header key or section is unknown, or there is no stage.
        NoHeader: a file without one.
    """
    lines = [Line(number=at, text=one) for at, one in enumerate(lines_of(text), 1)]
    if not any(_said(line) for line in lines):
        raise DefinitionWrong(file=file, reason="no stages found in definition file")
    return tuple(_stage(part, file) for part in _parts(lines))


def lines_of(text: str) -> list[str]:
    """Return the lines of a text; no other character than a newline ends one, as in a shell."""
    lines = text.removeprefix("\ufeff").split("\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def implicit(agent: str, source: str) -> Stage:
    """Return the stage that a bare image or URI stands for."""
    header = {"bootstrap": agent, "from": source}
    return Stage(header=header, sections=(), text=f"bootstrap: {agent}\nfrom: {source}\n\n")


def _said(line: Line) -> str:
    """Return a line's text, or "" for one that says nothing."""
    text = line.text.strip()
    return "" if text.startswith("#") else text


def _parts(lines: Sequence[Line]) -> list[list[Line]]:
    parts: list[list[Line]] = [[]]
    begun = False
    for line in lines:
        if key_of(line.text) == "bootstrap":
            if begun:
                parts.append([])
            begun = True
        parts[-1].append(line)
    return parts


def key_of(text: str) -> str:
    """Return the key that a line of a header gives, "" for another line."""
    key, colon, _ = text.partition(":")
    return key.strip().lower() if colon else ""


def _stage(lines: Sequence[Line], file: str) -> Stage:
    start = next(
        (at for at, line in enumerate(lines) if line.text.lstrip().startswith("%")), len(lines)
    )
    header = _header(lines[:start], file)
    if "bootstrap" not in header:
        reason = "no bootstrap specification found"
        if not header and any(map(_said, lines)):
            reason = "multiple stages detected, all must have headers"
        raise NoHeader(reason=reason)
    sections = tuple(_sections(lines[start:]))
    unknown = [
        one.name for one in sections if one.name not in SECTIONS and one.name not in APP_SECTIONS
    ]
    if unknown:
        names = ", ".join(dict.fromkeys(unknown))
        number = next(line.number for line in lines[start:] if _name_of(line.text) == unknown[0])
        reason = f"invalid section(s) specified: {names} (line {number})"
        raise DefinitionWrong(file=file, reason=reason)
    for one in sections:
        _check_words(one, file)
    text = "".join(f"{line.text}\n" for line in lines)
    number = next((one.number for one in lines[:start] if key_of(one.text) == "bootstrap"), 0)
    return Stage(header=header, sections=sections, text=text, line=number)


def _check_words(section: Section, file: str) -> None:
    reason = _wrong_words(section.name, section.words)
    if reason:
        reason = f"the section %{section.name} {reason} (line {section.number})"
        raise DefinitionWrong(file=file, reason=reason)


def _wrong_words(name: str, words: tuple[str, ...]) -> str:
    """Return what a section wants of the words after its name, "" if these will do."""
    if name in APP_SECTIONS and (not words or words[0] in (".", "..") or "/" in words[0]):
        return "needs the name of an application"
    if name == "files" and words and (words[0] != "from" or len(words) != 2):
        return "takes `from` and a stage, or nothing"
    if name in _SCRIPTS and words[-1:] == ("-c",):
        return "has -c without an interpreter"
    if name in _RUN_BY_US and words and not words[0].startswith(("-", "+")):
        return f"takes -c and an interpreter, or options of the shell: not {words[0]!r}"
    return ""


def _header(lines: Sequence[Line], file: str) -> dict[str, str]:
    header: dict[str, str] = {}
    for number, text in _continued(lines):
        key, colon, value = text.partition(":")
        key = key.strip().lower()
        if not colon:
            reason = f"header key {key} had no val (line {number})"
        elif key not in HEADER_KEYS and not _is_other_url(key):
            reason = f"invalid header keyword found: {key} (line {number})"
        else:
            header[key] = value.strip()
            continue
        raise DefinitionWrong(file=file, reason=f"failed to parse deffile header: {reason}")
    return header


def _is_other_url(key: str) -> bool:
    return key.startswith(_OTHER_URL) and key[len(_OTHER_URL) :].isdecimal()


def _continued(lines: Sequence[Line]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a header that say something; a backslash goes on with the next line."""
    waiting = ""
    for line in lines:
        said = _said(line)
        if not said:
            continue
        said = said.partition(" #")[0].strip()
        if said.endswith("\\"):
            waiting += said[:-1].strip() + " "
            continue
        yield line.number, waiting + said
        waiting = ""
    if waiting:
        yield lines[-1].number, waiting


def _name_of(text: str) -> str:
    words = text.split()
    return words[0][1:].lower() if words and words[0].startswith("%") else ""


def _sections(lines: Sequence[Line]) -> Iterator[Section]:
    import itertools

    starts = [at for at, line in enumerate(lines) if line.text.lstrip().startswith("%")]
    for start, end in itertools.pairwise([*starts, len(lines)]):
        line = lines[start]
        yield Section(
            name=_name_of(line.text),
            words=tuple(_words(line.text)),
            lines=tuple(lines[start + 1 : end]),
            number=line.number,
        )


def _words(text: str) -> list[str]:
    import shlex

    rest = text.split(None, 1)[1:]
    try:
        return shlex.split("".join(rest), comments=True)
    except ValueError:
        return "".join(rest).split()
