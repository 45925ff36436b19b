"""Build arguments: `{{ NAME }}` in a definition file, from the command line or `%arguments`."""

from __future__ import annotations

from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds.definition import lines_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PATTERN = r"\{\{\s*(\w+)\s*\}\}"
_FILE_BYTES = 1 << 20


class Undefined(ApptainerError):
    message = (
        "Unable to build from {file}: build var {name} is not defined through either --build-arg "
        "(--build-arg-file) or 'arguments' section"
    )


class NotUsed(ApptainerError):
    message = (
        "unused build args: {names}. Use option --warn-unused-build-args to show a warning "
        "instead of a fatal message"
    )


class ArgumentWrong(ApptainerError):
    message = "{where}: {text} is not of the form key=value"


def pairs(lines: Iterable[str], where: str) -> dict[str, str]:
    """Return the names and values of `key=value` lines; empty ones and comments are passed over.

    Raises:
        ArgumentWrong: a line has another form.
    """
    found: dict[str, str] = {}
    for line in lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ArgumentWrong(where=where, text=text)
        found[key.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def from_file(path: str) -> dict[str, str]:
    """Return the pairs of a file.

    Raises:
        ApptainerError: it cannot be read, or a line has another form.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return pairs(lines_of(file.read(_FILE_BYTES)), path)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise ApptainerError(text=f"Unable to read build arguments from {path}: {reason}") from None


def fill(text: str, given: Mapping[str, str], *, file: str) -> tuple[str, list[str]]:
    """Return a definition file with its variables replaced, and the names given but not used.

    A stage's `%arguments` have the values that are not given; one may use those before it.

    Raises:
        Undefined: a variable has no value.
        ApptainerError: the text is no definition file.
    """
    import re

    if not re.search(_PATTERN, text):
        return text, sorted(given)
    used: set[str] = set()
    done = []
    for part in _by_stage(text):
        values = {**_defaults(part, given, used, file), **given}
        done.append(_replace(part, values, used, file))
    return "".join(done), sorted(set(given) - used)


def _by_stage(text: str) -> list[str]:
    import itertools
    import re

    starts = [one.start() for one in re.finditer(r"(?im)^[ \t]*bootstrap[ \t]*:", text)][1:]
    edges = [0, *starts, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(edges)]


def _defaults(part: str, given: Mapping[str, str], used: set[str], file: str) -> dict[str, str]:
    values: dict[str, str] = {}
    inside = False
    for line in lines_of(part):
        word = line.split(None, 1)[0].lower() if line.strip() else ""
        if word.startswith("%"):
            inside = word == "%arguments"
        elif inside:
            known = {**values, **given}
            for name, value in pairs([line], file).items():
                values[name] = _replace(value, known, used, file)
    return values


def _replace(text: str, values: Mapping[str, str], used: set[str], file: str) -> str:
    import re

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name not in values:
            raise Undefined(file=file, name=name)
        used.add(name)
        return values[name]

    lines = text.split("\n")
    return "\n".join(
        line if line.lstrip().startswith("#") else re.sub(_PATTERN, value, line) for line in lines
    )
