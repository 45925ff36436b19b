"""`config check` and `config show`: the administrator's file, explained.

Nothing is printed here: the answer is a text for stdout and an exit status.
"""

from __future__ import annotations

from apptainer_py.base import build
from apptainer_py.base.record import Record
from apptainer_py.host.config_file import FileWrong, Problem, Reading, read
from apptainer_py.host.policy import (
    person,
    starter_obstacles,
    user_namespaces_allowed,
)
from apptainer_py.model.directives import (
    ADVISORY,
    REFUSES,
    Person,
    Surroundings,
    changed,
    decisions,
    directives,
    unenforceable,
    value_text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.directives import Decision, Directive

REFUSED = 255


class Outcome(Record):
    """What a command says on stdout, and its exit status."""

    text: str
    exit_code: int = 0


class _Findings(Record):
    """What `config check` has found: `notes` are directives that are not enforced, and values."""

    name: str
    problems: tuple[Problem, ...]
    obstacles: tuple[str, ...]
    notes: tuple[tuple[Directive, str], ...]
    warnings: tuple[str, ...]


def config_check(*, file: str | None = None, as_json: bool = False) -> Outcome:
    """Say what is wrong with the file, what is not enforced, and why the setuid flow is refused.

    The status is 255 when the file is wrong or refuses the setuid flow, else 0. A file that is
    named is judged by its text alone; the installed one with its owners and the starter, too.
    """
    name = file or build.CONFIG_FILE
    problems, reading = _judged(name, installed=file is None)
    obstacles = _obstacles(reading, problems, installed=file is None)
    absent = file is None and not build.SETUID
    notes = _not_enforced(reading) if reading else ()
    warnings = _warnings(reading) if reading else ()
    failed = bool(problems) or reading is None or (bool(obstacles) and not absent)
    found = _Findings(
        name=name, problems=problems, obstacles=obstacles, notes=notes, warnings=warnings
    )
    text = _check_json(found) if as_json else _check_text(found)
    return Outcome(text=text, exit_code=REFUSED if failed else 0)


def _judged(name: str, *, installed: bool) -> tuple[tuple[Problem, ...], Reading | None]:
    try:
        reading = read(name, require_root_owned=installed)
        outside = tuple(problem for problem in reading.problems if problem.line == 0)
        if installed and outside:
            # What it says is worth knowing even where nobody should believe it.
            reading = read(name, require_root_owned=False)
            inside = tuple(problem for problem in reading.problems if problem not in outside)
            return outside + inside, reading
        return reading.problems, reading
    except FileWrong:
        return (Problem(file=name, line=0, key=name, text="does not exist", nearest=""),), None


def _obstacles(
    reading: Reading | None, problems: tuple[Problem, ...], *, installed: bool
) -> tuple[str, ...]:
    found = []
    if problems:
        found.append(f"the file is wrong: {problems[0]}")
    if reading and not reading.config.allow_setuid:
        found.append(f"{reading.place('allow setuid')}: allow setuid = no")
    return (*found, *(starter_obstacles() if installed else ()))


def _not_enforced(reading: Reading) -> tuple[tuple[Directive, str], ...]:
    return tuple(
        (row, value_text(reading.value(row))) for row in changed(reading.config, ADVISORY, REFUSES)
    )


def _warnings(reading: Reading) -> tuple[str, ...]:
    found = []
    keys = unenforceable(reading.config)
    if keys and user_namespaces_allowed():
        found.append(
            f"{', '.join(keys)}: users escape this while the kernel lets them make user namespaces"
        )
    return (*found, *_unknown_names(reading))


def _unknown_names(reading: Reading) -> tuple[str, ...]:
    import grp
    import pwd

    lookups = {"users": pwd.getpwnam, "owners": pwd.getpwnam, "groups": grp.getgrnam}
    found = []
    for row in directives():
        lookup = lookups.get(row.key.rsplit(" ", 1)[-1])
        if not row.is_list or lookup is None:
            continue
        for name in reading.value(row):
            try:
                if not name.isdecimal():
                    lookup(name)
            except (KeyError, ValueError):
                found.append(f"{reading.place(row.key)}: {row.key}: nobody here is called {name}")
    return tuple(found)


def _check_text(found: _Findings) -> str:
    lines = [f"wrong: {problem}" for problem in found.problems]
    lines += [
        f"not enforced: {row.key} = {value}: {_consequence(row)}" for row, value in found.notes
    ]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"setuid flow refused: {text}" for text in found.obstacles]
    if not found.obstacles:
        lines.append(f"{found.name}: good; the setuid flow is allowed")
    return "".join(f"{_shown(line)}\n" for line in lines)


