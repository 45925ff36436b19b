"""The parity tests' own last line, and whose program is compared."""

from __future__ import annotations

import pytest

from tests.parity import tally


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how the two programs compare."""
    if tally.count:
        terminalreporter.write_line(f"parity: {tally.line()}")
