"""Scripts, labels, environment and definition file of an image, where Apptainer keeps them."""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.builds.definition import lines_of
from apptainer_py.builds.skeleton import META, make_folder, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from apptainer_py.builds.definition import Section, Stage

POST_LABELS = ".build.labels"
HISTORY = f"{META}/bootstrap_history"
_HELP = "/.singularity.d/runscript.help"
_HELP_LABELS = (
    "org.label-schema.usage",
    "org.label-schema.usage.apptainer.runscript.help",
)


def with_interpreter(section: Section) -> str:
    """Return a script: its own first line if it has one, else the one asked for by `-c`."""
    body = section.text
    if body.lstrip().startswith("#!"):
        first, _, rest = body.lstrip().partition("\n")
        return f"{first}\n\n{rest}\n"
    words = section.words
    interpreter = " ".join(words[words.index("-c") + 1 :]) if "-c" in words else "/bin/sh"
    return f"#!{interpreter}\n\n{body}\n"


def says_something(section: Section | None) -> bool:
    """Return whether a section is there and not empty."""
    return section is not None and bool(section.text.strip())


def environment(root: str, stage: Stage) -> None:
    """Add `%environment` to what the image had."""
    section = stage.joined("environment")
    if section is None or not says_something(section):
        return
    log.info("Adding environment to container")
    path = f"{META}/env/90-environment.sh"
    write(root, path, f"{read(root, path)}\n{section.text}\n", 0o755)


_SCRIPTS = (
    ("startscript", "startscript", "Adding startscript", 0o755),
    ("runscript", "runscript", "Adding runscript", 0o755),
    ("test", "test", "Adding testscript", 0o755),
)


def scripts(root: str, stage: Stage, wanted: Container[str]) -> None:
    """Put those of the run, start and test scripts that are wanted into the image."""
    for name, file, words, mode in _SCRIPTS:
        section = stage.joined(name)
        if section is None or not says_something(section) or name not in wanted:
            continue
        log.info(words)
        write(root, f"{META}/{file}", with_interpreter(section), mode)


def help_text(root: str, stage: Stage, *, force: bool) -> None:
    """Put the help text into the image; that of the base stays without `force`."""
    section, path = stage.joined("help"), f"{META}/runscript.help"
    if section is None or not says_something(section):
        return
    if not force and os.path.lexists(f"{root}/{path}"):
        log.warning("Help message already exists and force option is false, not overwriting")
        return
    log.info("Adding help info")
    write(root, path, section.text + "\n", 0o644)


def deffile(root: str, text: str) -> None:
    """Keep the definition file; the one that the base was made from becomes part of history."""
    path = f"{META}/Singularity"
    had = read(root, path)
    if had:
        make_folder(root, HISTORY)
        number = len(os.listdir(f"{root}/{HISTORY}"))
        write(root, f"{HISTORY}/Apptainer{number}", had, 0o644)
    write(root, path, text, 0o644)


def labels(
    root: str,
    stage: Stage,
    *,
    known: Mapping[str, str],
    force: bool,
    more: Mapping[str, str],
    with_own: bool,
) -> None:
    """Write labels.json: the base's, what the build itself knows, %post's, the section's."""
    import json

    path = f"{META}/labels.json"
    had = _labels(root, path)
    for key in [key for key in had if key.startswith("org.label-schema.usage.singularity.deffile")]:
        del had[key]
    _add(had, more, force=force)
    had.update(known)
    _add(had, _of_post(root), force=force)
    section = stage.joined("labels")
    if with_own and section is not None and says_something(section):
        log.info("Adding labels")
        _add(had, _of_section(section), force=force)
    if os.path.isfile(f"{root}/{META}/runscript.help"):
        had.update(dict.fromkeys(_HELP_LABELS, _HELP))
    text = json.dumps(dict(sorted(had.items())), indent="\t", ensure_ascii=False)
    write(root, path, valid(text), 0o644)


def valid(text: str) -> str:
    """Return a text with U+FFFD for what has no UTF-8 form: JSON knows no other encoding."""
    return "".join("\ufffd" if "\ud800" <= one <= "\udfff" else one for one in text)


def _labels(root: str, path: str) -> dict[str, str]:
    import json

    try:
        found = json.loads(read(root, path) or "{}")
    except (ValueError, RecursionError):
        log.warning("the labels of the base cannot be read, and are left out")
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _add(had: dict[str, str], new: Mapping[str, str], *, force: bool) -> None:
    for key, value in new.items():
        if key in had and had[key] != value and not force:
            log.warning(f"Label: {key} already exists and force option is false, not overwriting")
            continue
        had[key] = value


def _of_section(section: Section) -> dict[str, str]:
    return _pairs(line.text for line in section.lines)


def _of_post(root: str) -> dict[str, str]:
    text = read(root, POST_LABELS)
    if os.path.lexists(f"{root}/{POST_LABELS}"):
        os.unlink(f"{root}/{POST_LABELS}")
    return _pairs(lines_of(text))


def _pairs(lines: object) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:  # type: ignore[attr-defined]
        text = line.strip()
        if text and not text.startswith("#"):
            key, *value = text.split(None, 1)
            found[key] = value[0] if value else ""
    return found


def known_labels(stage: Stage, now_s: int, arch: str) -> dict[str, str]:
    """Return what a build knows by itself of an image for an architecture."""
    known = {
        "org.label-schema.schema-version": "1.0",
        "org.label-schema.build-arch": arch,
        "org.label-schema.build-date": build_date(now_s),
        "org.label-schema.usage.apptainer.version": build.VERSION,
    }
    for key, value in stage.header.items():
        known[f"org.label-schema.usage.singularity.deffile.{key}"] = value
    return known


def build_date(now_s: int) -> str:
    """Return a time in the form of Apptainer's label: `Saturday_21_November_2026_19:2:14_UTC`."""
    import time

    at = time.gmtime(now_s)
    day = time.strftime("%A_", at) + f"{at.tm_mday}" + time.strftime("_%B_%Y", at)
    return f"{day}_{at.tm_hour}:{at.tm_min}:{at.tm_sec}_UTC"