def _consequence(row: Directive) -> str:
    return f"{row.sentence} (not supported yet)" if row.enforcement == REFUSES else row.sentence


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _check_json(found: _Findings) -> str:
    return _json(
        {
            "file": found.name,
            "problems": [problem.asdict() for problem in found.problems],
            "setuid": {"allowed": not found.obstacles, "reasons": list(found.obstacles)},
            "notEnforced": [
                {
                    "key": row.key,
                    "value": value,
                    "enforcement": row.enforcement,
                    "text": _consequence(row),
                }
                for row, value in found.notes
            ],
            "warnings": list(found.warnings),
        }
    )


def _json(data: object) -> str:
    import json

    return json.dumps(data, indent=2) + "\n"


def config_show(
    *,
    file: str | None = None,
    effective: bool = False,
    user: str | None = None,
    as_json: bool = False,
) -> Outcome:
    """Show each directive with its value and origin or, with `effective`, what they decide.

    Raises:
        FileWrong: there is no file.
        NoSuchUser: `user` is neither the name nor the number of one.
    """
    name = file or build.CONFIG_FILE
    problems, reading = _judged(name, installed=file is None)
    if reading is None:
        raise FileWrong(file=name, reason=problems[0])
    if effective:
        return _show_effective(reading, problems, user, installed=file is None, as_json=as_json)
    rows = [
        (row.key, value_text(reading.value(row)), reading.place(row.key)) for row in directives()
    ]
    if as_json:
        shown = {key: {"value": value, "from": place} for key, value, place in rows}
        return Outcome(text=_json({"file": name, "directives": shown}))
    lines = [f"{f'{key} = {value}'.rstrip():<56}  # {place}" for key, value, place in rows]
    return Outcome(text="".join(f"{_shown(line)}\n" for line in lines))


def _show_effective(
    reading: Reading,
    problems: tuple[Problem, ...],
    user: str | None,
    *,
    installed: bool,
    as_json: bool,
) -> Outcome:
    who = person(user)
    found = [f"the file is wrong: {problems[0]}"] if problems else []
    around = Surroundings(
        setuid_obstacles=(*found, *(starter_obstacles() if installed else ())),
        user_namespaces=user_namespaces_allowed(),
    )
    made = decisions(reading.config, who, around)
    warnings = _warnings(reading)
    if as_json:
        return Outcome(text=_effective_json(reading, who, made, warnings))
    lines = [f"{who.name} (uid {who.uid})"]
    for one in made:
        origin = f"{one.rule}, {reading.place(one.rule)}"
        lines.append(
            f"  {one.subject:<22} {one.answer:<28} # "
            f"{origin if one.rule in reading.lines else one.rule}"
        )
    lines += [f"warning: {text}" for text in warnings]
    return Outcome(text="".join(f"{_shown(line)}\n" for line in lines))


def _effective_json(
    reading: Reading, who: Person, made: tuple[Decision, ...], warnings: tuple[str, ...]
) -> str:
    return _json(
        {
            "file": reading.file,
            "user": who.name,
            "uid": who.uid,
            "decisions": [{**one.asdict(), "from": reading.place(one.rule)} for one in made],
            "warnings": list(warnings),
        }
    )
