"""Documents that can be compared with what they are about."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest

FOLDERS = "clients|e2e|fuzz|house|oci|parity|security|starter|typing|unit"
TEST_NAME = re.compile(rf"`(?:tests/)?((?:{FOLDERS})/[\w/]+\.py)(?:::(\w+))?`")
TREE_PATH = re.compile(r"`((?:docs|starter|apptainer_py|tests|tools|benchmarks|etc)/[\w./-]*)`")
LONGEST = {"README.md": 120, "docs/architecture.md": 330}


@pytest.fixture(scope="module")
def documents(tracked_files):
    found = {path: path.read_text() for path in tracked_files if path.suffix == ".md"}
    assert len(found) >= 7
    return found


def test_every_test_that_is_named_exists(documents, repository):
    named = {match for text in documents.values() for match in TEST_NAME.findall(text)}
    assert len(named) > 10
    wrong = []
    for file, name in sorted(named):
        path = repository / "tests" / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text()):
            wrong.append(f"{file}::{name}")
    assert not wrong


def test_every_hole_of_a_relative_names_its_test(repository):
    """Or says that there is none, and why."""
    rows = [
        line.strip("|").split(" | ")
        for line in (repository / "docs/cve.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| where")
    ]
    assert len(rows) > 40
    assert not [row for row in rows if len(row) != 3]
    without = [row[0].strip() for row in rows if not TEST_NAME.search(row[2])]
    assert not [row for row in rows if row[0].strip() in without and "none;" not in row[2]]
    assert len(without) <= 1


def test_every_path_that_is_named_exists(documents, repository):
    wrong = [
        f"{document.name}: {path}"
        for document, text in documents.items()
        for path in TREE_PATH.findall(text)
        if not (repository / path).exists()
    ]
    assert not wrong


def test_the_page_of_directives_is_that_of_the_table(repository, tmp_path):
    made = tmp_path / "configuration.md"
    argv = ["/usr/bin/python3", "-B", repository / "tools/configuration_page.py", made]
    subprocess.run(argv, check=True)
    assert made.read_text() == (repository / "docs/configuration.md").read_text()


@pytest.mark.parametrize("name", LONGEST)
def test_length(name, repository):
    assert len((repository / name).read_text().splitlines()) <= LONGEST[name]


def test_operations_are_all_documented(repository):
    table = (repository / "starter/protocol.def").read_text()
    rows = re.findall(r"^OP\((\w+), \d+, (\w+),", table, re.MULTILINE)
    assert len(rows) > 10
    # Those of init run with the caller's own rights, and are no matter of privilege.
    privileged = [name for name, server in rows if server != "INIT"]
    for page, names in (
        ("docs/architecture.md", [name for name, _ in rows]),
        ("docs/security.md", privileged),
    ):
        text = (repository / page).read_text()
        assert not [name for name in names if not re.search(rf"\b{name}\b", text)], page


def flow_table(repository):
    argv = ["/usr/bin/python3", "-I", "-B", "-c", "import sys; sys.path.insert(0, sys.argv[1]);"]
    argv[-1] += "import flow_table; print(flow_table.replaced(open(sys.argv[2]).read()), end='')"
    argv += [repository / "tools", repository / "README.md"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_what_works_in_which_flow_is_what_tests_prove(repository):
    """Each row has a line that is run in each flow, or a test; the page has these rows alone."""
    rows = tomllib.loads((repository / "tests/flows.toml").read_text())["row"]
    assert len(rows) >= 12
    assert not [row["what"] for row in rows if not row.get("probes") and not row.get("tests")]
    wrong = []
    for name in (name for row in rows for name in row.get("tests", ())):
        file, _, function = name.partition("::")
        path = repository / "tests" / file
        if not path.exists() or f"def {function}(" not in path.read_text():
            wrong.append(name)
    assert not wrong
    text = (repository / "README.md").read_text()
    assert text == flow_table(repository), (
        "rows go into tests/flows.toml; then run: python3 tools/flow_table.py README.md"
    )
