"""What annotations ask of a container's unit."""

from __future__ import annotations

import pytest

from apptainer_py.engines.oci.keys import ConfigWrong
from apptainer_py.engines.oci.units import unit_properties

PREFIX = "org.systemd.property."


def test_properties():
    notes = {
        f"{PREFIX}TimeoutStopUSec": "uint64 1500000",
        f"{PREFIX}TimeoutStartSec": "2",
        f"{PREFIX}RuntimeMaxSec": "1.5",
        f"{PREFIX}CollectMode": "'inactive-or-failed'",
        "other": "x",
    }
    assert unit_properties(notes) == (
        ("CollectMode", ("s", "inactive-or-failed")),
        ("RuntimeMaxUSec", ("t", 1_500_000)),
        ("TimeoutStartUSec", ("t", 2_000_000)),
        ("TimeoutStopUSec", ("t", 1_500_000)),
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ab", "1", "name incorrect: name too short: ab"),
        ("Bad.Name", "1", "name incorrect: name contains non-alphabetic character: Bad.Name"),
        ("Description", "x y", "value parse error: unexpected x"),
        ("TimeoutStopSec", "'now'", "value parse error: not a number"),
    ],
)
def test_what_is_none(name, text, said):
    with pytest.raises(ConfigWrong, match=said.replace(".", r"\.")):
        unit_properties({f"{PREFIX}{name}": text})
