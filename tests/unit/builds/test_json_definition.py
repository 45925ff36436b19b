"""Definitions as JSON: read as the definition file with the same words."""

from __future__ import annotations

import json

import pytest

from apptainer_py.builds import definition
from apptainer_py.builds.definition import DefinitionWrong
from apptainer_py.builds.json_definition import as_text

HEADER = {"bootstrap": "localimage", "from": "base.sif"}


def script(text: str, args: str = "") -> dict[str, str]:
    return {"args": args, "script": text}


def parsed(*stages: object) -> tuple[definition.Stage, ...]:
    text = json.dumps(list(stages) if len(stages) > 1 else stages[0])
    return definition.parse(as_text(text, file="x.json"), file="x.json")


def test_every_field_becomes_its_section() -> None:
    scripts = {name: script(f"echo {name}") for name in ("pre", "setup", "post")}
    image = {"help": script("words"), "environment": script("export A=1"), "test": script("true")}
    image |= {"runScript": script("echo run", "-c /bin/sh -e"), "startScript": script("echo st")}
    files = [
        {"args": "", "files": [{"source": "two words", "destination": "/x"}]},
        {"args": "from one", "files": [{"source": "/a", "destination": ""}]},
    ]
    (stage,) = parsed(
        {
            "header": {"From": "base.sif", "Bootstrap": "localimage"},
            "imageData": {"labels": {"A": "b c"}, "imageScripts": image, "metadata": None},
            "buildData": {"files": files, "buildScripts": scripts},
            "customData": {"apprun b": "echo b", "appinstall a": "touch x"},
            "appOrder": ["a", "b"],
            "raw": "eA==",
        }
    )
    assert stage.header == HEADER
    found = {one.name: one for one in stage.sections}
    assert set(found) == {
        *("pre", "setup", "post", "help", "environment", "test", "runscript", "startscript"),
        *("labels", "files", "apprun", "appinstall"),
    }
    assert found["runscript"].words == ("-c", "/bin/sh", "-e")
    assert found["labels"].text.strip() == "A b c"
    assert [(one.words, one.text.strip()) for one in stage.all("files")] == [
        ((), '"two words" /x'),
        (("from", "one"), "/a"),
    ]
    assert stage.apps() == ["a", "b"]


def test_an_array_has_several_stages() -> None:
    stages = parsed({"header": {**HEADER, "stage": "one"}}, {"header": HEADER})
    assert [stage.name for stage in stages] == ["one", ""]


def in_post(text: str) -> dict[str, object]:
    return {"header": HEADER, "buildData": {"buildScripts": {"post": script(text)}}}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "no stages found"),
        (3, "a stage is no object"),
        ({"header": HEADER, "Header": {}}, "the field 'Header' is unknown"),
        ({"header": {**HEADER, "from": "a\n%post"}}, "from has more than one line"),
        ({"header": {**HEADER, "form": "a"}}, "invalid header keyword found: form"),
        ({"header": {**HEADER, "from": "a # b"}}, "its header has what"),
        ({"header": HEADER, "appOrder": {}}, "appOrder is no array"),
        ({"header": HEADER, "customData": {"post x": "true"}}, "no section of an application"),
        ({"header": HEADER, "imageData": {"labels": {"a": 1}}}, "a is no string"),
        (in_post("printf a\n %d"), "script has the line"),
        (in_post("x\nBootstrap: scratch"), "which starts something else"),
    ],
)
def test_what_is_no_definition_is_refused(value: object, says: str) -> None:
    with pytest.raises(DefinitionWrong, match=r"x\.json") as caught:
        parsed(value)
    assert says in str(caught.value)


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(DefinitionWrong, match="it is no JSON"):
        as_text("Bootstrap: scratch\n", file="x")
