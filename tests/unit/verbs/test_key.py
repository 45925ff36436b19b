"""What a hostile key server says."""

from __future__ import annotations

from apptainer_py.verbs import key


def test_numbers_that_are_none() -> None:
    index = "pub:AA:1:2048:\u00b2:" + "9" * 5000 + ":\nuid:name\npub\nuid\n:\npub:B:1:1:86400::\n"
    rows = key._found(index)
    assert [(row.created, row.expires) for row in rows[:2]] == [("", ""), ("", "")]
    assert rows[2].created.startswith("1970-01-02")
