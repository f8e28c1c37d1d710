"""What the tests of faults share; at the end of the session `tests/conftest.py` prints a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.fault_table import TABLE, Fault


@pytest.fixture(scope="session")
def inject() -> Callable[..., Fault]:
    """Note faults of a kind that a test injects; what comes back is told when they are survived."""
    return TABLE.inject
