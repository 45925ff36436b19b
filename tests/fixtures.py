"""Fixtures that a module makes for itself, with a configuration of its own choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import own_install
from tests.own_install import Installation


def own(text: str | None = "", *, needs: tuple[str, ...] = ()) -> Any:
    """Make a fixture `own` for all tests of a module: the tests' own installation.

    Its configuration is these lines alone, or the shipped one (None); it has the fixtures `needs`.
    """

    @pytest.fixture(scope="module", name="own")
    def made(request: pytest.FixtureRequest, require_root: None) -> Iterator[Installation]:
        for name in needs:
            request.getfixturevalue(name)
        found = own_install.installation()
        found.restore()
        if text is not None:
            found.configure(text)
        yield found
        found.restore()

    return made
