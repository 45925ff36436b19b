"""Applications in an image (SCIF): `%appinstall`, `%appenv`, `%apprun` and the others."""

from __future__ import annotations

from apptainer_py.builds.metadata import says_something, valid, with_interpreter
from apptainer_py.builds.skeleton import META, make_folder, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.builds.definition import Section, Stage

_FOLDERS = (
    "scif/apps/{app}/bin", "scif/apps/{app}/lib", "scif/apps/{app}/scif/env",
    "scif/data/{app}/input", "scif/data/{app}/output",
)  # fmt: skip
_SCRIPTS = (("apprun", "runscript"), ("appstart", "startscript"), ("apptest", "test"))

_GLOBALS = """\
## App Global Exports For: {app}

SCIF_APPDATA_{app}=/scif/data/{app}
SCIF_APPMETA_{app}=/scif/apps/{app}/scif
SCIF_APPROOT_{app}=/scif/apps/{app}
SCIF_APPBIN_{app}=/scif/apps/{app}/bin
SCIF_APPLIB_{app}=/scif/apps/{app}/lib

export SCIF_APPDATA_{app} SCIF_APPMETA_{app} SCIF_APPROOT_{app} SCIF_APPBIN_{app} SCIF_APPLIB_{app}
"""
_BASE = """\
#!/bin/sh

SCIF_APPNAME={app}
SCIF_APPROOT="/scif/apps/{app}"
SCIF_APPMETA="/scif/apps/{app}/scif"
SCIF_DATA="/scif/data"
SCIF_APPDATA="/scif/data/{app}"
SCIF_APPINPUT="/scif/data/{app}/input"
SCIF_APPOUTPUT="/scif/data/{app}/output"
export SCIF_APPDATA SCIF_APPNAME SCIF_APPROOT SCIF_APPMETA SCIF_APPINPUT SCIF_APPOUTPUT SCIF_DATA
"""
_SET = (
    ("appenv", "SCIF_APPENV", "scif/env/90-environment.sh"),
    ("applabels", "SCIF_APPLABELS", "scif/labels.json"),
    ("apprun", "SCIF_APPRUN", "scif/runscript"),
    ("appstart", "SCIF_APPSTART", "scif/startscript"),
)


def _section(stage: Stage, name: str, app: str) -> Section | None:
    from apptainer_py.builds.definition import Section

    found = [one for one in stage.all(name) if one.app == app]
    if not found:
        return None
    lines = tuple(line for one in found for line in one.lines)
    return Section(name=name, words=found[-1].words, lines=lines)


def make(root: str, stage: Stage) -> None:
    """Lay out the applications of a stage.

    Raises:
        OSError: a file cannot be written.
    """
    everywhere = []
    for app in stage.apps():
        for folder in _FOLDERS:
            make_folder(root, folder.format(app=app))
        everywhere.append(_globals(stage, app))
        _files(root, f"scif/apps/{app}/scif", stage, app)
    if everywhere:
        write(root, f"{META}/env/94-appsbase.sh", "".join(everywhere), 0o755)


def _globals(stage: Stage, app: str) -> str:
    # Only a name that the shell takes can be part of a variable's.
    name = app.replace("-", "_").replace(".", "_").replace("+", "_")
    text = _GLOBALS.format(app=app) if name == app else ""
    for section, variable, file in _SET:
        if section == "applabels" or _section(stage, section, app) is not None:
            text += f'export {variable}_{name}="/scif/apps/{app}/{file}"\n'
    return text


def _files(root: str, folder: str, stage: Stage, app: str) -> None:
    import json

    write(root, f"{folder}/env/01-base.sh", _BASE.format(app=app), 0o755)
    environment = _section(stage, "appenv", app)
    if environment is not None:
        write(root, f"{folder}/env/90-environment.sh", environment.text, 0o755)
    labels = _section(stage, "applabels", app)
    found = {"SCIF_APP_NAME": app}
    for line in () if labels is None else labels.lines:
        words = line.text.split(None, 1)
        if words and not words[0].startswith("#"):
            found[words[0]] = words[1].strip() if len(words) > 1 else ""
    data = json.dumps(dict(sorted(found.items())), indent="\t", ensure_ascii=False)
    write(root, f"{folder}/labels.json", valid(data), 0o644)
    for name, file in _SCRIPTS:
        section = _section(stage, name, app)
        if section is not None and says_something(section):
            # The word after the section's name is the application.
            bare = section.replace(words=section.words[1:])
            write(root, f"{folder}/{file}", with_interpreter(bare), 0o755)
    text = _section(stage, "apphelp", app)
    if text is not None and says_something(text):
        write(root, f"{folder}/runscript.help", text.text, 0o644)


def install_script(stage: Stage) -> list[tuple[int, str]]:
    """Return what %post goes on with, for each application that is installed: line and text."""
    lines: list[tuple[int, str]] = []
    for app in stage.apps():
        section = _section(stage, "appinstall", app)
        if section is None:
            continue
        lines += [(0, "cd /"), (0, f". /scif/apps/{app}/scif/env/01-base.sh")]
        lines.append((0, f"cd /scif/apps/{app}"))
        lines += [(line.number, line.text) for line in section.lines]
        lines.append((0, "cd /"))
    return lines
