"""At the end of a session that has injected faults: a table of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.fault_table import Fault, FaultTable

_TABLE = FaultTable()


@pytest.fixture(scope="session")
def inject() -> Callable[..., Fault]:
    """Note faults of a kind that a test injects; what comes back is told when they are survived."""
    return _TABLE.inject


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, if there is anything in it."""
    if _TABLE.faults:
        terminalreporter.section("faults")
        for line in _TABLE.lines():
            terminalreporter.write_line(line)
