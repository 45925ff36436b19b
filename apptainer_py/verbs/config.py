"""`config global`: one directive of the administrator's file, asked for or changed."""

from __future__ import annotations

import os

from apptainer_py.base import build
from apptainer_py.base.errors import ConfigError
from apptainer_py.host.config_file import FileWrong, Problem, Reading, read, read_text, replace
from apptainer_py.model.directives import directives, value_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.directives import Directive

TEMPLATE = f"{build.LIBDIR}/apptainer-py.conf"


class NeedsRoot(ConfigError):
    message = (
        '"{program} config global" command requires root privileges or an unprivileged installation'
    )


class NotADirective(ConfigError):
    message = '"{directive}" is not a valid configuration directive'
    hint = "did you mean `{nearest}`?"

    def advice(self) -> str | None:
        """Return the directive that was probably meant, if there is one."""
        return super().advice() if self.facts["nearest"] else None


class ValueMissing(ConfigError):
    message = 'you must specify a value for directive "{directive}"'


class ValueInvalid(ConfigError):
    message = "configuration directive invalid: {reason}"


class ValueNotFound(ConfigError):
    message = "value '{value}' not found for directive \"{directive}\""


def config_global(
    *,
    operation: str,
    directive: str,
    value: str = "",
    dry_run: bool = False,
    file: str = build.CONFIG_FILE,
    template: str = TEMPLATE,
) -> str:
    """Get, set, unset or reset one directive, as `apptainer config global` does.

    The file is written anew from the template: values stay, comments are the template's.

    Raises:
        ConfigError: the user, the directive, the value or the present file is not good for it.
    """
    if os.geteuid() != 0 and build.SETUID:
        raise NeedsRoot(program="apptainer-py")
    row = _row(directive)
    present = read(file, require_root_owned=False)
    if present.problems:
        raise FileWrong(file=file, reason=present.problems[0])
    given = _given(present)
    if operation == "get":
        values = given.get(row.key)
        return f"{','.join(values)}\n" if values else ""
    _CHANGES[operation](given, row, value)
    text = render(_template(template), given)
    _check_written(file, text, given, row, value)
    if dry_run:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    replace(file, text)
    return ""


def confgen(new: str, old: str = "", *, template: str = TEMPLATE) -> None:
    """Write a fresh configuration file, with the values of an old one if there is one.

    Raises:
        ConfigError: the old file is not good for it, or the new one cannot be written.
    """
    given: dict[str, tuple[str, ...]] = {}
    text = _template(template)
    if old:
        present = read(old, require_root_owned=False)
        if present.problems:
            raise FileWrong(file=old, reason=present.problems[0])
        given = _given(present)
        text = render(text, given)
    try:
        with open(new, "w", encoding="utf-8", errors="surrogateescape") as target:
            target.write(text)
    except OSError as error:
        reason = f"cannot be written: {(error.strerror or '').lower()}"
        raise ConfigError(file=new, reason=reason) from None


def _template(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as source:
            return source.read()
    except OSError as error:
        raise ConfigError(file=name, reason=f"cannot be read: {error.strerror}") from None


def _row(key: str) -> Directive:
    for row in directives():
        if row.key == key:
            return row
    from difflib import get_close_matches

    nearest = get_close_matches(key.lower(), [row.key for row in directives()], n=1)
    raise NotADirective(directive=key, nearest=nearest[0] if nearest else "")


def _given(reading: Reading) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for row in directives():
        value = reading.value(row)
        if reading.lines[row.key] and value != "" and value != ():
            found[row.key] = value if row.is_list else (value_text(value),)
    return found


def _items(value: str) -> tuple[str, ...]:
    items = (item.strip() for item in value.split(","))
    return tuple(dict.fromkeys(item for item in items if item))


def _set(given: dict[str, tuple[str, ...]], row: Directive, value: str) -> None:
    if not value.strip() or (row.is_list and not _items(value)):
        raise ValueMissing(directive=row.key)
    # A line break would begin a line of its own in the file, with a directive of its own.
    if any(c < " " or c == "\x7f" for c in value):
        raise ValueInvalid(reason=f'the value for directive "{row.key}" holds a control character')
    if not row.is_list:
        given[row.key] = (value.strip(),)
        return
    old = given.get(row.key, ())
    given[row.key] = tuple(item for item in _items(value) if item not in old) + old


def _unset(given: dict[str, tuple[str, ...]], row: Directive, value: str) -> None:
    unwanted = _items(value) if row.is_list else (value.strip(),)
    old = given.get(row.key, ())
    left = tuple(item for item in old if item not in unwanted)
    if left == old:
        raise ValueNotFound(value=value, directive=row.key)
    _keep(given, row.key, left)


def _reset(given: dict[str, tuple[str, ...]], row: Directive, _value: str) -> None:
    _keep(given, row.key, ())


def _keep(given: dict[str, tuple[str, ...]], key: str, values: tuple[str, ...]) -> None:
    given.pop(key, None)
    if values:
        given[key] = values


_CHANGES = {"set": _set, "unset": _unset, "reset": _reset}


def render(template: str, given: dict[str, tuple[str, ...]]) -> str:
    """Return the template with these values in place of its own.

    A directive's place is its first line `key = …` or `# key = …`. A directive that is not given
    keeps the template's line, but a list that is not given is empty.
    """
    keys = {row.key: row for row in directives()}
    placed: set[str] = set()
    lines: list[str] = []
    for line in template.splitlines():
        key = line.removeprefix("# ").partition(" =")[0]
        if " =" not in line or key not in keys:
            lines.append(line)
            continue
        if key not in placed:
            lines += _lines_of(keys[key], given.get(key), line)
        placed.add(key)
    for key in given:
        if key not in placed:
            lines += _lines_of(keys[key], given[key], "")
    return "\n".join([*lines, ""])


def _lines_of(row: Directive, values: tuple[str, ...] | None, line: str) -> list[str]:
    if values is None:
        return [f"# {row.key} ="] if row.is_list else [line]
    return [f"{row.key} = {value}" for value in values]


def _check_written(
    file: str, text: str, given: dict[str, tuple[str, ...]], row: Directive, value: str
) -> None:
    written = read_text(file, text)
    for problem in written.problems:
        if problem.key == row.key:
            raise ValueInvalid(reason=_invalid(row, value.strip(), problem))
        raise FileWrong(file=file, reason=problem)
    values = _given(written).get(row.key, ())
    if row.is_list and values != given.get(row.key, ()):
        raise ValueInvalid(reason=f'directive "{row.key}" would not read back as it was set')


def _invalid(row: Directive, value: str, problem: Problem) -> str:
    # The words of Apptainer, which quotes the directive in two ways.
    if row.kind == "BOOL":
        return f'value authorized for directive "{row.key}" are [yes no]'
    if row.kind == "ENUM":
        return f"value authorized for directive '{row.key}' are [{' '.join(row.allowed)}]"
    if row.kind == "UINT":
        digits = value.isascii() and value.isdecimal()
        reason = "value out of range" if digits else "invalid syntax"
        return f'strconv.ParseUint: parsing "{value}": {reason}'
    return f'directive "{row.key}": {problem.text}'
