"""exec --cgroup."""

from __future__ import annotations

import pytest

from apptainer_py.engines.oci.subgroups import parse_subgroups, subgroup_directories
from apptainer_py.runtime.containers import ContainerError

OWN = {"memory": "/m/c", "pids": "/p/c"}


def test_paths() -> None:
    assert parse_subgroups(()) == {}
    assert parse_subgroups(("a",)) == {"": "a"}
    assert parse_subgroups(("cpu,pids:a", "memory:b")) == {"cpu": "a", "pids": "a", "memory": "b"}
    assert subgroup_directories(OWN, {"": "a"}) == {"memory": "/m/c/a", "pids": "/p/c/a"}
    assert subgroup_directories(OWN, {"pids": "a"}) == {"memory": "/m/c", "pids": "/p/c/a"}


@pytest.mark.parametrize("given", [("a", "b"), (":a",), ("pids:a", "pids:b")])
def test_what_is_wrong(given: tuple[str, ...]) -> None:
    with pytest.raises(ContainerError, match="invalid --cgroup argument"):
        parse_subgroups(given)


def test_no_way_out() -> None:
    with pytest.raises(ContainerError, match="is not a sub cgroup path"):
        subgroup_directories(OWN, {"": "../d"})
    with pytest.raises(ContainerError, match="unknown controller foo"):
        subgroup_directories(OWN, {"foo": "a"})
