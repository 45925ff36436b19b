from __future__ import annotations

import pytest

from apptainer_py.model.duration import seconds_of


@pytest.mark.parametrize(
    ("word", "seconds"),
    [
        ("5s", 5),
        ("1m30s", 90),
        ("250ms", 0.25),
        ("-1s", -1),
        ("1.5h", 5400),
        ("0", 0),
        ("2us", 2e-6),
    ],
)
def test_durations(word: str, seconds: float) -> None:
    assert seconds_of(word) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("bad", 'time: invalid duration "bad"'),
        ("", 'time: invalid duration ""'),
        ("5", 'time: missing unit in duration "5"'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        ("1.2.3s", 'time: invalid duration "1.2.3s"'),
        (".s", 'time: invalid duration ".s"'),
        ("-", 'time: invalid duration "-"'),
    ],
)
def test_what_is_none_is_told_as_go_does(word: str, text: str) -> None:
    with pytest.raises(ValueError, match="time:") as raised:
        seconds_of(word)
    assert str(raised.value) == text
