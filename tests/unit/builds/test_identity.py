"""Who a build is, and which starter it takes."""

from __future__ import annotations

import os

import pytest

from apptainer_py.builds import identity
from apptainer_py.host import subid_file
from apptainer_py.model.oci_plan import IdMap


@pytest.mark.parametrize(("userns", "setuid"), [(False, True), (True, False)])
def test_with_userns_nothing_is_setuid(
    monkeypatch: pytest.MonkeyPatch, userns: bool, setuid: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(identity, "needs_setuid", lambda: True)
    ranges = IdMap(inside=1, outside=100000, count=subid_file.WANTED)
    monkeypatch.setattr(identity, "_ranges", lambda name, rights: (ranges, ranges))
    for ignore in (False, True):
        found = identity.choose(
            fakeroot=True, ignore_subuid=ignore, ignore_userns=False, userns=userns
        )
        assert found.setuid is setuid and found.owns_all is not ignore
